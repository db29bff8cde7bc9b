"""Cancelled: in a queue, in the middle, at the very end. What a request held is free within one step."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fault_setup import CreateFaults, EngineReplica, FaultCluster, PacedExecutor, Stream, ask, failure, until

from cluster.v1 import inference_pb2 as pb

CANCELLED = grpc.StatusCode.CANCELLED


def gated(*, max_in_flight: int = 1, **limits: int) -> EngineReplica:
    return EngineReplica(executor=PacedExecutor(gated=True, max_in_flight=max_in_flight), **limits)


async def cancel(cluster: FaultCluster, stream: Stream, how: str) -> None:
    """Ends a stream as its client, or as another one that knows its name."""
    if how == "by its client":
        stream.call.cancel()
    else:
        name = pb.CancelGenerationRequest(generation_id=stream.request.request_id)
        assert (await cluster.stub.CancelGeneration(name)).cancelled
        assert (await stream.failure()).code is CANCELLED


async def pass_steps(cluster: FaultCluster, num_steps: int) -> None:
    """Lets as many steps end, and the ones after them begin."""
    before = len(cluster.executor.steps)
    for index in range(num_steps):
        cluster.executor.allow()
        await until(lambda index=index: len(cluster.executor.steps) > before + index)


@pytest.mark.parametrize("how", ["by its client", "by name"])
async def test_who_is_cancelled_in_the_engines_queue_never_runs(create_faults: CreateFaults, how: str):
    """Client cancels while queued, at the replica: it leaves the queue within one step."""
    cluster = await create_faults(gated(max_num_seqs=1))
    running = Stream(cluster.front, ask(max_tokens=6))
    await until(lambda: cluster.executor.steps)
    queued = Stream(cluster.front, ask(request_id="queued"))
    await until(lambda: cluster.replica.num_submissions == 2)
    await pass_steps(cluster, 1)
    assert cluster.replica.engine.load().waiting == 1
    await cancel(cluster, queued, how)
    await until(lambda: cluster.replica.num_submissions == 1)
    await pass_steps(cluster, 1)
    assert cluster.replica.engine.load().waiting == 0
    cluster.executor.open()
    await running.whole()
    assert cluster.executor.ever_scheduled() == {0}
    await cluster.front.check_idle()
    assert sorted(cluster.front.metrics.outcomes) == ["CANCELLED", "OK"]


@pytest.mark.parametrize("how", ["by its client", "by name"])
async def test_who_is_cancelled_in_the_gateways_queue_is_never_sent(create_faults: CreateFaults, how: str):
    """Client cancels while queued, at the gateway."""
    cluster = await create_faults(gated(max_num_seqs=4, max_num_batched_tokens=4))
    streams = [Stream(cluster.front, ask([65] * 16, seed=seed)) for seed in range(3)]
    await until(lambda: cluster.front.num_queued() == 2)
    queued = Stream(cluster.front, ask([65] * 16, request_id="queued"))
    await until(lambda: cluster.front.num_queued() == 3)
    await cancel(cluster, queued, how)
    await until(lambda: cluster.front.num_queued() == 2)
    cluster.executor.open()
    for stream in streams:
        await stream.whole()
    assert len(cluster.executor.ever_scheduled()) == 3


@pytest.mark.parametrize("how", ["by its client", "by name"])
@pytest.mark.parametrize("max_in_flight", [1, 2])
async def test_who_is_cancelled_in_decode_is_in_no_step_after_it(
    create_faults: CreateFaults, how: str, max_in_flight: int
):
    """Client cancels in decode: work ends within one step, blocks are freed. What the steps under way yield for it is a
    late result for an aborted id, and is ignored."""
    cluster = await create_faults(gated(max_in_flight=max_in_flight))
    leaver, other = (Stream(cluster.front, ask(max_tokens=30, seed=seed, request_id=f"{seed}")) for seed in (1, 2))
    await until(lambda: cluster.replica.num_submissions == 2)
    await pass_steps(cluster, 4)
    await leaver.has(1)
    engine, executor = cluster.replica.engine, cluster.executor
    used = engine.load().num_blocks - engine.load().free_blocks
    await cancel(cluster, leaver, how)
    await until(lambda: cluster.replica.num_submissions == 1)
    under_way = executor.steps[-max_in_flight:]
    assert all(executor.scheduled_in(step) == {0, 1} for step in under_way)  # these results come late
    num_steps = len(executor.steps)
    await pass_steps(cluster, 3)
    assert all(executor.scheduled_in(step) == {1} for step in executor.steps[num_steps:])
    assert engine.load().num_blocks - engine.load().free_blocks < used
    num_tokens = len(leaver.tokens)
    executor.open()
    await other.whole()
    assert len(leaver.tokens) == num_tokens
    assert engine.fault is None


async def test_a_cancel_that_races_with_the_end_leaves_one_of_both(create_faults: CreateFaults):
    """Cancel races completion: exactly one terminal state, at the client and in the books."""
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(step_s=0.0005)))
    ends = []
    for attempt in range(120):
        request = ask(request_id=f"r{attempt}", n=2, max_tokens=1 + attempt % 6, seed=attempt)
        call = asyncio.ensure_future(cluster.stub.Generate(request))
        await asyncio.sleep(0.0005 * (attempt % 16))
        name = pb.CancelGenerationRequest(generation_id=f"r{attempt}")
        cancelled, result = await asyncio.gather(cluster.stub.CancelGeneration(name), call, return_exceptions=True)
        if isinstance(result, grpc.aio.AioRpcError):
            assert result.code() is CANCELLED and cancelled.cancelled
            ends.append("CANCELLED")
        else:
            assert [len(candidate.token_ids) for candidate in result.candidates] == [request.sampling.max_tokens] * 2
            ends.append("OK")
    assert ends.count("OK") > 10 and ends.count("CANCELLED") > 10  # it is a race
    await cluster.front.check_idle()
    assert sorted(cluster.front.metrics.outcomes) == sorted(ends)


async def test_what_never_ends_is_noticed(create_faults: CreateFaults, monkeypatch: pytest.MonkeyPatch):
    """What stands behind this file: an engine that does not hear of a cancel still has blocks."""
    cluster = await create_faults(gated())
    stream = Stream(cluster.front, ask(max_tokens=400))
    await until(lambda: cluster.executor.steps)
    monkeypatch.setattr(type(cluster.replica.engine), "cancel", lambda *arguments: None)
    stream.call.cancel()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(cluster.replica.check_idle(), 0.5)
    monkeypatch.undo()
    cluster.executor.open()


async def test_a_call_that_is_cancelled_before_it_is_sent_leaves_nothing(create_faults: CreateFaults):
    """A client that goes away while its prompt is tokenized, or before."""
    cluster = await create_faults()
    for attempt in range(30):
        call = asyncio.ensure_future(cluster.stub.Generate(ask("x" * 200)))
        await asyncio.sleep(0.0003 * attempt)
        call.cancel()
    assert (await cluster.stub.Generate(ask())).candidates[0].token_ids
    assert (await failure(cluster.stub.CancelGeneration(pb.CancelGenerationRequest(generation_id="never")))).code
