"""CPU time per streamed token of the gateway, against a fake replica: no model, every other part real.

Three processes: a gateway (uvloop), a replica that emits one token per stream and step at a steady pace, and this one,
which holds the client streams. Prints one JSON object. CPU time, not wall time, so a busy machine matters little.

    python tests/bench/bench_data_path.py --streams 64 --step-ms 20 --seconds 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.checkpoint import resolve_checkpoint
from cluster.gateway.config import GatewayConfig
from cluster.gateway.server import Gateway, ReplicaAddress, ServedModel
from cluster.v1 import inference_pb2, inference_pb2_grpc

TESTS = Path(__file__).parents[1]
SECRET = "test-secret"


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
        "gateway_rss_mib": round(gateway.memory_info().rss / 2**20, 1),
    }


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=TESTS, capture_output=True, text=True)
    return git.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--warm-up-s", type=float, default=2.0)
    parser.add_argument("--model", default="demo", help="whose tokenizer is used: as for 'cluster serve'")
    parser.add_argument("--serve-gateway", metavar="REPLICA", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_gateway:
        uvloop.run(serve_gateway(arguments.serve_gateway, arguments.model))
        return
    fake_replica = str(TESTS / "fake_replica.py")
    with (
        process(fake_replica, "--step-ms", str(arguments.step_ms)) as (replica, replica_address),
        process(__file__, "--model", arguments.model, "--serve-gateway", replica_address) as (gateway, address),
    ):
        figures = uvloop.run(
            measure(gateway, replica, address, arguments.streams, arguments.seconds, arguments.warm_up_s)
        )
    stamp = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "commit": commit()}
    print(json.dumps({"streams": arguments.streams, "step_ms": arguments.step_ms, **figures, **stamp}))


if __name__ == "__main__":
    main()
