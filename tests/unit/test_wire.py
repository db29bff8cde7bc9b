"""What goes onto the wire comes back the same, exactly."""

import pytest

from cluster.core.request import FinishReason, Priority, SamplingParams
from cluster.core.step import SampledToken
from cluster.errors import InvalidRequest
from cluster.v1 import inference_pb2 as pb
from cluster.wire import (
    chat_to_proto,
    finish_reason_from_proto,
    finish_reason_to_proto,
    logprobs_from_proto,
    logprobs_to_proto,
    priority_from_proto,
    priority_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)

EVERYTHING_SET = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    max_tokens=77,
    min_tokens=3,
    stop=("\n\n", "é"),
    stop_token_ids=(5, 6),
    seed=2**64 - 1,
    presence_penalty=0.1,
    frequency_penalty=-0.1,
    repetition_penalty=1.1,
    logprobs=4,
    logit_bias={9: -1.7},
    ignore_eos=True,
    n=2,
)


@pytest.mark.parametrize("params", [SamplingParams(), EVERYTHING_SET])
def test_sampling_round_trips_bit_for_bit(params):
    message = pb.SamplingParams.FromString(sampling_to_proto(params).SerializeToString())
    assert sampling_from_proto(message) == params


def test_every_field_of_the_dataclass_is_on_the_wire():
    names = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert names == set(SamplingParams.__dataclass_fields__)


def test_unset_fields_take_the_defaults():
    assert sampling_from_proto(pb.SamplingParams()) == SamplingParams()


def test_a_zero_that_is_set_is_kept():
    assert sampling_from_proto(pb.SamplingParams(temperature=0.0)).temperature == 0.0
    with pytest.raises(InvalidRequest, match="max_tokens"):
        sampling_from_proto(pb.SamplingParams(max_tokens=0))


def test_priorities():
    assert [priority_from_proto(priority_to_proto(p)) for p in Priority] == list(Priority)
    assert priority_from_proto(pb.PRIORITY_UNSPECIFIED) is Priority.P1
    assert priority_from_proto(99) is None


def test_finish_reasons():
    assert [finish_reason_from_proto(finish_reason_to_proto(r)) for r in FinishReason] == list(FinishReason)
    assert finish_reason_to_proto(None) == pb.FINISH_REASON_UNSPECIFIED
    assert finish_reason_from_proto(pb.FINISH_REASON_UNSPECIFIED) is None


def test_logprobs():
    tokens = [SampledToken(token_id=3, logprob=-0.5, top_logprobs=((3, -0.5), (4, -1.25)))]
    assert logprobs_from_proto(logprobs_to_proto(tokens)) == tokens


def test_chat():
    message = chat_to_proto([{"role": "user", "content": "hi"}]).messages[0]
    assert (message.role, message.content[0].text) == ("user", "hi")
