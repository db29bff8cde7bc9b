"""A client goes on with a stream that was cut off, at any gateway, with nothing but what it has had."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fake_replica import EOS, FakeReplica, fingerprint, letters
from gateway_setup import READY, CreateSetup, Setup, collect, failure, request
from test_generate import joined

from cluster.errors import Overloaded
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import replica_pb2

TEXTS = ("it was the best of times", "naïve — déjà vu: 東京 🙂 end", "three words x")
STOPS = [(), ("e", "xyz"), ("t w",), ("st of t", "語")]


def says(*texts: str):
    return lambda submit, candidate: [*texts[candidate].encode(), EOS]


def resume_of(chunks: list[pb.GenerateChunk]) -> pb.Resume:
    """What a client knows after these chunks."""
    resume = pb.Resume()
    candidates: dict[int, pb.ResumedCandidate] = {}
    for chunk in chunks:
        resume.generation_id = chunk.generation_id
        resume.sequence = chunk.sequence + 1
        resume.fingerprint = chunk.fingerprint or resume.fingerprint
        if chunk.HasField("seed"):
            resume.seed = chunk.seed
        candidate = candidates.setdefault(chunk.candidate_index, pb.ResumedCandidate(index=chunk.candidate_index))
        candidate.token_ids.extend(chunk.token_ids)
        candidate.finish_reason = chunk.finish_reason
    resume.candidates.extend(candidates.values())
    return resume


def resumed(message: pb.GenerateRequest, resume: pb.Resume) -> pb.GenerateRequest:
    again = pb.GenerateRequest()
    again.CopyFrom(message)
    again.resume.CopyFrom(resume)
    return again


async def read(stream: grpc.aio.UnaryStreamCall, num_chunks: int) -> list[pb.GenerateChunk]:
    messages = aiter(stream)
    return [await anext(messages) for _ in range(num_chunks)]


async def cut_off(setup: Setup, message: pb.GenerateRequest, num_chunks: int) -> list[pb.GenerateChunk]:
    """The first chunks of a stream whose client then goes away."""
    stream = setup.stub.GenerateStream(message)
    chunks = await read(stream, num_chunks)
    stream.cancel()
    await setup.gateway.wait_idle(timeout_s=10)
    return chunks


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("num_chunks", [1, 2, 7, 20, 45])
async def test_another_gateway_sends_the_rest(
    create_setup: CreateSetup, stop: tuple[str, ...], num_chunks: int
) -> None:
    first = await create_setup(FakeReplica(says(*TEXTS)))
    second = await create_setup(FakeReplica(says(*TEXTS), tokens_per_step=3))
    message = request(max_tokens=100, n=3, logprobs=1, stop=stop, seed=None)
    expected = await first.stub.Generate(request(max_tokens=100, n=3, logprobs=1, stop=stop))
    chunks = await collect(first.stub.GenerateStream(message))
    had = chunks[: min(num_chunks, len(chunks))]
    rest = await collect(second.stub.GenerateStream(resumed(message, resume_of(had))))
    assert [joined(had + rest, candidate) for candidate in range(3)] == list(expected.candidates)
    assert [chunk.sequence for chunk in had + rest] == list(range(len(had + rest)))
    assert {chunk.generation_id for chunk in rest} <= {chunks[0].generation_id}
    if rest:
        assert rest[0].seed == chunks[0].seed
        assert rest[-1].usage.prompt_tokens == 5


async def test_resume_generation_is_the_same(create_setup: CreateSetup) -> None:
    first, second = await create_setup(FakeReplica()), await create_setup(FakeReplica())
    had = (await collect(first.stub.GenerateStream(request(max_tokens=20))))[:4]
    resume = pb.ResumeGenerationRequest(request=request(max_tokens=20), resume=resume_of(had))
    rest = await collect(second.stub.ResumeGeneration(resume))
    assert list(joined(had + rest).token_ids) == letters(first.replica.submits[0], 0)
    bare = await failure(collect(second.stub.ResumeGeneration(pb.ResumeGenerationRequest(request=request()))))
    assert (bare.code, bare.field) == (grpc.StatusCode.INVALID_ARGUMENT, "resume")


async def test_nothing_runs_where_nothing_is_missing(create_setup: CreateSetup) -> None:
    setup, other = await create_setup(FakeReplica()), await create_setup(FakeReplica())
    chunks = await collect(setup.stub.GenerateStream(request(n=2)))
    assert await collect(other.stub.GenerateStream(resumed(request(n=2), resume_of(chunks)))) == []
    # The end alone is missing: it needs no replica either.
    resume = resume_of(chunks)
    resume.candidates[1].finish_reason = 0
    (end,) = await collect(other.stub.GenerateStream(resumed(request(n=2), resume)))
    assert (end.candidate_index, end.finish_reason) == (1, pb.FINISH_REASON_LENGTH)
    assert (list(end.token_ids), end.token_offset, end.text_delta, end.text_offset) == ([], 8, "", 8)
    assert not other.replica.submits


async def test_it_joins_what_still_runs_here(create_setup: CreateSetup) -> None:
    """The connection broke and the gateway has not noticed yet."""
    setup = await create_setup(FakeReplica(gated=True))
    message = request(max_tokens=10)
    stream = setup.stub.GenerateStream(message)
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(4)
    had: list[pb.GenerateChunk] = []
    while sum(len(chunk.token_ids) for chunk in had) < 4:
        had += await read(stream, 1)
    lost, had = had[-1:], had[:-1]  # it was sent, but never came
    if not had:
        had, lost = lost, []
    again = setup.stub.GenerateStream(resumed(message, resume_of(had)))
    rest = await read(again, 1) if lost else []
    stream.cancel()
    await setup.replica.allow(10)
    rest += await collect(again)
    assert list(joined(had + rest).token_ids) == letters(setup.replica.submits[0], 0)
    assert len(setup.replica.submits) == 1


async def test_a_resumed_stream_is_resumed_again(create_setup: CreateSetup) -> None:
    setups = [await create_setup(FakeReplica()) for _ in range(3)]
    message = request(max_tokens=30, stop=["zz"])
    had: list[pb.GenerateChunk] = []
    for setup in setups:
        stream = setup.stub.GenerateStream(resumed(message, resume_of(had)) if had else message)
        chunks = await collect(stream)
        had += chunks if setup is setups[-1] else chunks[:5]
    assert list(joined(had).token_ids) == letters(setups[0].replica.submits[0], 0)


async def test_it_stays_with_its_model(create_setup: CreateSetup) -> None:
    first = await create_setup(FakeReplica(fingerprint=fingerprint(model_digest="old")))
    had = (await collect(first.stub.GenerateStream(request())))[:2]
    assert replica_pb2.Fingerprint.FromString(had[0].fingerprint).model_digest == "old"
    assert not had[1].fingerprint
    second = await create_setup(
        FakeReplica(replica_id="replica-0", fingerprint=fingerprint(model_digest="new")),
        FakeReplica(replica_id="replica-1", fingerprint=fingerprint(model_digest="old")),
    )
    await second.wait_states("test", READY, READY)
    for _ in range(4):
        await collect(second.stub.GenerateStream(resumed(request(), resume_of(had))))
    assert [len(replica.submits) for replica in second.replicas] == [0, 4]


async def test_one_that_finds_the_queue_full_waits(create_setup: CreateSetup) -> None:
    """It was admitted once, so it is not refused as a new request is."""
    setup = await create_setup(FakeReplica(gated=True))
    (token,) = letters(replica_pb2.Submit(sampling=pb.SamplingParams(seed=7, max_tokens=8)), 0)[:1]
    had = [pb.GenerateChunk(generation_id="gen-1", token_ids=[token], text_delta=chr(token), seed=7)]
    admission = setup.gateway._catalog.lookup("test").admission
    enter, refused = admission.enter, asyncio.Event()

    def refuse(**arguments: object) -> None:
        refused.set()
        raise Overloaded("full", retry_after_s=1.0)

    admission.enter = refuse
    assert (await failure(setup.stub.Generate(request()))).reason == "OVERLOADED"
    stream = asyncio.create_task(collect(setup.stub.GenerateStream(resumed(request(), resume_of(had)))))
    await refused.wait()
    await setup.model()
    assert not stream.done()
    admission.enter = enter
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(10)
    assert list(joined(had + await stream).token_ids) == letters(setup.replica.submits[0], 0)


@pytest.mark.parametrize(
    ("resume", "field"),
    [
        (pb.Resume(generation_id="a\nb", seed=7), "resume.generation_id"),
        (pb.Resume(generation_id="x" * 129, seed=7), "resume.generation_id"),
        (pb.Resume(generation_id="gen-1", seed=8), "resume.seed"),
        (pb.Resume(seed=7, candidates=[pb.ResumedCandidate(index=2)]), "resume.candidates[0].index"),
        (pb.Resume(seed=7, candidates=[pb.ResumedCandidate()] * 2), "resume.candidates[1].index"),
        (pb.Resume(seed=7, candidates=[pb.ResumedCandidate(token_ids=[999])]), "resume.candidates[0].token_ids"),
        (pb.Resume(seed=7, candidates=[pb.ResumedCandidate(token_ids=[1] * 9)]), "resume.candidates[0].token_ids"),
        (pb.Resume(seed=7, candidates=[pb.ResumedCandidate(finish_reason=9)]), "resume.candidates[0].finish_reason"),
        (pb.Resume(seed=7, candidates=[pb.ResumedCandidate(token_ids=b"abc")]), "resume.candidates"),
        (pb.Resume(seed=7, fingerprint=b"\xff"), "resume.fingerprint"),
    ],
)
async def test_what_fits_no_stream_is_refused(create_setup: CreateSetup, resume: pb.Resume, field: str) -> None:
    setup = await create_setup(FakeReplica())
    refusal = await failure(collect(setup.stub.GenerateStream(resumed(request(n=2, stop=["b"]), resume))))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_whole_answer_is_asked_for_anew(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    refusal = await failure(setup.stub.Generate(resumed(request(), pb.Resume(seed=7))))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "resume")
