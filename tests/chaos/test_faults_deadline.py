"""Deadlines that pass: in a queue nothing is ever dispatched, in decode everything is free within one step."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from fault_setup import CreateFaults, EngineReplica, PacedExecutor, Stream, ask, until

LATE = grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_deadline_that_passes_in_the_engines_queue(create_faults: CreateFaults):
    """Deadline passes in the queue of a replica: DEADLINE_EXCEEDED, never dispatched."""
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(step_s=0.02), max_num_seqs=1))
    running = Stream(cluster.front, ask(max_tokens=60))
    await running.has(1)
    late = [Stream(cluster.front, ask(seed=seed), timeout=0.3) for seed in range(3)]
    await until(lambda: cluster.replica.engine.load().waiting)
    for stream in late:
        assert (await stream.failure()).code is LATE
    await until(lambda: not cluster.replica.engine.load().waiting)
    await running.whole()
    assert cluster.executor.ever_scheduled() == {0}


async def test_a_deadline_that_passes_in_the_gateways_queue(create_faults: CreateFaults):
    """Deadline passes in the queue of the gateway: DEADLINE_EXCEEDED, never dispatched."""
    executor = PacedExecutor(gated=True)
    cluster = await create_faults(EngineReplica(executor=executor, max_num_seqs=4, max_num_batched_tokens=4))
    running = [Stream(cluster.front, ask([65] * 16, seed=seed)) for seed in range(3)]
    await until(cluster.front.num_queued)
    late = Stream(cluster.front, ask([65] * 16), timeout=0.3)
    assert (await late.failure()).code is LATE
    executor.open()
    for stream in running:
        await stream.whole()
    assert len(executor.ever_scheduled()) == 3


@pytest.mark.parametrize("whose", ["the client's", "the gateway's"])
async def test_a_deadline_that_passes_in_decode(create_faults: CreateFaults, whose: str):
    """Deadline passes in decode: DEADLINE_EXCEEDED, blocks are freed within one step, and others go on."""
    limits = {"default_deadline_s": 0.6} if whose == "the gateway's" else {}
    executor = PacedExecutor(step_s=0.01)
    cluster = await create_faults(EngineReplica(executor=executor), **limits)
    other = Stream(cluster.front, ask(max_tokens=150), timeout=30)
    await other.has(1)
    late = Stream(cluster.front, ask(max_tokens=450, seed=8), timeout=0.6 if whose == "the client's" else None)
    failure = await late.failure()
    assert failure.code is LATE and late.tokens
    await until(lambda: cluster.replica.num_submissions == 1)
    num_steps = len(executor.steps)
    await other.whole()
    # At most the step that was under way, and the one that was planned while the cancel was read.
    assert all(executor.scheduled_in(step) == {0} for step in executor.steps[num_steps + 1 :])
    assert len(executor.steps) > num_steps + 1


async def test_an_engine_that_no_gateway_tells_keeps_deadlines_itself(create_faults: CreateFaults):
    """The replica's own watch over a deadline: nothing relies on the gateway's cancel."""
    executor = PacedExecutor(step_s=0.01)
    cluster = await create_faults(EngineReplica(executor=executor))
    thread = cluster.replica.server._engine
    send = thread.send
    # Whether the gateway would be the first to notice or not: the engine does not hear of it.
    thread.send = lambda commands: send(replace(commands, cancels=[]))
    late = Stream(cluster.front, ask(max_tokens=450), timeout=0.4)
    assert (await late.failure()).code is LATE
    await cluster.replica.check_idle()
    assert len(executor.steps) < 200
