"""The scheduler under random work: tiny pools, few prompts, siblings, cancels, deadlines, several steps in flight.

``SchedulerHarness`` holds the invariants; that every request attends to exactly its own tokens is the first of them.
CLUSTER_TEST_FULL=1 makes the walks twenty times as long. A failure says the seed that repeats it. What breaks the
scheduler on purpose, to see whether these runs notice, is in ``test_scheduler_faults``.
"""

from __future__ import annotations

import random

import pytest
from hypothesis.stateful import run_state_machine_as_test
from scheduler_walk import LENGTH, MACHINE, NUM_WALKS, SchedulerMachine, act, create_random_harness, walk

from cluster.core.request import FinishReason

STEPS_PER_WALK = 3_125


@pytest.mark.parametrize("seed", range(NUM_WALKS))
def test_random_walk(seed: int) -> None:
    print(f"seed {seed}")
    walk(seed, STEPS_PER_WALK * LENGTH)


@pytest.mark.timeout(900)
def test_machine() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=MACHINE)


def test_walks_meet_what_they_are_for() -> None:
    """A walk that never preempts, parks, forks, expires or stops would prove nothing."""
    rng = random.Random(0)
    ends: set[FinishReason | str] = set()
    num_preempted_in_flight = num_parked = num_resumed = num_forks = num_cached_tokens = num_shielded = 0
    num_left_out = 0
    for _ in range(100):
        harness = create_random_harness(rng)
        for _ in range(250):
            act(harness, rng)
            num_preempted_in_flight += any(e.num_placeholders and not e.running for e in harness.live.values())
            if harness.in_flight and harness.num_stages > 1:
                last = {share.sequence_id for share in harness.in_flight[-1].scheduled}
                num_left_out += any(e.decodes and i not in last for i, e in harness.live.items()) and bool(last)
        ends.update(harness.ended.values())
        num_parked += harness.num_parked
        num_resumed += harness.num_resumed
        num_forks += harness.num_forks
        num_cached_tokens += harness.num_cached_tokens
        num_shielded += sum(entry.may_be_shielded for entry in harness.live.values())
    assert ends == {FinishReason.STOP, FinishReason.LENGTH, "cancelled", "expired"}
    assert min(num_preempted_in_flight, num_shielded) > 20
    assert min(num_parked, num_resumed, num_forks) > 30
    assert num_cached_tokens > 1000
    assert num_left_out > 1000
