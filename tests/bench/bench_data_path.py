"""CPU time per streamed token of the gateway and of the replica: no model, every other part real.

Three processes: a gateway, a replica (stream server, engine, scheduler) whose executor makes up one token per stream
and step at a steady pace, and this one, which holds the client streams. CPU time, not wall time, so a busy machine
matters little.

    python tests/bench/bench_data_path.py --streams 64 --step-ms 20 --seconds 8
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import psutil
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stamp import report

from cluster.checkpoint import resolve_checkpoint
from cluster.core.config import SchedulerConfig
from cluster.core.model_info import ModelInfo
from cluster.core.step import SampledToken, StepInput, StepOutput
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.gateway.config import GatewayConfig
from cluster.gateway.server import Gateway, ReplicaAddress, ServedModel
from cluster.serve.replica_server import ReplicaServer
from cluster.text.tokenizer import Tokenizer
from cluster.v1 import inference_pb2, inference_pb2_grpc

SECRET = "test-secret"


class PacedExecutor:
    """Makes up a token for every sequence, one step per ``step_s``."""

    max_in_flight = 1

    def __init__(self, vocab_size: int, step_s: float) -> None:
        self.model = ModelInfo(
            architecture="none",
            max_model_len=200_000,
            vocab_size=vocab_size,
            eos_token_ids=(),
            dtype="none",
            device="none",
            num_blocks=2**20,
            block_size=16,
            backend="none",
        )
        self._vocab_size = vocab_size
        self._step_s = step_s
        self._next = time.monotonic()

    def submit(self, step: StepInput) -> None:
        self._step = step

    def collect(self) -> StepOutput:
        self._next = max(self._next + self._step_s, time.monotonic())
        time.sleep(max(0.0, self._next - time.monotonic()))
        token = SampledToken(token_id=self._step.step_id % self._vocab_size)
        sampled = {share.sequence_id: token for share in self._step.scheduled if share.samples}
        return StepOutput(step_id=self._step.step_id, sampled=sampled)

    def shutdown(self) -> None:
        return


async def serve_replica(model: str, num_streams: int, step_s: float) -> None:
    vocab_size = Tokenizer.from_checkpoint(resolve_checkpoint(model, weights=False)).vocab_size
    scheduler = SchedulerConfig(max_num_seqs=num_streams, max_num_batched_tokens=max(2048, num_streams))
    server = ReplicaServer(
        lambda: Engine(PacedExecutor(vocab_size, step_s), EngineConfig(scheduler=scheduler)),
        replica_id="replica-0",
        model="test",
        secret=SECRET,
    )
    print(f"127.0.0.1:{await server.start()}", flush=True)
    await asyncio.Event().wait()


async def serve_gateway(replica_address: str, model: str) -> None:
    gateway = Gateway(
        GatewayConfig(port=0), [ServedModel("test", resolve_checkpoint(model, weights=False))], secret=SECRET
    )
    port = await gateway.start()
    gateway.set_replicas("test", [ReplicaAddress("replica-0", replica_address)])
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


@contextmanager
def process(*arguments: str) -> Iterator[tuple[psutil.Process, str]]:
    """A Python process and the first line that it prints: its address."""
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield psutil.Process(child.pid), child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()


def cpu_s(of: psutil.Process) -> float:
    times = of.cpu_times()
    return times.user + times.system


async def measure(
    gateway: psutil.Process, replica: psutil.Process, address: str, num_streams: int, seconds: float, warm_up_s: float
) -> dict[str, float]:
    """Streams for a while, and divides both processes' CPU time by the tokens that arrived meanwhile."""
    num_tokens = num_messages = 0

    async def read(call: grpc.aio.UnaryStreamCall) -> None:
        nonlocal num_tokens, num_messages
        async for chunk in call:
            num_messages += 1
            num_tokens += len(chunk.token_ids)

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async with asyncio.timeout(30):
            async for health in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                if health.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        request = inference_pb2.GenerateRequest(
            prompt="def read_lines(path):", sampling=inference_pb2.SamplingParams(max_tokens=100_000)
        )
        readers = [asyncio.create_task(read(stub.GenerateStream(request))) for _ in range(num_streams)]
        await asyncio.sleep(warm_up_s)
        before = num_tokens, num_messages, cpu_s(gateway), cpu_s(replica)
        await asyncio.sleep(seconds)
        after = num_tokens, num_messages, cpu_s(gateway), cpu_s(replica)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    tokens, messages, gateway_s, replica_s = (b - a for a, b in zip(before, after, strict=True))
    return {
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "tokens_per_message": round(tokens / messages, 3),
        "gateway_us_per_token": round(1e6 * gateway_s / tokens, 1),
        "replica_us_per_token": round(1e6 * replica_s / tokens, 1),
        "us_per_token": round(1e6 * (gateway_s + replica_s) / tokens, 1),
        "gateway_rss_mib": round(gateway.memory_info().rss / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--warm-up-s", type=float, default=2.0)
    parser.add_argument("--model", default="demo", help="whose tokenizer is used: as for 'cluster serve'")
    parser.add_argument("--serve-replica", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve-gateway", metavar="REPLICA", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_replica:
        asyncio.run(serve_replica(arguments.model, arguments.streams, arguments.step_ms / 1e3))
        return
    if arguments.serve_gateway:
        asyncio.run(serve_gateway(arguments.serve_gateway, arguments.model))
        return
    again = [__file__, *sys.argv[1:]]
    with (
        process(*again, "--serve-replica") as (replica, replica_address),
        process(*again, "--serve-gateway", replica_address) as (gateway, address),
    ):
        figures = uvloop.run(
            measure(gateway, replica, address, arguments.streams, arguments.seconds, arguments.warm_up_s)
        )
    report({"streams": arguments.streams, "step_ms": arguments.step_ms, **figures})


if __name__ == "__main__":
    main()
