"""From token deltas to chunks: what is not read in time is merged, and nothing is lost by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_replica import EOS
from gateway_setup import RecordingSink

from cluster.gateway.candidate import Candidate
from cluster.gateway.generation import Generation
from cluster.gateway.reader import Reader
from cluster.gateway.write_pacer import WritePacer
from cluster.text.text_stream import TextStream
from cluster.text.tokenizer import Tokenizer
from cluster.v1 import inference_pb2 as pb
from cluster.v1.replica_pb2 import TokenDelta


class Reading:
    """A candidate and the one who reads it."""

    def __init__(self, candidate: Candidate) -> None:
        generation = Generation("gen-1", metrics=RecordingSink())
        generation.num_prompt_tokens = 5
        generation.candidates = [candidate]
        self.candidate = candidate
        self.reader = Reader("test", generation, streams=True, max_unread_tokens=1000, pacer=WritePacer())
        self.reader.begin()

    def push(self, delta: TokenDelta) -> None:
        self.candidate.push(delta)

    def take(self) -> pb.GenerateChunk:
        (chunk,) = self.reader.take()
        return chunk


def create_candidate(checkpoint: Path, *stop: str, min_tokens: int = 0) -> Reading:
    text_stream = TextStream(Tokenizer.from_checkpoint(checkpoint), stop, min_tokens=min_tokens)
    return Reading(Candidate(0, text_stream))


def logprobs(*token_ids: int) -> list[pb.PositionLogprobs]:
    return [pb.PositionLogprobs(chosen=pb.TokenLogprob(token_id=token_id)) for token_id in token_ids]


async def test_unread_deltas_are_one_chunk(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint)
    assert not candidate.reader.take()
    for text in (b"ab", "é".encode(), b"c"):
        candidate.push(TokenDelta(token_ids=text, logprobs=logprobs(*text)))
    chunk = candidate.take()
    assert (chunk.generation_id, chunk.candidate_index) == ("gen-1", 0)
    assert (chunk.text_delta, chunk.text_offset) == ("abéc", 0)
    assert (bytes(chunk.token_ids), chunk.token_offset) == ("abéc".encode(), 0)
    assert [position.chosen.token_id for position in chunk.logprobs] == list(chunk.token_ids)
    assert not candidate.reader.take()
    candidate.push(TokenDelta(token_ids=b"d"))
    chunk = candidate.take()
    # Offsets count code points and tokens, not bytes.
    assert (chunk.text_delta, chunk.text_offset, chunk.token_offset) == ("d", 4, 5)


async def test_text_is_held_while_tokens_go_on(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint, "STOP")
    candidate.push(TokenDelta(token_ids=b"aST"))
    chunk = candidate.take()
    assert (chunk.text_delta, bytes(chunk.token_ids)) == ("a", b"aST")
    candidate.push(TokenDelta(token_ids=b"AY"))
    chunk = candidate.take()
    assert (chunk.text_delta, chunk.text_offset, chunk.token_offset) == ("STAY", 1, 3)
    candidate.push(TokenDelta(token_ids=b"ST", finish_reason=pb.FINISH_REASON_LENGTH))
    chunk = candidate.take()
    assert (chunk.text_delta, chunk.text_offset) == ("ST", 5)
    assert chunk.finish_reason == pb.FINISH_REASON_LENGTH


async def test_the_last_chunk_has_reason_and_usage(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint)
    candidate.push(TokenDelta(token_ids=b"a", cached_tokens=4))
    chunk = candidate.take()
    assert (chunk.finish_reason, chunk.HasField("usage")) == (pb.FINISH_REASON_UNSPECIFIED, False)
    candidate.push(TokenDelta(token_ids=[ord("b"), EOS], finish_reason=pb.FINISH_REASON_STOP))
    chunk = candidate.take()
    assert (chunk.text_delta, list(chunk.token_ids)) == ("b", [ord("b"), EOS])
    assert chunk.finish_reason == pb.FINISH_REASON_STOP
    assert chunk.usage == pb.Usage(prompt_tokens=5, cached_tokens=4, completion_tokens=3)


async def test_an_ordinary_stop_token_is_no_text_and_completes_no_stop_string(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint, "ab")
    candidate.push(TokenDelta(token_ids=b"ab", finish_reason=pb.FINISH_REASON_STOP))
    chunk = candidate.take()
    assert (chunk.text_delta, bytes(chunk.token_ids)) == ("a", b"ab")


async def test_no_stop_string_before_min_tokens(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint, "x", min_tokens=3)
    candidate.push(TokenDelta(token_ids=b"xxxx"))
    assert candidate.candidate.finish_reason == pb.FINISH_REASON_STOP
    chunk = candidate.take()
    assert (chunk.text_delta, bytes(chunk.token_ids)) == ("xx", b"xxx")


async def test_line_ends_stay_what_they_are(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint)
    candidate.push(TokenDelta(token_ids=b"a\r\nb\rc\n"))
    assert candidate.take().text_delta == "a\r\nb\rc\n"


async def test_readers_come_and_go_at_their_own_pace(checkpoint: Path) -> None:
    first = create_candidate(checkpoint)
    first.push(TokenDelta(token_ids=b"ab"))
    assert first.take().text_delta == "ab"
    second = Reading(first.candidate)
    first.push(TokenDelta(token_ids=b"c"))
    assert (second.take().text_delta, first.take().text_delta) == ("abc", "c")
    first.push(TokenDelta(token_ids="é".encode(), finish_reason=pb.FINISH_REASON_LENGTH))
    for reading, start in ((first, 3), (second, 3)):
        chunk = reading.take()
        assert (chunk.text_delta, chunk.text_offset, chunk.token_offset) == ("é", start, start)
        assert chunk.usage.completion_tokens == 5


@pytest.mark.parametrize("cut", range(1, 9))
async def test_resumed_at_any_place_it_says_the_rest(checkpoint: Path, cut: int) -> None:
    """A stop string and a character across the cut."""
    tokens = "aé ST🙂STOPb".encode()
    whole, resumed = create_candidate(checkpoint, "STOP"), create_candidate(checkpoint, "STOP")
    whole.push(TokenDelta(token_ids=tokens[:cut]))
    before = whole.take()
    whole.push(TokenDelta(token_ids=tokens[cut:]))
    after = whole.take()
    resumed.candidate.resume(list(tokens[:cut]), 0, max_tokens=100)
    resumed.reader.begin()
    assert not resumed.reader.take()
    resumed.push(TokenDelta(token_ids=tokens[cut:]))
    again = resumed.take()
    assert before.text_delta + again.text_delta == "aé ST🙂"
    assert (again.text_delta, again.text_offset) == (after.text_delta, len(before.text_delta))
    assert (list(again.token_ids), again.token_offset) == (list(tokens[cut:-1]), cut)
    assert again.finish_reason == pb.FINISH_REASON_STOP
    assert again.usage == after.usage


async def test_resumed_at_its_last_token_it_only_has_to_end(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint)
    candidate.candidate.resume(list("aé".encode()[:-1]), 0, max_tokens=2)
    candidate.reader.begin()
    chunk = candidate.take()
    assert (chunk.text_delta, chunk.text_offset) == ("\ufffd", 1)
    assert (list(chunk.token_ids), chunk.token_offset) == ([], 2)
    assert chunk.finish_reason == pb.FINISH_REASON_LENGTH


async def test_of_a_candidate_that_had_its_end_nothing_comes_again(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint)
    candidate.candidate.resume([ord("a"), EOS], pb.FINISH_REASON_STOP, max_tokens=100)
    candidate.reader.begin()
    assert not candidate.reader.take()
