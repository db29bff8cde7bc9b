"""Blocks that are copied, parked and resumed hold what they held, whatever else the pool has seen meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cluster.core.step import ParkedBlocks, StepInput
from cluster.errors import EngineFault
from cluster.worker.host_blocks import HostBlocks


def create_caches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Two layers of 9 blocks; every value tells its place."""
    return [(torch.arange(2 * 9 * 5 * 3 * 2) + 1000 * i).to(dtype).view(2, 9, 5, 3, 2) for i in range(2)]


def create_step(**changes: Any) -> StepInput:
    return StepInput(**{"step_id": 0, "new": (), "scheduled": (), "dropped": ()} | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parked_blocks_come_back_into_others(dtype: torch.dtype):
    caches, before = create_caches(dtype), create_caches(dtype)
    blocks = HostBlocks(caches)
    assert blocks.move(create_step(dropped=(7,), parked=(ParkedBlocks(sequence_id=7, block_ids=(8, 0, 3)),))) > 0.0
    for cache in caches:
        cache.zero_()
    assert blocks.move(create_step(resumed=(ParkedBlocks(sequence_id=7, block_ids=(1, 2, 8)),))) > 0.0
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[:, [1, 2, 8]], old[:, [8, 0, 3]])
        assert not cache[:, [0, 3, 4, 5, 6, 7]].any()
    assert len(blocks) == 0


def test_the_tail_alone_is_resumed_where_the_head_is_in_the_pool():
    caches, before = create_caches(), create_caches()
    blocks = HostBlocks(caches)
    blocks.move(create_step(parked=(ParkedBlocks(sequence_id=7, block_ids=(8, 0, 3)),)))
    blocks.move(create_step(resumed=(ParkedBlocks(sequence_id=7, block_ids=(5, 4), first_index=1),)))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[:, [5, 4]], old[:, [0, 3]])
        assert torch.equal(cache[:, [0, 1, 2, 3, 6, 7, 8]], old[:, [0, 1, 2, 3, 6, 7, 8]])


def test_a_step_parks_before_it_resumes_and_copies():
    """The blocks of who is parked are given at once to who comes back, and its first one to a sibling's copy."""
    caches, before = create_caches(), create_caches()
    blocks = HostBlocks(caches)
    blocks.move(create_step(parked=(ParkedBlocks(sequence_id=1, block_ids=(4,)),)))
    blocks.move(
        create_step(
            parked=(ParkedBlocks(sequence_id=2, block_ids=(6,)),),
            resumed=(ParkedBlocks(sequence_id=1, block_ids=(6,)),),
            copies=((6, 0), (0, 1)),
        )
    )
    blocks.move(create_step(resumed=(ParkedBlocks(sequence_id=2, block_ids=(2,)),)))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[:, [6, 0, 1, 2]], old[:, [4, 4, 4, 6]])


@pytest.mark.parametrize(
    ("resumed", "message"),
    [
        (ParkedBlocks(sequence_id=8, block_ids=(1,)), "0 are parked"),
        (ParkedBlocks(sequence_id=7, block_ids=(1, 2), first_index=1), "blocks 1 to 3 of sequence 7"),
    ],
)
def test_what_was_not_parked_cannot_be_resumed(resumed: ParkedBlocks, message: str):
    blocks = HostBlocks(create_caches())
    blocks.move(create_step(parked=(ParkedBlocks(sequence_id=7, block_ids=(8, 0)),)))
    with pytest.raises(EngineFault, match=message):
        blocks.move(create_step(resumed=(resumed,)))


def test_the_dropped_leave_nothing_behind():
    blocks = HostBlocks(create_caches())
    blocks.move(create_step(parked=(ParkedBlocks(sequence_id=7, block_ids=(8, 0)),)))
    assert len(blocks) == 1
    assert blocks.move(create_step(dropped=(7, 9))) == 0.0
    assert len(blocks) == 0
