"""How much of a trace's prompts a pool's prefix cache finds."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.core.block_manager import BlockManager
from cluster.sim.workload import Arrival


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixHits:
    """What was found.

    Attributes:
        num_blocks: full blocks of all prompts.
        num_cached_blocks: how many of them were in the cache.
    """

    num_blocks: int
    num_cached_blocks: int

    @property
    def rate(self) -> float:
        return self.num_cached_blocks / max(1, self.num_blocks)


def replay_prefixes(blocks: BlockManager, arrivals: Iterable[Arrival], *, tpot_s: float = 0.0) -> PrefixHits:
    """Runs the arrivals' prompts, in their order, through the production block manager.

    There is no engine here: a prompt is computed where it arrives. Each request holds the blocks of its prompt and its
    completion for ``tpot_s`` seconds per output token; nobody finds the completion's, for a trace of prompts does not
    say what they hold. Where a request finds too few free blocks, those that end first end at once.
    """
    running: list[tuple[float, int]] = []
    num_blocks = num_cached_blocks = 0
    for request_id, arrival in enumerate(arrivals):
        while running and running[0][0] <= arrival.at_s:
            blocks.free(heapq.heappop(running)[1])
        num_tokens = arrival.num_prompt_tokens + arrival.num_output_tokens - 1  # the last is never computed
        num_spare_blocks = -(-num_tokens // blocks.block_size) - (-(-arrival.num_prompt_tokens // blocks.block_size))
        num_blocks += len(arrival.block_hashes)
        while True:
            start = blocks.start(
                request_id, arrival.block_hashes, arrival.num_prompt_tokens, num_spare_blocks=num_spare_blocks
            )
            if start is not None or not running:
                break
            blocks.free(heapq.heappop(running)[1])
        if start is None:
            continue  # more than the whole pool
        num_cached_blocks += start.num_cached_tokens // blocks.block_size
        blocks.commit(request_id, arrival.block_hashes, arrival.num_prompt_tokens)
        blocks.allocate(request_id, num_tokens)
        heapq.heappush(running, (arrival.at_s + tpot_s * arrival.num_output_tokens, request_id))
    return PrefixHits(num_blocks=num_blocks, num_cached_blocks=num_cached_blocks)
