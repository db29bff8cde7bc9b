"""Which cached block is given up first."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.core.prefix_cache import CachedBlock


class EvictionQueue:
    """Blocks that may be given up, least worth first: the one used longest ago.

    Every operation costs O(log n), spread over the calls: what leaves by ``discard`` stays in the heap until it comes
    up, or is swept out when it outweighs the rest.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, CachedBlock]] = []
        self._tickets: dict[int, int] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, block: CachedBlock) -> bool:
        return block.block_id in self._tickets

    def push(self, block: CachedBlock) -> None:
        self._num_pushed += 1
        self._tickets[block.block_id] = self._num_pushed
        heapq.heappush(self._heap, (block.last_used, self._num_pushed, block))

    def discard(self, block: CachedBlock) -> None:
        """Takes a block out; one that is not in is ignored."""
        if self._tickets.pop(block.block_id, None) is not None and len(self._heap) > 2 * len(self._tickets) + 64:
            self._heap = [entry for entry in self._heap if self._tickets.get(entry[2].block_id) == entry[1]]
            heapq.heapify(self._heap)

    def pop(self) -> CachedBlock:
        """Takes out the block worth least. Raises IndexError where there is none."""
        while True:
            _, ticket, block = heapq.heappop(self._heap)
            if self._tickets.get(block.block_id) == ticket:
                del self._tickets[block.block_id]
                return block
