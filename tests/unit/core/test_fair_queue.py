"""Tenants take turns by what they have had; each one's requests go by their deadlines."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from cluster.core.fair_queue import FairQueue, QueuedRequest
from cluster.core.request import Priority


class Harness:
    def __init__(self) -> None:
        self.queue = FairQueue()
        self._orders = itertools.count()

    def add(self, tenant: str = "a", num_tokens: int = 10, due: float = 0.0, *, ready: bool = True) -> QueuedRequest:
        request = QueuedRequest(
            priority=Priority.P1,
            tenant=tenant,
            arrival=due,
            due=due,
            order=next(self._orders),
            num_tokens=num_tokens,
        )
        self.queue.add(request)
        if ready:
            self.queue.make_ready(request)
        return request

    def take(self) -> QueuedRequest:
        self.queue.check_integrity()
        head = self.queue.head()
        assert head is not None
        self.queue.take(head)
        return head

    def take_all(self) -> list[QueuedRequest]:
        taken = []
        while self.queue.head() is not None:
            taken.append(self.take())
        return taken


def test_the_earliest_deadline_goes_first_and_equal_ones_in_the_order_they_came():
    harness = Harness()
    late, early, also_early = harness.add(due=2.0), harness.add(due=1.0), harness.add(due=1.0)
    assert harness.take_all() == [early, also_early, late]
    assert harness.queue.num_requests == harness.queue.num_tokens == 0


def test_who_is_not_ready_is_counted_and_passed_over():
    harness = Harness()
    first, second = harness.add(due=1.0, ready=False), harness.add(due=2.0)
    assert (harness.queue.num_requests, harness.queue.num_tokens, harness.queue.num_ready) == (2, 20, 1)
    assert harness.take() is second
    assert harness.queue.head() is None
    harness.queue.make_ready(first)
    assert harness.take() is first


def test_tenants_get_equal_tokens_whatever_they_ask_for():
    harness = Harness()
    for _ in range(300):
        harness.add("many", num_tokens=10)
    for _ in range(10):
        harness.add("large", num_tokens=100)
    for _ in range(100):
        harness.add("few", num_tokens=10)
    had = Counter[str]()
    while had["large"] < 1000:
        request = harness.take()
        had[request.tenant] += request.num_tokens
    assert had["many"] == pytest.approx(1000, abs=110)
    assert had["few"] == pytest.approx(1000, abs=110)


def test_a_tenant_that_comes_anew_saves_nothing_up():
    harness = Harness()
    for _ in range(100):
        harness.add("old")
    for _ in range(50):
        harness.take()
    for _ in range(10):
        harness.add("new")
    tenants = [harness.take().tenant for _ in range(20)]
    assert Counter(tenants) == {"old": 10, "new": 10}


def test_what_a_turn_did_not_use_is_given_back():
    harness = Harness()
    for _ in range(100):
        harness.add("frugal", num_tokens=100), harness.add("whole", num_tokens=100)
    had = Counter[str]()
    for _ in range(60):
        request = harness.take()
        used = 50 if request.tenant == "frugal" else 100
        harness.queue.settle(request, used)
        had[request.tenant] += used
    assert had["frugal"] == pytest.approx(had["whole"], abs=100)


def test_what_a_turn_used_beyond_its_charge_is_paid():
    harness = Harness()
    for _ in range(100):
        harness.add("long", num_tokens=50), harness.add("whole", num_tokens=100)
    had = Counter[str]()
    for _ in range(60):
        request = harness.take()
        harness.queue.settle(request, 100)
        had[request.tenant] += 1
    assert had["long"] == pytest.approx(had["whole"], abs=1)


def test_nothing_is_remembered_of_tenants_once_nobody_waits():
    harness = Harness()
    for index in range(100):
        harness.add(f"tenant-{index}")
    assert len(harness.take_all()) == 100
    assert harness.queue._accounts == {}


def test_tenants_that_are_gone_are_forgotten_while_others_wait():
    harness = Harness()
    for index in range(200):
        harness.add("stays", num_tokens=1)
        harness.add(f"tenant-{index}", num_tokens=1)
    for _ in range(300):
        harness.add("stays", num_tokens=1)
    for _ in range(600):
        harness.take()
    assert harness.queue.num_requests == 100
    assert len(harness.queue._accounts) == 1


def test_the_newest_of_the_tenant_with_most_goes_first():
    harness = Harness()
    harness.add("many"), harness.add("large", num_tokens=500), harness.add("many", due=5.0)
    newest = harness.add("many", due=3.0, ready=False)
    assert harness.queue.newest(by_tokens=False) is newest
    assert harness.queue.newest(by_tokens=True).tenant == "large"
    harness.queue.remove(newest)
    assert harness.queue.newest(by_tokens=False).due == 5.0


def test_removable_is_what_others_have_beyond_what_a_tenant_would_have():
    harness = Harness()
    for _ in range(5):
        harness.add("many", num_tokens=10)
    harness.add("few", num_tokens=10)
    assert harness.queue.num_removable("few", (1, 10)) == (3, 30)
    assert harness.queue.num_removable("new", (1, 45)) == (4, 5)
    assert harness.queue.num_removable("many", (1, 10)) == (0, 0)


def test_tokens_that_go_first():
    harness = Harness()
    harness.add("a", num_tokens=30, due=1.0)
    harness.add("a", num_tokens=30, due=9.0)
    harness.add("b", num_tokens=500)
    harness.add("c", num_tokens=7)
    last = harness.add("a", num_tokens=10, due=5.0)
    # Its own tenant's earlier one, and of the others no more than its tenant has had by then.
    assert harness.queue.num_tokens_before(last) == 30 + 40 + 7
    harness.add("a", num_tokens=30, due=4.0)
    assert harness.queue.num_tokens_before(last) == 60 + 70 + 7


def test_a_broken_book_is_noticed():
    harness = Harness()
    harness.add().num_tokens = 11
    with pytest.raises(RuntimeError):
        harness.queue.check_integrity()
