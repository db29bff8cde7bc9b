"""What a failover adds: streams on fake engines, engines killed -9 one after the other, the gap that each stream sees.

Fake engines take no time for prompts, so what the recompute would take is not in these figures: a gap is one step, and
what it lasted beyond that is the failover's. The other engine is ready all the time. Every token is checked.

    python tests/bench/bench_failover.py --kills 50 --streams 16 --context 1024
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field

import grpc
import numpy as np
import uvloop
from fake_engine import KeyedTokens
from plain_process import PlainProcess, engines, gateway, wait_serving
from stamp import report

from cluster.v1 import inference_pb2, inference_pb2_grpc

_NUM_TOKENS = 2**19  # as good as endless
_SETTLE_S = 0.5


@dataclass
class Stream:
    """One client's.

    Attributes:
        arrived: when each message came, in monotonic seconds, newest last; cut when a kill has been judged.
        num_tokens: so far.
        wrong: what was lost, doubled or changed.
        error: how it ended; it should not.
    """

    seed: int
    arrived: list[float] = field(default_factory=list)
    num_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    error: str = ""

    async def read(self, stub: inference_pb2_grpc.InferenceServiceStub, prompt: list[int], tokens: KeyedTokens) -> None:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=inference_pb2.SamplingParams(max_tokens=_NUM_TOKENS, seed=self.seed, ignore_eos=True),
        )
        key = tokens.key(self.seed, 0)
        try:
            async for chunk in stub.GenerateStream(request):
                self.arrived.append(time.monotonic())
                if chunk.token_offset != self.num_tokens:
                    self.wrong.append(f"token {chunk.token_offset} after {self.num_tokens}")
                expected = [tokens.at(key, chunk.token_offset + index) for index in range(len(chunk.token_ids))]
                if list(chunk.token_ids) != expected:
                    self.wrong.append(f"other tokens at {chunk.token_offset}")
                self.num_tokens = chunk.token_offset + len(chunk.token_ids)
            self.error = "it ended"
        except grpc.aio.AioRpcError as error:
            self.error = f"{error.code().name}: {error.details()}"

    def longest_gap_s(self) -> float:
        return max(np.diff(self.arrived), default=0.0)


class Engines:
    """Two of them, of which one at a time is killed and comes back at its old address."""

    def __init__(self, step_ms: float) -> None:
        self._options = ("--step-ms", step_ms)
        self.processes = engines(self._options, self._options)

    def kill(self, index: int) -> None:
        self.processes[index].kill()

    def restart(self, index: int) -> None:
        old = self.processes[index]
        old.terminate()
        port = old.address.rpartition(":")[2]
        options = ("--replica-id", f"replica-{index}", "--port", port, *self._options)
        self.processes[index] = PlainProcess("fake_engine.py", *options)

    def terminate(self) -> None:
        for process in self.processes:
            process.terminate()


async def measure(
    address: str,
    running: Engines,
    *,
    num_kills: int,
    num_streams: int,
    context: int,
    step_s: float,
    tokens: KeyedTokens,
) -> dict[str, object]:
    """Kills so often, with so many streams of so long prompts."""
    streams = [Stream(seed) for seed in range(1, num_streams + 1)]
    rng = random.Random(1)
    delays_s: list[float] = []
    undisturbed_s: list[float] = []
    await wait_serving(address)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await _wait_ready(stub)
        prompts = [tokens.candidate(rng.getrandbits(32), 0, context) for _ in streams]
        tasks = [
            asyncio.create_task(stream.read(stub, prompt, tokens))
            for stream, prompt in zip(streams, prompts, strict=True)
        ]
        await asyncio.sleep(2 * _SETTLE_S)
        for kill in range(num_kills):
            for stream in streams:
                del stream.arrived[:-1]
            await asyncio.sleep(_SETTLE_S)
            undisturbed_s += [stream.longest_gap_s() - step_s for stream in streams]
            for stream in streams:
                del stream.arrived[:-1]
            running.kill(kill % 2)
            await asyncio.sleep(2 * _SETTLE_S)
            # Only those that were there have moved; the longest gaps are theirs.
            gaps_s = sorted(stream.longest_gap_s() - step_s for stream in streams)
            delays_s += gaps_s if kill else gaps_s[len(gaps_s) // 2 :]
            await asyncio.to_thread(running.restart, kill % 2)
            await _wait_ready(stub)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "kills": num_kills,
        "streams": num_streams,
        "context": context,
        "step_ms": step_s * 1e3,
        "streams_failed": [stream.error for stream in streams if stream.error],
        "tokens_wrong": [wrong for stream in streams for wrong in stream.wrong],
        "tokens": sum(stream.num_tokens for stream in streams),
        "added_ms": _percentiles_ms(delays_s),
        "longest_gap_without_a_kill_ms": _percentiles_ms(undisturbed_s),
    }


async def _wait_ready(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    async with asyncio.timeout(30):
        while True:
            (model,) = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
            if all(replica.state == inference_pb2.REPLICA_STATE_READY for replica in model.replicas):
                return
            await asyncio.sleep(0.05)


def _percentiles_ms(values_s: list[float]) -> dict[str, float]:
    p50, p90, p99, highest = np.percentile(values_s, (50, 90, 99, 100)) * 1e3
    return {"p50": round(p50, 1), "p90": round(p90, 1), "p99": round(p99, 1), "max": round(highest, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--step-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    tokens = KeyedTokens.of_checkpoint("demo")
    running = Engines(arguments.step_ms)
    try:
        with gateway(running.processes) as front:
            figures = uvloop.run(
                measure(
                    front.address,
                    running,
                    num_kills=arguments.kills,
                    num_streams=arguments.streams,
                    context=arguments.context,
                    step_s=arguments.step_ms / 1e3,
                    tokens=tokens,
                )
            )
    finally:
        running.terminate()
    report(figures)


if __name__ == "__main__":
    main()
