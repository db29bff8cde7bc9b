"""KV blocks that move: within the pool, to host memory and back.

A block is a slice of dimension 1 of every layer's cache, whatever the layout inside it is.

Shapes: the caches are (2, num_blocks, ...), one per layer; parked blocks of a sequence are (2, N, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from cluster.core.step import ParkedBlocks, StepInput
from cluster.errors import EngineFault

_HOST = torch.device("cpu")


class HostBlocks:
    """What sequences have parked outside the pool. Not thread-safe.

    Args:
        kv_caches: of the pool; read and written.
    """

    def __init__(self, kv_caches: Sequence[Tensor]) -> None:
        self._kv_caches = kv_caches
        self._parked: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        """Sequences that have blocks here."""
        return len(self._parked)

    def move(self, step: StepInput) -> float:
        """Does what the step says before its forward pass; returns the seconds that parking and resuming took.

        Raises:
            EngineFault: blocks are to be resumed that were not parked.
        """
        for sequence_id in step.dropped:
            self._parked.pop(sequence_id, None)
        began = perf_counter()
        for blocks in step.parked:
            ids = self._ids(blocks.block_ids)
            self._parked[blocks.sequence_id] = [cache.index_select(1, ids).to(_HOST) for cache in self._kv_caches]
        for blocks in step.resumed:
            self._resume(blocks)
        parking_s = perf_counter() - began if step.parked or step.resumed else 0.0
        for source, destination in step.copies:
            for cache in self._kv_caches:
                cache[:, destination] = cache[:, source]
        return parking_s

    def _resume(self, blocks: ParkedBlocks) -> None:
        parked = self._parked.pop(blocks.sequence_id, None)
        last = blocks.first_index + len(blocks.block_ids)
        if parked is None or last > parked[0].shape[1]:
            raise EngineFault(
                f"blocks {blocks.first_index} to {last} of sequence {blocks.sequence_id} are to be resumed; "
                f"{0 if parked is None else parked[0].shape[1]} are parked"
            )
        ids = self._ids(blocks.block_ids)
        for cache, host in zip(self._kv_caches, parked, strict=True):
            cache.index_copy_(1, ids, host[:, blocks.first_index : last].to(cache.device))

    def _ids(self, block_ids: Sequence[int]) -> Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self._kv_caches[0].device)
