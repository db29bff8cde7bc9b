"""What is given up first, and how the queue learns from what it gave up too early."""

from __future__ import annotations

import copy

import pytest

from cluster.core.cached_block import CachedBlock
from cluster.core.eviction_queue import EvictionQueue


def create_block(name: int, last_used: int = 0, *, reused: bool = False) -> CachedBlock:
    block = CachedBlock(name, b"%d" % name, None, reused=reused)
    block.last_used = last_used
    return block


def pop_all(queue: EvictionQueue) -> list[int]:
    return [queue.pop().block_id for _ in range(len(queue))]


def test_at_first_it_is_least_recently_used():
    queue = EvictionQueue(8)
    for name, (last_used, reused) in enumerate([(5, False), (1, True), (3, False), (4, True), (2, False)]):
        queue.push(create_block(name, last_used, reused=reused))
    assert pop_all(queue) == [1, 4, 2, 3, 0]


def test_ties_go_in_the_order_of_their_coming():
    queue = EvictionQueue(8)
    for name in (3, 1, 2):
        queue.push(create_block(name))
    assert pop_all(queue) == [3, 1, 2]


def test_what_is_discarded_does_not_come_up_and_may_come_back():
    queue = EvictionQueue(8)
    blocks = [create_block(name, name) for name in range(3)]
    for block in blocks:
        queue.push(block)
    queue.discard(blocks[0])
    queue.discard(blocks[0])
    assert len(queue) == 2
    blocks[0].last_used = 7
    queue.push(blocks[0])
    assert pop_all(queue) == [1, 2, 0]
    with pytest.raises(IndexError):
        queue.pop()


def give_up(queue: EvictionQueue, name: int, *, reused: bool) -> None:
    queue.push(create_block(name, reused=reused))
    assert queue.pop().block_id == name


def spared(queue: EvictionQueue) -> int:
    """By how much a reused block may be older than one that was not, and still stay."""
    for age in range(1000):
        trial = copy.deepcopy(queue)
        trial.push(create_block(-1, last_used=age))
        trial.push(create_block(-2, last_used=0, reused=True))
        if trial.pop().reused:
            return age
    raise AssertionError("reused blocks are never given up")


def test_a_reused_block_that_is_missed_makes_the_next_ones_stay_longer():
    queue = EvictionQueue(64)
    assert spared(queue) == 1
    for name in range(3):
        give_up(queue, name, reused=True)
        assert queue.recall(b"%d" % name)
    grown = spared(queue)
    assert grown > 1
    # And one that was not reused takes some of that back.
    give_up(queue, 9, reused=False)
    assert queue.recall(b"9")
    assert 0 < spared(queue) < grown


def test_the_bonus_stays_within_twice_the_pool():
    queue = EvictionQueue(16)
    for name in range(100):
        give_up(queue, name, reused=True)
        queue.recall(b"%d" % name)
    assert spared(queue) == 33
    for name in range(100):
        give_up(queue, name, reused=False)
        queue.recall(b"%d" % name)
    assert spared(queue) == 1


def test_it_remembers_as_many_as_the_pool_has_and_each_once():
    queue = EvictionQueue(4)
    assert not queue.recall(b"0")
    for name in range(5):
        give_up(queue, name, reused=False)
    assert not queue.recall(b"0")
    assert queue.recall(b"1")
    assert not queue.recall(b"1")
    assert queue.recall(b"4")


def test_what_was_discarded_is_swept_out():
    queue = EvictionQueue(8)
    for name in range(10_000):
        block = create_block(name, name)
        queue.push(block)
        queue.discard(block)
    assert sum(map(len, queue._heaps)) <= 64
