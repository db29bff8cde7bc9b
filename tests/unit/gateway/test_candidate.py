"""From token deltas to chunks: what is not read in time is merged, and nothing is lost by it."""

from __future__ import annotations

from pathlib import Path

from fake_replica import EOS

from cluster.gateway.candidate import Candidate
from cluster.text.text_stream import TextStream
from cluster.text.tokenizer import Tokenizer
from cluster.v1 import inference_pb2 as pb
from cluster.v1.replica_pb2 import TokenDelta


def create_candidate(checkpoint: Path, *stop: str, min_tokens: int = 0) -> Candidate:
    text_stream = TextStream(Tokenizer.from_checkpoint(checkpoint), stop, min_tokens=min_tokens)
    return Candidate("gen-1", 2, 5, text_stream)


def logprobs(*token_ids: int) -> list[pb.PositionLogprobs]:
    return [pb.PositionLogprobs(chosen=pb.TokenLogprob(token_id=token_id)) for token_id in token_ids]


def test_unread_deltas_are_one_chunk(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint)
    assert not candidate.readable
    for text in (b"ab", "é".encode(), b"c"):
        candidate.push(TokenDelta(token_ids=text, logprobs=logprobs(*text)))
    assert candidate.unread_tokens == 5
    chunk = candidate.take()
    assert (chunk.generation_id, chunk.candidate_index) == ("gen-1", 2)
    assert (chunk.text_delta, chunk.text_offset) == ("abéc", 0)
    assert (bytes(chunk.token_ids), chunk.token_offset) == ("abéc".encode(), 0)
    assert [position.chosen.token_id for position in chunk.logprobs] == list(chunk.token_ids)
    assert (candidate.readable, candidate.unread_tokens) == (False, 0)
    candidate.push(TokenDelta(token_ids=b"d"))
    chunk = candidate.take()
    # Offsets count code points and tokens, not bytes.
    assert (chunk.text_delta, chunk.text_offset, chunk.token_offset) == ("d", 4, 5)


def test_text_is_held_while_tokens_go_on(checkpoint: Path) -> None:
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


def test_the_last_chunk_has_reason_and_usage(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint)
    candidate.push(TokenDelta(token_ids=b"a", cached_tokens=4))
    chunk = candidate.take()
    assert (chunk.finish_reason, chunk.HasField("usage")) == (pb.FINISH_REASON_UNSPECIFIED, False)
    candidate.push(TokenDelta(token_ids=[ord("b"), EOS], finish_reason=pb.FINISH_REASON_STOP))
    chunk = candidate.take()
    assert (chunk.text_delta, list(chunk.token_ids)) == ("b", [ord("b"), EOS])
    assert chunk.finish_reason == pb.FINISH_REASON_STOP
    assert chunk.usage == pb.Usage(prompt_tokens=5, cached_tokens=4, completion_tokens=3)


def test_an_ordinary_stop_token_is_no_text_and_completes_no_stop_string(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint, "ab")
    candidate.push(TokenDelta(token_ids=b"ab", finish_reason=pb.FINISH_REASON_STOP))
    chunk = candidate.take()
    assert (chunk.text_delta, bytes(chunk.token_ids)) == ("a", b"ab")


def test_no_stop_string_before_min_tokens(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint, "x", min_tokens=3)
    candidate.push(TokenDelta(token_ids=b"xxxx"))
    assert candidate.finished
    chunk = candidate.take()
    assert (chunk.text_delta, bytes(chunk.token_ids)) == ("xx", b"xxx")


def test_dropped_is_forgotten(checkpoint: Path) -> None:
    candidate = create_candidate(checkpoint)
    candidate.push(TokenDelta(token_ids=b"abc"))
    candidate.drop()
    assert (candidate.readable, candidate.unread_tokens) == (False, 0)
