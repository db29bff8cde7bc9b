"""The scheduler under random work: tiny pools, cancellations, deadlines, several steps in flight.

``SchedulerHarness`` holds the invariants. Every run repeats the same steps; CLUSTER_TEST_FULL=1 makes them ten times as
many. The negative controls break the scheduler on purpose: each break must be caught by the very same run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scheduler_harness import SchedulerHarness

from cluster.core.block_manager import BlockManager
from cluster.core.deadline_queue import DeadlineQueue
from cluster.core.request import FinishReason, Priority
from cluster.core.scheduler import Schedule, Scheduler
from cluster.core.tracked_request import TrackedRequest
from cluster.core.waiting_queue import WaitingQueue

LENGTH = 10 if os.environ.get("CLUSTER_TEST_FULL") == "1" else 1
WALKS = 16
STEPS_PER_WALK = 5_000


def create_random_harness(rng: random.Random, **broken: Any) -> SchedulerHarness:
    max_num_seqs = rng.randint(1, 6)
    return SchedulerHarness(
        num_blocks=rng.randint(1, 12),
        block_size=rng.choice((1, 2, 3, 4)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.randint(0, 12),
        max_in_flight=rng.randint(1, 4),
        **broken,
    )


def walk(seed: int, num_steps: int, **broken: Any) -> SchedulerHarness:
    """A random walk that ends by itself: a new harness every 250 steps, each run to its end."""
    rng = random.Random(seed)
    harness = create_random_harness(rng, **broken)
    for step in range(num_steps):
        if step % 250 == 249:
            harness.drain()
            harness = create_random_harness(rng, **broken)
        act(harness, rng)
        harness.check()
    harness.drain()
    return harness


def act(harness: SchedulerHarness, rng: random.Random) -> None:
    draw = rng.random()
    if draw < 0.25 and len(harness.live) < 24:
        deadline = harness.now + rng.uniform(0.0, 40.0) if rng.random() < 0.2 else None
        harness.add(rng.randint(1, 12), rng.randint(1, 24), rng.choice(list(Priority)), deadline=deadline)
    elif draw < 0.29:
        harness.cancel(rng.randint(0, len(harness.live) + len(harness.ended)))
    elif draw < 0.40:
        harness.now += rng.expovariate(0.5)
    elif draw < 0.70:
        if len(harness.in_flight) < harness.max_in_flight:
            harness.schedule()
    elif harness.in_flight:
        harness.update(lambda request_id: rng.random() < 0.05)


@pytest.mark.parametrize("seed", range(WALKS))
def test_random_walk(seed: int) -> None:
    walk(seed, STEPS_PER_WALK * LENGTH)


def test_walks_meet_what_they_are_for() -> None:
    """A walk that never preempts, expires or stops would prove nothing."""
    rng = random.Random(0)
    ends: set[FinishReason | str] = set()
    num_preempted_in_flight = 0
    for _ in range(20):
        harness = create_random_harness(rng)
        for _ in range(250):
            act(harness, rng)
            num_preempted_in_flight += any(e.num_placeholders and not e.running for e in harness.live.values())
        ends.update(harness.ended.values())
    assert ends == {FinishReason.STOP, FinishReason.LENGTH, "cancelled", "expired"}
    assert num_preempted_in_flight > 0


class SchedulerMachine(RuleBasedStateMachine):
    """The same, with Hypothesis choosing the steps, so that a failure shrinks."""

    def __init__(self, **broken: Any) -> None:
        super().__init__()
        self.broken = broken
        self.harness = SchedulerHarness(**broken)

    @initialize(
        num_blocks=st.integers(1, 8), block_size=st.integers(1, 4), max_num_seqs=st.integers(1, 4),
        budget=st.integers(0, 8), max_in_flight=st.integers(1, 3),
    )  # fmt: skip
    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, max_in_flight: int) -> None:
        self.harness = SchedulerHarness(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + budget,
            max_in_flight=max_in_flight,
            **self.broken,
        )

    @rule(
        num_prompt_tokens=st.integers(1, 16),
        max_tokens=st.integers(1, 8),
        priority=st.sampled_from(Priority),
        patience_s=st.none() | st.floats(0, 20),
    )
    def add(self, num_prompt_tokens: int, max_tokens: int, priority: Priority, patience_s: float | None) -> None:
        deadline = None if patience_s is None else self.harness.now + patience_s
        self.harness.add(num_prompt_tokens, max_tokens, priority, deadline=deadline)

    @rule(request_id=st.integers(0, 20))
    def cancel(self, request_id: int) -> None:
        self.harness.cancel(request_id)

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.harness.now += seconds

    @precondition(lambda self: len(self.harness.in_flight) < self.harness.max_in_flight)
    @rule()
    def schedule(self) -> None:
        self.harness.schedule()

    @precondition(lambda self: self.harness.in_flight)
    @rule(stop=st.integers(0, 15))
    def update(self, stop: int) -> None:
        self.harness.update(lambda request_id: request_id % 16 == stop)

    @invariant()
    def books_balance(self) -> None:
        self.harness.check()

    def teardown(self) -> None:
        self.harness.drain()


MACHINE = settings(
    max_examples=400 * LENGTH,
    stateful_step_count=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_machine() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=MACHINE)


class LeakyBlockManager(BlockManager):
    """Loses the last block of every large table."""

    def free(self, request_id: int) -> None:
        large = len(self.block_table(request_id)) > 2
        super().free(request_id)
        if large:
            self._free.pop()


class SharingBlockManager(BlockManager):
    """Frees a block that stays in use."""

    def allocate(self, request_id: int, num_tokens: int, *, num_spare_blocks: int = 0) -> tuple[int, ...] | None:
        blocks = super().allocate(request_id, num_tokens, num_spare_blocks=num_spare_blocks)
        if blocks and len(self.block_table(request_id)) == 3:
            self._free.append(blocks[-1])
        return blocks


class IdleScheduler(Scheduler):
    """Leaves those that wait alone while anybody runs."""

    def _admit_waiting(self, scheduled: list[Any], budget: int, now: float) -> list[int]:
        return [] if self._running else super()._admit_waiting(scheduled, budget, now)


class ForgettingScheduler(Scheduler):
    """Does not queue a preempted request again when its samples under way come in."""

    def update(self, schedule: Schedule, stopped: Collection[int]) -> list[tuple[int, FinishReason]]:
        resumable = [t for t in self._live.values() if not t.running and t.num_placeholders]
        finished = super().update(schedule, stopped)
        for tracked in resumable:
            self._waiting.remove(tracked)
        return finished


class HastyScheduler(Scheduler):
    """Queues a preempted request at once, though samples of it are under way."""

    def _preempt(self, tracked: TrackedRequest) -> None:
        super()._preempt(tracked)
        if tracked.num_placeholders:
            self._waiting.push(tracked)


class TwiceScheduler(Scheduler):
    """Reports the end of a request to the next update, too."""

    _last: list[tuple[int, FinishReason]]

    def update(self, schedule: Schedule, stopped: Collection[int]) -> list[tuple[int, FinishReason]]:
        last = getattr(self, "_last", [])
        self._last = super().update(schedule, stopped)
        return [*self._last, *last]


class DeafDeadlineQueue(DeadlineQueue):
    def pop_expired(self, now: float) -> list[int]:
        return []


class LateScheduler(Scheduler):
    """Pays no heed to deadlines."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._deadlines = DeafDeadlineQueue()


class GreedyScheduler(Scheduler):
    """Starts prompts whole, whatever the budget."""

    def _admit_waiting(self, scheduled: list[Any], budget: int, now: float) -> list[int]:
        return super()._admit_waiting(scheduled, budget + 3, now)


class OverrunningScheduler(Scheduler):
    """Does not count placeholders against max_tokens."""

    def _grow_running(self, scheduled: list[Any], budget: int) -> tuple[list[TrackedRequest], list[int]]:
        class Endless(TrackedRequest):
            __slots__ = ()
            is_sampled_out = False

        for tracked in self._running:
            tracked.__class__ = Endless
        return super()._grow_running(scheduled, budget)


class AgelessQueue(WaitingQueue):
    """Strict classes: the least urgent may wait for ever."""

    def peek(self, now: float) -> TrackedRequest | None:
        return next((waiting[0] for waiting in self._classes if waiting), None)


class StarvingScheduler(Scheduler):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._waiting = AgelessQueue()


class MiscountingScheduler(Scheduler):
    """Leaves what a cancelled request had queued in the count."""

    def cancel(self, request_id: int) -> bool:
        queued = self._num_queued_tokens
        known = super().cancel(request_id)
        self._num_queued_tokens = queued
        return known


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "leaks a block": ({"create_block_manager": LeakyBlockManager}, "blocks do not add up"),
    "shares a block": ({"create_block_manager": SharingBlockManager}, "blocks do not add up"),
    "idles": ({"create": IdleScheduler}, "blocks for all that wait, and nobody was started"),
    "forgets the preempted": ({"create": ForgettingScheduler}, "out of order|idle|nobody was started"),
    "resumes too early": ({"create": HastyScheduler}, "samples under way|it has ended"),
    "ends twice": ({"create": TwiceScheduler}, "ended (twice|a second time)"),
    "misses deadlines": ({"create": LateScheduler}, "whose deadline has come"),
    "exceeds the token budget": ({"create": GreedyScheduler}, "over the token budget"),
    "overruns max_tokens": ({"create": OverrunningScheduler}, "past max_tokens|lone request was preempted"),
    "starves P3": ({"create": StarvingScheduler}, "passed too often"),
    "miscounts": ({"create": MiscountingScheduler}, "queued tokens"),
}


@pytest.mark.parametrize(("broken", "caught_by"), BROKEN.values(), ids=BROKEN)
def test_walk_catches(broken: dict[str, Any], caught_by: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=caught_by):
        for seed in range(WALKS):
            walk(seed, STEPS_PER_WALK, **broken)


@pytest.mark.parametrize("fault", ["leaks a block", "idles", "ends twice", "misses deadlines", "overruns max_tokens"])
def test_machine_catches(fault: str) -> None:
    broken, caught_by = BROKEN[fault]
    quick = settings(MACHINE, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    with pytest.raises((AssertionError, RuntimeError), match=caught_by):
        run_state_machine_as_test(partial(SchedulerMachine, **broken), settings=quick)
