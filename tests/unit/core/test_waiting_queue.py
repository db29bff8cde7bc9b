"""Arrival order within each class."""

from __future__ import annotations

from cluster.core.request import Priority, Request
from cluster.core.tracked_request import TrackedRequest
from cluster.core.waiting_queue import WaitingQueue

P0, P1, P2, P3 = Priority


def create_tracked(request_id: int, priority: Priority = P1, arrival: float = 0.0) -> TrackedRequest:
    request = Request(request_id=request_id, num_prompt_tokens=1, max_tokens=1, priority=priority, arrival=arrival)
    return TrackedRequest(request, order=request_id)


def create_queue(*tracked: TrackedRequest) -> WaitingQueue:
    queue = WaitingQueue()
    for each in tracked:
        queue.push(each)
    return queue


def take_all(queue: WaitingQueue, priority: Priority = P1) -> list[int]:
    taken = []
    while (tracked := queue.head(priority)) is not None:
        assert queue.remove(tracked)
        taken.append(tracked.request.request_id)
    return taken


def test_arrival_then_order():
    queue = create_queue(create_tracked(0, arrival=2.0), create_tracked(2, arrival=1.0), create_tracked(1, arrival=1.0))
    assert take_all(queue) == [1, 2, 0]


def test_classes_have_queues_of_their_own():
    queue = create_queue(create_tracked(0, P3), create_tracked(1, P0, 5.0), create_tracked(2, P3))
    assert [take_all(queue, priority) for priority in Priority] == [[1], [], [], [0, 2]]


def test_who_comes_back_has_its_old_place():
    queue = create_queue(create_tracked(5, arrival=5.0), create_tracked(6, arrival=6.0))
    queue.push(create_tracked(1, arrival=1.0))
    assert take_all(queue) == [1, 5, 6]


def test_remove_leaves_the_others():
    first, second, third = (create_tracked(index) for index in range(3))
    queue = create_queue(first, second, third)
    assert queue.remove(second)
    assert not queue.remove(second)
    assert take_all(queue) == [0, 2]
