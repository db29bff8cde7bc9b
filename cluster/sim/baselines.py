"""Policies that the scheduler is compared with."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.request import FinishReason, Request
from cluster.core.schedule import Schedule
from cluster.core.step import ScheduledSequence
from cluster.errors import InvalidRequest, Overloaded


@dataclass
class _Sequence:
    """One live request; ``num_computed_tokens`` of its tokens have their KV in the pool."""

    request: Request
    num_output_tokens: int = 0
    num_computed_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.request.num_prompt_tokens + self.num_output_tokens


class PrefillFirst:
    """Prompts whole and before any decode, first come first served: continuous batching as it was before chunks.

    A step prefills or decodes, never both. While the oldest waiting prompt finds blocks and a place in the batch, the
    step prefills: as many waiting prompts as ``max_num_batched_tokens`` holds, and one at least, so that no prompt is
    too long. Else it decodes all that run. A hundredth of the pool is left free at admission, so that whoever starts is
    not preempted by the next block of another. When the pool is out of blocks, who arrived last gives up his; he is the
    first of those that wait, and his prompt and tokens are prefilled together when he returns.

    Blocks are taken before a step, one for each that decodes, as in vLLM's first engine (Kwon et al., SOSP 2023) and
    Orca's iteration-level scheduling (Yu et al., OSDI 2022). Classes and deadlines are not looked at.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self._config = config
        self._blocks = block_manager
        self._num_watermark_blocks = block_manager.num_blocks // 100
        self._live: dict[int, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # in the order of arrival
        self._dropped: list[int] = []

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, *requests: Request) -> None:
        """Raises InvalidRequest for what the pool cannot hold, Overloaded where too many wait."""
        for request in requests:
            num_tokens = request.num_prompt_tokens + request.max_tokens - 1
            if num_tokens > (self._blocks.num_blocks - self._num_watermark_blocks) * self._blocks.block_size:
                raise InvalidRequest(f"request {request.request_id} needs more KV than the pool holds")
        if len(self._waiting) + len(requests) > self._config.max_num_waiting:
            raise Overloaded(f"{len(self._waiting)} sequences wait already")
        for request in requests:
            sequence = _Sequence(request)
            self._live[request.request_id] = sequence
            self._waiting.append(sequence)

    def cancel(self, request_id: int) -> bool:
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return False
        if sequence in self._running:
            self._stop_running(sequence)
        else:
            self._waiting.remove(sequence)
        return True

    def schedule(self, now: float) -> Schedule:
        scheduled = self._prefill()
        started = tuple(share.sequence_id for share in scheduled)
        preempted: list[int] = []
        if not scheduled:
            scheduled = self._decode(preempted)
        dropped, self._dropped = tuple(self._dropped), []
        return Schedule(
            scheduled=tuple(scheduled),
            started=started,
            dropped=dropped,
            preempted=tuple(preempted),
            expired=(),
            num_cached_tokens=(0,) * len(started),
        )

    def update(
        self, schedule: Schedule, stopped: Collection[int], *, duration_s: float | None = None
    ) -> list[tuple[int, FinishReason]]:
        finished: list[tuple[int, FinishReason]] = []
        for share in schedule.scheduled:
            sequence = self._live.get(share.sequence_id)
            if sequence is None:
                continue
            sequence.num_output_tokens += 1
            is_stopped = share.sequence_id in stopped
            if is_stopped or sequence.num_output_tokens == sequence.request.max_tokens:
                self.cancel(share.sequence_id)
                finished.append((share.sequence_id, FinishReason.STOP if is_stopped else FinishReason.LENGTH))
        return finished

    def check_integrity(self) -> None:
        """Raises RuntimeError where blocks are lost or doubled, or held by requests that do not run."""
        self._blocks.check_integrity()
        held = {i for i in self._live if self._blocks.block_table(i)}
        if held != {sequence.request.request_id for sequence in self._running}:
            raise RuntimeError("other requests hold blocks than run")

    def _prefill(self) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        budget = self._config.max_num_batched_tokens
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            sequence = self._waiting[0]
            if scheduled and sequence.num_tokens > budget:
                break
            # A pool that nobody uses has room for any prompt that was let in.
            blocks = self._blocks.allocate(
                sequence.request.request_id, sequence.num_tokens, num_spare_blocks=self._num_watermark_blocks
            )
            if blocks is None:
                break
            self._waiting.popleft()
            self._running.append(sequence)
            scheduled.append(self._share(sequence, sequence.num_tokens, blocks))
            budget -= sequence.num_tokens
        self._running.sort(key=_by_arrival)
        return scheduled

    def _decode(self, preempted: list[int]) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            blocks = self._blocks.allocate(sequence.request.request_id, sequence.num_tokens)
            if blocks is None:
                victim = self._running[-1]  # may be this one
                self._stop_running(victim)
                victim.num_computed_tokens = 0
                self._waiting.appendleft(victim)
                preempted.append(victim.request.request_id)
            else:
                scheduled.append(self._share(sequence, 1, blocks))
                index += 1
        return scheduled

    def _share(self, sequence: _Sequence, num_new_tokens: int, blocks: tuple[int, ...]) -> ScheduledSequence:
        share = ScheduledSequence(
            sequence_id=sequence.request.request_id,
            num_computed_tokens=sequence.num_computed_tokens,
            num_new_tokens=num_new_tokens,
            new_block_ids=blocks,
            samples=True,
        )
        sequence.num_computed_tokens += num_new_tokens
        return share

    def _stop_running(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        self._blocks.free(sequence.request.request_id)
        self._dropped.append(sequence.request.request_id)


def _by_arrival(sequence: _Sequence) -> tuple[float, int]:
    return sequence.request.arrival, sequence.request.request_id
