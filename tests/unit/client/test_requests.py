"""The options of a call are the sampling parameters and a few of its own."""

import pytest

from cluster.client.requests import GenerateOptions, prompt_request
from cluster.core.request import SamplingParams
from cluster.errors import InvalidRequest
from cluster.v1 import inference_pb2 as pb

OWN = {"model", "priority", "deadline_s", "request_id", "labels", "cache_salt", "max_ttft_ms", "progress", "session_id"}


def test_every_sampling_parameter_is_an_option():
    assert set(GenerateOptions.__annotations__) == OWN | set(SamplingParams.__dataclass_fields__)


def test_every_call_has_a_name_of_its_own():
    first, second = (prompt_request("x", None, {}) for _ in range(2))
    assert first.request_id and first.request_id != second.request_id
    assert (first.model, first.priority, first.progress, first.HasField("max_ttft_ms")) == (
        "",
        pb.PRIORITY_P1,
        False,
        False,
    )
    assert prompt_request("x", None, {"request_id": "mine"}).request_id == "mine"


@pytest.mark.parametrize("value", [0, -1, 2**32])
def test_a_time_to_first_token_is_a_positive_number(value):
    with pytest.raises(InvalidRequest) as caught:
        prompt_request("x", None, {"max_ttft_ms": value})
    assert caught.value.field == "max_ttft_ms"


def test_keyword_arguments_override_and_leave_the_given_parameters_alone():
    sampling = SamplingParams(temperature=0.5, seed=3)
    request = prompt_request("x", sampling, {"temperature": 0.0, "stop": "\n"})
    assert (request.sampling.temperature, request.sampling.seed, list(request.sampling.stop)) == (0.0, 3, ["\n"])
    assert sampling.temperature == 0.5
