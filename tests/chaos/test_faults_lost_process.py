"""Replicas and gateways that go away, at every moment of a stream, with real engines: each token once, and the same."""

from __future__ import annotations

import asyncio
import multiprocessing.forkserver
import signal
from pathlib import Path

import pytest
from chaos_cluster import free_ports
from chaos_processes import ChaosProcess, serve_replica
from fault_setup import (
    READY,
    CreateFaults,
    EngineReplica,
    FrontGateway,
    PacedExecutor,
    Stream,
    ask,
    expected,
    failure,
    until,
)

from cluster.client import AsyncClient
from cluster.gateway.balancer import Balancer
from cluster.gateway.replica_link import ReplicaAddress, ReplicaLink
from cluster.v1 import inference_pb2 as pb


def paced(replica_id: str = "replica-0", step_s: float = 0.004, **limits: int) -> EngineReplica:
    return EngineReplica(replica_id, PacedExecutor(step_s=step_s), **limits)


def streams_at(front: FrontGateway, num: int, **fields: object) -> list[Stream]:
    return [Stream(front, ask([65 + seed] * 20, seed=seed, **{"max_tokens": 60} | fields)) for seed in range(num)]


async def test_a_replica_is_killed_mid_stream(create_faults: CreateFaults):
    """Replica killed mid-stream: every stream goes on from another replica, each token once, and the same tokens."""
    cluster = await create_faults(paced("replica-0"), paced("replica-1"))
    streams = streams_at(cluster.front, 8)
    for stream in streams:
        await stream.has(4)
    dying, other = cluster.replicas
    assert dying.num_submissions and other.num_submissions
    num_hit = dying.num_submissions
    await dying.kill()
    for stream in streams:
        await stream.whole()
    ledgers = [await stream.ledger() for stream in streams]
    assert sum(ledger.num_moves for ledger in ledgers) == num_hit
    assert cluster.front.metrics.outcomes == ["OK"] * 8
    # What had been emitted came with them: nobody began anew.
    assert other.engine.load().num_blocks == other.engine.load().free_blocks


async def test_the_only_replica_is_killed_mid_stream(create_faults: CreateFaults):
    """The only replica killed mid-stream: the stream waits for the new one within its deadline, then goes on."""
    cluster = await create_faults(paced())
    streams = streams_at(cluster.front, 3)
    late = Stream(cluster.front, ask([80] * 20, max_tokens=400), timeout=1.0)
    for stream in (*streams, late):
        await stream.has(4)
    await cluster.replica.kill()
    assert (await late.failure()).code.name == "DEADLINE_EXCEEDED"
    assert not any(stream.call.done() for stream in streams)
    await cluster.add(paced("replica-1"))
    for stream in streams:
        await stream.whole()
        assert (await stream.ledger()).num_moves == 1


async def test_a_gateway_is_killed_mid_stream(create_faults: CreateFaults):
    """Gateway killed mid-stream: the client library goes on at another one from its last token, each token once. What
    the dead one had running is freed."""
    cluster = await create_faults(paced(), num_gateways=2)
    request = ask([65] * 20, max_tokens=120, seed=5)
    async with AsyncClient(cluster.addresses, deadline_s=60) as client:

        async def read() -> tuple[list[int], int]:
            stream = client.stream([65] * 20, max_tokens=120, seed=5)
            tokens: list[int] = []
            async for chunk in stream:
                tokens += chunk.token_ids
            return tokens, stream.num_resumes

        readers = [asyncio.create_task(read()) for _ in range(6)]
        await until(lambda: cluster.replica.num_submissions == 6)
        await until(lambda: len(cluster.executor.steps) > 30)
        dying, other = cluster.gateways
        num_hit = dying.gateway.num_generations
        assert num_hit and other.gateway.num_generations
        await dying.stop()
        results = await asyncio.gather(*readers)
    assert [tokens for tokens, _ in results] == [expected(request)] * 6
    assert sum(num_resumes for _, num_resumes in results) == num_hit


@pytest.fixture(scope="module")
def forkserver() -> None:
    """Started now, not in the middle of a test that counts descriptors."""
    multiprocessing.forkserver.ensure_running()


@pytest.mark.parametrize("strike", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.usefixtures("forkserver")
async def test_a_replica_stops_between_pick_and_dispatch(
    create_faults: CreateFaults, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, strike: signal.Signals
):
    """Replica stops between pick and dispatch: another is picked, and the client sees nothing of it."""
    cluster = await create_faults()
    processes = [
        ChaosProcess(f"process-{index}", port, serve_replica, f"process-{index}", 0.001)
        for index, port in enumerate(free_ports(2))
    ]
    await asyncio.gather(*(process.start() for process in processes))
    try:
        front = cluster.front
        front.gateway.set_replicas("test", [ReplicaAddress(process.name, process.address) for process in processes])
        await front.wait_states(READY, READY)
        undisturbed = await cluster.stub.Generate(ask())
        pick, struck = Balancer.pick, []

        def pick_and_strike(balancer: Balancer, *arguments: object, **options: object) -> ReplicaLink:
            link = pick(balancer, *arguments, **options)
            if not struck:
                (process,) = [process for process in processes if process.name == link.replica.replica_id]
                process.send(strike)
                if strike == signal.SIGKILL:
                    process._process.join()  # nothing of it is left when the request is sent
                struck.append(process)
            return link

        monkeypatch.setattr(Balancer, "pick", pick_and_strike)
        call = cluster.stub.Generate(ask())
        answer = await call
        assert struck and answer.candidates == undisturbed.candidates
        ledger = pb.Ledger.FromString(dict(await call.trailing_metadata())["cluster-ledger-bin"])
        if strike == signal.SIGKILL:
            assert struck[0].name != ledger.replicas[-1]
        assert front.metrics.outcomes == ["OK", "OK"]
        front.gateway.set_replicas("test", [cluster.replica.at_gateways])
        await front.wait_states(READY)
    finally:
        await asyncio.gather(*(process.end() for process in processes))


@pytest.mark.parametrize("patience_s", [30.0, 0.05], ids=["who may finish", "who has to move"])
async def test_a_replica_is_told_to_end_under_load(create_faults: CreateFaults, patience_s: float):
    """SIGTERM to a replica under load, as it answers it: it drains, and zero requests fail. What is not done in time
    goes on elsewhere."""
    cluster = await create_faults(paced("replica-0"), paced("replica-1"))
    streams = streams_at(cluster.front, 8)
    for stream in streams:
        await stream.has(4)
    leaving = cluster.replicas[0]
    drain = asyncio.create_task(leaving.server.drain(patience_s))
    await cluster.front.wait_states(pb.REPLICA_STATE_DRAINING, READY)
    streams += streams_at(cluster.front, 4, max_tokens=10)
    assert await drain is (patience_s > 1)
    await leaving.stop()
    for stream in streams:
        await stream.whole()
    moved = sum([(await stream.ledger()).num_moves for stream in streams])
    assert (moved == 0) is (patience_s > 1)
    assert cluster.front.metrics.outcomes == ["OK"] * 12


async def test_a_gateway_is_told_to_end_under_load(create_faults: CreateFaults):
    """SIGTERM to a gateway under load, as it answers it: what runs finishes, what is new is told to go elsewhere, and
    users of the client library notice nothing."""
    cluster = await create_faults(paced(), num_gateways=2)
    streams = streams_at(cluster.front, 4)
    async with AsyncClient(cluster.addresses, deadline_s=60) as client:
        for stream in streams:
            await stream.has(4)
        drain = asyncio.create_task(cluster.front.gateway.drain(30))
        await until(lambda: cluster.front.gateway.draining)
        assert (await failure(cluster.stub.Generate(ask()))).reason == "DRAINING"
        results = await asyncio.gather(*(client.generate([70], max_tokens=5, seed=seed) for seed in range(12)))
        assert [result.usage.completion_tokens for result in results] == [5] * 12
        assert await drain is True
    for stream in streams:
        await stream.whole()
    assert len(cluster.gateways[1].metrics.outcomes) == 12
    await cluster.front.stop()


async def test_without_failover_they_would_fail(create_faults: CreateFaults, monkeypatch: pytest.MonkeyPatch):
    """What stands behind this file: a gateway that does not move streams loses them with their replica."""
    monkeypatch.setattr("cluster.gateway.generation._MAX_LOSSES", 0)
    cluster = await create_faults(paced("replica-0"), paced("replica-1"))
    streams = streams_at(cluster.front, 4)
    for stream in streams:
        await stream.has(4)
    num_hit = cluster.replicas[0].num_submissions
    await cluster.replicas[0].kill()
    ends = await asyncio.gather(*(stream.whole() for stream in streams), return_exceptions=True)
    assert sum(isinstance(end, Exception) for end in ends) == num_hit > 0
