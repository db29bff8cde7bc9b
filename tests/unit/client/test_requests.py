"""The options of a call are the sampling parameters and a few of its own."""

from cluster.client.requests import GenerateOptions, prompt_request
from cluster.core.request import SamplingParams
from cluster.v1 import inference_pb2 as pb

OWN = {"model", "priority", "deadline_s", "request_id", "labels", "cache_salt"}


def test_every_sampling_parameter_is_an_option():
    assert set(GenerateOptions.__annotations__) == OWN | set(SamplingParams.__dataclass_fields__)


def test_a_plain_call_leaves_the_names_to_the_server():
    request = prompt_request("x", None, {})
    assert (request.model, request.request_id, request.priority) == ("", "", pb.PRIORITY_P1)


def test_keyword_arguments_override_and_leave_the_given_parameters_alone():
    sampling = SamplingParams(temperature=0.5, seed=3)
    request = prompt_request("x", sampling, {"temperature": 0.0, "stop": "\n"})
    assert (request.sampling.temperature, request.sampling.seed, list(request.sampling.stop)) == (0.0, 3, ["\n"])
    assert sampling.temperature == 0.5
