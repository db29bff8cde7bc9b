"""Blocks are found by their content, shared, and given up from the ends of chains."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from cluster.core.block_manager import BlockManager
from cluster.core.cached_block import CachedBlock


def names(text: str) -> list[bytes]:
    """A chain of hashes, one block per letter: each stands for all letters up to it."""
    return [text[: end + 1].encode() for end in range(len(text))]


def run(blocks: BlockManager, request_id: int, text: str, num_tokens: int | None = None) -> int:
    """Starts a request whose full blocks are ``text`` and computes all of it. Returns how many tokens were cached."""
    if num_tokens is None:
        num_tokens = len(text) * blocks.block_size + 1
    start = blocks.start(request_id, names(text), num_tokens)
    assert start is not None
    assert start.block_ids == blocks.block_table(request_id)
    blocks.commit(request_id, names(text), num_tokens)
    blocks.check_integrity()
    return start.num_cached_tokens


def test_what_is_computed_is_found_while_held_and_after():
    blocks = BlockManager(num_blocks=8, block_size=4)
    assert run(blocks, 1, "abc") == 0
    assert run(blocks, 2, "abx") == 8
    assert blocks.block_table(1)[:2] == blocks.block_table(2)[:2]
    assert blocks.num_free_blocks == 8 - 4 - 2
    blocks.free(1)
    blocks.free(2)
    assert blocks.num_free_blocks == 8
    blocks.check_integrity()
    assert run(blocks, 3, "abc") == 12


def test_the_last_token_is_left_to_compute():
    blocks = BlockManager(num_blocks=8, block_size=4)
    run(blocks, 1, "ab")
    assert run(blocks, 2, "ab", num_tokens=8) == 4
    assert run(blocks, 3, "ab", num_tokens=9) == 8


def test_only_computed_blocks_are_found():
    blocks = BlockManager(num_blocks=8, block_size=4)
    blocks.start(1, names("ab"), 9)
    blocks.commit(1, names("ab"), 7)
    start = blocks.start(2, names("ab"), 9)
    assert start is not None
    assert start.num_cached_tokens == 4
    blocks.check_integrity()


def test_generated_blocks_are_found_too():
    blocks = BlockManager(num_blocks=8, block_size=2)
    run(blocks, 1, "a")
    blocks.allocate(1, 7)
    blocks.commit(1, names("abc"), 6)
    blocks.free(1)
    assert run(blocks, 2, "abcd") == 6


def test_without_hashes_nothing_is_found():
    blocks = BlockManager(num_blocks=4, block_size=2)
    blocks.allocate(1, 8)
    blocks.free(1)
    assert run(blocks, 2, "abc") == 0


def test_too_few_blocks_is_not_now_and_changes_nothing():
    blocks = BlockManager(num_blocks=4, block_size=2)
    run(blocks, 1, "abc")
    blocks.free(1)
    blocks.allocate(2, 2)
    # Three blocks are free, two of them are to be shared: one is left for the two that are missing.
    assert blocks.start(3, names("abxy"), 8) is None
    assert blocks.start(3, names("abx"), 6, num_spare_blocks=1) is None
    assert blocks.block_table(3) == ()
    assert blocks.num_free_blocks == 3
    blocks.check_integrity()
    assert run(blocks, 3, "abx", num_tokens=6) == 4


def test_a_request_starts_once():
    blocks = BlockManager(num_blocks=4, block_size=2)
    blocks.allocate(1, 1)
    with pytest.raises(ValueError, match="holds blocks"):
        blocks.start(1, (), 1)


def test_the_block_used_longest_ago_goes_first_and_leaves_before_parents():
    blocks = BlockManager(num_blocks=4, block_size=1)
    run(blocks, 1, "ab", num_tokens=2)
    blocks.free(1)
    run(blocks, 2, "xy", num_tokens=2)
    blocks.free(2)
    blocks.allocate(3, 1)
    blocks.check_integrity()
    blocks.free(3)
    assert run(blocks, 4, "ab") == 1
    blocks.free(4)


def test_a_block_computed_twice_is_kept_by_whoever_runs_on_it():
    blocks = BlockManager(num_blocks=8, block_size=2)
    first, second = blocks.start(1, names("ab"), 5), blocks.start(2, names("ac"), 5)
    assert first is not None
    assert second is not None
    blocks.commit(1, names("ab"), 4)
    blocks.commit(2, names("ac"), 4)
    blocks.check_integrity()
    assert blocks.block_table(2) == second.block_ids
    assert not set(first.block_ids) & set(second.block_ids)
    # What follows the double is found once its request has ended.
    assert run(blocks, 3, "ac") == 2
    blocks.free(3)
    blocks.free(2)
    blocks.check_integrity()
    assert run(blocks, 4, "ac") == 4


def test_salts_share_nothing():
    blocks = BlockManager(num_blocks=8, block_size=2)
    run(blocks, 1, "ab")
    salted = [b"other" + name for name in names("ab")]
    start = blocks.start(2, salted, 5)
    assert start is not None
    assert start.num_cached_tokens == 0


@pytest.mark.parametrize(
    ("num_tokens", "num_shared", "copied"), [(1, 0, False), (4, 0, True), (5, 1, False), (7, 1, True), (8, 1, True)]
)
def test_a_fork_shares_what_it_does_not_write(num_tokens: int, num_shared: int, copied: bool):
    blocks = BlockManager(num_blocks=8, block_size=4)
    parent = blocks.allocate(1, 9)
    assert parent is not None
    fork = blocks.fork(1, 2, num_tokens)
    assert fork is not None
    assert fork.block_ids == blocks.block_table(2)
    assert fork.block_ids[:-1] == parent[:num_shared]
    assert fork.block_ids[-1] not in parent
    assert fork.copy == ((parent[num_shared], fork.block_ids[-1]) if copied else None)
    assert blocks.num_free_blocks == 4
    blocks.check_integrity()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_siblings_end_in_any_order(order: tuple[int, ...]):
    blocks = BlockManager(num_blocks=12, block_size=2)
    run(blocks, 0, "ab", num_tokens=5)
    prompt = blocks.block_table(0)[:2]
    for child in (1, 2):
        fork = blocks.fork(0, child, 5)
        assert fork is not None
        assert fork.block_ids[:2] == prompt
        assert fork.copy is None  # the last token's block holds nothing else
    for request_id, completion in enumerate("xyz"):
        blocks.allocate(request_id, 7)
        blocks.commit(request_id, names("ab" + completion), 6)
    assert blocks.num_free_blocks == 12 - 2 - 3 * 2
    for num_left, request_id in zip((2, 1, 0), order, strict=True):
        blocks.free(request_id)
        blocks.check_integrity()
        assert blocks.num_free_blocks == 12 - (2 if num_left else 0) - num_left * 2
    for request_id, completion in enumerate("xyz"):
        assert run(blocks, request_id, "ab" + completion) == 6
    assert all(blocks.block_table(request_id)[:2] == prompt for request_id in range(3))


def test_a_sibling_keeps_blocks_that_its_parent_did_not_commit():
    blocks = BlockManager(num_blocks=4, block_size=2)
    parent = blocks.allocate(0, 5)
    assert parent is not None
    fork = blocks.fork(0, 1, 4)
    assert fork is not None
    blocks.free(0)
    blocks.check_integrity()
    assert blocks.block_table(1) == (parent[0], fork.block_ids[1])
    assert blocks.num_free_blocks == 2
    # The sibling commits what they share.
    blocks.commit(1, names("ab"), 4)
    blocks.free(1)
    assert run(blocks, 2, "ab") == 4


def test_fork_is_not_now_without_a_block_and_never_beyond_the_parents_tokens():
    blocks = BlockManager(num_blocks=3, block_size=2)
    blocks.allocate(0, 4)
    assert blocks.fork(0, 1, 4, num_spare_blocks=1) is None
    assert blocks.block_table(1) == ()
    for parent_id, num_tokens in ((0, 5), (0, 0), (7, 1)):
        with pytest.raises(ValueError, match="does not hold"):
            blocks.fork(parent_id, 1, num_tokens)
    assert blocks.fork(0, 1, 4) is not None
    with pytest.raises(ValueError, match="holds blocks"):
        blocks.fork(0, 1, 4)
    assert blocks.fork(0, 2, 4) is None
    blocks.check_integrity()


def test_a_block_is_not_named_twice():
    blocks = BlockManager(num_blocks=4, block_size=2)
    run(blocks, 0, "ab")
    blocks.fork(0, 1, 4)
    with pytest.raises(ValueError, match="another hash"):
        blocks._cache.insert(blocks.block_table(1)[0], b"x", None)


def break_held(blocks: BlockManager, chain: list[CachedBlock]) -> None:
    chain[0].held = True


def break_link(blocks: BlockManager, chain: list[CachedBlock]) -> None:
    del blocks._cache._by_id[chain[0].block_id], blocks._cache._by_hash[chain[0].block_hash]
    blocks._free.append(chain[0].block_id)
    blocks._cache.num_idle -= 1


def break_children(blocks: BlockManager, chain: list[CachedBlock]) -> None:
    chain[0].num_children = 0


def break_name(blocks: BlockManager, chain: list[CachedBlock]) -> None:
    chain[1].block_hash = b"other"


def break_evictable(blocks: BlockManager, chain: list[CachedBlock]) -> None:
    blocks._cache._evictable.push(chain[0])


def break_idle(blocks: BlockManager, chain: list[CachedBlock]) -> None:
    blocks._cache.num_idle += 1


def break_holders(blocks: BlockManager, chain: list[CachedBlock]) -> None:
    blocks._num_holders[blocks.block_table(9)[0]] += 1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (break_held, "do not add up"),
        (break_link, "a chain is broken"),
        (break_children, "miscounted its children"),
        (break_name, "not found by its hash"),
        (break_evictable, "exactly the leaves"),
        (break_idle, "miscounts"),
        (break_holders, "holders are miscounted"),
    ],
)
def test_check_integrity_tells(fault: Callable[[BlockManager, list[CachedBlock]], None], told: str):
    blocks = BlockManager(num_blocks=8, block_size=2)
    run(blocks, 0, "ab")
    blocks.free(0)
    run(blocks, 9, "xy")
    chain = blocks._cache.match(names("ab"))
    assert len(chain) == 2
    blocks.check_integrity()
    fault(blocks, chain)
    with pytest.raises(RuntimeError, match=told):
        blocks.check_integrity()
