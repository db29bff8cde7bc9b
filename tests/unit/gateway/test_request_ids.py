"""The same request under the same name runs once: it is joined while it runs, and replayed for a while after."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fake_replica import FakeReplica
from gateway_setup import CreateSetup, collect, failure, request
from test_generate import joined
from test_resume import resume_of, resumed

from cluster.gateway.replay import ReplayConfig, ReplayWindow
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import replica_pb2


async def test_the_same_request_joins_from_its_beginning(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    message = request(max_tokens=20, n=2, stop=["q"], logprobs=1, request_id="mine", seed=None)
    first = asyncio.create_task(collect(setup.stub.GenerateStream(message)))
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(6)
    await setup.replica.until(lambda: not setup.replica._allowed)
    second = asyncio.create_task(collect(setup.stub.GenerateStream(message)))
    third = asyncio.ensure_future(setup.stub.Generate(message))
    await setup.model()
    await setup.replica.allow(100)
    streams = await asyncio.gather(first, second)
    whole = await third
    for chunks in streams:
        assert [joined(chunks, candidate) for candidate in range(2)] == list(whole.candidates)
        assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
        assert chunks[0].seed == whole.seed
    assert len({chunk.generation_id for chunks in streams for chunk in chunks} | {whole.generation_id}) == 1
    assert len(setup.replica.submits) == 1


async def test_one_that_ended_is_replayed(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    message = request(max_tokens=20, n=2, logprobs=1, request_id="mine", seed=None)
    whole = await setup.stub.Generate(message)
    assert await setup.stub.Generate(message) == whole
    chunks = await collect(setup.stub.GenerateStream(message))
    assert [joined(chunks, candidate) for candidate in range(2)] == list(whole.candidates)
    rest = await collect(setup.stub.GenerateStream(resumed(message, resume_of(chunks[:1]))))
    assert [joined(chunks[:1] + rest, candidate) for candidate in range(2)] == list(whole.candidates)
    assert len(setup.replica.submits) == 1
    assert not (await setup.stub.CancelGeneration(pb.CancelGenerationRequest(generation_id="mine"))).cancelled


@pytest.mark.parametrize("ended", [False, True])
async def test_another_request_of_that_name_is_refused(create_setup: CreateSetup, ended: bool) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    running = asyncio.create_task(collect(setup.stub.GenerateStream(request(request_id="mine"))))
    await setup.replica.until(lambda: setup.replica.running)
    if ended:
        await setup.replica.allow(8)
        await running
    for other in (request("other", request_id="mine"), request(max_tokens=9, request_id="mine")):
        refusal = await failure(setup.stub.Generate(other))
        assert (refusal.code, refusal.reason, refusal.field) == (
            grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS", "request_id",
        )  # fmt: skip
    await setup.replica.allow(8)
    await running


async def test_it_runs_until_the_last_of_its_readers_has_gone(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    streams = [setup.stub.GenerateStream(request(request_id="mine")) for _ in range(3)]
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(1)
    for stream in streams:
        await anext(aiter(stream))
    streams[0].cancel()
    streams[2].cancel()
    await setup.replica.allow(1)
    await anext(aiter(streams[1]))
    assert setup.replica.running
    streams[1].cancel()
    await setup.replica.until(lambda: not setup.replica.running)
    assert await setup.gateway.wait_idle(timeout_s=10)
    # It never ended, so there is nothing to replay.
    again = asyncio.ensure_future(setup.stub.Generate(request(request_id="mine")))
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(8)
    await again
    assert len(setup.replica.submits) == 2


async def test_the_first_reader_may_leave_while_it_waits(create_setup: CreateSetup) -> None:
    setup = await create_setup()
    message = request(request_id="mine", progress=True)
    streams = [setup.stub.GenerateStream(message) for _ in range(2)]
    waiting = [await anext(aiter(stream)) for stream in streams]
    assert [chunk.progress.stage for chunk in waiting] == [pb.Progress.STAGE_WARMING] * 2
    streams[0].cancel()
    await setup.model()
    replica = FakeReplica()
    setup.replicas.append(replica)
    setup.addresses["replica-0"] = await replica.start()
    setup.gateway.set_replicas("test", setup.replica_addresses("replica-0"))
    chunks = [chunk for chunk in await collect(streams[1]) if not chunk.HasField("progress")]
    assert len(joined(chunks).token_ids) == 8
    assert {chunk.generation_id for chunk in waiting} == {chunks[0].generation_id}


async def test_a_later_deadline_counts(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    short = asyncio.ensure_future(failure(setup.stub.Generate(request(request_id="mine"), timeout=0.3)))
    await setup.replica.until(lambda: setup.replica.running)
    long = asyncio.ensure_future(setup.stub.Generate(request(request_id="mine"), timeout=30))
    assert (await short).code == grpc.StatusCode.DEADLINE_EXCEEDED
    await setup.replica.allow(8)
    await long


async def test_only_the_resumed_may_join_what_was_resumed(create_setup: CreateSetup) -> None:
    """What came before is not here."""
    other, setup = await create_setup(FakeReplica()), await create_setup(FakeReplica(gated=True))
    message = request(request_id="mine")
    had = (await collect(other.stub.GenerateStream(message)))[:3]
    for began in (False, True):
        stream = setup.stub.GenerateStream(resumed(message, resume_of(had)))
        if began:
            await setup.replica.until(lambda: setup.replica.running)
        else:
            await setup.model()
        refusal = await failure(setup.stub.Generate(message))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.ALREADY_EXISTS, "request_id")
        wrong = resume_of(had)
        wrong.candidates[0].token_ids[0] += 1
        refusal = await failure(collect(setup.stub.GenerateStream(resumed(message, wrong))))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "resume.candidates[0].token_ids")
        again = setup.stub.GenerateStream(resumed(message, resume_of(had)))
        await setup.replica.until(lambda: setup.replica.running)
        if began:
            await setup.replica.allow(8)
            assert joined(had + await collect(stream)) == joined(had + await collect(again))
        else:
            stream.cancel()
            again.cancel()
            await setup.gateway.wait_idle(timeout_s=10)


async def test_cancelled_for_one_is_cancelled_for_all(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    calls = [asyncio.ensure_future(failure(setup.stub.Generate(request(request_id="mine")))) for _ in range(2)]
    await setup.replica.until(lambda: setup.replica.running)
    assert (await setup.stub.CancelGeneration(pb.CancelGenerationRequest(generation_id="mine"))).cancelled
    assert [(await call).code for call in calls] == [grpc.StatusCode.CANCELLED] * 2


async def test_failures_are_not_replayed(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(), max_prompt_bytes=100)
    setup.replica.refusal = replica_pb2.Failure(reason="OVERLOADED", message="not now")
    assert (await failure(setup.stub.Generate(request(request_id="mine")))).reason == "OVERLOADED"
    setup.replica.refusal = None
    await setup.stub.Generate(request(request_id="mine"))


async def test_what_does_not_fit_the_window_runs_again(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(), replay=ReplayConfig(max_generations=1))
    for name in ("one", "two", "two", "one"):
        await setup.stub.Generate(request(request_id=name))
    assert len(setup.replica.submits) == 3


def test_the_window_is_bounded_in_time_number_and_bytes() -> None:
    now = 0.0
    window: ReplayWindow[str] = ReplayWindow(
        ReplayConfig(window_s=10, max_generations=3, max_bytes=100), clock=lambda: now
    )
    window.put("a", "A", 10)
    now = 5.0
    window.put("b", "B", 10)
    assert (window.get("a"), window.get("b")) == ("A", "B")
    now = 10.0
    assert (window.get("a"), window.get("b")) == (None, "B")
    for name in "cde":
        window.put(name, name.upper(), 10)
    assert [window.get(name) for name in "bcde"] == [None, "C", "D", "E"]
    window.put("f", "F", 85)
    assert [window.get(name) for name in "cdef"] == [None, None, "E", "F"]
    window.put("g", "G", 101)
    assert [window.get(name) for name in "efg"] == ["E", "F", None]
    window.put("f", "F2", 20)
    assert (window.get("f"), len(window)) == ("F2", 2)
    off: ReplayWindow[str] = ReplayWindow(ReplayConfig(window_s=0), clock=lambda: now)
    off.put("a", "A", 1)
    assert off.get("a") is None
