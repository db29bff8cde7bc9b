"""Blocks are free or in exactly one table, whatever happens."""

from __future__ import annotations

import os
from functools import partial

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cluster.core.block_manager import BlockManager

LENGTH = 10 if os.environ.get("CLUSTER_TEST_FULL") == "1" else 1


def test_a_table_grows_by_whole_blocks():
    blocks = BlockManager(num_blocks=4, block_size=3)
    first = blocks.allocate(7, 4)
    assert first is not None
    assert len(first) == 2
    assert blocks.allocate(7, 6) == ()
    second = blocks.allocate(7, 7)
    assert second is not None
    assert blocks.block_table(7) == first + second
    assert len(set(first + second)) == 3
    assert blocks.num_free_blocks == 1


def test_too_few_blocks_is_not_now_and_changes_nothing():
    blocks = BlockManager(num_blocks=3, block_size=2)
    table = blocks.allocate(1, 3)
    assert blocks.allocate(2, 3) is None
    assert blocks.block_table(2) == ()
    assert blocks.block_table(1) == table
    assert blocks.num_free_blocks == 1
    assert blocks.allocate(2, 2) is not None


def test_spare_blocks_stay_free():
    blocks = BlockManager(num_blocks=3, block_size=2)
    assert blocks.allocate(1, 4, num_spare_blocks=2) is None
    assert blocks.allocate(1, 4, num_spare_blocks=1) is not None
    assert blocks.num_free_blocks == 1


def test_free_gives_all_back_once():
    blocks = BlockManager(num_blocks=3, block_size=2)
    blocks.allocate(1, 6)
    blocks.free(1)
    blocks.free(1)
    blocks.free(2)
    assert blocks.num_free_blocks == 3
    blocks.check_integrity()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_size: int):
    with pytest.raises(ValueError, match="num_blocks"):
        BlockManager(num_blocks, block_size)


class BlockManagerMachine(RuleBasedStateMachine):
    """Against the plainest model: request id to number of tokens, and the set of blocks each has been given."""

    def __init__(self, create: type[BlockManager] = BlockManager) -> None:
        super().__init__()
        self.create = create
        self.blocks = create(1, 1)
        self.tables: dict[int, list[int]] = {}

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 5))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.blocks = self.create(num_blocks, block_size)

    @rule(request_id=st.integers(0, 5), num_tokens=st.integers(0, 40), num_spare_blocks=st.integers(0, 3))
    def allocate(self, request_id: int, num_tokens: int, num_spare_blocks: int) -> None:
        table = self.tables.get(request_id, [])
        num_new = max(0, -(-num_tokens // self.blocks.block_size) - len(table))
        num_free = self.blocks.num_blocks - sum(map(len, self.tables.values()))
        new = self.blocks.allocate(request_id, num_tokens, num_spare_blocks=num_spare_blocks)
        if num_new + num_spare_blocks > num_free:
            assert new is None, "gave blocks that it should have kept"
        else:
            assert new is not None, "kept blocks that it should have given"
            assert len(new) == num_new
            self.tables[request_id] = [*table, *new]

    @rule(request_id=st.integers(0, 5))
    def free(self, request_id: int) -> None:
        self.blocks.free(request_id)
        self.tables.pop(request_id, None)

    @invariant()
    def books_balance(self) -> None:
        self.blocks.check_integrity()
        held = [block for table in self.tables.values() for block in table]
        assert len(set(held)) == len(held), "a block has two owners"
        assert len(held) + self.blocks.num_free_blocks == self.blocks.num_blocks, "free + used is not the total"
        for request_id, table in self.tables.items():
            assert self.blocks.block_table(request_id) == tuple(table)


MACHINE = settings(max_examples=200 * LENGTH, stateful_step_count=50, derandomize=True, database=None, deadline=None)


def test_machine():
    run_state_machine_as_test(BlockManagerMachine, settings=MACHINE)


class Leaking(BlockManager):
    def free(self, request_id: int) -> None:
        held = len(self.block_table(request_id))
        super().free(request_id)
        if held > 3:
            self._free.pop()


class Doubling(BlockManager):
    def free(self, request_id: int) -> None:
        self._free.extend(self.block_table(request_id)[:1])
        super().free(request_id)


class Overdrawing(BlockManager):
    def allocate(self, request_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> tuple[int, ...] | None:
        return super().allocate(request_id, num_tokens)


@pytest.mark.parametrize("broken", [Leaking, Doubling, Overdrawing])
def test_machine_catches(broken: type[BlockManager]):
    quick = settings(MACHINE, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    with pytest.raises((AssertionError, RuntimeError), match=r"do not add up|should have kept"):
        run_state_machine_as_test(partial(BlockManagerMachine, broken), settings=quick)
