"""Drives a scheduler and checks all it says against a ledger of its own.

The ledger follows each request from the plans alone, as a worker would, and shares no code with the scheduler. Every
request has tokens here, of prompts that begin alike, so that ``KVModel`` can tell whether each attends to its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from kv_model import KVModel

from cluster.core.block_manager import BlockManager
from cluster.core.config import ClassesConfig, SchedulerConfig
from cluster.core.request import FinishReason, Priority, Request
from cluster.core.schedule import Schedule
from cluster.core.scheduler import Scheduler
from cluster.core.step import ScheduledSequence

CreateScheduler = Callable[..., Scheduler]


@dataclass
class Siblings:
    """Requests with one prompt, in the order in which they came."""

    request_ids: list[int]
    computed: bool = False  # the prompt, by a plan that is past


@dataclass
class Entry:
    """What the plans have said of one live request."""

    request: Request
    chain: list[bytes]  # of every token it may ever have; what a sampled token is, is known beforehand
    siblings: Siblings
    num_output_tokens: int = 0
    num_placeholders: int = 0
    num_computed_tokens: int = 0
    num_hashes: int = 0
    block_ids: list[int] = field(default_factory=list)
    running: bool = False
    may_be_shielded: bool = False
    parked: bool = False
    num_undecided_tokens: int = 0  # computed when it was preempted, and no plan has said yet whether they are parked
    sampled_in: int = -1  # the plan that sampled its newest token

    @property
    def num_tokens(self) -> int:
        return self.request.num_prompt_tokens + self.num_output_tokens + self.num_placeholders

    @property
    def num_missing_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def age(self) -> tuple[float, int]:
        return self.request.arrival, self.request.request_id

    @property
    def urgency(self) -> tuple[int, float, int]:
        return self.request.priority, *self.age

    @property
    def decodes(self) -> bool:
        return self.wants_tokens and self.num_missing_tokens == 1

    @property
    def wants_tokens(self) -> bool:
        return self.running and self.num_output_tokens + self.num_placeholders < self.request.max_tokens


def create_chain(prompt: int, own: int, num_prompt_tokens: int, num_tokens: int) -> list[bytes]:
    """Prompts of one number begin alike, whatever their length; ``own`` tells apart what is sampled after them."""
    chain: list[bytes] = []
    digest = b""
    for position in range(num_tokens):
        token = f"{prompt}" if position < num_prompt_tokens else f"sampled {own}"
        digest = sha256(digest + token.encode()).digest()
        chain.append(digest)
    return chain


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
        num_park_blocks: int = 0,
        num_stages: int = 1,
        classes: ClassesConfig | None = None,
        create: CreateScheduler = Scheduler,
        create_block_manager: Callable[[int, int], BlockManager] = BlockManager,
        **config: Any,
    ) -> None:
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            park_bytes=10 * num_park_blocks,
            **config,
        )
        self.classes = classes or ClassesConfig()
        self.num_park_blocks = num_park_blocks
        self.blocks = create_block_manager(num_blocks, block_size)
        self.scheduler = create(self.config, self.blocks, classes=self.classes, block_bytes=10, num_stages=num_stages)
        self.kv = KVModel(block_size)
        self.max_in_flight = max_in_flight
        self.num_stages = num_stages
        self.num_planned = 0
        self.now = 0.0
        self.live: dict[int, Entry] = {}
        self.ended: dict[int, FinishReason | str] = {}
        self.in_flight: deque[Schedule] = deque()
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_forks = 0
        self.num_parked = 0
        self.num_resumed = 0
        self._held: set[int] = set()
        self._num_added = 0

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
        prompt: int | None = None,
        own: int | None = None,
        num_copied_tokens: int = 0,
        n: int = 1,
        num_emitted_tokens: int = 0,
    ) -> int:
        """Counts beyond the pool are cut to what fits. ``prompt`` None: nothing is shared with others. The last
        ``num_copied_tokens`` of the prompt are what ``own`` samples. Another scheduler has sampled the first
        ``num_emitted_tokens``. Returns the first of ``n`` ids, which follow each other."""
        num_prompt_tokens = min(num_prompt_tokens, self.capacity)
        max_tokens = min(max_tokens, self.capacity - num_prompt_tokens + 1)
        num_emitted_tokens = min(num_emitted_tokens, max_tokens - 1)
        num_known_tokens = num_prompt_tokens + num_emitted_tokens
        first = self._num_added
        siblings = Siblings(list(range(first, first + n)))
        for request_id in siblings.request_ids:
            chain = create_chain(
                -1 - first if prompt is None else prompt,
                request_id if own is None or n > 1 else own,
                num_prompt_tokens - num_copied_tokens,
                num_prompt_tokens + max_tokens,
            )
            request = Request(
                request_id=request_id,
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=max_tokens,
                num_emitted_tokens=num_emitted_tokens,
                priority=priority,
                arrival=self.now,
                deadline=deadline,
                block_hashes=() if prompt is None else tuple(self._hashes(chain[:num_known_tokens])),
                group=first if n > 1 else None,
            )
            entry = Entry(
                request,
                chain,
                siblings,
                num_output_tokens=num_emitted_tokens,
                num_hashes=len(request.block_hashes),
            )
            self.live[request_id] = entry
        self._num_added += n
        self.scheduler.add(*(self.live[request_id].request for request_id in siblings.request_ids))
        return first

    def cancel(self, request_id: int) -> None:
        assert self.scheduler.cancel(request_id) == (request_id in self.live), "cancel does not know who is live"
        if request_id in self.live:
            self._end(request_id, "cancelled")

    def schedule(self) -> Schedule:
        schedule = self.scheduler.schedule(self.now)
        self._check_expired(schedule)
        decoding = {request_id for request_id, entry in self.live.items() if entry.decodes}
        unread = {request_id: entry.num_missing_tokens for request_id, entry in self.live.items()}
        self._check_preempted(schedule)
        self._check_worker(schedule)
        self._check_started(schedule)
        self._check_micro_batch(schedule, decoding)
        for share in schedule.scheduled:
            self._check_share(share, share.sequence_id in schedule.started)
        self._run(schedule)
        self._check_limits(schedule)
        self._check_not_idle(schedule, decoding)
        self._check_pace(schedule, unread, decoding)
        for entry in self.live.values():
            if entry.running and entry.num_computed_tokens >= entry.request.num_prompt_tokens:
                entry.siblings.computed = True
        if schedule.scheduled:
            self.in_flight.append(schedule)
            self.num_planned += 1
        return schedule

    def update(self, stops: Callable[[int], bool] = lambda request_id: False, **measured: float) -> list[int]:
        """Takes in the oldest step in flight; ``stops`` says of a sampling request whether its token ends it. Returns
        who sampled."""
        schedule = self.in_flight.popleft()
        sampled = [s.sequence_id for s in schedule.scheduled if s.samples and s.sequence_id in self.live]
        stopped = {request_id for request_id in sampled if stops(request_id)}
        expected: list[tuple[int, FinishReason]] = []
        block_hashes: dict[int, list[bytes]] = {}
        for request_id in sampled:
            entry = self.live[request_id]
            entry.num_placeholders -= 1
            entry.num_output_tokens += 1
            if request_id in stopped:
                expected.append((request_id, FinishReason.STOP))
            elif entry.num_output_tokens == entry.request.max_tokens:
                expected.append((request_id, FinishReason.LENGTH))
            if entry.request.block_hashes:
                num_known = entry.request.num_prompt_tokens + entry.num_output_tokens
                new = self._hashes(entry.chain[:num_known])[entry.num_hashes :]
                entry.num_hashes += len(new)
                if new:
                    block_hashes[request_id] = new
        finished = self.scheduler.update(schedule, stopped, block_hashes=block_hashes, **measured)
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
        if self._held or self.kv.parked:
            # What the worker forgets waits for a step; one more, and it holds nothing any more.
            last = self.add()
            self.schedule()
            assert self._held == {last}, "the worker holds sequences that have ended"
            assert not self.kv.parked, "blocks stay parked for ever"
            self.update()
            del self.ended[last]

    def check(self) -> None:
        self.scheduler.check_integrity()
        owned = {block for entry in self.live.values() for block in entry.block_ids}
        assert len(owned) + self.blocks.num_free_blocks == self.blocks.num_blocks, "free + used is not the total"
        running = [entry for entry in self.live.values() if entry.running]
        assert self.scheduler.num_running == len(running)
        assert self.scheduler.num_waiting == len(self.live) - len(running)
        assert self.scheduler.has_work == bool(self.live), "live requests and has_work disagree"
        assert self.scheduler.num_preemptions == self.num_preemptions
        queued = sum(entry.num_tokens - entry.num_computed_tokens for entry in self.live.values())
        undecided = sum(entry.num_undecided_tokens for entry in self.live.values())
        assert queued - undecided <= self.scheduler.num_queued_tokens <= queued, "queued tokens are miscounted"

    def _hashes(self, chain: list[bytes]) -> list[bytes]:
        return chain[self.blocks.block_size - 1 :: self.blocks.block_size]

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
        parked = {blocks.sequence_id for blocks in schedule.parked}
        shares = self.classes.by_priority()
        urgent = any(entry.request.priority is Priority.P0 for entry in self._waiting())
        for request_id in schedule.preempted:
            assert request_id in self.live, "preempted, but it has ended"
            entry = self.live[request_id]
            running = [other for other in self.live.values() if other.running]
            assert entry.running, "preempted, but not running"
            assert len(running) > 1 or urgent, "a lone request was preempted"
            for other in running:
                members = [each for each in running if each.request.priority is other.request.priority]
                is_guaranteed = urgent and (
                    len(members) <= shares[other.request.priority].share * self.config.max_num_seqs
                    or sum(len(each.block_ids) for each in members)
                    <= shares[other.request.priority].share * self.blocks.num_blocks
                )
                assert other.urgency <= entry.urgency or other.may_be_shielded or is_guaranteed, (
                    "somebody less urgent was passed over"
                )
            entry.running = False
            entry.may_be_shielded = True
            entry.block_ids = []
            entry.num_undecided_tokens, entry.num_computed_tokens = entry.num_computed_tokens, 0
            self.num_preemptions += 1
        for request_id, entry in self.live.items():
            if request_id in parked:
                assert entry.num_undecided_tokens, "parked, but not preempted"
                entry.parked, entry.num_computed_tokens = True, entry.num_undecided_tokens
            if schedule.scheduled:
                entry.num_undecided_tokens = 0

    def _check_worker(self, schedule: Schedule) -> None:
        assert len(set(schedule.dropped)) == len(schedule.dropped)
        assert self._held | self.kv.parked.keys() >= set(schedule.dropped), "dropped, but not held"
        self._held -= set(schedule.dropped)
        assert not self._held & set(schedule.started), "started, but held"
        self._held |= set(schedule.started)
        if schedule.scheduled:
            # Not held in vain: whoever is neither live nor running has been dropped.
            assert self._held == {i for i, e in self.live.items() if e.running} | set(schedule.started)

    def _check_started(self, schedule: Schedule) -> None:
        assert len(schedule.num_cached_tokens) == len(schedule.started)
        resumed = {blocks.sequence_id for blocks in schedule.resumed}
        for request_id, num_cached_tokens in zip(schedule.started, schedule.num_cached_tokens, strict=True):
            waiting = self._waiting()
            assert request_id in self.live, "started, but it has ended"
            entry = self.live[request_id]
            assert entry in waiting, "started, but not waiting (or with samples under way)"
            same_class = [other for other in waiting if other.request.priority is entry.request.priority]
            assert entry is min(same_class, key=lambda e: e.age), "out of order"
            prompts = [other for other in self.live.values() if other.running and other.num_missing_tokens > 1]
            others = [*waiting, *prompts]
            entry.may_be_shielded |= any(other.request.priority < entry.request.priority for other in others)
            entry.running = True
            assert entry.parked or not resumed & {request_id}, "resumed, but not parked"
            entry.parked = False
            entry.num_computed_tokens = max(entry.num_computed_tokens, num_cached_tokens)
            self.num_cached_tokens += num_cached_tokens
        self.num_forks += len(schedule.copies)
        self.num_parked += len(schedule.parked)
        self.num_resumed += len(schedule.resumed)

    def _is_ready(self, entry: Entry) -> bool:
        """Whether no other stage has to be done first with its newest token, as far as that can be known."""
        under_way = list(self.in_flight)[1 - self.num_stages :] if self.num_stages > 1 else []
        return not any(
            share.samples and share.sequence_id == entry.request.request_id
            for schedule in under_way
            for share in schedule.scheduled
        )

    def _check_micro_batch(self, schedule: Schedule, decoding: set[int]) -> None:
        """
        Args:
            decoding: those that missed one token before the plan.
        """
        batch = {share.sequence_id for share in schedule.scheduled} & decoding - set(schedule.started)
        assert all(self._is_ready(self.live[i]) for i in batch), "a first stage would wait for a token of the last"
        size = -(-len(decoding) // self.num_stages)
        assert len(batch) <= size, "more than a stage's part of those that decode"
        left = [self.live[i] for i in decoding - batch if self.live[i].running and self._is_ready(self.live[i])]
        if left and batch and self.num_stages > 1:
            oldest = min(entry.sampled_in for entry in left)
            assert max(self.live[i].sampled_in for i in batch) <= oldest, "somebody waits longer than those decoded"
        if not schedule.preempted:
            assert not left or len(batch) == size, "a decode was left out"

    def _check_share(self, share: ScheduledSequence, started: bool) -> None:
        assert share.sequence_id in self.live, "scheduled, but it has ended"
        entry = self.live[share.sequence_id]
        assert entry.running, "scheduled, but not running"
        assert entry.wants_tokens, "scheduled past max_tokens"
        assert share.num_computed_tokens == entry.num_computed_tokens, "computed tokens do not continue"
        assert not started or not entry.block_ids, "started in the middle"
        entry.num_computed_tokens += share.num_new_tokens
        assert share.num_new_tokens > 0 and entry.num_computed_tokens <= entry.num_tokens, "tokens that nobody knows"
        assert share.samples == (entry.num_computed_tokens == entry.num_tokens), "samples exactly at the last token"
        entry.num_placeholders += share.samples
        if share.samples:
            entry.sampled_in = self.num_planned
        entry.block_ids += share.new_block_ids
        assert entry.num_computed_tokens <= len(entry.block_ids) * self.blocks.block_size, "too few blocks"
        assert tuple(entry.block_ids) == self.blocks.block_table(share.sequence_id), "the worker's table is another"

    def _run(self, schedule: Schedule) -> None:
        tables = {share.sequence_id: self.live[share.sequence_id].block_ids for share in schedule.scheduled}
        chains = {share.sequence_id: self.live[share.sequence_id].chain for share in schedule.scheduled}
        self.kv.run(schedule, tables, chains)
        num_parked = sum(map(len, self.kv.parked.values()))
        assert num_parked <= self.num_park_blocks, "more is parked than host memory was given for"

    def _check_limits(self, schedule: Schedule) -> None:
        ids = [share.sequence_id for share in schedule.scheduled]
        assert len(set(ids)) == len(ids), "scheduled twice in a step"
        num_new_tokens = sum(share.num_new_tokens for share in schedule.scheduled)
        assert num_new_tokens <= self.config.max_num_batched_tokens, "over the token budget"
        assert sum(e.running for e in self.live.values()) <= self.config.max_num_seqs, "over the sequence budget"

    def _check_not_idle(self, schedule: Schedule, decoding: set[int]) -> None:
        if not schedule.scheduled:
            assert self.in_flight or not self.live, "idle, with work waiting"
        num_new_tokens = sum(share.num_new_tokens for share in schedule.scheduled)
        if num_new_tokens == self.config.max_num_batched_tokens:
            return
        ids = {share.sequence_id for share in schedule.scheduled}
        # Who decodes in a micro-batch, and who not, is another check's.
        missed = [
            i
            for i, e in self.live.items()
            if e.wants_tokens and i not in ids and (self.num_stages == 1 or not e.decodes)
        ]
        # Prompts may be kept short; decodes never stall.
        if self.config.target_itl_ms is not None or self.num_stages > 1:
            missed = [i for i in missed if self.live[i].num_missing_tokens == 1]
        assert not missed, f"there was budget left for the running {missed}"
        num_running = sum(entry.running for entry in self.live.values())
        waiting = self._waiting()
        has_room = num_running < self.config.max_num_seqs and self.config.target_itl_ms is None
        if self.num_stages > 1 and ids - decoding:  # prompts are spread
            has_room = False
        if waiting and not schedule.preempted and has_room:
            most = max(-(-entry.num_tokens // self.blocks.block_size) for entry in waiting)
            spare = self.blocks.num_free_blocks - num_running
            assert most > spare, "there were blocks for all that wait, and nobody was started"

    def _check_pace(self, schedule: Schedule, unread: dict[int, int], decoding: set[int]) -> None:
        """In a pipeline prompts are spread over two rounds, not more and not less.

        Args:
            unread: tokens that each missed before the plan.
            decoding: those that missed one token, and wanted it.
        """
        if self.num_stages == 1 or schedule.preempted:
            return
        num_tokens = sum(share.num_new_tokens for share in schedule.scheduled if share.sequence_id not in decoding)
        num_decoded = sum(share.sequence_id in decoding for share in schedule.scheduled)
        all_unread = sum(num for i, num in unread.items() if i in self.live and i not in decoding)
        most = max(self.blocks.block_size, -(-all_unread // (2 * self.num_stages)))
        assert num_tokens <= most, "prompts are not spread over the steps"
        if self.config.target_itl_ms is None:
            running = {i for i, entry in self.live.items() if entry.running} - decoding - set(schedule.started)
            running_unread = sum(unread[i] for i in running if unread[i] > 1)
            least = max(self.blocks.block_size, -(-running_unread // (2 * self.num_stages)))
            limit = self.config.max_num_batched_tokens - num_decoded
            assert num_tokens >= min(least, running_unread, limit), "prompts are spread over too many steps"

    def _waiting(self) -> Collection[Entry]:
        return [
            entry
            for entry in self.live.values()
            if not entry.running and entry.num_placeholders == 0 and self._waits_for(entry) is None
        ]

    def _waits_for(self, entry: Entry) -> int | None:
        """The sibling that computes the prompt of both."""
        if entry.siblings.computed:
            return None
        first = next(i for i in entry.siblings.request_ids if i in self.live)
        return None if first == entry.request.request_id else first
