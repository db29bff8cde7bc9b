"""Tables of blocks, for requests that share none."""

from __future__ import annotations

import pytest

from cluster.core.block_manager import BlockManager


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
