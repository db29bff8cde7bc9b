"""What runs in the next step: continuous batching as pure bookkeeping."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

from cluster.core.block_manager import BlockManager
from cluster.core.class_policy import ClassPolicy
from cluster.core.config import ClassesConfig, SchedulerConfig
from cluster.core.deadline_queue import DeadlineQueue
from cluster.core.micro_batches import MicroBatches
from cluster.core.parking import Parking
from cluster.core.queue_bounds import QueueBounds
from cluster.core.request import FinishReason, Priority, Request
from cluster.core.running_batch import RunningBatch
from cluster.core.schedule import Schedule, StepPlan
from cluster.core.sibling_group import SiblingGroup
from cluster.core.step import ScheduledSequence
from cluster.core.step_budget import StepBudget
from cluster.core.tracked_request import TrackedRequest
from cluster.core.waiting_queue import WaitingQueue
from cluster.errors import InvalidRequest

_CLASSES = tuple(Priority)
_NO_HASHES: Mapping[int, Sequence[bytes]] = MappingProxyType({})

# Running requests that miss more than one token, by class, oldest first.
_Prompts = tuple[deque[TrackedRequest], ...]


class Scheduler:
    """Decides which requests run, and gives them their KV blocks.

    There is no prefill or decode phase. Every request has tokens, some of which are computed; a step computes more of
    them, and where it reaches the last one it samples one more (``TrackedRequest`` draws it).

    - **Step**: every running request that misses one token gets it. What ``StepBudget`` leaves goes to those that miss
      more, prompts in chunks, and to those that wait, as far as ``max_num_seqs`` goes. ``ClassPolicy`` says whose turn
      it is; within a class the running come first, then the oldest. Who waits and finds no blocks is overtaken by more
      urgent classes alone, and once its class is overdue by nobody.
    - **Blocks**: a request takes the blocks of all its known tokens when it starts, shared ones where the prefix cache
      or a sibling has them (``BlockManager``, ``SiblingGroup``), and one more whenever it grows out of them.
    - **Preemption**: when no block is free to grow, the running request of the lowest class that arrived last loses its
      place. Since ``add`` refuses what the whole pool cannot hold, the most urgent request always gets on. A P0 that
      finds no room takes it, at once, from the lowest class that holds more than its share of it; but not from one that
      was started before more urgent ones or after a preemption because its class is within its share of the work, so
      everybody gets to an end. Who loses its place keeps what it sampled, and its place in the queue. Its KV is parked
      in host memory or computed again (``Parking``).
    - **Planning ahead**: ``schedule`` may come again before ``update``; a token that is still being sampled counts as a
      placeholder. The ``update``s follow in the order of the plans. A preempted request waits until its samples under
      way are in. Steps run in order on the device, so a plan may give away blocks that an earlier one still writes.
    - **Pipelines**: with several stages as many steps are under way, and each has its part of those that decode
      (``MicroBatches``). Where all of these are under way and there is no prompt a plan is empty, until an ``update``.
    - **Ends**: a request ends once: stopped or out of tokens (``update``), expired (``schedule``) or cancelled. Results
      that come after its end are passed over; that is why an id must not come back.

    Pure: ``now`` is any monotonic clock in seconds, the one of the requests' times. Not thread-safe.

    Args:
        config: limits of the batch and of the queue.
        block_manager: of the pool; nobody else takes blocks from it.
        classes: shares and latency targets of the priority classes; None: their defaults.
        block_bytes: of one block, all layers; 0: the worker cannot park blocks.
        num_stages: of the pipeline that runs the steps.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        block_manager: BlockManager,
        *,
        classes: ClassesConfig | None = None,
        block_bytes: int = 0,
        num_stages: int = 1,
    ) -> None:
        self._policy = ClassPolicy(classes or ClassesConfig(), burst_tokens=config.max_num_batched_tokens)
        self._budget = StepBudget(config, min_prefill_tokens=block_manager.block_size, num_stages=num_stages)
        self._micro_batches = MicroBatches(num_stages, min_prompt_tokens=block_manager.block_size)
        capacity = block_manager.num_blocks * block_manager.block_size
        self._bounds = QueueBounds(config.max_num_waiting, self._policy.share, capacity)
        self._live: dict[int, TrackedRequest] = {}
        self._num_live = Counter[Priority]()
        self._waiting = WaitingQueue()
        self._running = RunningBatch(config.max_num_seqs, block_manager, Parking(config.park_bytes, block_bytes))
        self._deadlines = DeadlineQueue()
        self._num_added = 0
        self._num_queued_tokens = 0
        self._num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """All that do not run, those that wait for their samples under way or for a sibling included."""
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
            Overloaded: more than ``max_num_waiting`` would wait, and more than its class's share of them of some class.
        """
        for request in requests:
            if request.request_id in self._live:
                raise InvalidRequest(f"request {request.request_id} is already live", field="request_id")
            self._bounds.check(request)
        if len({request.request_id for request in requests}) < len(requests):
            raise InvalidRequest("two requests have the same id", field="request_id")
        self._bounds.check_queue(requests, self._num_live, self._running)
        groups: dict[int, SiblingGroup] = {}
        for request in requests:
            group = None if request.group is None else groups.setdefault(request.group, SiblingGroup())
            tracked = TrackedRequest(request, self._num_added, group)
            self._num_added += 1
            self._live[request.request_id] = tracked
            self._num_live[request.priority] += 1
            if group is None or group.add(tracked):
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
        decoding: list[TrackedRequest] = []
        prompts: _Prompts = tuple(deque() for _ in _CLASSES)
        for tracked in self._running:
            if tracked.num_tokens - tracked.num_computed_tokens > 1:
                prompts[tracked.request.priority].append(tracked)
            elif tracked.num_tokens < tracked.max_num_tokens:
                decoding.append(tracked)
        heads = self._heads(prompts)
        plan = StepPlan(waiting=heads.keys())
        batch = self._micro_batches.pick(decoding)
        budget = self._budget.num_prefill_tokens(
            len(batch),
            (tracked.num_computed_tokens for tracked in batch),
            max((of_class[0].num_computed_tokens for of_class in prompts if of_class), default=0),
            # Others' decodes do not keep a class from its share.
            may_wait=not heads or not self._policy.is_within_share(self._pick(heads)),
            others_decode=len(batch) < len(decoding),
        )
        could_start = self._running.room_for(self._waiting)
        budget = self._micro_batches.max_prompt_tokens(chain(*prompts, could_start), budget)
        budget = self._admit_urgent(plan, prompts, decoding, batch, budget)
        num_decoded = self._decode(plan, batch)
        # Where all of these have lost their places it is the turn of those that were left out.
        while not plan.scheduled and (others := self._micro_batches.pick([t for t in decoding if t.running])):
            num_decoded = self._decode(plan, others)
        budget += len(batch) - num_decoded
        self._prefill(plan, prompts, budget)
        for tracked in self._running.commit():
            self._waiting.push(tracked)
        if plan.scheduled:
            self._running.tell(plan)
            self._micro_batches.plan()
        return plan.finish(expired)

    def update(
        self,
        schedule: Schedule,
        stopped: Collection[int],
        *,
        block_hashes: Mapping[int, Sequence[bytes]] = _NO_HASHES,
        duration_s: float | None = None,
        parking_s: float = 0.0,
    ) -> list[tuple[int, FinishReason]]:
        """Takes in a step's result: every live sequence that was to sample has one token more.

        Args:
            schedule: the plan that was run, the oldest not yet taken in.
            stopped: ids whose sampled token ends them.
            block_hashes: of blocks that sampled tokens have filled, by request; they continue the request's own.
            duration_s: how long the step took, counted from the end of the one before it where that was under way.
            parking_s: how much of that went into ``parked`` and ``resumed``.

        Returns:
            The requests that ended with this step, and why.
        """
        self._micro_batches.finish()
        if duration_s is not None:
            self._budget.observe(schedule, duration_s - parking_s)
            self._running.observe(schedule, duration_s - parking_s, parking_s)
        for request_id, hashes in block_hashes.items():
            tracked = self._live.get(request_id)
            if tracked is not None:
                self._running.add_hashes(tracked, hashes)
        finished: list[tuple[int, FinishReason]] = []
        for share in schedule.scheduled:
            tracked = self._live.get(share.sequence_id)
            if tracked is None or not share.samples:
                continue
            tracked.num_placeholders -= 1
            if share.sequence_id in stopped:
                finished.append((share.sequence_id, FinishReason.STOP))
                self._end(tracked)
            elif tracked.num_placeholders == 0:
                if tracked.num_tokens == tracked.max_num_tokens:
                    finished.append((share.sequence_id, FinishReason.LENGTH))
                    self._end(tracked)
                elif not tracked.running:
                    self._waiting.push(tracked)
        return finished

    def check_integrity(self) -> None:
        """Raises RuntimeError where the books do not balance. Costs O(requests + blocks)."""
        self._running.check_integrity(self._live.values())
        if self._num_queued_tokens != sum(tracked.num_missing_tokens for tracked in self._live.values()):
            raise RuntimeError(f"{self._num_queued_tokens} queued tokens were counted, and they are not there")

    def _heads(self, prompts: _Prompts, limit: int = len(_CLASSES)) -> dict[Priority, TrackedRequest]:
        """Who is next in each class; those that wait only of the ``limit`` most urgent classes."""
        heads: dict[Priority, TrackedRequest] = {}
        for priority in _CLASSES:
            running = prompts[priority]
            while running and not running[0].running:  # preempted in this plan
                running.popleft()
            head = running[0] if running else self._waiting.head(priority) if priority < limit else None
            if head is not None:
                heads[priority] = head
        return heads

    def _pick(self, heads: Mapping[Priority, TrackedRequest]) -> Priority:
        return self._policy.pick({priority: head.request.arrival for priority, head in heads.items()})

    def _admit_urgent(
        self,
        plan: StepPlan,
        prompts: _Prompts,
        decoding: list[TrackedRequest],
        batch: list[TrackedRequest],
        budget: int,
    ) -> int:
        """Starts P0s whose turn it is, in the place of others if need be; returns what is left of the budget.

        This comes before all else in a step, so that nobody loses his place after his share of the step is booked.
        """
        # Where all decode and no token is left, whoever goes leaves his.
        while budget > 0 or (self._running.is_full and len(decoding) == len(self._running)):
            tracked = self._waiting.head(Priority.P0)
            if tracked is None:
                break
            heads = self._heads(prompts)
            if heads[Priority.P0] is not tracked or self._pick(heads) is not Priority.P0:
                break
            blocks = self._start(plan, tracked) if budget > 0 else None
            while blocks is None and (victims := self._running.victims(tracked, self._policy.share)):
                self._preempt(plan, victims[0])
                if victims[0] in decoding:
                    decoding.remove(victims[0])
                    if victims[0] in batch:
                        batch.remove(victims[0])
                        budget += 1
                    else:  # his token would have come in a later step
                        budget = max(budget, 1)
                blocks = self._start(plan, tracked)
            if blocks is None:
                break
            budget -= self._compute(plan, tracked, budget, blocks)
        return budget

    def _decode(self, plan: StepPlan, decoding: Sequence[TrackedRequest]) -> int:
        """Books the next token of all that miss one, most urgent first, and preempts from the other end; returns of how
        many."""
        counts = [0] * len(_CLASSES)
        for tracked in decoding:
            if not tracked.running:
                continue
            blocks: tuple[int, ...] = ()
            if tracked.num_tokens > tracked.num_block_tokens:
                grown = self._grow(plan, tracked)
                if grown is None:
                    continue
                blocks = grown
            counts[tracked.request.priority] += 1
            self._advance(plan, tracked, 1, blocks)
        for priority in _CLASSES:
            if counts[priority]:
                self._policy.charge(priority, counts[priority], plan.waiting)
        return sum(counts)

    def _prefill(self, plan: StepPlan, prompts: _Prompts, budget: int) -> None:
        """Books prompts of those that run and of those that wait, by the classes' turns."""
        # Whoever was just preempted would take back the place that others lacked.
        limit = 0 if plan.preempted else len(_CLASSES)
        while budget > 0:
            if self._running.is_full:
                limit = 0
            heads = self._heads(prompts, limit)
            if not heads:
                break
            priority = self._pick(heads)
            tracked = heads[priority]
            blocks: tuple[int, ...] | None = ()
            if tracked.running:
                prompts[priority].popleft()
            else:
                blocks = self._start(plan, tracked, out_of_turn=min(heads) < priority)
            if blocks is None:
                limit = 0 if self._policy.is_overdue(priority) else priority
            else:
                budget -= self._compute(plan, tracked, budget, blocks)

    def _start(self, plan: StepPlan, tracked: TrackedRequest, *, out_of_turn: bool = False) -> tuple[int, ...] | None:
        """Moves a request from the queue to the batch; its blocks, or None where there is no room for it."""
        within_share = self._policy.is_within_share(tracked.request.priority)
        num_missing_tokens = tracked.num_missing_tokens
        is_shielded = out_of_turn or (tracked.num_tokens_preempted > 0 and within_share)
        blocks = self._running.start(plan, tracked, is_shielded=is_shielded)
        if blocks is not None:
            self._waiting.remove(tracked)
            self._num_queued_tokens += tracked.num_missing_tokens - num_missing_tokens
        return blocks

    def _grow(self, plan: StepPlan, tracked: TrackedRequest) -> tuple[int, ...] | None:
        """Blocks for all tokens of a running request, taken from the least urgent if need be; None: that is itself."""
        while (blocks := self._running.grow(tracked)) is None:
            victim = self._running.least_urgent
            self._preempt(plan, victim)
            if victim is tracked:
                break
        return blocks

    def _compute(self, plan: StepPlan, tracked: TrackedRequest, budget: int, blocks: tuple[int, ...]) -> int:
        """Books as much of a prompt as the budget holds, and its class pays; returns how much."""
        num_new_tokens = min(tracked.num_missing_tokens, budget)
        self._advance(plan, tracked, num_new_tokens, blocks)
        self._policy.charge(tracked.request.priority, num_new_tokens, plan.waiting)
        return num_new_tokens

    def _advance(self, plan: StepPlan, tracked: TrackedRequest, num_new_tokens: int, blocks: tuple[int, ...]) -> None:
        """Books a share of this step."""
        num_computed_tokens = tracked.num_computed_tokens
        samples = num_computed_tokens + num_new_tokens == tracked.num_tokens
        plan.scheduled.append(
            ScheduledSequence(
                sequence_id=tracked.request.request_id,
                num_computed_tokens=num_computed_tokens,
                num_new_tokens=num_new_tokens,
                new_block_ids=blocks,
                samples=samples,
            )
        )
        tracked.num_computed_tokens = num_computed_tokens + num_new_tokens
        if samples:
            tracked.sampled_in = self._micro_batches.num_planned
        tracked.num_placeholders += samples
        tracked.num_tokens += samples
        self._num_queued_tokens += samples - num_new_tokens

    def _preempt(self, plan: StepPlan, tracked: TrackedRequest) -> None:
        num_missing_tokens = tracked.num_missing_tokens
        self._running.preempt(plan, tracked)
        self._num_preemptions += 1
        self._num_queued_tokens += tracked.num_missing_tokens - num_missing_tokens
        if tracked.num_placeholders == 0:
            self._waiting.push(tracked)

    def _end(self, tracked: TrackedRequest) -> None:
        request_id = tracked.request.request_id
        del self._live[request_id]
        self._num_live[tracked.request.priority] -= 1
        self._deadlines.discard(request_id)
        self._num_queued_tokens -= tracked.num_missing_tokens
        if tracked.running:
            self._running.stop(tracked)
        else:
            self._waiting.remove(tracked)
            self._running.unpark(tracked)
        if tracked.group is not None:
            successor = tracked.group.ended(tracked)
            if successor is not None:
                self._waiting.push(successor)
