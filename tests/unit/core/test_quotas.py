"""What tenants may use, and when they may come back."""

from __future__ import annotations

import pytest

from cluster.core.config import TenantConfig
from cluster.core.quotas import Quotas
from cluster.core.token_bucket import TokenBucket
from cluster.errors import QuotaExceeded


def test_a_bucket_lets_its_rate_through():
    bucket = TokenBucket(rate=5.0, capacity=10.0)
    taken, now = 0, 0.0
    while now < 100.0:
        if bucket.missing_s(1, now) == 0:
            bucket.take(1, now)
            taken += 1
        now += 0.01
    assert taken == pytest.approx(510, abs=2)


def test_a_bucket_says_when_it_will_hold_enough():
    bucket = TokenBucket(rate=5.0, capacity=10.0)
    bucket.take(10, now=3.0)
    assert bucket.missing_s(4, now=3.0) == pytest.approx(0.8)
    assert bucket.missing_s(4, now=3.5) == pytest.approx(0.3)
    assert bucket.missing_s(4, now=3.8) == pytest.approx(0.0)


def test_a_full_bucket_lets_more_than_it_holds_through_and_then_has_a_debt():
    bucket = TokenBucket(rate=5.0, capacity=10.0)
    assert bucket.missing_s(35, now=0.0) == 0
    bucket.take(35, now=0.0)
    assert bucket.missing_s(5, now=0.0) == pytest.approx(6.0)


def test_a_part_of_a_bucket_holds_and_fills_as_much_less():
    bucket = TokenBucket(rate=8.0, capacity=16.0)
    bucket.scale(0.25, now=0.0)
    bucket.take(4, now=0.0)
    assert bucket.missing_s(4, now=0.0) == pytest.approx(2.0)
    bucket.scale(1.0, now=1.0)
    assert bucket.missing_s(10, now=1.0) == pytest.approx(1.0)


def test_requests_per_second():
    quotas = Quotas([TenantConfig(name="a", requests_per_s=2)])
    quotas.enter("a", 10, now=0.0), quotas.enter("a", 10, now=0.0)
    with pytest.raises(QuotaExceeded, match="2 requests per second") as caught:
        quotas.enter("a", 10, now=0.0)
    assert caught.value.retry_after_s == pytest.approx(0.5)
    quotas.enter("a", 10, now=0.5)
    quotas.enter("b", 10, now=0.5)


def test_tokens_per_minute_are_charged_corrected_and_given_back():
    quotas = Quotas([TenantConfig(name="a", tokens_per_min=600)])
    lease = quotas.enter("a", 500, now=0.0)
    with pytest.raises(QuotaExceeded) as caught:
        quotas.enter("a", 200, now=0.0)
    assert caught.value.retry_after_s == pytest.approx(10.0)
    lease.correct(550, now=0.0)
    with pytest.raises(QuotaExceeded) as caught:
        quotas.enter("a", 200, now=0.0)
    assert caught.value.retry_after_s == pytest.approx(15.0)
    lease.release(300, now=0.0)
    quotas.enter("a", 300, now=0.0)


def test_requests_at_once():
    quotas = Quotas([TenantConfig(name="a", max_concurrent_requests=2)])
    leases = [quotas.enter("a", 10, now=0.0) for _ in range(2)]
    with pytest.raises(QuotaExceeded, match="2 of its requests run"):
        quotas.enter("a", 10, now=0.0)
    leases[0].release(10, now=0.0)
    quotas.enter("a", 10, now=0.0)


def test_a_request_that_others_refused_costs_nothing():
    quotas = Quotas([TenantConfig(name="a", requests_per_s=1, tokens_per_min=60, max_concurrent_requests=1)])
    for _ in range(10):
        quotas.enter("a", 60, now=0.0).undo(now=0.0)
    quotas.enter("a", 60, now=0.0)


def test_what_is_refused_by_one_limit_is_not_charged_to_the_others():
    quotas = Quotas([TenantConfig(name="a", requests_per_s=1, tokens_per_min=60)])
    lease = quotas.enter("a", 60, now=0.0)
    with pytest.raises(QuotaExceeded, match="tokens per minute"):
        quotas.enter("a", 10, now=1.0)
    lease.release(0, now=1.0)
    quotas.enter("a", 10, now=1.0)


def test_each_gateway_enforces_its_part_as_they_come_and_go():
    num_gateways = 4
    quotas = Quotas([TenantConfig(name="a", max_concurrent_requests=8)], lambda: num_gateways)
    quotas.enter("a", 1, now=0.0), quotas.enter("a", 1, now=0.0)
    with pytest.raises(QuotaExceeded, match="25%"):
        quotas.enter("a", 1, now=0.0)
    num_gateways = 1
    for _ in range(6):
        quotas.enter("a", 1, now=0.0)
    with pytest.raises(QuotaExceeded):
        quotas.enter("a", 1, now=0.0)


def test_four_gateways_together_let_the_rate_through():
    all_quotas = [Quotas([TenantConfig(name="a", requests_per_s=40)], lambda: 4) for _ in range(4)]
    passed = 0
    for tick in range(1000):
        for quotas in all_quotas:
            try:
                quotas.enter("a", 1, now=tick / 100).release(1, now=tick / 100)
                passed += 1
            except QuotaExceeded:
                pass
    assert passed == pytest.approx(400 + 40, abs=8)


def test_those_that_are_not_listed_have_the_same_limits_each():
    quotas = Quotas([TenantConfig(name="*", max_concurrent_requests=1), TenantConfig(name="free")])
    quotas.enter("a", 1, now=0.0), quotas.enter("b", 1, now=0.0)
    with pytest.raises(QuotaExceeded):
        quotas.enter("a", 1, now=0.0)
    quotas.enter("free", 1, now=0.0), quotas.enter("free", 1, now=0.0)


def test_tenants_that_are_gone_are_forgotten():
    quotas = Quotas([TenantConfig(name="*", requests_per_s=1, max_concurrent_requests=1)])
    running = quotas.enter("stays", 1, now=0.0)
    for index in range(20_000):
        quotas.enter(f"tenant-{index}", 1, now=index / 100).release(1, now=index / 100)
    assert len(quotas._accounts) <= 4097
    with pytest.raises(QuotaExceeded):
        quotas.enter("stays", 1, now=300.0)
    running.release(1, now=300.0)
