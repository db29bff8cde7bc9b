"""Which cached block is given up first."""

from __future__ import annotations

import heapq
from collections import OrderedDict

from cluster.core.cached_block import CachedBlock

_STEP = 4.0  # of age, for a mistake: a thousand in a row move the bonus by a small pool
_MAX_BONUS = 2.0  # pools of age: beyond, reused blocks would stay for ever when nothing is reused any more


class EvictionQueue:
    """Blocks that may be given up, ordered by when they were used last, with a bonus for those that were used again.

    Most blocks are never wanted again, and one that has been reused is a better bet than one that has not; how much
    better depends on the work. So the two kinds age apart, and what is given up is the older of the two kinds' oldest
    blocks, where a reused one counts as ``bonus`` younger than it is. Age is measured in blocks computed since.

    The bonus is learnt from mistakes. The hashes of as many blocks as the pool has are remembered after they were given
    up. When one of them is computed again, it went too early: the bonus grows if it was a reused block, shrinks if it
    was not, by more if its kind is the rarer among the remembered. The block comes back as a reused one.

    With bonus 0, where it starts, this is least-recently-used. Where reuse tells nothing (conversations that end at
    random) it stays near 0; where there are scans or popular prefixes it goes up to twice the pool. After ARC (Megiddo
    and Modha, FAST 2003): its two lists, its ghosts, its rule of learning. ARC learns how to split the pool between the
    lists; a tree that gives up leaves only cannot be split at will, so here it is the difference in age. On Mooncake's
    trace of conversations it finds 58, 80 and 96 % of what an unbounded pool would with 5, 10 and 25 % of the blocks;
    least-recently-used 53, 75 and 96 %.

    Every operation costs O(log n), spread over the calls: what leaves by ``discard`` stays in its heap until it comes
    up, or is swept out when it outweighs the rest.

    Args:
        num_blocks: in the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._heaps: tuple[list[tuple[int, int, CachedBlock]], ...] = ([], [])  # never reused, reused
        self._num_evictable = 0
        self._num_pushed = 0
        self._ghosts: OrderedDict[bytes, bool] = OrderedDict()  # hash -> reused, the one given up first in front
        self._num_ghosts = [0, 0]
        self._bonus = 0.0

    def __len__(self) -> int:
        return self._num_evictable

    def push(self, block: CachedBlock) -> None:
        self._num_pushed += 1
        self._num_evictable += 1
        block.ticket = self._num_pushed
        heapq.heappush(self._heaps[block.reused], (block.last_used, block.ticket, block))

    def discard(self, block: CachedBlock) -> None:
        """Takes a block out; one that is not in is ignored."""
        if block.ticket == 0:
            return
        block.ticket = 0
        self._num_evictable -= 1
        if sum(map(len, self._heaps)) > 2 * self._num_evictable + 64:
            for heap in self._heaps:
                heap[:] = [entry for entry in heap if entry[2].ticket == entry[1]]
                heapq.heapify(heap)

    def pop(self) -> CachedBlock:
        """Takes out the block worth least, and remembers it. Raises IndexError where there is none."""
        block, reused = map(_oldest, self._heaps)
        if block is None or (reused is not None and reused.last_used + self._bonus < block.last_used):
            block = reused
        if block is None:
            raise IndexError("no block may be given up")
        heapq.heappop(self._heaps[block.reused])
        block.ticket = 0
        self._num_evictable -= 1
        self._ghosts[block.block_hash] = block.reused
        self._num_ghosts[block.reused] += 1
        if len(self._ghosts) > self._num_blocks:
            _, was_reused = self._ghosts.popitem(last=False)
            self._num_ghosts[was_reused] -= 1
        return block

    def recall(self, block_hash: bytes) -> bool:
        """Takes note that this content is computed; whether it is so again, soon after it was given up."""
        was_reused = self._ghosts.pop(block_hash, None)
        if was_reused is None:
            return False
        rarity = max(1.0, self._num_ghosts[not was_reused] / self._num_ghosts[was_reused])
        self._num_ghosts[was_reused] -= 1
        step = _STEP * rarity if was_reused else -_STEP * rarity
        self._bonus = min(max(self._bonus + step, 0.0), _MAX_BONUS * self._num_blocks)
        return True


def _oldest(heap: list[tuple[int, int, CachedBlock]]) -> CachedBlock | None:
    while heap and heap[0][2].ticket != heap[0][1]:
        heapq.heappop(heap)
    return heap[0][2] if heap else None
