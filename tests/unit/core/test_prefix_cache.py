"""Blocks are found by their content, shared, and given up from the ends of chains."""

from __future__ import annotations

import pytest

from cluster.core.block_manager import BlockManager


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
