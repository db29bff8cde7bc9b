"""Shares that hold, targets that order, and nobody who waits for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.class_policy import ClassPolicy
from cluster.core.config import ClassConfig, ClassesConfig
from cluster.core.request import Priority
from cluster.errors import ConfigError

P0, P1, P2, P3 = Priority
BURST = 100


def create_policy(*, burst_tokens: int = BURST, **classes: ClassConfig) -> ClassPolicy:
    return ClassPolicy(ClassesConfig(**classes), burst_tokens=burst_tokens)


def flood(policy: ClassPolicy, sizes: Mapping[Priority, int], num_tokens: int) -> Counter[Priority]:
    """Serves classes that always wait, all since the same time, in pieces of ``sizes``; what each got."""
    served: Counter[Priority] = Counter()
    while served.total() < num_tokens:
        priority = policy.pick(dict.fromkeys(sizes, 0.0))
        policy.charge(priority, sizes[priority], sizes)
        served[priority] += sizes[priority]
    return served


def alone(policy: ClassPolicy, priority: Priority, num_tokens: int) -> None:
    flood(policy, {priority: 10}, num_tokens)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({P0: 10, P1: 10, P2: 10, P3: 10}, {P0: 0.4, P1: 0.3, P2: 0.2, P3: 0.1}),
        ({P0: 90, P1: 7, P2: 33, P3: 100}, {P0: 0.4, P1: 0.3, P2: 0.2, P3: 0.1}),
        ({P0: 10, P3: 10}, {P0: 0.9, P3: 0.1}),
        ({P1: 10, P2: 50, P3: 10}, {P1: 0.7, P2: 0.2, P3: 0.1}),
        ({P2: 10, P3: 100}, {P2: 0.9, P3: 0.1}),
        ({P3: 10}, {P3: 1.0}),
    ],
)
def test_each_gets_its_share_and_the_most_urgent_what_is_left(
    sizes: dict[Priority, int], expected: dict[Priority, float]
):
    served = flood(create_policy(), sizes, 100_000)
    assert {priority: served[priority] / served.total() for priority in sizes} == pytest.approx(expected, abs=0.005)


def test_a_charge_beyond_the_burst_counts_whole():
    served = flood(create_policy(burst_tokens=10), {P0: 10, P3: 1000}, 1_000_000)
    assert served[P3] / served.total() == pytest.approx(0.1, abs=0.002)


def test_a_class_within_its_share_goes_before_any_flood():
    policy = create_policy()
    for _ in range(1000):
        for _ in range(13):  # of 10 tokens each, between two of its requests: P0 is below its 40 %
            policy.charge(P3, 10, {P3})
        assert policy.pick({P0: 5.0, P3: 0.0}) is P0
        policy.charge(P0, 80, {P0, P3})


def test_a_class_beyond_its_share_goes_first_while_nobody_is_owed():
    policy = create_policy()
    alone(policy, P3, 10_000)
    served = 0
    while policy.pick({P0: 0.0, P3: 0.0}) is P0:
        policy.charge(P0, 10, {P0, P3})
        served += 10
    assert served == BURST / 0.1  # until P3 has made up for what it had borrowed


def test_a_class_that_does_not_wait_saves_nothing_up():
    policy = create_policy()
    alone(policy, P1, 10_000)
    assert policy.balance(P3) == 0.0
    served = flood(policy, {P1: 10, P3: 10}, 2_000)
    assert served[P3] == pytest.approx(200, abs=20)


def test_what_was_borrowed_while_nobody_else_waited_is_forgiven():
    policy = create_policy()
    alone(policy, P3, 1_000_000)
    served = flood(policy, {P0: 10, P3: 10}, 2_000)
    assert served[P3] >= 90


def test_a_small_charge_does_not_forgive_a_large_one():
    policy = create_policy()
    policy.charge(P3, 1000, {P0, P3})
    policy.charge(P3, 10, {P0, P3})
    assert policy.balance(P3) == pytest.approx(-900)


def test_debts_are_paid_while_a_class_does_not_wait():
    policy = create_policy()
    policy.charge(P0, 50, {P0, P3})
    assert policy.balance(P0) == pytest.approx(-30)
    alone(policy, P1, 100)
    assert policy.balance(P0) == 0.0


@pytest.mark.parametrize(("age_s", "first"), [(0.0, P0), (0.29, P0), (0.31, P1)])
def test_of_two_within_their_shares_the_earlier_deadline_goes_first(age_s: float, first: Priority):
    assert create_policy().pick({P0: 10.0, P1: 10.0 - age_s}) is first


def test_a_class_without_a_target_comes_after_those_with_one():
    assert create_policy().pick({P2: 1e6, P3: 0.0}) is P2
    without = ClassConfig(share=0.2)
    assert create_policy(p1=without, p2=without).pick({P2: 0.0, P1: 5.0, P3: 0.0}) is P1


def test_an_overdue_class_goes_before_all_others():
    policy = create_policy()
    policy.charge(P1, 999, {P3})
    assert not policy.is_overdue(P3) and policy.is_within_share(P3)
    assert policy.pick({P0: 0.0, P3: 0.0}) is P0
    policy.charge(P1, 1, {P3})
    assert policy.is_overdue(P3)
    assert policy.pick({P0: 0.0, P3: 0.0}) is P3


def test_a_refund_takes_back_a_charge():
    policy = create_policy()
    policy.charge(P0, 20, {P0, P3})
    before = [policy.balance(priority) for priority in (P0, P3)]
    policy.charge(P0, 50, {P0, P3})
    policy.refund(P0, 50, {P0, P3})
    assert [policy.balance(priority) for priority in (P0, P3)] == pytest.approx(before)


def test_a_refund_gives_nobody_a_debt_or_savings():
    policy = create_policy()
    policy.charge(P0, 50, {P0})  # nobody else waits, nobody earns
    policy.refund(P0, 50, {P0})
    assert all(policy.balance(priority) == 0.0 for priority in (P1, P2, P3))
    assert policy.balance(P0) == pytest.approx(0.0)
    policy.refund(P0, 10_000, ())
    assert all(policy.balance(priority) <= 0.0 for priority in Priority)
    policy.refund(P0, 10_000, Priority)
    assert policy.balance(P0) == BURST


@pytest.mark.parametrize("delay", [0, 1, 20])
def test_shares_are_by_what_was_used_whenever_refunds_come(delay: int):
    policy = create_policy()
    used: Counter[Priority] = Counter()
    to_refund: list[tuple[Priority, int]] = []
    for _ in range(20_000):
        priority = policy.pick(dict.fromkeys(Priority, 0.0))
        num_used = {P0: 5, P1: 10, P2: 1, P3: 7}[priority]
        policy.charge(priority, 10, Priority)
        to_refund.append((priority, 10 - num_used))
        used[priority] += num_used
        if len(to_refund) > delay:
            policy.refund(*to_refund.pop(0), Priority)
    assert [used[priority] / used.total() for priority in Priority] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.01)


def test_without_refunds_shares_would_be_by_what_was_asked_for():
    policy = create_policy()
    used: Counter[Priority] = Counter()
    for _ in range(20_000):
        priority = policy.pick(dict.fromkeys(Priority, 0.0))
        policy.charge(priority, 10, Priority)
        used[priority] += {P0: 5, P1: 10, P2: 1, P3: 7}[priority]
    assert used[P1] / used.total() > 0.4


@given(
    rounds=st.lists(st.tuples(st.sets(st.sampled_from([P0, P1, P2])), st.integers(1, 200)), min_size=50, max_size=300)
)
def test_whoever_waits_gets_its_share_whatever_the_others_do(rounds: Iterable[tuple[set[Priority], int]]):
    policy = create_policy()
    total = served = 0
    for others, num_tokens in rounds:
        waiting = {P3, *others}
        priority = policy.pick(dict.fromkeys(waiting, 0.0))
        policy.charge(priority, num_tokens, waiting)
        total += num_tokens
        served += num_tokens * (priority is P3)
        assert served >= 0.1 * total - 2 * BURST - 200


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_shares_that_mean_nothing_are_refused(share: float):
    with pytest.raises(ConfigError) as caught:
        ClassConfig(share=share)
    assert caught.value.field == "share"


@pytest.mark.parametrize("target_ms", [0.0, -1.0, float("inf"), float("nan")])
def test_targets_that_mean_nothing_are_refused(target_ms: float):
    with pytest.raises(ConfigError) as caught:
        ClassConfig(share=0.1, target_ms=target_ms)
    assert caught.value.field == "target_ms"


def test_shares_beyond_the_whole_are_refused():
    with pytest.raises(ConfigError, match=r"add up to 1\.5"):
        ClassesConfig(p0=ClassConfig(share=0.9))
    ClassesConfig(p0=ClassConfig(share=0.1))
