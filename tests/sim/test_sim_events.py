"""The virtual clock."""

from __future__ import annotations

import math

import pytest

from cluster.sim.events import EventQueue


def test_actions_run_in_the_order_of_their_times_and_then_of_their_adding():
    queue, seen = EventQueue(), []
    for at_s, name in [(2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")]:
        queue.add(at_s, lambda name=name: seen.append((name, queue.now)))
    queue.run()
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0), ("d", 2.0)]
    assert len(queue) == 0


def test_an_action_may_add_others_at_its_own_time_and_later():
    queue, seen = EventQueue(), []

    def first() -> None:
        queue.add(queue.now + 1, lambda: seen.append(queue.now))
        queue.add(queue.now, lambda: seen.append(queue.now))

    queue.add(3.0, first)
    queue.run()
    assert seen == [3.0, 4.0]


@pytest.mark.parametrize("at_s", [0.5, -1.0, math.nan])
def test_nothing_happens_in_the_past(at_s):
    queue = EventQueue()
    queue.add(1.0, lambda: queue.add(at_s, lambda: None))
    with pytest.raises(ValueError, match="was added at"):
        queue.run()
