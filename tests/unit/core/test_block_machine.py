"""The block manager under random work: tiny pools, prefixes in common, siblings, requests that end in any order.

``BlockHarness`` holds the invariants. Every run repeats the same steps; CLUSTER_TEST_FULL=1 makes them ten times as
many. The negative controls break the block manager on purpose: each break must be caught by the very same run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from block_harness import BlockHarness
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cluster.core.block_hash import block_hashes
from cluster.core.block_manager import BlockManager, Fork, Start
from cluster.core.cached_block import CachedBlock
from cluster.core.eviction_queue import EvictionQueue
from cluster.core.prefix_cache import CacheChanges

LENGTH = 10 if os.environ.get("CLUSTER_TEST_FULL") == "1" else 1
WALKS = 9
STEPS_PER_WALK = 10_000
SALTS = (b"", b"a")


def act(harness: BlockHarness, rng: random.Random) -> None:
    request_id = rng.randrange(6)
    live = request_id in harness.live
    num_spare_blocks = rng.randrange(3) if rng.random() < 0.2 else 0
    draw = rng.random()
    if draw < 0.15:
        harness.free(request_id)
    elif not live and draw < 0.2:
        harness.grow(request_id, tokens(rng, 6), num_spare_blocks)
    elif not live:
        parents = [i for i, holder in harness.live.items() if holder.num_computed_tokens]
        if parents and draw < 0.4:
            parent_id = rng.choice(parents)
            parent = harness.live[parent_id]
            num_tokens = rng.randint(1, min(parent.num_computed_tokens + 1, len(parent.token_ids)))
            harness.fork(parent_id, request_id, num_tokens, num_spare_blocks)
        else:
            harness.start(request_id, tokens(rng, 16), rng.choice(SALTS), num_spare_blocks)
    elif draw < 0.25:
        harness.grow(request_id, tokens(rng, 3), num_spare_blocks)
    elif draw < 0.60:
        harness.compute(request_id, rng.randint(1, 12))
    else:
        harness.commit(request_id)


def tokens(rng: random.Random, most: int) -> list[int]:
    """Few different ones: prefixes in common are the rule."""
    return [int(rng.random() < 0.1) for _ in range(rng.randint(1, most))]


def walk(seed: int, num_steps: int, **broken: Any) -> tuple[int, int, int]:
    """A random walk, with a new pool every 500 steps. Returns how many blocks were found, evicted, and found late."""
    rng = random.Random(seed)
    totals = (0, 0, 0)
    for step in range(num_steps):
        if step % 500 == 0:
            harness = BlockHarness(rng.randint(1, 20), rng.choice((1, 2, 3, 4)), **broken)
        act(harness, rng)
        harness.check()
        if step % 7 == 0:
            harness.listen()
        if step % 500 == 499:
            totals = (
                totals[0] + harness.num_hits, totals[1] + harness.num_evictions, totals[2] + harness.num_late
            )  # fmt: skip
    return totals


@pytest.mark.parametrize("seed", range(WALKS))
def test_random_walk(seed: int) -> None:
    num_hits, num_evictions, num_late = walk(seed, STEPS_PER_WALK * LENGTH)
    # A walk that finds and evicts nothing would prove nothing.
    assert num_hits > 100
    assert num_evictions > 100
    assert num_late > 5


class BlockMachine(RuleBasedStateMachine):
    """The same, with Hypothesis choosing the steps, so that a failure shrinks."""

    def __init__(self, **broken: Any) -> None:
        super().__init__()
        self.broken = broken
        self.harness = BlockHarness(1, 1, **broken)

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 5))
    def create(self, num_blocks: int, block_size: int) -> None:
        self.harness = BlockHarness(num_blocks, block_size, **self.broken)

    @rule(
        request_id=st.integers(0, 5),
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        salt=st.sampled_from(SALTS),
        num_spare_blocks=st.integers(0, 3),
    )
    def start(self, request_id: int, token_ids: list[int], salt: bytes, num_spare_blocks: int) -> None:
        if request_id in self.harness.live:
            with pytest.raises(ValueError, match="holds blocks"):
                self.harness.blocks.start(request_id, (), len(token_ids))
        else:
            self.harness.start(request_id, token_ids, salt, num_spare_blocks)

    @rule(
        request_id=st.integers(0, 5),
        token_ids=st.lists(st.integers(0, 1), max_size=20),
        num_spare_blocks=st.integers(0, 3),
    )
    def grow(self, request_id: int, token_ids: list[int], num_spare_blocks: int) -> None:
        self.harness.grow(request_id, token_ids, num_spare_blocks)

    @rule(request_id=st.integers(0, 5), num_tokens=st.integers(1, 20), commits=st.booleans())
    def compute(self, request_id: int, num_tokens: int, commits: bool) -> None:
        if request_id in self.harness.live:
            self.harness.compute(request_id, num_tokens)
            if commits:
                self.harness.commit(request_id)

    @rule(parent_id=st.integers(0, 5), child_id=st.integers(0, 5), num_tokens=st.integers(1, 20))
    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        parent = self.harness.live.get(parent_id)
        if child_id in self.harness.live or parent is None or num_tokens > len(parent.table) * self.harness.block_size:
            with pytest.raises(ValueError, match=r"holds blocks|does not hold"):
                self.harness.blocks.fork(parent_id, child_id, num_tokens)
        elif num_tokens <= min(parent.num_computed_tokens + 1, len(parent.token_ids)):
            self.harness.fork(parent_id, child_id, num_tokens)

    @rule(request_id=st.integers(0, 5))
    def free(self, request_id: int) -> None:
        self.harness.free(request_id)
        self.harness.listen()

    @invariant()
    def books_balance(self) -> None:
        self.harness.check()


MACHINE = settings(max_examples=200 * LENGTH, stateful_step_count=50, derandomize=True, database=None, deadline=None)


def test_machine() -> None:
    run_state_machine_as_test(BlockMachine, settings=MACHINE)


class Leaking(BlockManager):
    """Loses the last block of every large table."""

    def free(self, request_id: int) -> None:
        large = len(self.block_table(request_id)) > 3
        super().free(request_id)
        if large and self._free:
            self._free.pop()


class Doubling(BlockManager):
    """Frees a block twice."""

    def free(self, request_id: int) -> None:
        self._free.extend(self.block_table(request_id)[:1])
        super().free(request_id)


class Overdrawing(BlockManager):
    """Leaves none to spare."""

    def allocate(self, request_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> tuple[int, ...] | None:
        return super().allocate(request_id, num_tokens)


class Snatching(BlockManager):
    """Frees what siblings hold."""

    def free(self, request_id: int) -> None:
        for block_id in self.block_table(request_id)[:1]:
            if block_id in self._num_holders:
                self._num_holders[block_id] = 1
        super().free(request_id)


class Hasty(BlockManager):
    """Makes a block findable before its last token is computed."""

    def commit(self, request_id: int, block_hashes: Sequence[bytes], num_computed_tokens: int) -> None:
        super().commit(request_id, block_hashes, num_computed_tokens + 1)


class Swapping(BlockManager):
    """Puts the block that is found in the place of one that a request runs on."""

    def commit(self, request_id: int, block_hashes: Sequence[bytes], num_computed_tokens: int) -> None:
        table = self._tables[request_id]
        for index in range(table.num_cached, min(num_computed_tokens // self.block_size, len(block_hashes))):
            found = self._cache.find(block_hashes[index])
            if found is not None:
                table.block_ids[index] = found.block_id
        super().commit(request_id, block_hashes, num_computed_tokens)


class Sated(BlockManager):
    """Leaves nothing to compute."""

    def start(
        self, request_id: int, block_hashes: Sequence[bytes], num_tokens: int, *, num_spare_blocks: int = 0
    ) -> Start | None:
        return super().start(request_id, block_hashes, num_tokens + 1, num_spare_blocks=num_spare_blocks)


class Intruding(BlockManager):
    """Lets siblings write to the same block."""

    def fork(self, parent_id: int, child_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> Fork | None:
        fork = super().fork(parent_id, child_id, num_tokens, num_spare_blocks=num_spare_blocks)
        if fork is None or fork.copy is None:
            return fork
        self._free.append(fork.copy[1])
        self._tables[child_id].block_ids[-1] = fork.copy[0]
        return Fork(block_ids=(*fork.block_ids[:-1], fork.copy[0]), copy=None)


class Copyless(BlockManager):
    """Does not say what to copy."""

    def fork(self, parent_id: int, child_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> Fork | None:
        fork = super().fork(parent_id, child_id, num_tokens, num_spare_blocks=num_spare_blocks)
        return None if fork is None else Fork(block_ids=fork.block_ids, copy=None)


class Stale(BlockManager):
    """Finds a block that has been given up."""

    def _take(self, num_blocks: int) -> list[int]:
        before = dict(self._cache._by_hash)
        blocks = super()._take(num_blocks)
        self._cache._by_hash = before
        return blocks


class Felling(EvictionQueue):
    """Gives up blocks from the beginning of their chains."""

    def pop(self) -> CachedBlock:
        block = super().pop()
        root = block
        while root.parent is not None:
            root = root.parent
        root.num_children = 0
        self.push(block)
        self.discard(root)
        return root


class Wasting(BlockManager):
    """Gives cached blocks up while there are empty ones."""

    def _take(self, num_blocks: int) -> list[int]:
        if num_blocks and len(self._cache._evictable):
            self._free.append(self._cache.evict())
        return super()._take(num_blocks)


class Discreet(BlockManager):
    """Does not tell of what it gives up."""

    def take_cache_changes(self) -> CacheChanges:
        return replace(super().take_cache_changes(), removed=())


class Repeating(BlockManager):
    """Tells of everything again."""

    def take_cache_changes(self) -> CacheChanges:
        self._cache._added |= dict.fromkeys(self._cache._by_hash)
        return super().take_cache_changes()


def create_felling(num_blocks: int, block_size: int) -> BlockManager:
    return BlockManager(num_blocks, block_size, Felling(num_blocks))


def name_without_salt(token_ids: list[int], block_size: int, salt: bytes) -> list[bytes]:
    return block_hashes(token_ids, block_size)


def name_without_chain(token_ids: list[int], block_size: int, salt: bytes) -> list[bytes]:
    starts = range(0, len(token_ids) - block_size + 1, block_size)
    return [block_hashes([start, *token_ids[start : start + block_size]], block_size + 1, salt)[0] for start in starts]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "leaks": ({"create": Leaking}, "do not add up"),
    "frees twice": ({"create": Doubling}, "do not add up"),
    "overdraws": ({"create": Overdrawing}, "should have kept"),
    "frees what others hold": ({"create": Snatching}, "holders are miscounted|do not add up"),
    "commits too early": ({"create": Hasty}, "found more or fewer|is another's|cached blocks up|other blocks"),
    "swaps under a request": ({"create": Swapping}, "do not add up|another table"),
    "leaves nothing to compute": ({"create": Sated}, "found more or fewer|too long"),
    "siblings write to one block": (
        {"create": Intruding},
        "are others|two owners|do not add up",
    ),
    "does not copy": ({"create": Copyless}, "is another's"),
    "finds what is gone": ({"create": Stale}, "miscounts"),
    "breaks chains": ({"create": create_felling}, "a chain is broken|miscounted its children"),
    "wastes": ({"create": Wasting}, "while there were empty ones"),
    "does not tell what went": ({"create": Discreet}, "not what was told"),
    "tells twice": ({"create": Repeating}, "that was there"),
    "knows no salt": ({"name": name_without_salt}, "is another's"),
    "knows no chain": ({"name": name_without_chain}, "is another's|its parent is not"),
}


@pytest.mark.parametrize(("broken", "caught_by"), BROKEN.values(), ids=BROKEN)
def test_walk_catches(broken: dict[str, Any], caught_by: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=caught_by):
        for seed in range(WALKS):
            walk(seed, STEPS_PER_WALK, **broken)


@pytest.mark.parametrize("fault", ["leaks", "frees twice", "overdraws", "does not copy", "leaves nothing to compute"])
def test_machine_catches(fault: str) -> None:
    broken, caught_by = BROKEN[fault]
    quick = settings(MACHINE, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    with pytest.raises((AssertionError, RuntimeError), match=caught_by):
        run_state_machine_as_test(partial(BlockMachine, **broken), settings=quick)
