"""What runs in the next step: continuous batching as pure bookkeeping."""

from __future__ import annotations

import bisect
from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.deadline_queue import DeadlineQueue
from cluster.core.request import FinishReason, Priority, Request
from cluster.core.step import ScheduledSequence
from cluster.core.tracked_request import TrackedRequest
from cluster.core.waiting_queue import WaitingQueue
from cluster.errors import InvalidRequest, Overloaded

_URGENCY_KEY = attrgetter("urgency_key")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One step's plan.

    Attributes:
        scheduled: the sequences' shares; empty when there is nothing to run now.
        started: ids in ``scheduled`` that the worker does not hold: they travel whole.
        dropped: ids whose state the worker forgets before this step. They wait for a plan that is not empty.
        preempted: ids that lost their blocks to others; they start over later.
        expired: ids that ended because their deadline passed.
    """

    scheduled: tuple[ScheduledSequence, ...]
    started: tuple[int, ...]
    dropped: tuple[int, ...]
    preempted: tuple[int, ...]
    expired: tuple[int, ...]


class Scheduler:
    """Decides which requests run, and gives them their KV blocks.

    There is no prefill or decode phase. Every request has tokens, some of which are computed; a step computes more of
    them, and where it reaches the last one it samples one more (``TrackedRequest`` draws it).

    - **Step**: first the running requests that miss one token, most urgent first, then the running ones that miss more
      (prompts in chunks), then waiting ones in ``WaitingQueue``'s order, as far as ``max_num_batched_tokens`` and
      ``max_num_seqs`` go. A waiting request whose blocks are not free is not overtaken.
    - **Blocks**: a request takes the blocks of all its known tokens when it starts, and one more whenever it grows out
      of them. When none is free, the running request of the lowest class that arrived last is preempted: it gives up
      its blocks, keeps what it sampled, and starts over later from prompt and samples together. Since ``add`` refuses
      what the whole pool cannot hold, the most urgent request always gets on.
    - **Planning ahead**: ``schedule`` may come again before ``update``; a token that is still being sampled counts as a
      placeholder. The ``update``s follow in the order of the plans. A preempted request waits until its samples under
      way are in. Steps run in order on the device, so a plan may give away blocks that an earlier one still writes.
    - **Ends**: a request ends once: stopped or out of tokens (``update``), expired (``schedule``) or cancelled. Results
      that come after its end are passed over; that is why an id must not come back.

    Pure: ``now`` is any monotonic clock in seconds, the one of the requests' times. Not thread-safe.

    Args:
        config: limits of the batch and of the queue.
        block_manager: of the pool; nobody else takes blocks from it.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self._config = config
        self._blocks = block_manager
        self._live: dict[int, TrackedRequest] = {}
        self._waiting = WaitingQueue()
        self._running: list[TrackedRequest] = []  # most urgent first
        self._deadlines = DeadlineQueue()
        self._dropped: list[int] = []
        self._num_added = 0
        self._num_queued_tokens = 0
        self._num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """All that do not run, those that wait for their samples under way included."""
        return len(self._live) - len(self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of live requests that are neither computed nor in a step under way."""
        return self._num_queued_tokens

    @property
    def num_preemptions(self) -> int:
        """Since the start."""
        return self._num_preemptions

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, *requests: Request) -> None:
        """Queues requests, all of them or none.

        Raises:
            InvalidRequest: an id is live, a count is below 1, or the whole pool could not hold one of them.
            Overloaded: more than ``max_num_waiting`` would wait.
        """
        for request in requests:
            self._check(request)
        if len({request.request_id for request in requests}) < len(requests):
            raise InvalidRequest("two requests have the same id", field="request_id")
        if self.num_waiting + len(requests) > self._config.max_num_waiting:
            raise Overloaded(
                f"{self.num_waiting} sequences wait here and {len(requests)} more came; at most "
                f"{self._config.max_num_waiting} may wait"
            )
        for request in requests:
            tracked = TrackedRequest(request, self._num_added)
            self._num_added += 1
            self._live[request.request_id] = tracked
            self._waiting.push(tracked)
            self._num_queued_tokens += tracked.num_missing_tokens
            if request.deadline is not None:
                self._deadlines.add(request.request_id, request.deadline)

    def cancel(self, request_id: int) -> bool:
        """Ends a request and frees its blocks at once. False: it has ended already, or never was."""
        tracked = self._live.get(request_id)
        if tracked is not None:
            self._end(tracked)
        return tracked is not None

    def schedule(self, now: float) -> Schedule:
        """Plans the next step. Requests whose deadline is ``now`` or earlier end here."""
        expired = self._deadlines.pop_expired(now)
        for request_id in expired:
            self._end(self._live[request_id])
        scheduled: list[ScheduledSequence] = []
        budget = self._config.max_num_batched_tokens
        partial, preempted = self._grow_running(scheduled, budget)
        budget -= len(scheduled)
        for tracked in partial:
            if budget == 0:
                break
            budget -= self._advance(tracked, budget, (), scheduled)
        # Whoever was just preempted would take back the blocks that others lacked.
        started = [] if preempted else self._admit_waiting(scheduled, budget, now)
        dropped: list[int] = []
        if scheduled:
            dropped, self._dropped = self._dropped, []
        return Schedule(
            scheduled=tuple(scheduled),
            started=tuple(started),
            dropped=tuple(dropped),
            preempted=tuple(preempted),
            expired=tuple(expired),
        )

    def update(self, schedule: Schedule, stopped: Collection[int]) -> list[tuple[int, FinishReason]]:
        """Takes in a step's result: every live sequence that was to sample has one token more.

        Args:
            schedule: the plan that was run, the oldest not yet taken in.
            stopped: ids whose sampled token ends them.

        Returns:
            The requests that ended with this step, and why.
        """
        finished: list[tuple[int, FinishReason]] = []
        for share in schedule.scheduled:
            tracked = self._live.get(share.sequence_id)
            if tracked is None or not share.samples:
                continue
            tracked.num_placeholders -= 1
            tracked.num_output_tokens += 1
            if share.sequence_id in stopped:
                finished.append((share.sequence_id, FinishReason.STOP))
                self._end(tracked)
            elif tracked.num_output_tokens == tracked.request.max_tokens:
                finished.append((share.sequence_id, FinishReason.LENGTH))
                self._end(tracked)
            elif not tracked.running and tracked.num_placeholders == 0:
                self._waiting.push(tracked)
        return finished

    def check_integrity(self) -> None:
        """Raises RuntimeError where the books do not balance. Costs O(requests + blocks)."""
        self._blocks.check_integrity()
        if self._running != sorted(self._running, key=_URGENCY_KEY) or not all(t.running for t in self._running):
            raise RuntimeError("the running batch is out of order")
        num_held = 0
        for request_id, tracked in self._live.items():
            num_blocks = len(self._blocks.block_table(request_id))
            num_held += num_blocks
            if (
                tracked.running != (num_blocks > 0)
                or tracked.num_computed_tokens > num_blocks * self._blocks.block_size
            ):
                raise RuntimeError(
                    f"request {request_id} has {tracked.num_computed_tokens} computed tokens in {num_blocks} blocks"
                )
        if num_held + self._blocks.num_free_blocks != self._blocks.num_blocks:
            raise RuntimeError(
                f"{num_held} of {self._blocks.num_blocks} blocks are held by live requests, not all others are free"
            )
        if self._num_queued_tokens != sum(tracked.num_missing_tokens for tracked in self._live.values()):
            raise RuntimeError(f"{self._num_queued_tokens} queued tokens were counted, and they are not there")

    def _check(self, request: Request) -> None:
        if request.request_id in self._live:
            raise InvalidRequest(f"request {request.request_id} is already live", field="request_id")
        if request.num_prompt_tokens < 1 or request.max_tokens < 1:
            raise InvalidRequest(
                f"request {request.request_id} has {request.num_prompt_tokens} prompt tokens and asks for "
                f"{request.max_tokens}; both must be at least 1"
            )
        # The last sampled token is never computed.
        num_tokens = request.num_prompt_tokens + request.max_tokens - 1
        capacity = self._blocks.num_blocks * self._blocks.block_size
        if num_tokens > capacity:
            raise InvalidRequest(
                f"request {request.request_id} needs KV for up to {num_tokens} tokens; the whole pool holds {capacity}",
                field="sampling.max_tokens",
            )

    def _grow_running(self, scheduled: list[ScheduledSequence], budget: int) -> tuple[list[TrackedRequest], list[int]]:
        """Schedules running requests that miss one token; returns those that miss more, and who was preempted.

        The batch is walked from its most urgent end and preempted from the other, so nobody loses blocks after his
        share of this step is booked. Those that miss more have their blocks since they started.
        """
        partial: list[TrackedRequest] = []
        preempted: list[int] = []
        index = 0
        while index < len(self._running):
            tracked = self._running[index]
            index += 1
            num_missing_tokens = tracked.num_missing_tokens
            if num_missing_tokens > 1:
                partial.append(tracked)
            elif budget > 0 and not tracked.is_sampled_out:
                new_blocks = self._allocate(tracked, preempted)
                if new_blocks is not None:
                    budget -= self._advance(tracked, 1, new_blocks, scheduled)
        return partial, preempted

    def _allocate(self, tracked: TrackedRequest, preempted: list[int]) -> tuple[int, ...] | None:
        """Blocks for all tokens of a running request, taken from the least urgent if need be; None: that is itself."""
        while True:
            new_blocks = self._blocks.allocate(tracked.request.request_id, tracked.num_tokens)
            if new_blocks is not None:
                return new_blocks
            victim = self._running[-1]
            self._preempt(victim)
            preempted.append(victim.request.request_id)
            if victim is tracked:
                return None

    def _admit_waiting(self, scheduled: list[ScheduledSequence], budget: int, now: float) -> list[int]:
        started: list[int] = []
        while budget > 0 and len(self._running) < self._config.max_num_seqs:
            tracked = self._waiting.peek(now)
            if tracked is None:
                break
            request_id = tracked.request.request_id
            # Those that run grow into new blocks soon: without one spare for each, whoever starts now would be
            # preempted before its prompt has paid off.
            new_blocks = self._blocks.allocate(request_id, tracked.num_tokens, num_spare_blocks=len(self._running))
            if new_blocks is None:
                break
            if self._waiting.admit(tracked, now):
                tracked.priority = Priority.P0
            tracked.running = True
            bisect.insort(self._running, tracked, key=_URGENCY_KEY)
            started.append(request_id)
            budget -= self._advance(tracked, budget, new_blocks, scheduled)
        return started

    def _advance(
        self, tracked: TrackedRequest, budget: int, new_blocks: tuple[int, ...], scheduled: list[ScheduledSequence]
    ) -> int:
        """Books a share of this step of at most ``budget`` tokens; returns its size."""
        num_missing_tokens = tracked.num_missing_tokens
        num_new_tokens = min(num_missing_tokens, budget)
        samples = num_new_tokens == num_missing_tokens
        scheduled.append(
            ScheduledSequence(
                sequence_id=tracked.request.request_id,
                num_computed_tokens=tracked.num_computed_tokens,
                num_new_tokens=num_new_tokens,
                new_block_ids=new_blocks,
                samples=samples,
            )
        )
        tracked.num_computed_tokens += num_new_tokens
        tracked.num_placeholders += samples
        self._num_queued_tokens += samples - num_new_tokens
        return num_new_tokens

    def _preempt(self, tracked: TrackedRequest) -> None:
        self._stop_running(tracked)
        self._num_preemptions += 1
        self._num_queued_tokens += tracked.num_computed_tokens
        tracked.num_computed_tokens = 0
        if tracked.num_placeholders == 0:
            self._waiting.push(tracked)

    def _end(self, tracked: TrackedRequest) -> None:
        request_id = tracked.request.request_id
        del self._live[request_id]
        self._deadlines.discard(request_id)
        self._num_queued_tokens -= tracked.num_missing_tokens
        if tracked.running:
            self._stop_running(tracked)
        else:
            self._waiting.remove(tracked)

    def _stop_running(self, tracked: TrackedRequest) -> None:
        del self._running[bisect.bisect_left(self._running, tracked.urgency_key, key=_URGENCY_KEY)]
        tracked.running = False
        self._blocks.free(tracked.request.request_id)
        self._dropped.append(tracked.request.request_id)
