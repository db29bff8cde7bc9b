"""How generations end before their time: cancelled, late, unread, or their replica gone."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fake_replica import FakeReplica, letters
from gateway_setup import CONNECTING, DRAINING, READY, CreateSetup, Setup, collect, failure, request

from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc, replica_pb2


async def first_chunk(setup: Setup, stream: grpc.aio.UnaryStreamCall) -> pb.GenerateChunk:
    """Lets the gated replica make one step and reads what comes of it."""
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(1)
    return await anext(aiter(stream))


@pytest.mark.parametrize("by", ["generation_id", "request_id"])
async def test_cancel_generation(create_setup: CreateSetup, by: str) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    stream = setup.stub.GenerateStream(request(request_id="mine"))
    chunk = await first_chunk(setup, stream)
    name = chunk.generation_id if by == "generation_id" else "mine"
    cancel = pb.CancelGenerationRequest(generation_id=name)
    assert (await setup.stub.CancelGeneration(cancel)).cancelled
    end = await failure(collect(stream))
    assert (end.code, end.reason) == (grpc.StatusCode.CANCELLED, "CANCELLED")
    await setup.replica.until(lambda: not setup.replica.running)
    assert [message.id for message in setup.replica.cancels] == [1]
    assert not (await setup.stub.CancelGeneration(cancel)).cancelled
    assert setup.metrics.outcomes() == ["CANCELLED"]


async def test_cancel_a_unary_call_from_elsewhere(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    call = asyncio.ensure_future(failure(setup.stub.Generate(request(request_id="mine"))))
    await setup.replica.until(lambda: setup.replica.running)
    await setup.stub.CancelGeneration(pb.CancelGenerationRequest(generation_id="mine"))
    assert (await call).code == grpc.StatusCode.CANCELLED


async def test_cancel_of_what_never_was(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    call = await failure(setup.stub.CancelGeneration(pb.CancelGenerationRequest(generation_id="nope")))
    assert (call.code, call.reason) == (grpc.StatusCode.NOT_FOUND, "GENERATION_NOT_FOUND")


@pytest.mark.parametrize("after_first_chunk", [False, True])
async def test_a_client_that_goes_away(create_setup: CreateSetup, after_first_chunk: bool) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    stream = setup.stub.GenerateStream(request(n=3))
    if after_first_chunk:
        await first_chunk(setup, stream)
    await setup.replica.until(lambda: setup.replica.running)
    stream.cancel()
    await setup.replica.until(lambda: not setup.replica.running)
    assert [(message.id, message.HasField("candidate_index")) for message in setup.replica.cancels] == [(1, False)]
    assert await setup.gateway.drain(timeout_s=10)
    assert setup.metrics.outcomes() == ["CANCELLED"]


async def test_a_connection_that_breaks(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{setup.port}", options=options) as channel:
        call = channel.unary_stream("/cluster.v1.InferenceService/GenerateStream")(request().SerializeToString())
        await setup.replica.until(lambda: setup.replica.running)
    assert call.done()
    await setup.replica.until(lambda: not setup.replica.running)


async def test_the_clients_deadline(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    end = await failure(setup.stub.Generate(request(), timeout=0.1))
    assert end.code == grpc.StatusCode.DEADLINE_EXCEEDED
    await setup.replica.until(lambda: not setup.replica.running and setup.replica.submits)


async def test_the_default_deadline(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True), default_deadline_s=0.1)
    end = await failure(setup.stub.Generate(request()))
    assert (end.code, end.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    await setup.replica.until(lambda: not setup.replica.running)
    assert setup.replica.submits[0].deadline_ms <= 100
    assert setup.metrics.outcomes() == ["DEADLINE_EXCEEDED"]


async def test_cancels_that_race_with_the_end(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    outcomes = set()
    for attempt in range(60):
        stream = setup.stub.GenerateStream(request(request_id=f"r{attempt}", n=2, max_tokens=1 + attempt % 7))
        collecting = asyncio.create_task(collect(stream))
        for _ in range(attempt % 20):
            await asyncio.sleep(0)
        cancel = setup.stub.CancelGeneration(pb.CancelGenerationRequest(generation_id=f"r{attempt}"))
        _, chunks = await asyncio.gather(cancel, collecting, return_exceptions=True)
        if isinstance(chunks, grpc.aio.AioRpcError):
            assert chunks.code() == grpc.StatusCode.CANCELLED
            outcomes.add("cancelled")
        else:
            assert sum(bool(chunk.finish_reason) for chunk in chunks) == 2
            outcomes.add("finished")
    assert "finished" in outcomes
    assert len(setup.metrics.outcomes()) == 60


async def test_a_slow_reader_is_cut_off_and_others_are_not(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(max_model_len=200_000, tokens_per_step=2000), max_unread_tokens=10_000)
    # Fixed flow control windows: else gRPC widens them until all of this fits.
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0))
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{setup.port}", options=options)
    slow = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request(max_tokens=190_000, seed=1))
    await setup.replica.until(lambda: setup.replica.cancels)  # nobody reads: the gateway ended it
    assert setup.replica.cancels[0].id == 1
    quick = await collect(setup.stub.GenerateStream(request(max_tokens=190_000, seed=2)))
    assert sum(len(chunk.token_ids) for chunk in quick) == 190_000
    received: list[int] = []

    async def read() -> None:
        async for chunk in slow:
            assert chunk.token_offset == len(received)
            received.extend(chunk.token_ids)

    end = await failure(read())
    assert (end.code, end.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")
    assert end.retry_after_s is None  # the work was done: to do it again helps nobody
    assert received == letters(setup.replica.submits[0], 0)[: len(received)]
    await channel.close()


async def test_a_replica_lost_before_the_first_token_is_replaced(create_setup: CreateSetup) -> None:
    first, second = FakeReplica(gated=True), FakeReplica(replica_id="replica-1", gated=True)
    setup = await create_setup(first, second)
    await setup.wait_states("test", READY, READY)
    call = asyncio.ensure_future(setup.stub.Generate(request(max_tokens=5)))
    async with asyncio.timeout(10):
        while not (first.running or second.running):
            await setup.model()
    dying, other = (first, second) if first.running else (second, first)
    await dying.stop()
    await other.until(lambda: other.running)
    await other.allow(5)
    whole = await call
    assert list(whole.candidates[0].token_ids) == letters(other.submits[0], 0)
    assert setup.metrics.outcomes() == ["OK"]


async def three_replicas(create_setup: CreateSetup) -> tuple[Setup, list[FakeReplica]]:
    replicas = [FakeReplica(replica_id=f"replica-{index}", gated=True) for index in range(3)]
    setup = await create_setup(*replicas)
    await setup.wait_states("test", READY, READY, READY)
    return setup, replicas


async def test_an_engine_that_fails_before_the_first_token_is_replaced_once(create_setup: CreateSetup) -> None:
    setup, replicas = await three_replicas(create_setup)
    for replica in replicas:
        replica.refusal = replica_pb2.Failure(reason="ENGINE_FAULT", message="the device is gone")
    end = await failure(setup.stub.Generate(request()))
    assert (end.code, end.reason, end.message) == (grpc.StatusCode.INTERNAL, "ENGINE_FAULT", "the device is gone")
    assert sorted(len(replica.submits) for replica in replicas) == [0, 1, 1]


async def test_another_replica_takes_over_from_an_engine_that_fails(create_setup: CreateSetup) -> None:
    first, second = FakeReplica(), FakeReplica(replica_id="replica-1")
    setup = await create_setup(first, second)
    await setup.wait_states("test", READY, READY)
    first.refusal = replica_pb2.Failure(reason="ENGINE_FAULT", message="the device is gone")
    await asyncio.gather(*(setup.stub.Generate(request()) for _ in range(8)))
    assert first.submits
    assert len(second.submits) == 8


async def test_an_engine_that_fails_after_the_first_token_says_why(create_setup: CreateSetup) -> None:
    first, second = FakeReplica(gated=True), FakeReplica(replica_id="replica-1", gated=True)
    setup = await create_setup(first, second)
    await setup.wait_states("test", READY, READY)
    stream = setup.stub.GenerateStream(request())
    async with asyncio.timeout(10):
        while not (first.running or second.running):
            await setup.model()
    running, other = (first, second) if first.running else (second, first)
    await running.allow(1)
    await anext(aiter(stream))
    await running.fail(running.submits[0].id, "the device is gone")
    end = await failure(collect(stream))
    assert (end.code, end.reason, end.message) == (grpc.StatusCode.INTERNAL, "ENGINE_FAULT", "the device is gone")
    assert not other.submits


async def test_waiting_for_a_replica_ends_with_the_deadline_or_the_client(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True), default_deadline_s=1.0)
    late = asyncio.ensure_future(failure(setup.stub.Generate(request())))
    gone = setup.stub.Generate(request())
    await setup.replica.until(lambda: len(setup.replica.running) == 2)
    await setup.replica.stop()
    await setup.wait_states("test", CONNECTING)
    gone.cancel()
    assert (await late).reason == "DEADLINE_EXCEEDED"
    setup.replica.submits.clear()
    await setup.replica.start()
    await setup.wait_serving()
    assert not setup.replica.submits


async def test_a_dying_engine_hands_back_what_another_takes_over(create_setup: CreateSetup) -> None:
    first, second = FakeReplica(gated=True), FakeReplica(replica_id="replica-1", gated=True)
    setup = await create_setup(first, second)
    await setup.wait_states("test", READY, READY)
    calls = [asyncio.ensure_future(setup.stub.Generate(request(max_tokens=4))) for _ in range(6)]
    async with asyncio.timeout(10):
        while len(first.running) + len(second.running) < 6:
            await setup.model()
    await first.allow(2)
    await first.hand_back("rank 1 was killed")
    await second.until(lambda: len(second.running) == 6)
    await second.allow(4)
    assert all(len(whole.candidates[0].token_ids) == 4 for whole in await asyncio.gather(*calls))
    assert setup.metrics.outcomes() == ["OK"] * 6


async def test_a_replica_that_comes_back_is_used_again(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    await setup.stub.Generate(request())
    await setup.replica.stop()
    await setup.wait_states("test", CONNECTING)
    await setup.replica.start()
    await setup.wait_serving()
    await setup.stub.Generate(request())
    assert setup.replica.num_connections == 2


@pytest.mark.parametrize("reason", ["DRAINING", "OVERLOADED"])
async def test_what_one_replica_refuses_another_takes(create_setup: CreateSetup, reason: str) -> None:
    first, second = FakeReplica(), FakeReplica(replica_id="replica-1")
    setup = await create_setup(first, second)
    await setup.wait_states("test", READY, READY)
    first.refusal = replica_pb2.Failure(reason=reason, message="not now")
    await asyncio.gather(*(setup.stub.Generate(request()) for _ in range(8)))
    assert first.submits
    assert len(second.submits) == 8


async def test_a_draining_replica_finishes_what_it_has(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    stream = setup.stub.GenerateStream(request(max_tokens=5))
    await first_chunk(setup, stream)
    await setup.replica.drain()
    await setup.wait_states("test", DRAINING)
    assert (await failure(setup.stub.Generate(request()))).code == grpc.StatusCode.UNAVAILABLE
    await setup.replica.allow(4)
    assert (await collect(stream))[-1].finish_reason == pb.FINISH_REASON_LENGTH
