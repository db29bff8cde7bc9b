"""Costs before they are known, and how long backlogs last."""

from __future__ import annotations

import math
import random

import pytest

from cluster.core.config import ClassesConfig
from cluster.core.drain_forecast import drain
from cluster.core.request import Priority
from cluster.core.service_rate import ServiceRate
from cluster.core.token_estimate import BytesPerToken, CompletionLength

P0, P1, P2, P3 = Priority


def share(priority: Priority) -> float:
    return ClassesConfig().by_priority()[priority].share


@pytest.mark.parametrize("bytes_per_token", [1.0, 3.7, 12.0])
def test_few_texts_have_fewer_tokens_than_their_bytes_say(bytes_per_token: float):
    rng = random.Random(0)
    estimate = BytesPerToken()
    texts = []
    for _ in range(2000):
        num_tokens = rng.randint(50, 5000)
        texts.append((int(num_tokens * bytes_per_token * rng.lognormvariate(0, 0.15)), num_tokens))
        estimate.observe(*texts[-1])
    above = sum(estimate.num_tokens(num_bytes) > num_tokens for num_bytes, num_tokens in texts[1000:])
    assert above <= 100
    num_bytes, num_tokens = (sum(each) for each in zip(*texts, strict=True))
    assert 0.5 < estimate.num_tokens(num_bytes) / num_tokens < 1.0


def test_short_texts_teach_nothing():
    estimate = BytesPerToken()
    before = estimate.bound
    for _ in range(1000):
        estimate.observe(20, 20)
        estimate.observe(0, 0)
    assert estimate.bound == before
    assert estimate.num_tokens(0) == 1


def test_completions_are_expected_to_be_as_long_as_they_were():
    lengths = CompletionLength()
    for _ in range(500):
        lengths.observe(120, 2, 3.0)
    assert lengths.expected(None, 1) == pytest.approx(60, abs=2)
    assert lengths.expected(1000, 3) == pytest.approx(180, abs=6)
    assert lengths.expected(16, 1) == 16
    assert lengths.expected_s(20) == pytest.approx(1.0)


def test_a_rate_is_of_the_time_in_which_somebody_waits():
    rate, now = ServiceRate(), 0.0
    for _ in range(20):
        for _ in range(100):
            rate.advance(now, busy=True)
            now += 0.01
            rate.advance(now, busy=True)
            rate.serve(5)
        rate.advance(now, busy=False)
        now += 60.0
    assert rate.tokens_per_s == pytest.approx(500.0, rel=0.01)


def test_a_rate_is_not_known_before_anybody_has_waited():
    rate = ServiceRate()
    rate.advance(0.0, busy=False)
    rate.serve(100)
    assert rate.tokens_per_s is None


@pytest.mark.parametrize(
    ("priority", "num_tokens", "backlogs", "expected_s"),
    [
        (P0, 100, {}, 1.0),
        (P3, 100, {}, 1.0),
        (P3, 10, {P0: 1000}, 1.0),
        (P0, 90, {P3: 1000}, 1.0),
        (P0, 70, {P1: 1000}, 1.0),
        (P1, 30, {P0: 1000}, 1.0),
        (P3, 110, {P0: 90}, 2.0),  # a tenth for a second, then all
        (P3, 0, {P0: 90}, 0.0),
    ],
)
def test_backlogs_are_served_by_shares(
    priority: Priority, num_tokens: int, backlogs: dict[Priority, int], expected_s: float
):
    seconds, served = drain(num_tokens, priority, backlogs, share=share, tokens_per_s=100.0)
    assert seconds == pytest.approx(expected_s)
    assert served[priority] == pytest.approx(num_tokens)
    assert sum(served.values()) == pytest.approx(100.0 * expected_s)


def test_without_any_service_it_takes_for_ever():
    assert drain(1, P1, {}, share=share, tokens_per_s=0.0)[0] == math.inf
    assert drain(0, P1, {}, share=share, tokens_per_s=0.0)[0] == 0.0
