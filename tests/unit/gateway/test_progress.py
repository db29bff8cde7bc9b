"""What a request waits for, told on request."""

from __future__ import annotations

import asyncio

import grpc
from fake_replica import FakeReplica
from gateway_setup import CONNECTING, READY, CreateSetup, collect, failure, request
from test_generate import joined

from cluster.v1 import inference_pb2 as pb

QUEUED, WARMING, MOVING = pb.Progress.STAGE_QUEUED, pb.Progress.STAGE_WARMING, pb.Progress.STAGE_MOVING


async def next_progress(stream: grpc.aio.UnaryStreamCall) -> pb.Progress:
    chunk = await asyncio.wait_for(anext(aiter(stream)), 10)
    assert chunk.HasField("progress")
    assert not (chunk.token_ids or chunk.text_delta or chunk.finish_reason or chunk.HasField("seed"))
    return chunk.progress


def check(chunks: list[pb.GenerateChunk], start: int = 0) -> None:
    """Numbered in order, and whole without the progress."""
    assert [chunk.sequence for chunk in chunks] == list(range(start, start + len(chunks)))
    tokens = [chunk for chunk in chunks if not chunk.HasField("progress")]
    assert len(joined(tokens).token_ids) == 8
    assert [chunk.HasField("seed") for chunk in tokens] == [True] + [False] * (len(tokens) - 1)


async def test_queued_with_a_position(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True, max_num_batched_tokens=8))
    # The first fills what the replica may have under way; the others wait behind it.
    calls = [asyncio.ensure_future(setup.stub.Generate(request("x" * 60))) for _ in range(3)]
    await setup.replica.until(lambda: setup.replica.running)
    await setup.model()
    stream = setup.stub.GenerateStream(request(progress=True))
    progress = await next_progress(stream)
    assert progress.stage == QUEUED
    assert 1 <= progress.position <= 3
    await setup.replica.allow(100)
    check([pb.GenerateChunk(progress=progress), *await collect(stream)])
    await asyncio.gather(*calls)


async def test_warming_where_no_replica_was_ever_met(create_setup: CreateSetup) -> None:
    setup = await create_setup()
    assert (await failure(setup.stub.Generate(request()))).reason == "MODEL_WARMING"
    stream = setup.stub.GenerateStream(request(progress=True))
    assert (await next_progress(stream)).stage == WARMING
    replica = FakeReplica()
    setup.replicas.append(replica)
    setup.addresses["replica-0"] = await replica.start()
    setup.gateway.set_replicas("test", setup.replica_addresses("replica-0"))
    chunks = await collect(stream)
    check(chunks, start=1)


async def test_moving_to_another_replica(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    stream = setup.stub.GenerateStream(request(progress=True))
    quiet = setup.stub.GenerateStream(request())
    await setup.replica.until(lambda: len(setup.replica.running) == 2)
    await setup.replica.allow(1)
    chunks = [await anext(aiter(stream))]
    while not chunks[-1].token_ids:
        chunks.append(await anext(aiter(stream)))
    await setup.replica.stop()
    await setup.wait_states("test", CONNECTING)
    moving = await anext(aiter(stream))
    assert moving.progress.stage == MOVING
    await setup.replica.start()
    await setup.replica.until(lambda: len(setup.replica.running) == 2)
    await setup.replica.allow(10)
    check([*chunks, moving, *await collect(stream)])
    assert not any(chunk.HasField("progress") for chunk in await collect(quiet))
    await setup.wait_states("test", READY)


async def test_what_is_wrong_is_said_all_the_same(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    refusal = await failure(collect(setup.stub.GenerateStream(request("", progress=True))))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")


async def test_a_client_that_goes_away_while_it_waits(create_setup: CreateSetup) -> None:
    setup = await create_setup()
    stream = setup.stub.GenerateStream(request(progress=True))
    assert (await next_progress(stream)).stage == WARMING
    stream.cancel()
    assert await setup.gateway.wait_idle(timeout_s=10)
