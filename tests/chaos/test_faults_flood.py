"""Clients that send too much, or nothing sensible at all: others do not notice, and memory stays bounded."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import chaos_processes
import grpc
import pytest
from chaos_processes import ChaosProcess
from fault_setup import failure, until
from flood_processes import flood, hold_connections, memory_bytes, num_descriptors, serve_flooded
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.core.config import AdmissionConfig
from cluster.gateway.config import GatewayConfig
from cluster.gateway.security_config import AdminConfig, ConnectionConfig
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc

FULL = os.environ.get("CLUSTER_TEST_FULL") == "1"
MIB = 2**20
FLOOD_S = 5.0 if FULL else 1.0


class Flooded:
    """A gateway in a process of its own, and one well-behaved client."""

    def __init__(self, process: ChaosProcess, port: int) -> None:
        self.port = port
        self.process = process
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def pid(self) -> int:
        return self.process._process.pid

    async def health_s(self) -> float:
        """How long the gateway takes to say how it is."""
        started = time.monotonic()
        await health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        return time.monotonic() - started

    @asynccontextmanager
    async def under(self, *kinds: str) -> AsyncIterator[list[int]]:
        """Meanwhile a process of each kind does harm; at the end, how often."""
        counts: list[int] = []
        started = []
        for kind in kinds:
            ours, theirs = chaos_processes._context.Pipe()
            process = chaos_processes._context.Process(target=flood, args=(kind, self.port, theirs), daemon=True)
            process.start()
            started.append((process, ours))
        try:
            for _, ours in started:
                assert await asyncio.to_thread(ours.poll, 60)
                ours.recv()
            yield counts
        finally:
            for process, ours in started:
                ours.send("end")
                assert await asyncio.to_thread(ours.poll, 60)
                counts.append(ours.recv())
                process.join(10)


CreateFlooded = Callable[..., Awaitable[Flooded]]


@pytest.fixture
async def create_flooded(checkpoint: Path) -> AsyncIterator[CreateFlooded]:
    started: list[Flooded] = []

    async def create(**config: object) -> Flooded:
        port = random.randrange(20_000, 30_000)
        settings = {"port": port, "http_port": None, "admin": AdminConfig(port=0), **config}
        process = ChaosProcess("gateway", port, serve_flooded, checkpoint, GatewayConfig(**settings))
        await process.start()
        started.append(Flooded(process, port))
        async with asyncio.timeout(20):
            while True:
                model = await started[-1].stub.GetModel(pb.GetModelRequest())
                if model.replicas and model.replicas[0].state == pb.REPLICA_STATE_READY:
                    return started[-1]

    yield create
    for flooded in started:
        await flooded.channel.close()
        await flooded.process.end()


async def test_a_burst_past_the_queues_bound(create_flooded: CreateFlooded) -> None:
    """Refused at once, before anything is tokenized, and told when to come back."""
    gateway = await create_flooded(admission=AdmissionConfig(max_queued_requests=16), max_prompt_bytes=16 * MIB)
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 400), sampling={"max_tokens": 8})
    burst = [gateway.stub.GenerateStream(message) for _ in range(200)]
    readers = [asyncio.ensure_future(call.read()) for call in burst]
    await until(lambda: sum(reader.done() for reader in readers) >= 150)
    refusals = [await failure(reader) for reader in readers if reader.done()]
    assert {(refusal.code, refusal.reason) for refusal in refusals} == {
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    }
    assert all(refusal.retry_after_s > 0 for refusal in refusals)
    # Tokenizing this takes seconds. (The same class: another one would have places of its own.)
    large, took_s = pb.GenerateRequest(prompt="word " * (2 * MIB)), []
    for _ in range(10):
        started = time.monotonic()
        refusal = await failure(gateway.stub.Generate(large, timeout=20))
        took_s.append(time.monotonic() - started)
        assert refusal.reason == "OVERLOADED"
    small = pb.GenerateRequest(prompt="word", sampling={"max_tokens": 8})
    for _ in range(20):
        started = time.monotonic()
        assert (await failure(gateway.stub.Generate(small, timeout=20))).reason == "OVERLOADED"
        took_s.append(time.monotonic() - started)
    assert statistics.median(took_s) < 0.05
    for call in burst:
        call.cancel()
    await asyncio.gather(*readers, return_exceptions=True)


async def test_prompts_of_27_megabytes(create_flooded: CreateFlooded) -> None:
    """Too large for a prompt, or for a message: told by bytes, and health answers meanwhile."""
    prompt = pb.GenerateRequest(prompt="x" * 27 * MIB)
    usual = await create_flooded()
    assert (await failure(usual.stub.Generate(prompt))).code == grpc.StatusCode.RESOURCE_EXHAUSTED
    gateway = await create_flooded(max_message_bytes=64 * MIB)
    refusal = await failure(gateway.stub.Generate(prompt))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")
    async with gateway.under("huge prompts", "huge prompts") as counts:
        took_s = await probe(gateway)
    assert sum(counts) > 1
    assert statistics.median(took_s) < 0.1


async def probe(gateway: Flooded) -> list[float]:
    """Asks for health again and again, for a while."""
    took_s, until = [], time.monotonic() + FLOOD_S
    while time.monotonic() < until:
        took_s.append(await gateway.health_s())
    return took_s


async def test_floods(create_flooded: CreateFlooded) -> None:
    gateway = await create_flooded()
    await gateway.health_s()
    for kind in ("metadata", "unknown methods", "resets"):
        # What a first wave leaves, allocators keep; a second one must not add to it.
        async with gateway.under(kind):
            await probe(gateway)
        before = memory_bytes(gateway.pid)
        async with gateway.under(kind) as counts:
            took_s = await probe(gateway)
        print(kind, counts, statistics.median(took_s), max(took_s), (memory_bytes(gateway.pid) - before) / MIB)
        assert counts[0] > 2, kind
        assert statistics.median(took_s) < 0.1, kind
        assert memory_bytes(gateway.pid) - before < 64 * MIB, kind
    assert (await gateway.stub.GetModel(pb.GetModelRequest())).replicas[0].outstanding_tokens == 0


async def test_metadata_that_is_too_long_is_refused(create_flooded: CreateFlooded) -> None:
    gateway = await create_flooded(connections=ConnectionConfig(max_metadata_bytes=4096))
    call = gateway.channel.unary_unary("/cluster.v1.InferenceService/ListModels")
    refusal = await failure(call(b"", metadata=(("key", "v" * 5000),)))
    assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await call(b"", metadata=(("key", "v" * 2000),))


async def test_idle_connections(create_flooded: CreateFlooded) -> None:
    """As many as are allowed cost little each; the rest are closed; those that never say a word are closed in time."""
    allowed = 10_000 if FULL else 500
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit != resource.RLIM_INFINITY and limit < allowed + 500:
        pytest.skip(f"this machine allows {limit} descriptors to a process")
    connections = ConnectionConfig(max_connections=allowed, handshake_timeout_s=2.0)
    gateway = await create_flooded(connections=connections)
    await gateway.health_s()
    memory, descriptors = memory_bytes(gateway.pid), num_descriptors(gateway.pid)
    holders = []
    for _ in range(2):
        ours, theirs = chaos_processes._context.Pipe()
        arguments = (gateway.port, allowed * 3 // 4, theirs)
        process = chaos_processes._context.Process(target=hold_connections, args=arguments, daemon=True)
        process.start()
        holders.append((process, ours))
    try:
        for _, ours in holders:
            assert await asyncio.to_thread(ours.poll, 120)
            ours.recv()
        took_s = await probe(gateway)
        assert statistics.median(took_s) < 0.1
        assert num_descriptors(gateway.pid) - descriptors <= allowed + 20
        assert memory_bytes(gateway.pid) - memory < allowed * 100_000 + 64 * MIB
        # Half of them were silent. With them gone there is room again.
        await until(lambda: num_descriptors(gateway.pid) - descriptors <= allowed * 0.9, timeout_s=60)
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{gateway.port}", options=(("grpc.use_local_subchannel_pool", 1),)
        ) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    finally:
        for process, ours in holders:
            ours.send("end")
            process.join(10)
