"""What runs in the next step: continuous batching as pure bookkeeping.

There is no prefill or decode phase. Every request has tokens (prompt, then what was sampled) of which some are
computed; a step computes more of them, and where it reaches a request's last token it samples one more.

    prompt                          sampled      placeholders
    [0 ........ num_prompt_tokens)  [.........)  [..........)
    [0 ..... num_computed_tokens)   <- computed or under way

Steps may be planned ahead: ``schedule`` again before ``update`` counts a token that is still being sampled as a
placeholder. Steps run in order on the device, so blocks that one plan frees may be written by the next.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Collection
from dataclasses import dataclass

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.request import FinishReason, Request
from cluster.core.step import ScheduledSequence

AGEING_S = 10.0
"""What one class of priority is worth in waiting time: a P3 goes before every P0 that comes 30 s after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One step's plan.

    Attributes:
        scheduled: the sequences' shares; empty when there is nothing to run now.
        started: ids in ``scheduled`` that the worker does not hold: they travel whole.
        dropped: ids whose state the worker forgets before this step.
        expired: ids that ended because their deadline passed.
    """

    scheduled: tuple[ScheduledSequence, ...]
    started: tuple[int, ...]
    dropped: tuple[int, ...]
    expired: tuple[int, ...]


class _Tracked:
    """A live request's counters."""

    __slots__ = ("key", "num_computed_tokens", "num_in_flight", "num_output_tokens", "num_placeholders", "request")

    def __init__(self, request: Request, sequence_number: int) -> None:
        self.request = request
        self.key = (request.arrival + AGEING_S * request.priority, sequence_number)
        self.num_computed_tokens = 0
        self.num_output_tokens = 0
        self.num_placeholders = 0
        self.num_in_flight = 0

    @property
    def num_tokens(self) -> int:
        return self.request.num_prompt_tokens + self.num_output_tokens + self.num_placeholders

    @property
    def num_missing_tokens(self) -> int:
        """Tokens to compute before the next sample; 0 when every sample it may still draw is under way."""
        if self.num_output_tokens + self.num_placeholders >= self.request.max_tokens:
            return 0
        return self.num_tokens - self.num_computed_tokens


def _key(tracked: _Tracked) -> tuple[float, int]:
    return tracked.key


class Scheduler:
    """Orders requests by class and arrival, and takes their blocks from a BlockManager.

    - **Order**: by ``arrival + AGEING_S x class``, waiting and running alike. The key never changes, so every request
      is overtaken for at most ``3 x AGEING_S`` seconds' worth of arrivals: nothing starves.
    - **Step**: first every running request that needs one token, then unfinished prompts in chunks, then waiting
      requests, until ``max_num_batched_tokens`` or ``max_num_seqs`` is reached. Waiting requests start strictly in
      order; one that does not fit is not overtaken.
    - **Blocks**: a request takes the blocks of all its known tokens when it starts, and one more whenever it grows
      into it. When there is none, the running request that is last in order is preempted: its blocks are freed, and
      it starts over later, prompt and sampled tokens together (recompute), so nothing is lost.

    ``schedule`` and ``update`` alternate, or several ``schedule`` come before their ``update``s, which then follow in
    the same order. Not thread-safe.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self._config = config
        self._blocks = block_manager
        self._live: dict[int, _Tracked] = {}
        self._waiting: list[tuple[tuple[float, int], int]] = []  # heap; entries of ended requests are skipped
        self._running: list[_Tracked] = []  # sorted by key
        self._deadlines: list[tuple[float, int]] = []  # heap; likewise
        self._dropped: list[int] = []
        self._num_added = 0
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._live) - len(self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt (and, after a preemption, sampled) tokens that are still to be computed."""
        return sum(tracked.num_missing_tokens for tracked in self._live.values())

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: its id is live, it asks for nothing, or even alone it would not fit the pool.
        """
        if request.request_id in self._live:
            raise ValueError(f"request {request.request_id} is already live")
        if request.num_prompt_tokens < 1 or request.max_tokens < 1:
            raise ValueError(f"request {request.request_id} has no prompt or asks for no token")
        num_tokens = request.num_prompt_tokens + request.max_tokens
        if num_tokens > self._blocks.num_blocks * self._blocks.block_size:
            raise ValueError(
                f"request {request.request_id} may grow to {num_tokens} tokens; the pool holds "
                f"{self._blocks.num_blocks * self._blocks.block_size}"
            )
        tracked = _Tracked(request, self._num_added)
        self._num_added += 1
        self._live[request.request_id] = tracked
        heapq.heappush(self._waiting, (tracked.key, request.request_id))
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))

    def cancel(self, request_id: int) -> bool:
        """Ends a request at once and frees its blocks. False: it had already ended, or never was."""
        tracked = self._live.get(request_id)
        if tracked is None:
            return False
        self._end(tracked)
        return True

    def schedule(self, now: float) -> Schedule:
        """Plans the next step. Requests whose deadline has come end here."""
        expired = self._expire(now)
        scheduled: list[ScheduledSequence] = []
        started: list[int] = []
        budget = self._config.max_num_batched_tokens
        preempted, budget = self._continue_decodes(scheduled, budget)
        budget = self._continue_prompts(scheduled, budget)
        if not preempted:
            self._start_waiting(scheduled, started, budget)
        dropped: tuple[int, ...] = ()
        if scheduled:
            dropped, self._dropped = tuple(self._dropped), []
        return Schedule(scheduled=tuple(scheduled), started=tuple(started), dropped=dropped, expired=expired)

    def update(self, schedule: Schedule, stopped: Collection[int]) -> list[tuple[int, FinishReason]]:
        """Takes in a step's result.

        Args:
            schedule: the plan that was run, oldest first.
            stopped: ids whose sampled token ends them.

        Returns:
            The requests that ended with this step, and why. What had ended before is passed over.
        """
        finished: list[tuple[int, FinishReason]] = []
        for sequence in schedule.scheduled:
            tracked = self._live.get(sequence.sequence_id)
            if tracked is None:
                continue
            tracked.num_in_flight -= 1
            if sequence.samples:
                tracked.num_placeholders -= 1
                tracked.num_output_tokens += 1
                if sequence.sequence_id in stopped:
                    finished.append((sequence.sequence_id, FinishReason.STOP))
                elif tracked.num_output_tokens >= tracked.request.max_tokens:
                    finished.append((sequence.sequence_id, FinishReason.LENGTH))
        for request_id, _ in finished:
            self._end(self._live[request_id])
        return finished

    def check_integrity(self) -> None:
        """Raises RuntimeError where the books do not balance."""
        self._blocks.check_integrity()
        if self._running != sorted(self._running, key=_key) or len(self._running) > self._config.max_num_seqs:
            raise RuntimeError("the running batch is out of order or over its limit")
        if not self._live and self._blocks.num_free_blocks != self._blocks.num_blocks:
            raise RuntimeError(f"idle, but {self._blocks.num_blocks - self._blocks.num_free_blocks} blocks are held")

    def _expire(self, now: float) -> tuple[int, ...]:
        expired: list[int] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            if self.cancel(request_id):
                expired.append(request_id)
        return tuple(expired)

    def _continue_decodes(self, scheduled: list[ScheduledSequence], budget: int) -> tuple[bool, int]:
        """One token for every running request that needs just one. Whoever is preempted comes later in order than the
        request that needs the block, so it has no share in this step yet."""
        preempted = False
        index = 0
        while index < len(self._running) and budget > 0:
            tracked = self._running[index]
            if tracked.num_missing_tokens == 1:
                new_blocks = self._blocks.allocate(tracked.request.request_id, tracked.num_tokens)
                while new_blocks is None:
                    preempted = True
                    last = self._running[-1]
                    self._preempt(last)
                    if last is tracked:
                        break
                    new_blocks = self._blocks.allocate(tracked.request.request_id, tracked.num_tokens)
                if new_blocks is None:
                    break
                scheduled.append(self._advance(tracked, 1, new_blocks))
                budget -= 1
            index += 1
        return preempted, budget

    def _continue_prompts(self, scheduled: list[ScheduledSequence], budget: int) -> int:
        for tracked in self._running:
            if budget == 0:
                break
            if (missing := tracked.num_missing_tokens) > 1:
                scheduled.append(self._advance(tracked, min(missing, budget), ()))
                budget -= min(missing, budget)
        return budget

    def _start_waiting(self, scheduled: list[ScheduledSequence], started: list[int], budget: int) -> None:
        while self._waiting and budget > 0 and len(self._running) < self._config.max_num_seqs:
            _, request_id = self._waiting[0]
            tracked = self._live.get(request_id)
            if tracked is None:
                heapq.heappop(self._waiting)
                continue
            if tracked.num_in_flight:
                break  # preempted with a sample under way: its tokens are not all known yet
            new_blocks = self._blocks.allocate(request_id, tracked.num_tokens)
            if new_blocks is None:
                break
            heapq.heappop(self._waiting)
            bisect.insort(self._running, tracked, key=_key)
            num_new_tokens = min(tracked.num_missing_tokens, budget)
            scheduled.append(self._advance(tracked, num_new_tokens, new_blocks))
            started.append(request_id)
            budget -= num_new_tokens

    def _advance(self, tracked: _Tracked, num_new_tokens: int, new_blocks: tuple[int, ...]) -> ScheduledSequence:
        samples = tracked.num_computed_tokens + num_new_tokens == tracked.num_tokens
        sequence = ScheduledSequence(
            sequence_id=tracked.request.request_id,
            num_computed_tokens=tracked.num_computed_tokens,
            num_new_tokens=num_new_tokens,
            new_block_ids=new_blocks,
            samples=samples,
        )
        tracked.num_computed_tokens += num_new_tokens
        tracked.num_in_flight += 1
        tracked.num_placeholders += samples
        return sequence

    def _preempt(self, tracked: _Tracked) -> None:
        self._leave_running(tracked)
        tracked.num_computed_tokens = 0
        self.num_preemptions += 1
        heapq.heappush(self._waiting, (tracked.key, tracked.request.request_id))

    def _end(self, tracked: _Tracked) -> None:
        del self._live[tracked.request.request_id]
        self._leave_running(tracked)

    def _leave_running(self, tracked: _Tracked) -> None:
        index = bisect.bisect_left(self._running, tracked.key, key=_key)
        if index < len(self._running) and self._running[index] is tracked:
            del self._running[index]
            self._blocks.free(tracked.request.request_id)
            self._dropped.append(tracked.request.request_id)
