"""Clients that read slowly, and clients that ask for the same thing twice."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fault_setup import CreateFaults, EngineReplica, PacedExecutor, Stream, ask, expected, failure, tokens_of, until

# Long enough to fill the buffers of a connection that nobody reads.
LONG = {"max_tokens": 500, "n": 8}


def large(step_s: float = 0.0) -> EngineReplica:
    executor = PacedExecutor(step_s=step_s, max_model_len=2048, num_blocks=4000)
    return EngineReplica(executor=executor, max_num_seqs=16)


async def test_a_slow_reader_is_cancelled_and_nobody_else(create_faults: CreateFaults):
    """Slow reader: what is kept for it is bounded, then it is cancelled; others are unaffected, and what it has had is
    right."""
    cluster = await create_faults(large(), max_unread_tokens=100)
    slow = ask(max_tokens=1500, n=8)
    call = cluster.stub.GenerateStream(slow)
    chunks = [await anext(aiter(call))]
    quick = Stream(cluster.front, ask([70] * 5, seed=3, max_tokens=300))
    await quick.whole()
    await until(lambda: not cluster.replica.num_submissions)  # the engine works for nobody any more
    assert len(cluster.executor.steps) < 1450

    async def read() -> None:
        async for chunk in call:
            chunks.append(chunk)

    end = await failure(read())
    assert (end.code, end.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")
    assert end.retry_after_s is None
    for index in range(8):
        tokens = tokens_of(chunks, index)
        assert tokens == expected(slow, index)[: len(tokens)]
    assert sorted(cluster.front.metrics.outcomes) == ["OK", "SLOW_READER"]


async def test_a_slow_reader_within_its_bound_gets_larger_chunks(create_faults: CreateFaults):
    """Slow reader that catches up: chunks are coalesced, and nothing is missing."""
    cluster = await create_faults(large(), max_unread_tokens=10_000)
    request = ask(**LONG)
    call = cluster.stub.GenerateStream(request)
    first = await anext(aiter(call))
    await until(lambda: not cluster.replica.num_submissions)
    chunks = [first, *[chunk async for chunk in call]]
    for index in range(8):
        assert tokens_of(chunks, index) == expected(request, index)
    assert max(len(chunk.token_ids) for chunk in chunks) > 50
    assert len(chunks) < 8 * 500 / 2


@pytest.mark.parametrize("streams", [True, False])
async def test_the_same_request_again(create_faults: CreateFaults, streams: bool):
    """Same request_id, same body: it joins while that runs and replays when it is done. The engine works once."""
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(step_s=0.01)))
    request = ask(request_id="mine", max_tokens=40)

    async def call() -> tuple[str, list[int]]:
        if not streams:
            answer = await cluster.stub.Generate(request)
            return answer.generation_id, list(answer.candidates[0].token_ids)
        chunks = [chunk async for chunk in cluster.stub.GenerateStream(request)]
        return chunks[0].generation_id, tokens_of(chunks)

    first = asyncio.create_task(call())
    await until(lambda: len(cluster.executor.steps) > 10)
    joined = await call()
    assert joined == await first
    assert joined[1] == expected(request)
    num_steps = len(cluster.executor.steps)
    assert await call() == joined
    assert len(cluster.executor.steps) == num_steps and cluster.executor.ever_scheduled() == {0}


async def test_who_leaves_does_not_end_what_another_reads(create_faults: CreateFaults):
    """Same request_id, same body, and the first client goes away: the second one goes on, to the end."""
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(step_s=0.01)))
    first, second = (Stream(cluster.front, ask(request_id="mine", max_tokens=40)) for _ in range(2))
    await first.has(5)
    await second.has(5)
    first.call.cancel()
    await second.whole()
    # And where the last one goes, it ends.
    streams = [Stream(cluster.front, ask(request_id="other", max_tokens=400)) for _ in range(2)]
    for stream in streams:
        await stream.has(1)
    for stream in streams:
        stream.call.cancel()
    await until(lambda: not cluster.replica.num_submissions)


async def test_another_request_of_the_same_name(create_faults: CreateFaults):
    """Same request_id, other body: ALREADY_EXISTS while the first runs and after it. What has failed is no obstacle."""
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(step_s=0.01)))
    running = Stream(cluster.front, ask(request_id="mine", max_tokens=40))
    await running.has(5)
    others = [ask(request_id="mine", max_tokens=41), ask([65], request_id="mine", max_tokens=40)]
    for _ in range(2):
        for other in others:
            refusal = await failure(cluster.stub.Generate(other))
            assert (refusal.code, refusal.field) == (grpc.StatusCode.ALREADY_EXISTS, "request_id")
        await running.whole()
    cancelled = Stream(cluster.front, ask(request_id="name", max_tokens=400))
    await cancelled.has(1)
    cancelled.call.cancel()
    await until(lambda: not cluster.front.gateway.num_generations)
    assert (await cluster.stub.Generate(ask(request_id="name", max_tokens=3))).usage.completion_tokens == 3
