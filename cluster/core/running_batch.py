"""Who runs, where their KV is, and who would have to give way."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from operator import attrgetter

from cluster.core.block_manager import BlockManager
from cluster.core.parking import Parking
from cluster.core.request import Priority
from cluster.core.schedule import Schedule, StepPlan
from cluster.core.step import ParkedBlocks
from cluster.core.tracked_request import TrackedRequest

_URGENCY_KEY = attrgetter("urgency_key")


class RunningBatch:
    """The requests that hold blocks, most urgent first.

    What the worker has to know of it (whose state it forgets, what it parks) is kept until a plan takes it along.

    Args:
        max_num_seqs: how many may run.
        block_manager: of the pool; nobody else takes blocks from it.
        parking: says which requests keep their KV in host memory.
    """

    def __init__(self, max_num_seqs: int, block_manager: BlockManager, parking: Parking) -> None:
        self._max_num_seqs = max_num_seqs
        self._blocks = block_manager
        self._parking = parking
        self._members: list[TrackedRequest] = []
        # Dicts keep the order, and name nobody twice.
        self._dropped: dict[int, None] = {}
        self._parked: dict[int, ParkedBlocks] = {}
        # Members with blocks to be found, or a prompt that siblings wait for, once they are computed.
        self._uncommitted: dict[int, TrackedRequest] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[TrackedRequest]:
        return iter(self._members)

    @property
    def is_full(self) -> bool:
        return len(self._members) == self._max_num_seqs

    @property
    def least_urgent(self) -> TrackedRequest:
        """Raises IndexError where nobody runs."""
        return self._members[-1]

    def start(self, plan: StepPlan, tracked: TrackedRequest, *, is_shielded: bool) -> tuple[int, ...] | None:
        """Takes a request in, with blocks for all of its tokens; None where there is no room. Its computed tokens are
        what the prefix cache, a sibling or host memory has of it."""
        if self.is_full:
            return None
        taken = self._fork(plan, tracked) or self._take(plan, tracked)
        if taken is None:
            return None
        blocks, num_cached_tokens = taken
        request_id = tracked.request.request_id
        tracked.num_computed_tokens = max(num_cached_tokens, tracked.num_computed_tokens)
        tracked.num_block_tokens = len(blocks) * self._blocks.block_size
        tracked.is_shielded = is_shielded
        tracked.running = True
        bisect.insort(self._members, tracked, key=_URGENCY_KEY)
        if tracked.block_hashes or tracked.group is not None:
            self._uncommitted[request_id] = tracked
        plan.started.append(request_id)
        plan.num_cached_tokens.append(num_cached_tokens)
        return blocks

    def room_for(self, waiting: Iterable[TrackedRequest]) -> Iterator[TrackedRequest]:
        """The first of those that wait, as far as there are places and blocks for all of them, shared ones aside."""
        num_free_places = self._max_num_seqs - len(self)
        num_free_blocks = self._blocks.num_free_blocks - len(self)
        for tracked in islice(waiting, num_free_places):
            num_free_blocks -= -(-tracked.num_tokens // self._blocks.block_size)
            if num_free_blocks < 0:
                break
            yield tracked
            num_free_blocks -= 1  # a spare one for each

    def grow(self, tracked: TrackedRequest) -> tuple[int, ...] | None:
        """The blocks that a member misses; None where too few are free."""
        blocks = self._blocks.allocate(tracked.request.request_id, tracked.num_tokens)
        if blocks is not None:
            tracked.num_block_tokens += len(blocks) * self._blocks.block_size
        return blocks

    def preempt(self, plan: StepPlan, tracked: TrackedRequest) -> None:
        """Takes a member's blocks. Its computed tokens are what is parked of it: all or none."""
        request_id, block_size = tracked.request.request_id, self._blocks.block_size
        num_blocks = -(-tracked.num_computed_tokens // block_size)
        num_lost_tokens = tracked.num_computed_tokens - self._blocks.num_shared_blocks(request_id) * block_size
        if self._parking.park(request_id, num_blocks, num_lost_tokens):
            blocks = self._blocks.block_table(request_id)[:num_blocks]
            self._parked[request_id] = ParkedBlocks(sequence_id=request_id, block_ids=blocks)
        else:
            tracked.num_computed_tokens = 0
        tracked.num_tokens_preempted = tracked.num_tokens
        plan.preempted.append(request_id)
        self.stop(tracked)

    def stop(self, tracked: TrackedRequest) -> None:
        """Takes a member out, and its blocks back."""
        request_id = tracked.request.request_id
        del self._members[bisect.bisect_left(self._members, tracked.urgency_key, key=_URGENCY_KEY)]
        tracked.running = False
        tracked.num_block_tokens = 0
        self._blocks.free(request_id)
        self._uncommitted.pop(request_id, None)
        self._dropped[request_id] = None
        if tracked.group is not None:
            tracked.group.stopped(tracked)

    def unpark(self, tracked: TrackedRequest) -> None:
        """Has the worker forget what it has parked of a request, if anything."""
        request_id = tracked.request.request_id
        if self._parking.release(request_id):
            self._parked.pop(request_id, None)
            self._dropped[request_id] = None

    def victims(self, tracked: TrackedRequest, share: Callable[[Priority], float]) -> list[TrackedRequest]:
        """Those that have to go for a request that finds no room, in this order: the lowest class first that holds more
        than its share of places or blocks, whichever is short, its latest arrival first. Members of the request's own
        class and of more urgent ones stay; so do those that are shielded, or have gained no token since they were
        preempted last, so that everybody gets on. Nobody has to go where that would not help.
        """
        block_size = self._blocks.block_size
        if self.is_full:
            sizes = dict.fromkeys(self._members, 1)
            num_missing, num_spare, total = 1, 0, self._max_num_seqs
        else:
            sizes = {member: member.num_block_tokens // block_size for member in self._members}
            num_missing = -(-tracked.num_tokens // block_size) + len(self._members) - self._blocks.num_free_blocks
            num_spare, total = 1, self._blocks.num_blocks  # a member that goes needs no spare block any more
        held = dict.fromkeys(Priority, 0)
        for member, size in sizes.items():
            held[member.request.priority] += size
        victims: list[TrackedRequest] = []
        for member in reversed(self._members):
            priority = member.request.priority
            stays = priority <= tracked.request.priority or member.is_shielded
            stays = stays or member.num_tokens == member.num_tokens_preempted
            if not stays and held[priority] > share(priority) * total:
                victims.append(member)
                held[priority] -= sizes[member]
                num_missing -= sizes[member] + num_spare
                if num_missing <= 0:
                    return victims
        return []

    def commit(self) -> list[TrackedRequest]:
        """Makes what is computed by the plans so far findable for those that come; returns requests that waited for a
        sibling's prompt."""
        released: list[TrackedRequest] = []
        for request_id, tracked in list(self._uncommitted.items()):
            self._blocks.commit(request_id, tracked.block_hashes, tracked.num_computed_tokens)
            if tracked.has_computed_prompt:
                if tracked.group is not None:
                    released += tracked.group.computed(tracked)
                if tracked.num_computed_tokens // self._blocks.block_size >= len(tracked.block_hashes):
                    del self._uncommitted[request_id]
        return released

    def add_hashes(self, tracked: TrackedRequest, block_hashes: Collection[bytes]) -> None:
        """More of a request's blocks are full, and will be computed by the next plan at the latest."""
        tracked.block_hashes += block_hashes
        if tracked.running:
            self._uncommitted[tracked.request.request_id] = tracked

    def tell(self, plan: StepPlan) -> None:
        """Has the plan take along what the worker has to know."""
        plan.dropped, self._dropped = self._dropped, {}
        plan.parked, self._parked = self._parked, {}

    def observe(self, schedule: Schedule, compute_s: float, copy_s: float) -> None:
        """How long a step has taken to compute, and to copy what it parked and resumed."""
        self._parking.observe(schedule, compute_s, copy_s)

    def check_integrity(self, live: Collection[TrackedRequest]) -> None:
        """Raises RuntimeError where the order is broken, or blocks are not where they should be."""
        self._blocks.check_integrity()
        if self._members != sorted(self._members, key=_URGENCY_KEY) or not all(t.running for t in self._members):
            raise RuntimeError("the running batch is out of order")
        held: set[int] = set()
        for tracked in live:
            request_id = tracked.request.request_id
            table = self._blocks.block_table(request_id)
            held.update(table)
            is_parked = request_id in self._parking
            num_tokens = len(table) * self._blocks.block_size
            is_stored = is_parked or tracked.num_computed_tokens <= num_tokens == tracked.num_block_tokens
            if tracked.running != bool(table) or (tracked.running and is_parked) or not is_stored:
                raise RuntimeError(
                    f"request {request_id} has {tracked.num_computed_tokens} computed tokens in {len(table)} blocks"
                )
        if len(held) + self._blocks.num_free_blocks != self._blocks.num_blocks:
            raise RuntimeError(
                f"{len(held)} of {self._blocks.num_blocks} blocks are held by live requests, not all others are free"
            )
        self._parking.check_integrity({tracked.request.request_id for tracked in live})

    def _fork(self, plan: StepPlan, tracked: TrackedRequest) -> tuple[tuple[int, ...], int] | None:
        """Blocks and computed tokens of a sibling; None where none has computed the prompt, or no block is free."""
        request = tracked.request
        source = None if tracked.group is None else tracked.group.source
        if source is None or tracked.num_tokens_preempted:
            return None
        # What it emitted elsewhere comes behind the prompt, in blocks of its own.
        block_size = self._blocks.block_size
        num_own_blocks = -(-tracked.num_tokens // block_size) - -(-request.num_prompt_tokens // block_size)
        fork = self._blocks.fork(
            source.request.request_id,
            request.request_id,
            request.num_prompt_tokens,
            num_spare_blocks=num_own_blocks + len(self),
        )
        if fork is None:
            return None
        if fork.copy is not None:
            plan.copies.append(fork.copy)
        own_blocks = self._blocks.allocate(request.request_id, tracked.num_tokens) or ()
        return fork.block_ids + own_blocks, request.num_prompt_tokens - 1

    def _take(self, plan: StepPlan, tracked: TrackedRequest) -> tuple[tuple[int, ...], int] | None:
        """Cached blocks and free ones, and how many of the tokens are computed; None where too few are free."""
        request_id, block_size = tracked.request.request_id, self._blocks.block_size
        # Members grow into new blocks soon: without one spare for each, whoever starts now would be preempted before
        # its prompt has paid off.
        start = self._blocks.start(request_id, tracked.block_hashes, tracked.num_tokens, num_spare_blocks=len(self))
        if start is None:
            return None
        first = start.num_cached_tokens // block_size
        missing = start.block_ids[first : -(-tracked.num_computed_tokens // block_size)]
        if missing:  # of what is parked; the others are in the pool yet
            plan.resumed.append(ParkedBlocks(sequence_id=request_id, block_ids=missing, first_index=first))
            self._parking.release(request_id)
        else:
            self.unpark(tracked)
        return start.block_ids, start.num_cached_tokens
