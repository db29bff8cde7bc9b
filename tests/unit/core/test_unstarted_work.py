"""What a gateway keeps of requests that have not begun: the window, the backlog, prompts about to be cached."""

from __future__ import annotations

from cluster.core.request import Priority
from cluster.core.routing import Placement
from cluster.core.unstarted_work import UnstartedWork


def create_placement(
    num_prompt_tokens: int, priority: Priority = Priority.P1, block_hashes: tuple[int, ...] = ()
) -> Placement:
    return Placement(num_prompt_tokens=num_prompt_tokens, max_tokens=1, priority=priority, block_hashes=block_hashes)


def test_the_window_is_full_of_what_has_to_be_computed() -> None:
    work = UnstartedWork()
    work.add(1, create_placement(900), cached_tokens=850)
    assert work.has_room(Priority.P1, 100)
    work.add(2, create_placement(50), cached_tokens=0)
    assert not work.has_room(Priority.P1, 100)
    assert work.remove(1) and work.has_room(Priority.P1, 100)
    assert not work.remove(1)  # it has left already
    assert len(work) == 1


def test_each_class_has_half_a_window_of_its_own() -> None:
    work = UnstartedWork()
    work.add(1, create_placement(5000, Priority.P3), cached_tokens=0)
    assert not work.has_room(Priority.P3, 100)
    assert work.has_room(Priority.P0, 100)
    work.add(2, create_placement(49, Priority.P0), cached_tokens=0)
    assert work.has_room(Priority.P0, 100)
    work.add(3, create_placement(1, Priority.P0), cached_tokens=0)
    assert not work.has_room(Priority.P0, 100)
    assert work.has_room(Priority.P1, 0)  # of a class of which there is nothing one may always go


def test_less_urgent_classes_are_no_backlog() -> None:
    work = UnstartedWork()
    work.add(1, create_placement(1000, Priority.P3), cached_tokens=0)
    work.add(2, create_placement(100, Priority.P1), cached_tokens=40)
    assert work.backlog_tokens(Priority.P0, 0) == 0
    assert work.backlog_tokens(Priority.P1, 0) == 60
    assert work.backlog_tokens(Priority.P3, 0) == 1060


def test_what_others_have_sent_is_backlog_too() -> None:
    work = UnstartedWork()
    work.add(1, create_placement(1000), cached_tokens=900)
    # The replica counts the whole prompt: it has not looked for it in its cache.
    assert work.backlog_tokens(Priority.P1, 1000) == 100
    assert work.backlog_tokens(Priority.P1, 1700) == 800
    assert work.backlog_tokens(Priority.P1, 300) == 100


def test_prompts_that_are_computed_now_are_as_good_as_cached() -> None:
    work = UnstartedWork()
    work.add(1, create_placement(64, block_hashes=(1, 2, 3, 4)), cached_tokens=0)
    work.add(2, create_placement(64, block_hashes=(1, 2, 8, 9)), cached_tokens=0)
    assert work.match((1, 2, 3, 7)) == 3
    work.remove(1)
    assert work.match((1, 2, 3, 7)) == 2
    work.remove(2)
    assert work.match((1, 2, 3, 7)) == 0
