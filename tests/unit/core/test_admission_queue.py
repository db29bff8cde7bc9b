"""Bounds that hold, turns by classes and deadlines, forecasts that come true."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.admission import AdmissionQueue
from cluster.core.config import AdmissionConfig, ClassConfig, ClassesConfig
from cluster.core.fair_queue import QueuedRequest
from cluster.core.request import Priority
from cluster.errors import Overloaded

P0, P1, P2, P3 = Priority


def create_queue(
    *, classes: ClassesConfig | None = None, known_rate: float | None = None, **bounds: int
) -> AdmissionQueue:
    return AdmissionQueue(AdmissionConfig(**bounds), classes or ClassesConfig(), known_rate=lambda: known_rate)


def add(queue: AdmissionQueue, priority: Priority = P1, num_tokens: int = 10, **request: Any) -> QueuedRequest:
    """Adds one that nobody has to go for."""
    added, pushed_out = add_pushing(queue, priority, num_tokens, **request)
    assert pushed_out == []
    return added


def add_pushing(
    queue: AdmissionQueue, priority: Priority = P1, num_tokens: int = 10, *, ready: bool = True, **request: Any
) -> tuple[QueuedRequest, list[QueuedRequest]]:
    now = request.setdefault("now", 0.0)
    added, pushed_out = queue.add(**{"priority": priority, "tenant": "", "num_tokens": num_tokens, **request})
    if ready:
        queue.make_ready(added, now)
    queue.check_integrity()
    return added, pushed_out


def take_all(queue: AdmissionQueue, now: float = 0.0) -> list[QueuedRequest]:
    taken = []
    while (request := queue.pop(now, lambda priority: True)) is not None:
        taken.append(request)
    queue.check_integrity()
    return taken


def test_a_turn_is_given_by_class_and_to_classes_with_room_alone():
    queue = create_queue()
    low, high = add(queue, P3), add(queue, P0)
    assert queue.pop(0.0, lambda priority: False) is None
    assert queue.pop(0.0, lambda priority: priority is P3) is low
    assert queue.pop(0.0, lambda priority: priority is P3) is None
    assert take_all(queue) == [high]


def test_within_a_class_the_earliest_deadline_goes_first():
    queue = create_queue()
    plain = add(queue, P2, now=0.0)  # due at 1.0
    soon = add(queue, P2, now=0.1, max_ttft_s=0.2)
    late = add(queue, P2, now=0.2)
    expiring = add(queue, P2, now=0.3, deadline=0.5)
    assert take_all(queue) == [soon, expiring, plain, late]


def test_who_has_no_deadline_is_not_overtaken_for_ever():
    queue = create_queue()
    patient = add(queue, P3, now=0.0)
    early = add(queue, P3, now=10.0, deadline=25.0)
    late = add(queue, P3, now=10.0, deadline=31.0)
    assert take_all(queue) == [early, patient, late]


def test_an_earlier_deadline_puts_a_class_first_among_those_within_their_shares():
    queue = create_queue()
    plain = add(queue, P0, now=0.0)  # due at 0.2
    hurried = add(queue, P1, now=0.0, max_ttft_s=0.1)
    assert take_all(queue) == [hurried, plain]


def test_refunds_keep_the_shares_by_what_was_used():
    queue = create_queue(max_queued_requests=10_000)
    used = Counter[Priority]()
    for _ in range(5000):
        for priority in Priority:
            while queue.backlog(0.0)[priority].requests < 2:
                add(queue, priority, num_tokens=400)
        request = queue.pop(0.0, lambda priority: True)
        assert request is not None
        num_used = {P0: 400, P1: 40, P2: 100, P3: 900}[request.priority]
        queue.settle(request, num_used)
        used[request.priority] += num_used
    assert [used[priority] / used.total() for priority in Priority] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.01)


def test_a_full_queue_takes_no_more_of_the_same_class():
    queue = create_queue(max_queued_requests=3)
    for _ in range(3):
        add(queue, P3)
    with pytest.raises(Overloaded, match="of class P3 3 requests with 30 tokens"):
        add(queue, P3)
    assert len(queue) == 3


def test_the_newest_of_the_lowest_class_gives_way():
    queue = create_queue(max_queued_requests=4)
    add(queue, P2), add(queue, P3)
    newest = add(queue, P3, now=1.0)
    add(queue, P2)
    _, pushed_out = add_pushing(queue, P0)
    assert pushed_out == [newest] and not newest.is_queued
    assert len(queue) == 4


def test_room_in_tokens_is_made_by_as_many_as_it_takes_and_only_if_it_helps():
    queue = create_queue(max_queued_tokens=1000)
    for index in range(9):
        add(queue, P3, num_tokens=100, now=float(index))
    with pytest.raises(Overloaded):
        add_pushing(queue, P2, num_tokens=950)  # P3 keeps its share of 100
        add_pushing(queue, P2, num_tokens=100)
    assert queue.backlog(0.0)[P3].tokens in (0, 100, 900)
    queue = create_queue(max_queued_tokens=1000)
    for index in range(9):
        add(queue, P3, num_tokens=100, now=float(index))
    add(queue, P0, num_tokens=50)
    _, pushed_out = add_pushing(queue, P0, num_tokens=350)
    assert [request.arrival for request in pushed_out] == [8.0, 7.0, 6.0]


def test_a_class_keeps_its_share_of_the_queue_whatever_comes():
    queue = create_queue(max_queued_requests=20)
    for _ in range(20):
        add(queue, P0)
    for expected in range(1, 3):  # a tenth of 20
        _, pushed_out = add_pushing(queue, P3)
        assert [request.priority for request in pushed_out] == [P0]
        assert queue.backlog(0.0)[P3].requests == expected
    with pytest.raises(Overloaded):
        add(queue, P3)
    with pytest.raises(Overloaded):
        add(queue, P0)


def test_classes_have_bounds_of_their_own():
    classes = ClassesConfig(p1=ClassConfig(share=0.3, max_queued_requests=2, max_queued_tokens=100))
    queue = create_queue(classes=classes)
    add(queue, P1), add(queue, P1)
    with pytest.raises(Overloaded):
        add(queue, P1)
    add(queue, P2)
    take_all(queue)
    add(queue, P1, num_tokens=60)
    with pytest.raises(Overloaded):
        add(queue, P1, num_tokens=60)


def test_a_class_of_which_nothing_waits_takes_one_of_any_size():
    queue = create_queue(max_queued_tokens=100)
    large = add(queue, P1, num_tokens=5000)
    with pytest.raises(Overloaded):
        add(queue, P1, num_tokens=1)
    queue.resize(large, 9000)
    assert take_all(queue) == [large]


def test_a_tenant_that_has_more_gives_way_to_one_that_has_less():
    queue = create_queue(max_queued_requests=10)
    for index in range(10):
        add(queue, P1, tenant="many", now=float(index))
    for index in range(5):
        _, pushed_out = add_pushing(queue, P1, tenant="few")
        assert [request.arrival for request in pushed_out] == [9.0 - index]
    with pytest.raises(Overloaded):
        add(queue, P1, tenant="few")


def test_a_correction_upwards_is_refused_where_it_does_not_fit():
    queue = create_queue(max_queued_tokens=100)
    other, request = add(queue, num_tokens=50), add(queue, num_tokens=40, ready=False)
    assert queue.resize(request, 50) == []
    assert queue.resize(request, 10) == []
    with pytest.raises(Overloaded):
        queue.resize(request, 60)
    assert not request.is_queued
    assert take_all(queue) == [other]


def test_a_correction_upwards_pushes_lower_classes_out():
    queue = create_queue(max_queued_tokens=100)
    low, _, request = add(queue, P3, 50), add(queue, P0, 5), add(queue, P0, 40, ready=False)
    assert queue.resize(request, 70) == [low]


def served(queue: AdmissionQueue, *, tokens_per_s: float, seconds: float = 20.0) -> float:
    """Serves a backlog of P1 at a rate; the time at its end."""
    now, num = 0.0, int(seconds * tokens_per_s / 10)
    for _ in range(num):
        add(queue, P1, now=0.0)
    for _ in range(num):
        now += 10 / tokens_per_s
        assert queue.pop(now, lambda priority: True) is not None
    return now


def test_waits_are_forecast_by_the_measured_rate():
    queue = create_queue()
    assert queue.wait_s(add(queue)) == 0.0
    assert queue.wait_s(add(queue)) is None
    take_all(queue)
    now = served(queue, tokens_per_s=100.0)
    assert queue.tokens_per_s == pytest.approx(100.0, rel=0.02)
    for _ in range(50):
        add(queue, P1, now=now)
    last = add(queue, P1, now=now)
    assert queue.wait_s(last) == pytest.approx(5.0, rel=0.05)
    assert queue.position(last) == 50
    urgent = add(queue, P0, now=now)
    assert queue.wait_s(urgent) == pytest.approx(0.1, rel=0.05)  # whoever goes next
    low = add(queue, P3, now=now)
    queue.remove(urgent, now)
    assert queue.wait_s(low) == pytest.approx(0.1, rel=0.05)
    assert queue.wait_s(add(queue, P3, now=now)) == pytest.approx(10 / 10.0, rel=0.05)  # a tenth of the rate


def test_a_pause_without_work_does_not_count():
    queue = create_queue()
    now = served(queue, tokens_per_s=100.0)
    add(queue, P1, now=now + 1000.0)
    queue.pop(now + 1000.0, lambda priority: True)
    assert queue.tokens_per_s == pytest.approx(100.0, rel=0.02)


def test_a_rate_that_changes_is_followed():
    queue = create_queue()
    served(queue, tokens_per_s=100.0)
    num, now = 1000, 20.0
    for _ in range(num):
        add(queue, P1, now=now)
    for _ in range(num):
        now += 0.02
        queue.pop(now, lambda priority: True)
    assert queue.tokens_per_s == pytest.approx(500.0, rel=0.25)


def test_what_replicas_say_counts_until_the_rate_is_measured():
    queue = create_queue(known_rate=20.0)
    add(queue, P1)
    assert queue.wait_s(add(queue, P1)) == pytest.approx(0.5)
    take_all(queue)
    served(queue, tokens_per_s=100.0)
    assert queue.tokens_per_s == pytest.approx(100.0, rel=0.02)


def test_a_refusal_says_when_to_come_back():
    queue = create_queue(max_queued_requests=60, known_rate=100.0)
    for _ in range(60):
        add(queue, P2)
    with pytest.raises(Overloaded) as caught:
        add(queue, P2)
    assert caught.value.retry_after_s == pytest.approx(6.0)
    assert math.isfinite(create_queue().retry_after_s(P3))


def test_the_backlog_says_how_long_the_first_has_waited():
    queue = create_queue()
    add(queue, P2, now=1.0, num_tokens=7), add(queue, P2, now=2.0, num_tokens=8)
    backlog = queue.backlog(now=5.0)
    assert (backlog[P2].requests, backlog[P2].tokens, backlog[P2].oldest_s) == (2, 15, 4.0)
    assert (backlog[P0].requests, backlog[P0].oldest_s) == (0, 0.0)


_REQUESTS = st.tuples(
    st.just("add"), st.sampled_from(list(Priority)), st.sampled_from("abc"), st.integers(1, 120), st.booleans()
)
_OTHERS = st.tuples(st.sampled_from(["pop", "remove", "resize", "settle"]), st.integers(0, 10**6), st.integers(1, 200))


@settings(deadline=None)
@given(st.lists(st.one_of(_REQUESTS, _REQUESTS, _OTHERS), min_size=20, max_size=120))
def test_the_bounds_hold_whatever_comes_and_nobody_is_lost(operations: list[tuple[Any, ...]]):
    queue = create_queue(max_queued_requests=12, max_queued_tokens=500)
    live: dict[QueuedRequest, None] = {}
    done: list[QueuedRequest] = []
    now = 0.0

    def gone(requests: list[QueuedRequest]) -> None:
        for request in requests:
            assert not request.is_queued
            del live[request]

    for operation, *arguments in operations:
        now += 0.01
        if operation == "add":
            priority, tenant, num_tokens, ready = arguments
            try:
                request, pushed_out = queue.add(now=now, priority=priority, tenant=tenant, num_tokens=num_tokens)
            except Overloaded:
                continue
            gone(pushed_out)
            live[request] = None
            if ready:
                queue.make_ready(request, now)
        elif operation == "pop":
            request = queue.pop(now, lambda priority: True)
            assert (request is None) == (not any(each.is_ready for each in live))
            if request is not None:
                gone([request])
                done.append(request)
        elif operation == "settle" and done:
            queue.settle(done.pop(), arguments[1])
        elif live:
            request = list(live)[arguments[0] % len(live)]
            if operation == "remove":
                queue.remove(request, now)
                gone([request])
            elif operation == "resize":
                try:
                    gone(queue.resize(request, arguments[1]))
                except Overloaded:
                    gone([request])
        queue.check_integrity()
        backlog = queue.backlog(now)
        assert len(queue) == len(live) <= 12
        # Beyond the bound there is at most one request of each class that had nothing.
        lone = sum(each.tokens for each in backlog.values() if each.requests == 1)
        assert sum(each.tokens for each in backlog.values()) <= 500 + lone
