"""Deadlines come due once, in order; what ended leaves nothing behind."""

from __future__ import annotations

import random

from cluster.core.deadline_queue import DeadlineQueue


def test_due_ones_come_in_order_and_once():
    queue = DeadlineQueue()
    for request_id, deadline in [(1, 5.0), (2, 3.0), (3, 9.0), (4, 3.5)]:
        queue.add(request_id, deadline)
    assert queue.pop_expired(2.9) == []
    assert queue.pop_expired(5.0) == [2, 4, 1]
    assert queue.pop_expired(5.0) == []
    assert len(queue) == 1


def test_discarded_ones_do_not_come():
    queue = DeadlineQueue()
    queue.add(1, 1.0)
    queue.add(2, 2.0)
    queue.discard(1)
    queue.discard(77)
    assert queue.pop_expired(10.0) == [2]


def test_garbage_does_not_pile_up():
    queue = DeadlineQueue()
    for request_id in range(10_000):
        queue.add(request_id, 600.0)
        if request_id >= 10:
            queue.discard(request_id - 10)
    assert len(queue) == 10
    assert len(queue._heap) < 200
    assert queue.pop_expired(600.0) == list(range(9_990, 10_000))


def test_agrees_with_a_plain_dictionary():
    rng = random.Random(5)
    queue, plain, now = DeadlineQueue(), dict[int, float](), 0.0
    for request_id in range(3_000):
        plain[request_id] = now + rng.uniform(0, 50)
        queue.add(request_id, plain[request_id])
        if rng.random() < 0.7:
            gone = rng.randrange(request_id + 1)
            plain.pop(gone, None)
            queue.discard(gone)
        now += rng.random()
        due = sorted((deadline, i) for i, deadline in plain.items() if deadline <= now)
        assert queue.pop_expired(now) == [i for _, i in due]
        for _, i in due:
            del plain[i]
    assert len(queue) == len(plain)
