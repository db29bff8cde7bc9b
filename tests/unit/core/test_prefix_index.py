"""Prefixes are found by bisection exactly as by looking at each block; changes come in their order."""

from __future__ import annotations

import random

import pytest

from cluster.core.block_hash import block_hashes
from cluster.core.prefix_index import PrefixIndex, block_name, common_prefix


def names(*token_ids: int, block_size: int = 2) -> list[int]:
    return [block_name(each) for each in block_hashes(token_ids, block_size)]


def test_a_block_is_named_by_the_first_bytes_of_its_hash() -> None:
    assert block_name(bytes(range(32))) == 0x0001020304050607


def test_the_longest_prefix_is_found() -> None:
    index = PrefixIndex()
    index.apply(reset=True, added=names(1, 2, 3, 4, 5, 6), removed=[])
    assert index.match(names(1, 2, 3, 4, 9, 9, 5, 6)) == 2
    assert index.match(names(1, 2, 3, 4, 5, 6, 7, 8)) == 3
    assert index.match(names(9, 2, 3, 4)) == 0
    assert index.match([]) == 0


def test_what_is_removed_after_it_was_added_is_gone_and_a_reset_forgets_all() -> None:
    index = PrefixIndex()
    first, second, third = names(1, 2, 3, 4, 5, 6)
    index.apply(reset=True, added=[first, second], removed=[])
    index.apply(reset=False, added=[third], removed=[third, 12345])
    assert (index.match([first, second, third]), len(index)) == (2, 2)
    index.apply(reset=True, added=[first], removed=[])
    assert index.match([first, second, third]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_bisection_finds_what_a_scan_finds(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [tuple(rng.choices(range(3), k=rng.randint(0, 24))) for _ in range(60)]
    hashed = [names(*prompt) for prompt in prompts]
    index = PrefixIndex()
    cached = hashed[:20]
    index.apply(reset=True, added=[name for each in cached for name in each], removed=[])
    known = {name for each in cached for name in each}
    for each in hashed:
        assert index.match(each) == next((i for i, name in enumerate(each) if name not in known), len(each))
    for one, other in zip(hashed, reversed(hashed), strict=True):
        scan = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        assert common_prefix(one, other) == scan
