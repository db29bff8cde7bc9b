"""What a client gets: whole answers, streams, and that both say the same."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fake_replica import EOS, FakeReplica, letters
from gateway_setup import READY, CreateSetup, collect, request

from cluster.observability.metrics import E2E_S, GENERATED_TOKENS, ITL_S, PROMPT_TOKENS, TTFT_S
from cluster.v1 import inference_pb2 as pb


def says(*texts: str):
    """A script that says ``texts[candidate]`` and then ends."""
    return lambda submit, candidate: [*texts[candidate].encode(), EOS]


def joined(chunks: list[pb.GenerateChunk], candidate: int = 0) -> pb.Candidate:
    """A candidate put together from a stream, with every promise about the chunks checked on the way."""
    whole = pb.Candidate(index=candidate)
    mine = [chunk for chunk in chunks if chunk.candidate_index == candidate]
    for chunk in mine:
        assert chunk.text_offset == len(whole.text)
        assert chunk.token_offset == len(whole.token_ids)
        whole.text += chunk.text_delta
        whole.token_ids.extend(chunk.token_ids)
        whole.logprobs.extend(chunk.logprobs)
    assert [bool(chunk.finish_reason) for chunk in mine] == [False] * (len(mine) - 1) + [True]
    assert [chunk.HasField("usage") for chunk in mine] == [False] * (len(mine) - 1) + [True]
    assert mine[-1].usage.completion_tokens == len(whole.token_ids)
    whole.finish_reason = mine[-1].finish_reason
    return whole


async def test_stream_has_each_token_and_character_once(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    chunks = await collect(setup.stub.GenerateStream(request("héllo", max_tokens=40)))
    whole = joined(chunks)
    expected = letters(setup.replica.submits[0], 0)
    assert list(whole.token_ids) == expected
    assert whole.text == bytes(expected).decode()
    assert whole.finish_reason == pb.FINISH_REASON_LENGTH
    assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.HasField("seed") for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert chunks[0].seed == 7
    assert len({chunk.generation_id for chunk in chunks}) == 1
    assert chunks[-1].usage.prompt_tokens == len("héllo".encode())


@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize("stop", [(), ("e", "xyz"), ("t w",), ("never",)])
async def test_generate_equals_stream(create_setup: CreateSetup, tokens_per_step: int, stop: tuple[str, ...]) -> None:
    texts = ("it was the best of times", "naïve — déjà vu: 東京 🙂 end", "three words x")
    setup = await create_setup(FakeReplica(says(*texts), tokens_per_step=tokens_per_step))
    message = request(max_tokens=100, n=3, logprobs=2, stop=stop)
    whole = await setup.stub.Generate(message)
    chunks = await collect(setup.stub.GenerateStream(message))
    assert list(whole.candidates) == [joined(chunks, candidate) for candidate in range(3)]
    assert whole.model == "test"
    assert whole.seed == 7
    assert whole.usage.completion_tokens == sum(len(candidate.token_ids) for candidate in whole.candidates)
    for candidate, text in zip(whole.candidates, texts, strict=True):
        ends = [text.index(s) for s in stop if s in text]
        assert candidate.text == text[: min(ends, default=len(text))]
        assert [position.chosen.token_id for position in candidate.logprobs] == list(candidate.token_ids)
        assert candidate.finish_reason == pb.FINISH_REASON_STOP


async def test_stop_string_ends_the_candidate_at_the_replica(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(says("one STOP two", "one two STOP", "no end"), gated=True))
    stream = setup.stub.GenerateStream(request(max_tokens=100, n=3, stop=("STOP",)))
    collecting = asyncio.create_task(collect(stream))
    await setup.replica.until(lambda: setup.replica.running)
    await setup.replica.allow(len("one STOP"))
    await setup.replica.until(lambda: setup.replica.cancels)
    assert [(cancel.id, cancel.candidate_index) for cancel in setup.replica.cancels] == [(1, 0)]
    assert {candidate for _, candidate in setup.replica.running} == {1}
    await setup.replica.allow(100)
    chunks = await collecting
    assert joined(chunks, 0).text == "one "
    assert bytes(joined(chunks, 0).token_ids) == b"one STOP"
    assert joined(chunks, 1).text == "one two "
    assert joined(chunks, 2).text == "no end"


async def test_tokens_after_the_stop_string_are_trimmed(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(says("one STOP two three"), tokens_per_step=11))
    whole = await setup.stub.Generate(request(max_tokens=100, stop=("STOP",), logprobs=0))
    (candidate,) = whole.candidates
    assert candidate.text == "one "
    assert bytes(candidate.token_ids) == b"one STOP"
    assert len(candidate.logprobs) == len(b"one STOP")
    assert whole.usage.completion_tokens == len(b"one STOP")


async def test_stop_token_is_reported_but_no_text(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(says("hi")))
    (candidate,) = (await setup.stub.Generate(request())).candidates
    assert candidate.text == "hi"
    assert list(candidate.token_ids) == [*b"hi", EOS]
    assert candidate.finish_reason == pb.FINISH_REASON_STOP


async def test_an_incomplete_character_at_the_end_is_flushed(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(says("東京")))
    (candidate,) = (await setup.stub.Generate(request(max_tokens=5))).candidates
    assert candidate.text.startswith("東")
    assert set(candidate.text[1:]) == {"\N{REPLACEMENT CHARACTER}"}


async def test_seed_is_drawn_and_reproduces(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    first = await setup.stub.Generate(request(seed=None, max_tokens=20))
    other = await setup.stub.Generate(request(seed=None, max_tokens=20))
    again = await setup.stub.Generate(request(seed=first.seed, max_tokens=20))
    assert first.candidates == again.candidates
    assert first.seed != other.seed


async def test_what_the_replica_is_told(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(max_model_len=64))
    message = request("hello", max_tokens=None, stop=("zzz",), priority=pb.PRIORITY_P2, temperature=0.5, cache_salt="é")
    await setup.stub.Generate(message, timeout=100)
    (submit,) = setup.replica.submits
    assert bytes(submit.prompt_token_ids) == b"hello"
    assert submit.sampling.max_tokens == 64 - 5
    assert submit.sampling.temperature == 0.5
    assert submit.sampling.seed == 7
    assert not submit.sampling.stop
    assert submit.priority == pb.PRIORITY_P2
    assert submit.cache_salt == "é"
    assert 90_000 < submit.deadline_ms < 105_000  # gRPC rounds timeouts up on the wire


async def test_max_tokens_is_clamped_to_the_context(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(max_model_len=64))
    whole = await setup.stub.Generate(request("hello", max_tokens=10_000))
    assert whole.usage.completion_tokens == 64 - 5


async def test_token_ids_and_chat_as_input(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    await setup.stub.Generate(request(token_ids=pb.TokenIds(ids=[3, 1, 2])))
    content = [pb.ContentPart(text="be "), pb.ContentPart(text="brief")]
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="system", content=content)])
    await setup.stub.Generate(request(chat=chat))
    assert list(setup.replica.submits[0].prompt_token_ids) == [3, 1, 2]
    rendered = bytes(setup.replica.submits[1].prompt_token_ids)
    assert rendered == b"system: be brief\nassistant:"
    count = await setup.stub.CountTokens(pb.CountTokensRequest(chat=chat))
    assert count.tokens == len(rendered)


async def test_model_may_be_omitted_where_one_is_served(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    assert (await setup.stub.Generate(request(model=""))).model == "test"
    assert (await setup.stub.Generate(request(model="test"))).model == "test"


async def test_models_are_described(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(), models=("test", "other"), ready=False)
    await setup.wait_states("test", READY)
    model, other = (await setup.stub.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.architecture, model.max_model_len, model.vocab_size, model.dtype) == (
        "test", "FakeForCausalLM", 512, 257, "float32",
    )  # fmt: skip
    (replica,) = model.replicas
    assert replica.replica_id == "replica-0"
    assert replica.state == pb.REPLICA_STATE_READY
    assert replica.kv_capacity_tokens == 1600
    assert replica.kv_usage == pytest.approx(0.25)
    assert replica.address == setup.addresses["replica-0"]
    assert (other.name, list(other.replicas)) == ("other", [])
    assert await setup.model() == model


async def test_no_initial_metadata_before_the_first_chunk(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    stream = setup.stub.GenerateStream(request())
    metadata = asyncio.create_task(stream.initial_metadata())
    await setup.replica.until(lambda: setup.replica.running)
    await setup.model()  # a whole round trip later
    assert not metadata.done()
    await setup.replica.allow(100)
    await collect(stream)
    await metadata


async def test_many_streams_at_once_do_not_mix(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    streams = [setup.stub.GenerateStream(request(seed=seed, max_tokens=50, n=2)) for seed in range(32)]
    for seed, chunks in enumerate(await asyncio.gather(*map(collect, streams))):
        submit = next(submit for submit in setup.replica.submits if submit.sampling.seed == seed)
        for candidate in range(2):
            assert list(joined(chunks, candidate).token_ids) == letters(submit, candidate)
    assert setup.replica.num_connections == 1


async def test_metrics(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    await setup.stub.Generate(request("hello", max_tokens=6))
    with pytest.raises(grpc.aio.AioRpcError):
        await setup.stub.Generate(request(temperature=-1.0))
    await setup.gateway.drain(timeout_s=10)
    metrics = setup.metrics
    assert metrics.outcomes() == ["OK", "INVALID_REQUEST"]
    assert sum(metrics.values(PROMPT_TOKENS)) == 5
    assert sum(metrics.values(GENERATED_TOKENS)) == 6
    assert len(metrics.values(TTFT_S)) == 1
    assert len(metrics.values(ITL_S)) == 1  # of an answer that comes whole, the mean
    assert len(metrics.values(E2E_S)) == 1


async def test_a_streams_gaps_are_those_between_its_messages(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    chunks = await collect(setup.stub.GenerateStream(request("hello", max_tokens=6)))
    await setup.gateway.drain(timeout_s=10)
    assert len(setup.metrics.values(ITL_S)) == len(chunks) - 1
