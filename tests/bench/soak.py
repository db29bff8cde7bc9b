"""Hours of load with cancels and kills, and whether memory, descriptors or tasks of the gateway grow.

Two fake engines and a gateway as plain processes; requests come at a share of the gateway's capacity, streams and
whole answers, some with deadlines that pass, some left by their clients. Engines are killed -9 now and then. Between
rounds of load everything ends, and then the gateway is looked at: what grows is told per hour, with its standard error.

    python tests/bench/soak.py --minutes 60
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import uvloop
from bench_failover import Engines
from plain_process import PlainProcess, gateway, wait_serving
from stamp import report

from cluster.v1 import inference_pb2, inference_pb2_grpc

_LOAD = 0.7
_STEP_MS = 5.0
_MAX_TOKENS = 64
_SETTLE_S = 3.0
_CALIBRATION_S = 5.0
# Endings that the load itself brings about.
_EXPECTED = ("OK", "left", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


@dataclass
class Soak:
    """Load on a gateway, and what it has led to so far."""

    stub: inference_pb2_grpc.InferenceServiceStub
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    statuses: Counter[str] = field(default_factory=Counter)

    async def request(self) -> None:
        """One of any kind."""
        rng = self.rng
        message = inference_pb2.GenerateRequest(
            prompt="def " + "x" * rng.randrange(400),
            sampling=inference_pb2.SamplingParams(
                max_tokens=rng.randrange(1, _MAX_TOKENS), seed=rng.getrandbits(32), n=1 + (rng.random() < 0.1)
            ),
            priority=rng.randrange(5),
        )
        if rng.random() < 0.2:
            message.request_id = f"soak-{rng.getrandbits(64)}"
        timeout = rng.uniform(0.01, 0.2) if rng.random() < 0.05 else 60.0
        leaves_after_s = rng.uniform(0.0, 0.3) if rng.random() < 0.1 else None
        try:
            if rng.random() < 0.3:
                await asyncio.wait_for(self.stub.Generate(message, timeout=timeout), leaves_after_s)
            else:
                await asyncio.wait_for(_read(self.stub.GenerateStream(message, timeout=timeout)), leaves_after_s)
            self.statuses["OK"] += 1
        except TimeoutError:
            self.statuses["left"] += 1
        except grpc.aio.AioRpcError as error:
            self.statuses[error.code().name] += 1

    async def load(self, rate: float, seconds: float) -> None:
        """So many requests a second for so long, and until the last has ended."""
        due_s = time.monotonic()
        end_s = due_s + seconds
        async with asyncio.TaskGroup() as group:
            while due_s < end_s:
                due_s += self.rng.expovariate(rate)
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                group.create_task(self.request())

    async def capacity(self, front: PlainProcess) -> float:
        """Requests a second that would keep the gateway busy all the time."""
        cpu_s, count = front.cpu_s(), sum(self.statuses.values())
        await self.load(50.0, _CALIBRATION_S)
        return (sum(self.statuses.values()) - count) / (front.cpu_s() - cpu_s)


async def _read(call: grpc.aio.UnaryStreamCall) -> None:
    async for _ in call:
        pass


async def soak(
    front: PlainProcess, running: Engines, *, seconds: float, round_s: float, warm_up: float
) -> dict[str, Any]:
    await wait_serving(front.address)
    async with grpc.aio.insecure_channel(front.address) as channel:
        load = Soak(inference_pb2_grpc.InferenceServiceStub(channel))
        rate = _LOAD * await load.capacity(front)
        samples: list[tuple[float, int, int, int]] = []
        begun_s = time.monotonic()
        num_kills = 0
        while (now_s := time.monotonic() - begun_s) < seconds:
            victim = num_kills % 2
            under_load = asyncio.create_task(load.load(rate, round_s))
            await asyncio.sleep(round_s / 2)
            running.kill(victim)
            num_kills += 1
            await asyncio.sleep(round_s / 4)
            await asyncio.to_thread(running.restart, victim)
            await under_load
            await asyncio.sleep(_SETTLE_S)
            sample = front.rss_bytes(), front.num_fds(), await asyncio.to_thread(front.num_tasks)
            samples.append((now_s, *sample))
    kept = [sample for sample in samples if sample[0] >= warm_up * seconds]
    return {
        "minutes": round(seconds / 60, 2),
        "requests_per_s": round(rate, 1),
        "kills": num_kills,
        "statuses": dict(load.statuses),
        "unexpected": {status: count for status, count in load.statuses.items() if status not in _EXPECTED},
        "samples": len(kept),
        "rss_mib": growth([(at_s, rss / 2**20) for at_s, rss, _, _ in kept]),
        "descriptors": growth([(at_s, fds) for at_s, _, fds, _ in kept]),
        "tasks": growth([(at_s, tasks) for at_s, _, _, tasks in kept]),
    }


def growth(samples: list[tuple[float, float]]) -> dict[str, float]:
    """The first and the last value, and the slope of the line through all of them with its standard error."""
    hours, values = np.array(samples).T
    hours = hours / 3600
    if len(values) < 3:
        return {"first": float(values[0]), "last": float(values[-1])}
    (slope, _), covariance = (
        np.polyfit(hours, values, 1, cov=True) if np.ptp(values) else ((0.0, 0.0), np.zeros((2, 2)))
    )
    return {
        "first": round(float(values[0]), 2),
        "last": round(float(values[-1]), 2),
        "per_hour": round(float(slope), 3),
        "standard_error": round(float(np.sqrt(covariance[0, 0])), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--round-s", type=float, default=20.0, help="of load, between two looks")
    parser.add_argument("--warm-up", type=float, default=0.25, help="share of the time that does not count")
    arguments = parser.parse_args()
    running = Engines(_STEP_MS)
    try:
        with gateway(running.processes) as front:
            figures = uvloop.run(
                soak(
                    front,
                    running,
                    seconds=60 * arguments.minutes,
                    round_s=arguments.round_s,
                    warm_up=arguments.warm_up,
                )
            )
    finally:
        running.terminate()
    report(figures)


if __name__ == "__main__":
    main()
