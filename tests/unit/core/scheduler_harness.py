"""Drives a scheduler and checks all it says against a ledger of its own.

The ledger follows each request from the plans alone, as a worker would, and shares no code with the scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.request import FinishReason, Priority, Request
from cluster.core.scheduler import Schedule, Scheduler
from cluster.core.step import ScheduledSequence

OVERDUE_S = 5.0
MAX_PASSED = 3

CreateScheduler = Callable[[SchedulerConfig, BlockManager], Scheduler]


@dataclass
class Entry:
    """What the plans have said of one live request."""

    request: Request
    priority: Priority
    num_output_tokens: int = 0
    num_placeholders: int = 0
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    running: bool = False

    @property
    def num_tokens(self) -> int:
        return self.request.num_prompt_tokens + self.num_output_tokens + self.num_placeholders

    @property
    def age(self) -> tuple[float, int]:
        return self.request.arrival, self.request.request_id

    @property
    def urgency(self) -> tuple[int, float, int]:
        return self.priority, *self.age

    @property
    def wants_tokens(self) -> bool:
        return self.running and self.num_output_tokens + self.num_placeholders < self.request.max_tokens


class SchedulerHarness:
    """One scheduler, its clock and its steps in flight. Every method asserts; ``check`` holds at any time."""

    def __init__(
        self,
        *,
        num_blocks: int = 8,
        block_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_in_flight: int = 1,
        create: CreateScheduler = Scheduler,
        create_block_manager: Callable[[int, int], BlockManager] = BlockManager,
    ) -> None:
        self.config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        self.blocks = create_block_manager(num_blocks, block_size)
        self.scheduler = create(self.config, self.blocks)
        self.max_in_flight = max_in_flight
        self.now = 0.0
        self.live: dict[int, Entry] = {}
        self.ended: dict[int, FinishReason | str] = {}
        self.in_flight: deque[Schedule] = deque()
        self.num_preemptions = 0
        self._held: set[int] = set()
        self._num_added = 0
        self._num_passed = 0

    @property
    def capacity(self) -> int:
        return self.blocks.num_blocks * self.blocks.block_size

    def add(
        self,
        num_prompt_tokens: int = 1,
        max_tokens: int = 1,
        priority: Priority = Priority.P1,
        *,
        deadline: float | None = None,
    ) -> int:
        """Counts beyond the pool are cut to what fits."""
        num_prompt_tokens = min(num_prompt_tokens, self.capacity)
        request = Request(
            request_id=self._num_added,
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=min(max_tokens, self.capacity - num_prompt_tokens + 1),
            priority=priority,
            arrival=self.now,
            deadline=deadline,
        )
        self._num_added += 1
        self.scheduler.add(request)
        self.live[request.request_id] = Entry(request, priority)
        return request.request_id

    def cancel(self, request_id: int) -> None:
        assert self.scheduler.cancel(request_id) == (request_id in self.live), "cancel does not know who is live"
        if request_id in self.live:
            self._end(request_id, "cancelled")

    def schedule(self) -> Schedule:
        schedule = self.scheduler.schedule(self.now)
        self._check_expired(schedule)
        self._check_preempted(schedule)
        self._check_worker(schedule)
        self._check_started(schedule)
        for share in schedule.scheduled:
            self._check_share(share, share.sequence_id in schedule.started)
        self._check_limits(schedule)
        self._check_not_idle(schedule)
        if schedule.scheduled:
            self.in_flight.append(schedule)
        return schedule

    def update(self, stops: Callable[[int], bool] = lambda request_id: False) -> list[int]:
        """Takes in the oldest step in flight; ``stops`` says of a sampling request whether its token ends it. Returns
        who sampled."""
        schedule = self.in_flight.popleft()
        sampled = [s.sequence_id for s in schedule.scheduled if s.samples and s.sequence_id in self.live]
        stopped = {request_id for request_id in sampled if stops(request_id)}
        expected: list[tuple[int, FinishReason]] = []
        for request_id in sampled:
            entry = self.live[request_id]
            entry.num_placeholders -= 1
            entry.num_output_tokens += 1
            if request_id in stopped:
                expected.append((request_id, FinishReason.STOP))
            elif entry.num_output_tokens == entry.request.max_tokens:
                expected.append((request_id, FinishReason.LENGTH))
        finished = self.scheduler.update(schedule, stopped)
        assert len(dict(finished)) == len(finished), "a request ended twice in one step"
        assert not dict(finished).keys() & self.ended.keys(), "a request ended a second time"
        assert sorted(finished, key=str) == sorted(expected, key=str), "other ends than the tokens say"
        for request_id, reason in finished:
            self._end(request_id, reason)
        return sampled

    def step(self, stops: Callable[[int], bool] = lambda request_id: False) -> list[int]:
        """As an engine does: plans while there is room in flight, then takes the oldest in."""
        while len(self.in_flight) < self.max_in_flight and self.schedule().scheduled:
            pass
        return self.update(stops) if self.in_flight else []

    def drain(self) -> None:
        """Runs to the end: everybody gets there, and nothing is left."""
        # Each is started over for every token that anybody else samples, at the very worst.
        num_tokens = sum(e.request.num_prompt_tokens + e.request.max_tokens for e in self.live.values())
        limit = 10 + num_tokens * (1 + len(self.live)) * self.max_in_flight
        while self.live or self.in_flight:
            self.step()
            self.check()
            limit -= 1
            assert limit > 0, f"no end in sight for {sorted(self.live)}"
        assert self.blocks.num_free_blocks == self.blocks.num_blocks, "idle, and blocks are missing"

    def check(self) -> None:
        self.scheduler.check_integrity()
        owned = [block for entry in self.live.values() for block in entry.block_ids]
        assert len(set(owned)) == len(owned), "two requests own a block"
        assert len(owned) + self.blocks.num_free_blocks == self.blocks.num_blocks, "free + used is not the total"
        running = [entry for entry in self.live.values() if entry.running]
        assert self.scheduler.num_running == len(running)
        assert self.scheduler.num_waiting == len(self.live) - len(running)
        assert self.scheduler.has_work == bool(self.live), "live requests and has_work disagree"
        assert self.scheduler.num_preemptions == self.num_preemptions
        queued = sum(entry.num_tokens - entry.num_computed_tokens for entry in self.live.values())
        assert self.scheduler.num_queued_tokens == queued, "queued tokens are miscounted"

    def _end(self, request_id: int, how: FinishReason | str) -> None:
        assert request_id not in self.ended, "a request ended twice"
        del self.live[request_id]
        self.ended[request_id] = how

    def _check_expired(self, schedule: Schedule) -> None:
        late = {i for i, e in self.live.items() if e.request.deadline is not None and e.request.deadline <= self.now}
        assert set(schedule.expired) == late, "expired are those whose deadline has come"
        for request_id in schedule.expired:
            self._end(request_id, "expired")

    def _check_preempted(self, schedule: Schedule) -> None:
        for request_id in schedule.preempted:
            assert request_id in self.live, "preempted, but it has ended"
            entry = self.live[request_id]
            others = [other.urgency for other in self.live.values() if other.running]
            assert entry.running and entry.urgency == max(others), "the least urgent that runs is preempted"
            assert len(others) > 1, "a lone request was preempted"
            entry.running = False
            entry.block_ids = []
            entry.num_computed_tokens = 0
            self.num_preemptions += 1

    def _check_worker(self, schedule: Schedule) -> None:
        assert len(set(schedule.dropped)) == len(schedule.dropped)
        assert self._held >= set(schedule.dropped), "dropped, but not held"
        self._held -= set(schedule.dropped)
        assert not self._held & set(schedule.started), "started, but held"
        self._held |= set(schedule.started)
        if schedule.scheduled:
            # Not held in vain: whoever is neither live nor running has been dropped.
            assert self._held == {i for i, e in self.live.items() if e.running} | set(schedule.started)

    def _check_started(self, schedule: Schedule) -> None:
        for request_id in schedule.started:
            waiting = self._waiting()
            assert request_id in self.live, "started, but it has ended"
            entry = self.live[request_id]
            assert entry in waiting, "started, but not waiting (or with samples under way)"
            urgent = min(waiting, key=lambda e: e.urgency)
            oldest = min(waiting, key=lambda e: e.age)
            overdue = self.now - oldest.request.arrival >= OVERDUE_S
            assert entry is urgent or (entry is oldest and overdue), "out of order"
            self._num_passed = self._num_passed + 1 if overdue and entry is not oldest else 0
            assert self._num_passed <= MAX_PASSED, "the oldest is overdue and was passed too often"
            if any(other.priority < entry.priority for other in waiting):
                entry.priority = Priority.P0
            entry.running = True

    def _check_share(self, share: ScheduledSequence, started: bool) -> None:
        assert share.sequence_id in self.live, "scheduled, but it has ended"
        entry = self.live[share.sequence_id]
        assert entry.running, "scheduled, but not running"
        assert entry.wants_tokens, "scheduled past max_tokens"
        assert share.num_computed_tokens == entry.num_computed_tokens, "computed tokens do not continue"
        assert not started or (share.num_computed_tokens == 0 and not entry.block_ids), "started in the middle"
        entry.num_computed_tokens += share.num_new_tokens
        assert share.num_new_tokens > 0 and entry.num_computed_tokens <= entry.num_tokens, "tokens that nobody knows"
        assert share.samples == (entry.num_computed_tokens == entry.num_tokens), "samples exactly at the last token"
        entry.num_placeholders += share.samples
        entry.block_ids += share.new_block_ids
        assert entry.num_computed_tokens <= len(entry.block_ids) * self.blocks.block_size, "too few blocks"
        assert tuple(entry.block_ids) == self.blocks.block_table(share.sequence_id), "the worker's table is another"

    def _check_limits(self, schedule: Schedule) -> None:
        ids = [share.sequence_id for share in schedule.scheduled]
        assert len(set(ids)) == len(ids), "scheduled twice in a step"
        num_new_tokens = sum(share.num_new_tokens for share in schedule.scheduled)
        assert num_new_tokens <= self.config.max_num_batched_tokens, "over the token budget"
        assert sum(e.running for e in self.live.values()) <= self.config.max_num_seqs, "over the sequence budget"

    def _check_not_idle(self, schedule: Schedule) -> None:
        if not schedule.scheduled:
            assert self.in_flight or not self.live, "idle, with work waiting"
        num_new_tokens = sum(share.num_new_tokens for share in schedule.scheduled)
        if num_new_tokens == self.config.max_num_batched_tokens:
            return
        ids = {share.sequence_id for share in schedule.scheduled}
        missed = [i for i, e in self.live.items() if e.wants_tokens and i not in ids]
        assert not missed, f"there was budget left for the running {missed}"
        num_running = sum(entry.running for entry in self.live.values())
        waiting = self._waiting()
        if waiting and not schedule.preempted and num_running < self.config.max_num_seqs:
            most = max(-(-entry.num_tokens // self.blocks.block_size) for entry in waiting)
            spare = self.blocks.num_free_blocks - num_running
            assert most > spare, "there were blocks for all that wait, and nobody was started"

    def _waiting(self) -> Collection[Entry]:
        return [entry for entry in self.live.values() if not entry.running and entry.num_placeholders == 0]
