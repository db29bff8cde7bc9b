"""Who is alive and who is not: an engine that is dead in a living process, one that is busy, and one that hangs."""

from __future__ import annotations

import pytest
from fault_setup import READY, CreateFaults, EngineReplica, PacedExecutor, Stream, ask, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import EngineFault
from cluster.serve import replica_server
from cluster.v1 import inference_pb2 as pb

DRAINING = pb.REPLICA_STATE_DRAINING
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_dead_engine_in_a_living_process_gets_no_traffic(create_faults: CreateFaults):
    """Engine dead, process alive: its health check fails, it gets no traffic, and what ran there goes on elsewhere."""
    dying = EngineReplica(executor=PacedExecutor(step_s=0.005, fault_in="collect", fault_at_step=20))
    other = EngineReplica("replica-1", PacedExecutor(step_s=0.005))
    cluster = await create_faults(dying, other)
    dying.server.check()
    streams = [Stream(cluster.front, ask([65 + seed] * 40, max_tokens=40, seed=seed)) for seed in range(8)]
    for stream in streams:
        await stream.whole()
    assert sorted(cluster.front.metrics.outcomes) == ["OK"] * 8
    with pytest.raises(EngineFault, match="the fake device failed"):
        dying.server.check()
    other.server.check()
    assert await cluster.front.states() == [DRAINING, READY]  # the process is there, and says what it is worth
    num_steps = len(dying.executor.steps)
    for seed in range(8):
        await cluster.stub.Generate(ask(seed=seed))
    assert len(dying.executor.steps) == num_steps


async def test_a_gateway_whose_only_engine_is_dead_is_not_healthy(create_faults: CreateFaults):
    """Engine dead, process alive, nobody else: the gateway's own health says so, until there is another."""
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(fault_in="collect", fault_at_step=3)))
    stub = health_pb2_grpc.HealthStub(cluster.front.channel)

    async def health() -> int:
        return (await stub.Check(health_pb2.HealthCheckRequest())).status

    assert await health() == SERVING
    stream = Stream(cluster.front, ask(max_tokens=20))
    await cluster.front.wait_states(DRAINING)
    assert await health() == NOT_SERVING
    await cluster.replica.stop()
    await cluster.add(EngineReplica("replica-1"))
    await stream.whole()
    assert await health() == SERVING


async def test_a_long_prefill_is_progress(create_faults: CreateFaults, monkeypatch: pytest.MonkeyPatch):
    """Long prefill keeps the engine busy for longer than a step may take: it stays alive. Liveness is progress."""
    monkeypatch.setattr(replica_server, "_STALL_S", 0.4)
    executor = PacedExecutor(step_s=0.05)
    cluster = await create_faults(EngineReplica(executor=executor, max_num_batched_tokens=8))
    stream = Stream(cluster.front, ask([65] * 200, max_tokens=2))
    num_checks = 0
    while len(executor.steps) < 25:
        cluster.replica.server.check()
        assert await cluster.front.states() == [READY]
        num_checks += 1
    assert num_checks > 20 and not stream.tokens
    await stream.whole()


async def test_a_step_that_never_ends_is_found(create_faults: CreateFaults, monkeypatch: pytest.MonkeyPatch):
    """The same check, with the fault put in: an engine that makes no progress."""
    monkeypatch.setattr(replica_server, "_STALL_S", 0.2)
    executor = PacedExecutor(gated=True)
    cluster = await create_faults(EngineReplica(executor=executor))
    stream = Stream(cluster.front, ask())
    await until(lambda: executor.steps)

    def is_stuck() -> bool:
        try:
            cluster.replica.server.check()
        except EngineFault as fault:
            return "inside one step" in fault.message
        return False

    await until(is_stuck)
    executor.open()
    await stream.whole()
    cluster.replica.server.check()
