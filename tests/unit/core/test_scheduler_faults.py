"""Negative controls of ``test_scheduler_machine``: each fault that is put in must be caught by the very same runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from scheduler_walk import MACHINE, NUM_WALKS, SchedulerMachine, walk

from cluster.core.block_manager import BlockManager, Fork, Start
from cluster.core.deadline_queue import DeadlineQueue
from cluster.core.micro_batches import MicroBatches
from cluster.core.request import FinishReason, Priority, Request
from cluster.core.running_batch import RunningBatch
from cluster.core.schedule import Schedule, StepPlan
from cluster.core.scheduler import Scheduler
from cluster.core.tracked_request import TrackedRequest
from cluster.core.waiting_queue import WaitingQueue


class LeakyBlockManager(BlockManager):
    """Loses an empty block with every large table."""

    def free(self, request_id: int) -> None:
        large = len(self.block_table(request_id)) > 2
        super().free(request_id)
        if large and self._free:
            self._free.pop()


class SharingBlockManager(BlockManager):
    """Frees a block that stays in use."""

    def allocate(self, request_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> tuple[int, ...] | None:
        blocks = super().allocate(request_id, num_tokens, num_spare_blocks=num_spare_blocks)
        if blocks and len(self.block_table(request_id)) == 3:
            self._free.append(blocks[-1])
        return blocks


class EagerBlockManager(BlockManager):
    """Makes blocks findable that nobody has computed yet."""

    def start(
        self, request_id: int, block_hashes: Sequence[bytes], num_tokens: int, *, num_spare_blocks: int = 0
    ) -> Start | None:
        start = super().start(request_id, block_hashes, num_tokens, num_spare_blocks=num_spare_blocks)
        if start is not None:
            self.commit(request_id, block_hashes, num_tokens)
        return start


class RobbingBlockManager(BlockManager):
    """Gives a cached block away that somebody holds, and keeps quiet about it."""

    def _take(self, num_blocks: int) -> list[int]:
        blocks = super()._take(num_blocks)
        held = [block for block in self._num_holders if block in self._cache]
        return [held[0], *blocks[1:]] if blocks and len(held) > 2 else blocks

    def check_integrity(self) -> None:
        pass


class SharingForkBlockManager(BlockManager):
    """Does not say that a sibling's last block is to be copied."""

    def fork(self, parent_id: int, child_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> Fork | None:
        fork = super().fork(parent_id, child_id, num_tokens, num_spare_blocks=num_spare_blocks)
        return None if fork is None else replace(fork, copy=None)


class IdleScheduler(Scheduler):
    """Leaves those that wait alone while anybody runs."""

    def _start(self, *args: Any, **kwargs: Any) -> tuple[int, ...] | None:
        return None if len(self._running) else super()._start(*args, **kwargs)


class ForgettingScheduler(Scheduler):
    """Does not queue a preempted request again when its samples under way come in."""

    def update(self, *args: Any, **kwargs: Any) -> list[tuple[int, FinishReason]]:
        resumable = [t for t in self._live.values() if not t.running and t.num_placeholders]
        finished = super().update(*args, **kwargs)
        for tracked in resumable:
            self._waiting.remove(tracked)
        return finished


class HastyScheduler(Scheduler):
    """Queues a preempted request at once, though samples of it are under way."""

    def _preempt(self, plan: StepPlan, tracked: TrackedRequest) -> None:
        super()._preempt(plan, tracked)
        if tracked.num_placeholders:
            self._waiting.push(tracked)


class TwiceScheduler(Scheduler):
    """Reports the end of a request to the next update, too."""

    _last: list[tuple[int, FinishReason]]

    def update(self, *args: Any, **kwargs: Any) -> list[tuple[int, FinishReason]]:
        last = getattr(self, "_last", [])
        self._last = super().update(*args, **kwargs)
        return [*self._last, *last]


class DeafDeadlineQueue(DeadlineQueue):
    def pop_expired(self, now: float) -> list[int]:
        return []


class LateScheduler(Scheduler):
    """Pays no heed to deadlines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadlines = DeafDeadlineQueue()


class GreedyScheduler(Scheduler):
    """Starts prompts whole, whatever the budget."""

    def _prefill(self, plan: StepPlan, prompts: Any, budget: int) -> None:
        super()._prefill(plan, prompts, budget + 3)


class OverrunningScheduler(Scheduler):
    """Miscounts what a request may have."""

    def add(self, *requests: Request) -> None:
        super().add(*requests)
        for request in requests:
            self._live[request.request_id].max_num_tokens += 1


class LastInQueue(WaitingQueue):
    def head(self, priority: Priority) -> TrackedRequest | None:
        return self._classes[priority][-1] if self._classes[priority] else None


class UnfairScheduler(Scheduler):
    """Takes the youngest of a class first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting = LastInQueue()


class MiscountingScheduler(Scheduler):
    """Leaves what a cancelled request had queued in the count."""

    def cancel(self, request_id: int) -> bool:
        queued = self._num_queued_tokens
        known = super().cancel(request_id)
        self._num_queued_tokens = queued
        return known


class ShufflingScheduler(Scheduler):
    """Has parked blocks written back in another order."""

    def schedule(self, now: float) -> Schedule:
        schedule = super().schedule(now)
        return replace(schedule, resumed=tuple(replace(r, block_ids=r.block_ids[::-1]) for r in schedule.resumed))


class ForgetfulBatch(RunningBatch):
    """Believes to have parked all that it has not."""

    def preempt(self, plan: StepPlan, tracked: TrackedRequest) -> None:
        num_computed_tokens = tracked.num_computed_tokens
        super().preempt(plan, tracked)
        tracked.num_computed_tokens = num_computed_tokens


class HoardingBatch(RunningBatch):
    """Lets the worker keep what is parked of those that have ended."""

    def unpark(self, tracked: TrackedRequest) -> None:
        self._parking.release(tracked.request.request_id)


class ShortForkBatch(RunningBatch):
    """Gives a sibling blocks of the prompt alone, whatever it has emitted elsewhere."""

    def _fork(self, plan: StepPlan, tracked: TrackedRequest) -> tuple[tuple[int, ...], int] | None:
        num_tokens, tracked.num_tokens = tracked.num_tokens, tracked.request.num_prompt_tokens
        forked = super()._fork(plan, tracked)
        tracked.num_tokens = num_tokens
        return forked


class TroublesomeBatch(RunningBatch):
    """Finds the most urgent to go for a P0."""

    def victims(self, *args: Any) -> list[TrackedRequest]:
        return [tracked for tracked in self._members[:-1] if not tracked.is_shielded]


class SchedulerOf(Scheduler):
    """A scheduler with a batch of another class."""

    def __init__(self, batch: type[RunningBatch], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running.__class__ = batch


class HastyMicroBatches(MicroBatches):
    """Does not care whose tokens are under way."""

    def pick(self, decoding: list[TrackedRequest]) -> list[TrackedRequest]:
        return decoding[: -(-len(decoding) // self._num_stages)]


class WholeMicroBatches(MicroBatches):
    """One step takes all that are ready."""

    def pick(self, decoding: list[TrackedRequest]) -> list[TrackedRequest]:
        return self._ready(decoding)


class YoungestMicroBatches(MicroBatches):
    """Takes those first that had a token last."""

    def pick(self, decoding: list[TrackedRequest]) -> list[TrackedRequest]:
        size = -(-len(decoding) // self._num_stages)
        return sorted(self._ready(decoding), key=lambda tracked: -tracked.sampled_in)[:size]


class SmallMicroBatches(MicroBatches):
    """Leaves the last of each out."""

    def pick(self, decoding: list[TrackedRequest]) -> list[TrackedRequest]:
        return super().pick(decoding)[: 1 - self._num_stages or None]


class WholePromptMicroBatches(MicroBatches):
    """Has a prompt pass through the stages in one piece."""

    def max_prompt_tokens(self, prompts: Iterable[TrackedRequest], limit: int) -> int:
        return limit


class ThinMicroBatches(MicroBatches):
    """Spreads prompts thinner than it should."""

    def max_prompt_tokens(self, prompts: Iterable[TrackedRequest], limit: int) -> int:
        return super().max_prompt_tokens(prompts, limit) if self._num_stages == 1 else min(limit, 1)


class DeafMicroBatches(MicroBatches):
    """Does not hear that steps are done."""

    def finish(self) -> None:
        pass


class SchedulerWith(Scheduler):
    """A scheduler that forms its micro-batches in another way."""

    def __init__(self, micro_batches: type[MicroBatches], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._micro_batches.__class__ = micro_batches


class OrphaningScheduler(Scheduler):
    """When the first sibling ends its others go on waiting for it."""

    def _end(self, tracked: TrackedRequest) -> None:
        group, tracked.group = tracked.group, None
        if tracked.running and group is not None:
            group.stopped(tracked)
        super()._end(tracked)


class ImpatientScheduler(Scheduler):
    """Lets siblings start together."""

    def add(self, *requests: Request) -> None:
        super().add(*(replace(request, group=None) for request in requests))


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "leaks a block": ({"create_block_manager": LeakyBlockManager}, "blocks do not add up"),
    "shares a block": ({"create_block_manager": SharingBlockManager}, "blocks do not add up"),
    "commits too early": ({"create_block_manager": EagerBlockManager}, "attends to other tokens than its own"),
    "robs a held block": (
        {"create_block_manager": RobbingBlockManager},
        "attends to other tokens than its own|not the total|not all others are free",
    ),
    "forks without a copy": ({"create_block_manager": SharingForkBlockManager}, "attends to other tokens than its own"),
    "resumes in disorder": ({"create": ShufflingScheduler}, "attends to other tokens than its own"),
    "believes to have parked": (
        {"create": partial(SchedulerOf, ForgetfulBatch)},
        "computed tokens in|computed tokens do not continue|queued tokens",
    ),
    "parks for ever": ({"create": partial(SchedulerOf, HoardingBatch)}, "parked for ever|more is parked"),
    "forks too few blocks": (
        {"create": partial(SchedulerOf, ShortForkBatch)},
        "too few blocks|computed tokens in",
    ),
    "preempts the urgent": ({"create": partial(SchedulerOf, TroublesomeBatch)}, "passed over|but not running"),
    "orphans siblings": (
        {"create": OrphaningScheduler},
        "idle, with work waiting|nobody was started|out of order|it has ended",
    ),
    "computes a prompt twice": ({"create": ImpatientScheduler}, "started, but not waiting"),
    "idles": ({"create": IdleScheduler}, "blocks for all that wait, and nobody was started"),
    "forgets the preempted": ({"create": ForgettingScheduler}, "out of order|idle|nobody was started"),
    "resumes too early": (
        {"create": HastyScheduler},
        "samples under way|it has ended|empty deque|holds blocks already",
    ),
    "ends twice": ({"create": TwiceScheduler}, "ended (twice|a second time)"),
    "waits for the last stage": ({"create": partial(SchedulerWith, HastyMicroBatches)}, "would wait for a token"),
    "decodes all at once": ({"create": partial(SchedulerWith, WholeMicroBatches)}, "more than a stage's part"),
    "decodes the youngest": ({"create": partial(SchedulerWith, YoungestMicroBatches)}, "waits longer"),
    "leaves decodes out": ({"create": partial(SchedulerWith, SmallMicroBatches)}, "was left out|idle, with work"),
    "does not spread prompts": (
        {"create": partial(SchedulerWith, WholePromptMicroBatches)},
        "are not spread over the steps",
    ),
    "spreads prompts too thin": ({"create": partial(SchedulerWith, ThinMicroBatches)}, "over too many steps"),
    "decodes too late": ({"create": partial(SchedulerWith, DeafMicroBatches)}, "was left out|idle, with work"),
    "misses deadlines": ({"create": LateScheduler}, "whose deadline has come"),
    "exceeds the token budget": ({"create": GreedyScheduler}, "over the token budget"),
    "overruns max_tokens": ({"create": OverrunningScheduler}, "past max_tokens|other ends than"),
    "is unfair": ({"create": UnfairScheduler}, "out of order"),
    "miscounts": ({"create": MiscountingScheduler}, "queued tokens"),
}


@pytest.mark.parametrize(("broken", "caught_by"), BROKEN.values(), ids=BROKEN)
def test_walk_catches(broken: dict[str, Any], caught_by: str) -> None:
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError), match=caught_by):
        for seed in range(NUM_WALKS):
            walk(seed, 5_000, **broken)


@pytest.mark.parametrize("fault", ["leaks a block", "forks without a copy", "idles", "ends twice", "misses deadlines"])
def test_machine_catches(fault: str) -> None:
    broken, caught_by = BROKEN[fault]
    quick = settings(MACHINE, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    with pytest.raises((AssertionError, RuntimeError), match=caught_by):
        run_state_machine_as_test(partial(SchedulerMachine, **broken), settings=quick)
