"""What a stream is resumed with."""

import pytest
from scripted_server import chunks_of

from cluster.client.received import Received
from cluster.client.requests import prompt_request
from cluster.errors import EngineFault
from cluster.v1 import inference_pb2 as pb


def create_received(**options):
    request = prompt_request("x", None, {"max_tokens": 9, **options})
    return request, Received(request)


def test_nothing_came_so_the_request_goes_as_it_was():
    request, received = create_received()
    assert received.next_request() == request
    received.add(pb.GenerateChunk(generation_id="gen-1", progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED)))
    assert not received.started
    assert received.next_request() == request


def test_what_came_goes_along():
    request, received = create_received(n=3)
    first, second, _ = chunks_of("ab", "cd", "ef", seed=2**64 - 1)
    first.fingerprint, second.fingerprint = b"one", b"another"
    received.add(first)
    received.add(second)
    other = pb.GenerateChunk(generation_id="gen-1", sequence=2, candidate_index=2, token_ids=[4, 5], text_delta="x")
    other.finish_reason = pb.FINISH_REASON_LENGTH
    received.add(other)
    resumed = received.next_request()
    assert resumed.resume == pb.Resume(
        generation_id="gen-1",
        seed=2**64 - 1,
        sequence=3,
        fingerprint=b"another",
        candidates=[
            pb.ResumedCandidate(index=0, token_ids=[0, 1]),
            pb.ResumedCandidate(index=2, token_ids=[4, 5], finish_reason=pb.FINISH_REASON_LENGTH),
        ],
    )
    resumed.ClearField("resume")
    assert resumed == request
    assert not request.HasField("resume")


def test_it_is_complete_when_every_candidate_is():
    _, received = create_received(n=2)
    *_, last = chunks_of("a")
    received.add(last)
    assert not received.complete
    last.candidate_index = 1
    received.add(last)
    assert received.complete


@pytest.mark.parametrize("order", [(0, 0), (0, 2), (1,)])
def test_a_token_twice_or_left_out_is_a_fault(order):
    _, received = create_received()
    chunks = chunks_of("a", "b", "c")
    with pytest.raises(EngineFault, match="went on at token"):
        for index in order:
            received.add(chunks[index])


def test_a_character_left_out_is_a_fault():
    _, received = create_received()
    first, second = chunks_of("ab", "c")
    received.add(first)
    second.text_offset = 1
    with pytest.raises(EngineFault, match="character 1, not at 1 and 2"):
        received.add(second)
