"""What the gateway costs and adds: a fake engine, the gateway and this client as plain processes; everything between
the engine's step and the client's socket is real.

Streams: tokens per second of the gateway's processor time, tokens per message, and how much later than the engine's
step a token is at the client. Unary: how much longer a call takes than the engine had it, at a share of the gateway's
capacity.

    python tests/bench/bench_gateway.py --streams 64 --tokens-per-s 10000,20000
    python tests/bench/bench_gateway.py --unary --secure
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvloop
from lean_client import LeanConnection
from plain_process import engines, gateway, wait_serving
from security import MutualTls
from stamp import report

from cluster.v1 import inference_pb2
from cluster.wire import SERVICE

_PROMPT = "def read_lines(path):"
_NUM_CONNECTIONS = 4
_STREAM = f"/{SERVICE}/GenerateStream"
_UNARY = f"/{SERVICE}/Generate"


@dataclass
class Journal:
    """What the engine noted, see fake_engine.Journal."""

    step_times_s: np.ndarray
    begun: dict[tuple[str, int], tuple[int, int, float]]

    @classmethod
    def read(cls, file: Path) -> Journal:
        with np.load(file) as saved:
            names = zip(saved["generation_ids"].tolist(), saved["candidates"].tolist(), strict=True)
            begun = zip(saved["steps"].tolist(), saved["positions"].tolist(), saved["received_s"].tolist(), strict=True)
            return cls(saved["step_times_s"], dict(zip(names, begun, strict=True)))

    def token_s(self, generation_id: str, candidate: int, position: int) -> float:
        """When the engine's step made this token."""
        step, first, _ = self.begun[generation_id, candidate]
        return self.step_times_s[step + position - first]


class Bench:
    """A gateway in front of an engine. A context manager.

    Args:
        secure: clients come with mutual TLS and a bearer token.
    """

    def __init__(self, *engine_options: object, secure: bool) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="bench-gateway-")
        directory = Path(self._directory.name)
        self._journal = directory / "journal.npz"
        self._tls = MutualTls(directory) if secure else None
        (self._engine,) = engines(["--journal", self._journal, *engine_options])
        config = {} if self._tls is None else self._tls.config
        self.gateway = gateway([self._engine], "--config", json.dumps(config))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.gateway.terminate()
        self._engine.terminate()
        self._directory.cleanup()

    async def connect(self) -> list[LeanConnection]:
        """Connections to the gateway, which serves."""
        address, tls = self.gateway.address, self._tls
        if tls is None:
            await wait_serving(address)
            return [await LeanConnection.open(address) for _ in range(_NUM_CONNECTIONS)]
        await wait_serving(address, credentials=tls.credentials)
        return [await LeanConnection.open(address, tls.metadata, tls.context) for _ in range(_NUM_CONNECTIONS)]

    def journal(self) -> Journal:
        """Of the engine, which ends."""
        self._engine.terminate()
        return Journal.read(self._journal)


@contextmanager
def steady() -> Iterator[None]:
    """No garbage collection of this process while it measures."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def request(max_tokens: int) -> bytes:
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return inference_pb2.GenerateRequest(prompt=_PROMPT, sampling=sampling).SerializeToString()


# -- streams --------------------------------------------------------------------------------------------------------


async def read_streams(
    bench: Bench, num_streams: int, seconds: float, warm_up_s: float
) -> tuple[list[tuple[float, bytes]], float, float]:
    """What arrived while it was measured, each with its time; the gateway's processor time and the time meanwhile."""
    arrived: list[tuple[float, bytes]] = []
    connections = await bench.connect()
    message = request(2**18)

    def take(now: float, raw: bytes) -> None:
        arrived.append((now, raw))

    with steady():
        calls = [connections[i % _NUM_CONNECTIONS].call(_STREAM, message, take) for i in range(num_streams)]
        await asyncio.sleep(warm_up_s)
        arrived.clear()
        begun_s, cpu_s = time.monotonic(), bench.gateway.cpu_s()
        await asyncio.sleep(seconds)
        took_s, cpu_s = time.monotonic() - begun_s, bench.gateway.cpu_s() - cpu_s
        measured = arrived.copy()
    if any(call.ended.done() for call in calls):
        raise RuntimeError("a stream ended before its time")
    for connection in connections:
        await connection.close()
    return measured, cpu_s, took_s


def measure_streams(
    num_streams: int, tokens_per_s: float, seconds: float, warm_up_s: float, *, secure: bool
) -> dict[str, object]:
    """At one number of streams and one rate of the engine."""
    step_s = num_streams / tokens_per_s
    with Bench("--step-ms", step_s * 1e3, secure=secure) as bench:
        arrived, cpu_s, took_s = uvloop.run(read_streams(bench, num_streams, seconds, warm_up_s))
        rss_bytes = bench.gateway.rss_bytes()
        steps = bench.journal()
    num_tokens = 0
    late_s = []
    for arrived_s, raw in arrived:
        chunk = inference_pb2.GenerateChunk.FromString(raw)
        num_tokens += len(chunk.token_ids)
        for position in range(chunk.token_offset, chunk.token_offset + len(chunk.token_ids)):
            late_s.append(arrived_s - steps.token_s(chunk.generation_id, chunk.candidate_index, position))
    return {
        "streams": num_streams,
        "offered_tokens_per_s": tokens_per_s,
        "tokens_per_s": round(num_tokens / took_s),
        "gateway_cores": round(cpu_s / took_s, 3),
        "gateway_us_per_token": round(1e6 * cpu_s / num_tokens, 2),
        "tokens_per_s_and_gateway_core": round(num_tokens / cpu_s),
        "tokens_per_message": round(num_tokens / len(arrived), 2),
        "added_ms": percentiles_ms(late_s),
        "gateway_rss_mib": round(rss_bytes / 2**20),
    }


# -- unary ----------------------------------------------------------------------------------------------------------


async def call_unary(
    bench: Bench, max_tokens: int, load: float, seconds: float, warm_up_s: float
) -> tuple[list[tuple[float, bytes]], dict[str, object]]:
    """How long each call took, and its answer, at Poisson arrivals; the processor time of a call sets the rate."""
    connections = itertools.cycle(await bench.connect())
    message = request(max_tokens)

    async def repeat(until_s: float) -> int:
        count = 0
        while time.monotonic() < until_s:
            await next(connections).unary(_UNARY, message)
            count += 1
        return count

    with steady():
        await asyncio.gather(*(repeat(time.monotonic() + warm_up_s) for _ in range(16)))
        cpu_s = bench.gateway.cpu_s()
        counts = await asyncio.gather(*(repeat(time.monotonic() + seconds / 2) for _ in range(16)))
        call_cpu_s = (bench.gateway.cpu_s() - cpu_s) / sum(counts)

        answers: list[tuple[float, bytes]] = []

        async def call() -> None:
            begun_s = time.monotonic()
            raw = await next(connections).unary(_UNARY, message)
            if raw is None:
                raise RuntimeError("a call failed")
            answers.append((time.monotonic() - begun_s, raw))

        rng, calls = random.Random(1), []
        rate = load / call_cpu_s
        due_s = begun_s = time.monotonic()
        cpu_s = bench.gateway.cpu_s()
        while due_s < begun_s + seconds:
            due_s += rng.expovariate(rate)
            if (wait_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            calls.append(asyncio.create_task(call()))
        cpu_s, took_s = bench.gateway.cpu_s() - cpu_s, time.monotonic() - begun_s
        await asyncio.gather(*calls)
    for connection in itertools.islice(connections, _NUM_CONNECTIONS):
        await connection.close()
    return answers, {
        "gateway_us_per_call": round(1e6 * call_cpu_s, 1),
        "calls_per_s": round(len(calls) / took_s, 1),
        "gateway_cores": round(cpu_s / took_s, 3),
    }


def measure_unary(
    max_tokens: int, step_ms: float, load: float, seconds: float, warm_up_s: float, *, secure: bool
) -> dict[str, object]:
    """What the gateway adds to calls of so many tokens while it is busy for the share ``load`` of its time."""
    with Bench("--step-ms", step_ms, secure=secure) as bench:
        answers, figures = uvloop.run(call_unary(bench, max_tokens, load, seconds, warm_up_s))
        steps = bench.journal()
    added_s = []
    for took_s, raw in answers:
        answer = inference_pb2.GenerateResponse.FromString(raw)
        _, _, received_s = steps.begun[answer.generation_id, 0]
        added_s.append(took_s - (steps.token_s(answer.generation_id, 0, max_tokens - 1) - received_s))
    return {"max_tokens": max_tokens, "step_ms": step_ms, "load": load, **figures, "added_ms": percentiles_ms(added_s)}


def percentiles_ms(values_s: list[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values_s, (50, 90, 99)) * 1e3
    return {"p50": round(p50, 2), "p90": round(p90, 2), "p99": round(p99, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens-per-s", default="10000,20000,30000", help="rates of the engine, one run each")
    parser.add_argument("--unary", action="store_true", help="measure unary calls instead")
    parser.add_argument("--max-tokens", type=int, default=16, help="of a unary call")
    parser.add_argument("--step-ms", type=float, default=2.0, help="of the engine under unary calls")
    parser.add_argument("--secure", action="store_true", help="measure again with mutual TLS and JWT")
    parser.add_argument("--load", type=float, default=0.7, help="share of the gateway's capacity in unary calls")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--warm-up-s", type=float, default=2.0)
    arguments = parser.parse_args()
    rates = [float(rate) for rate in arguments.tokens_per_s.split(",")]
    times = arguments.seconds, arguments.warm_up_s

    def measure(secure: bool) -> list[dict[str, object]]:
        if arguments.unary:
            load = arguments.max_tokens, arguments.step_ms, arguments.load
            return [measure_unary(*load, *times, secure=secure)]
        return [measure_streams(arguments.streams, rate, *times, secure=secure) for rate in rates]

    name, figures = "unary" if arguments.unary else "streams", {"plain": measure(False)}
    if arguments.secure:
        figures["mutual TLS, JWT"] = measure(True)
    report({name: figures})


if __name__ == "__main__":
    main()
