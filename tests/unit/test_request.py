"""SamplingParams refuses what can never be sampled, and names the field."""

import math

import pytest

from cluster.core.request import MAX_STOP_STRINGS, SamplingParams
from cluster.errors import InvalidRequest

INTEGERS = ("top_k", "max_tokens", "min_tokens", "seed", "logprobs", "n")
FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


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


@pytest.mark.parametrize(
    ("field", "wrong"),
    [(field, wrong) for field in INTEGERS for wrong in (1.5, 1.0, math.nan, "1", True, [1])]
    + [("stop_token_ids", (wrong,)) for wrong in (1.0, "a", True, None, -1, 2**32)]
    + [("stop_token_ids", "ab")]
    + [("logit_bias", {wrong: 1.0}) for wrong in (1.5, "a", True, None, -1, 2**32)]
    + [("logit_bias", {1: wrong}) for wrong in ("a", True, None, 10**400)],
)
def test_what_is_no_whole_number_is_refused_with_the_field(field, wrong):
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: wrong})
    assert caught.value.field == f"sampling.{field}"


@pytest.mark.parametrize("field", FLOATS)
def test_a_number_with_a_fraction_may_be_given_as_an_integer(field):
    assert getattr(SamplingParams(**{field: 1}), field) == 1


def test_min_tokens_may_not_exceed_max_tokens():
    SamplingParams(min_tokens=3, max_tokens=3)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(min_tokens=4, max_tokens=3)


def test_limits_themselves_are_allowed():
    SamplingParams(temperature=0.0, top_p=1e-9, min_p=1.0, seed=2**64 - 1, logprobs=0, n=16, repetition_penalty=10.0)
    SamplingParams(stop_token_ids=(0, 2**32 - 1), logit_bias={0: 100, 2**32 - 1: -100})


def test_a_single_stop_string_is_one_string():
    assert SamplingParams(stop="end").stop == ("end",)


@pytest.mark.parametrize("params", [SamplingParams(stop_token_ids=(7,)), SamplingParams(logit_bias={7: 1.0})])
def test_vocabulary_bound(params):
    params.check_vocabulary(8)
    with pytest.raises(InvalidRequest, match="token 7"):
        params.check_vocabulary(7)
