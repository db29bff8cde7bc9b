"""Random work for a scheduler: walks of chosen seeds, and the same as a Hypothesis state machine."""

from __future__ import annotations

import os
import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_harness import SchedulerHarness

from cluster.core.request import Priority

LENGTH = 20 if os.environ.get("CLUSTER_TEST_FULL") == "1" else 1
NUM_WALKS = 16
_STEPS_PER_HARNESS = 250

MACHINE = settings(
    max_examples=200 * LENGTH,
    stateful_step_count=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def create_random_harness(rng: random.Random, **broken: Any) -> SchedulerHarness:
    max_num_seqs = rng.randint(1, 6)
    return SchedulerHarness(
        num_blocks=rng.randint(1, 14),
        block_size=rng.choice((1, 2, 3, 4)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.randint(0, 12),
        max_in_flight=rng.randint(1, 6),
        num_stages=rng.choice((1, 2, 4)),
        num_park_blocks=rng.choice((0, 4, 40)),
        target_itl_ms=rng.choice((None, None, 100.0)),
        **broken,
    )


def walk(seed: int, num_steps: int, **broken: Any) -> None:
    """A random walk that ends by itself: a new harness every so often, each run to its end."""
    rng = random.Random(seed)
    harness = create_random_harness(rng, **broken)
    for step in range(1, num_steps):
        if step % _STEPS_PER_HARNESS == 0:
            harness.drain()
            harness = create_random_harness(rng, **broken)
        act(harness, rng)
        harness.check()
    harness.drain()


def act(harness: SchedulerHarness, rng: random.Random) -> None:
    draw = rng.random()
    if draw < 0.25 and len(harness.live) < 24:
        harness.add(
            rng.randint(1, 12),
            rng.randint(1, 24),
            rng.choice(list(Priority)),
            deadline=harness.now + rng.uniform(0.0, 40.0) if rng.random() < 0.2 else None,
            prompt=rng.choice((None, 1, 2)),
            own=rng.choice((None, 0)),
            n=rng.choice((1, 1, 1, 2, 4)),
            num_emitted_tokens=rng.randint(1, 24) if rng.random() < 0.15 else 0,
        )
    elif draw < 0.29:
        harness.cancel(rng.randint(0, len(harness.live) + len(harness.ended)))
    elif draw < 0.40:
        harness.now += rng.expovariate(0.5)
    elif draw < 0.70:
        if len(harness.in_flight) < harness.max_in_flight:
            harness.schedule()
    elif harness.in_flight:
        parking_s = rng.uniform(0.0, 0.05)
        duration_s = parking_s + rng.uniform(0.01, 0.2)
        harness.update(lambda request_id: rng.random() < 0.05, duration_s=duration_s, parking_s=parking_s)


class SchedulerMachine(RuleBasedStateMachine):
    """The same, with Hypothesis choosing the steps, so that a failure shrinks."""

    def __init__(self, **broken: Any) -> None:
        super().__init__()
        self.broken = broken
        self.harness = SchedulerHarness(**broken)

    @initialize(
        num_blocks=st.integers(1, 8), block_size=st.integers(1, 4), max_num_seqs=st.integers(1, 4),
        budget=st.integers(0, 8), max_in_flight=st.integers(1, 5), num_park_blocks=st.sampled_from((0, 3, 30)),
        num_stages=st.sampled_from((1, 2, 4)),
    )  # fmt: skip
    def start(self, max_num_seqs: int, budget: int, **limits: int) -> None:
        self.harness = SchedulerHarness(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + budget, **limits, **self.broken
        )

    @rule(
        num_prompt_tokens=st.integers(1, 16),
        max_tokens=st.integers(1, 8),
        priority=st.sampled_from(Priority),
        patience_s=st.none() | st.floats(0, 20),
        prompt=st.none() | st.integers(1, 2),
        own=st.none() | st.just(0),
        n=st.integers(1, 3),
        num_emitted_tokens=st.integers(0, 7),
    )
    def add(
        self,
        num_prompt_tokens: int,
        max_tokens: int,
        priority: Priority,
        patience_s: float | None,
        prompt: int | None,
        own: int | None,
        n: int,
        num_emitted_tokens: int,
    ) -> None:
        deadline = None if patience_s is None else self.harness.now + patience_s
        self.harness.add(
            num_prompt_tokens,
            max_tokens,
            priority,
            deadline=deadline,
            prompt=prompt,
            own=own,
            n=n,
            num_emitted_tokens=num_emitted_tokens,
        )

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
