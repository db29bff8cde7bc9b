"""What to do with the KV of a preempted request: copy it to host memory, or compute it again."""

from __future__ import annotations

from collections.abc import Collection

from cluster.core.schedule import Schedule

_SMOOTHING = 0.2
_MIN_PROMPT_PART = 8  # tokens of prompts per sequence of a step from which its time is said to be theirs


class Parking:
    """Decides which preempted requests keep their KV in host memory, and knows which do.

    The rule is measured: parked blocks are copied twice, out and back; what is not parked is computed again, but for
    the blocks that others hold and that will be found by their hashes. Whichever takes less time is done. As long as
    one of the two is not measured blocks are parked: that is how it gets measured, and copying usually wins by far.

    Args:
        max_bytes: host memory for parked blocks.
        block_bytes: of one block, all layers; 0: nothing is parked.
    """

    def __init__(self, max_bytes: int, block_bytes: int) -> None:
        self._max_blocks = max_bytes // block_bytes if block_bytes else 0
        self._num_blocks: dict[int, int] = {}
        self._num_used_blocks = 0
        self._block_copy_s = 0.0
        self._token_compute_s = 0.0

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._num_blocks

    def park(self, request_id: int, num_blocks: int, num_lost_tokens: int) -> bool:
        """Whether the request's blocks are to be parked; they count as parked then.

        Args:
            request_id: a request that is not parked.
            num_blocks: that its computed tokens are in.
            num_lost_tokens: those of its tokens that would have to be computed again.
        """
        if num_lost_tokens <= 0 or self._num_used_blocks + num_blocks > self._max_blocks:
            return False
        if 2 * num_blocks * self._block_copy_s > num_lost_tokens * self._token_compute_s > 0.0:
            return False
        self._num_blocks[request_id] = num_blocks
        self._num_used_blocks += num_blocks
        return True

    def release(self, request_id: int) -> bool:
        """Forgets a request's blocks. False: none are parked."""
        num_blocks = self._num_blocks.pop(request_id, 0)
        self._num_used_blocks -= num_blocks
        return num_blocks > 0

    def observe(self, schedule: Schedule, compute_s: float, copy_s: float) -> None:
        """A step has taken so long to compute, and to copy what it parked and resumed."""
        if self._max_blocks == 0:
            return
        num_blocks = sum(len(blocks.block_ids) for blocks in (*schedule.parked, *schedule.resumed))
        if num_blocks > 0:
            self._block_copy_s = _smooth(self._block_copy_s, copy_s / num_blocks)
        num_tokens = sum(share.num_new_tokens for share in schedule.scheduled if share.num_new_tokens > 1)
        # Decodes beside it would make a prompt look dear.
        if num_tokens > _MIN_PROMPT_PART * len(schedule.scheduled):
            self._token_compute_s = _smooth(self._token_compute_s, compute_s / num_tokens)

    def check_integrity(self, live: Collection[int]) -> None:
        """Raises RuntimeError unless only ``live`` requests are parked, within the limit."""
        if not self._num_blocks.keys() <= set(live):
            raise RuntimeError("blocks are parked of requests that have ended")
        if not sum(self._num_blocks.values()) == self._num_used_blocks <= self._max_blocks:
            raise RuntimeError(f"{self._num_used_blocks} blocks are parked, and they are not there or too many")


def _smooth(average: float, value: float) -> float:
    return value if average == 0.0 else average + _SMOOTHING * (value - average)
