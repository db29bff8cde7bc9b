"""SamplingParams refuses what can never be sampled, and names the field."""

import math

import pytest

from cluster.core.request import MAX_STOP_STRINGS, SamplingParams
from cluster.errors import InvalidRequest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("n", 0),
        ("n", 17),
        ("stop", ("",)),
        ("stop", ("x",) * (MAX_STOP_STRINGS + 1)),
        ("stop_token_ids", tuple(range(129))),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101.0}),
    ],
)
def test_out_of_range_names_the_field(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == f"sampling.{field}"


def test_min_tokens_may_not_exceed_max_tokens():
    SamplingParams(min_tokens=3, max_tokens=3)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(min_tokens=4, max_tokens=3)


def test_limits_themselves_are_allowed():
    SamplingParams(temperature=0.0, top_p=1e-9, min_p=1.0, seed=2**64 - 1, logprobs=0, n=16, repetition_penalty=10.0)


def test_a_single_stop_string_is_one_string():
    assert SamplingParams(stop="end").stop == ("end",)


@pytest.mark.parametrize("params", [SamplingParams(stop_token_ids=(7,)), SamplingParams(logit_bias={7: 1.0})])
def test_vocabulary_bound(params):
    params.check_vocabulary(8)
    with pytest.raises(InvalidRequest, match="token 7"):
        params.check_vocabulary(7)
