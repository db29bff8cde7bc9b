"""Strict classes, arrival order within, and a guaranteed share for who has waited long."""

from __future__ import annotations

import pytest

from cluster.core.request import Priority, Request
from cluster.core.tracked_request import TrackedRequest
from cluster.core.waiting_queue import AGEING_S, MAX_PASSED, WaitingQueue

P0, P1, P2, P3 = Priority


def create_tracked(request_id: int, priority: Priority = P1, arrival: float = 0.0) -> TrackedRequest:
    request = Request(request_id=request_id, num_prompt_tokens=1, max_tokens=1, priority=priority, arrival=arrival)
    return TrackedRequest(request, order=request_id)


def create_queue(*tracked: TrackedRequest) -> WaitingQueue:
    queue = WaitingQueue()
    for each in tracked:
        queue.push(each)
    return queue


def admit_all(queue: WaitingQueue, now: float) -> list[int]:
    admitted = []
    while (tracked := queue.peek(now)) is not None:
        queue.admit(tracked, now)
        admitted.append(tracked.request.request_id)
    return admitted


def test_classes_then_arrival_then_order():
    queue = create_queue(
        create_tracked(0, P3, 0.0),
        create_tracked(1, P1, 2.0),
        create_tracked(2, P1, 1.0),
        create_tracked(3, P0, 3.0),
        create_tracked(4, P1, 1.0),
    )
    assert len(queue) == 5
    assert admit_all(queue, now=3.0) == [3, 2, 4, 1, 0]
    assert len(queue) == 0


def test_who_comes_back_keeps_the_place_of_its_arrival():
    queue = create_queue(create_tracked(5, P1, 5.0), create_tracked(6, P1, 6.0))
    queue.push(create_tracked(1, P1, 1.0))
    assert admit_all(queue, now=6.0) == [1, 5, 6]


def test_the_oldest_is_passed_a_few_times_once_it_is_overdue():
    old = create_tracked(100, P3, 0.0)
    urgent = [create_tracked(index, P0, AGEING_S) for index in range(10)]
    queue = create_queue(old, *urgent)
    admitted = admit_all(queue, now=AGEING_S)
    assert admitted == [*range(MAX_PASSED), 100, *range(MAX_PASSED, 10)]


def test_nobody_is_let_past_before_the_oldest_is_overdue():
    old = create_tracked(100, P3, 0.0)
    queue = create_queue(old, *(create_tracked(index, P0, 1.0) for index in range(10)))
    assert admit_all(queue, now=AGEING_S - 0.001) == [*range(10), 100]


def test_the_urgent_keep_their_share_against_a_backlog_that_is_all_overdue():
    backlog = [create_tracked(100 + index, P3, 0.0) for index in range(50)]
    queue = create_queue(*backlog, *(create_tracked(index, P0, 60.0) for index in range(30)))
    admitted = admit_all(queue, now=60.0)
    last_urgent = admitted.index(29)
    assert last_urgent + 1 == 30 + 29 // MAX_PASSED


@pytest.mark.parametrize("num_older", [0, 1, 7])
def test_the_wait_of_the_overdue_is_bounded_whatever_arrives(num_older: int):
    last = create_tracked(999, P3, 0.5)
    queue = create_queue(last, *(create_tracked(index, P2, 0.0) for index in range(num_older)))
    now = 0.5 + AGEING_S
    for num_admitted in range(1, 1000):
        queue.push(create_tracked(1000 + num_admitted, P0, now))
        tracked = queue.peek(now)
        assert tracked is not None
        queue.admit(tracked, now)
        if tracked is last:
            break
        now += 0.01
    assert num_admitted == (MAX_PASSED + 1) * (num_older + 1)


def test_admit_says_who_went_out_of_turn():
    old = create_tracked(9, P3, 0.0)
    queue = create_queue(old, *(create_tracked(index, P0, 10.0) for index in range(MAX_PASSED + 1)))
    out_of_turn = []
    while (tracked := queue.peek(10.0)) is not None:
        out_of_turn.append((tracked.request.request_id, queue.admit(tracked, 10.0)))
    assert out_of_turn == [(0, False), (1, False), (2, False), (9, True), (3, False)]


def test_remove_leaves_the_others():
    first, second, third = (create_tracked(index) for index in range(3))
    queue = create_queue(first, second, third)
    assert queue.remove(second)
    assert not queue.remove(second)
    assert admit_all(queue, now=0.0) == [0, 2]
