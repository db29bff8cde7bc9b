"""Who gets on when not all can: classes, their shares, and whom a P0 may push aside."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from scheduler_harness import SchedulerHarness

from cluster.core.class_policy import ClassPolicy
from cluster.core.config import ClassConfig, ClassesConfig, SchedulerConfig
from cluster.core.request import Priority
from cluster.core.scheduler import Scheduler

P0, P1, P2, P3 = Priority


def create_running(*priorities: Priority, **limits: Any) -> SchedulerHarness:
    """Requests 0, 1, ... that arrived in this order, one block each, all of them running and generating."""
    harness = SchedulerHarness(**{"num_blocks": 100, "block_size": 16, "max_num_seqs": len(priorities), **limits})
    for priority in priorities:
        harness.now += 0.1
        harness.add(num_prompt_tokens=2, max_tokens=14, priority=priority)
        harness.step()
    assert harness.scheduler.num_running == len(priorities)
    return harness


def sampled_by_class(harness: SchedulerHarness, num_steps: int) -> Counter[Priority]:
    sampled: Counter[Priority] = Counter()
    for _ in range(num_steps):
        harness.now += 0.01
        priorities = {i: entry.request.priority for i, entry in harness.live.items()}
        sampled.update(priorities[i] for i in harness.step())
    return sampled


@pytest.mark.parametrize(
    ("running", "victim"),
    [
        ((P3,), 0),
        ((P3, P3), 1),
        ((P1, P3, P2), 1),
        ((P3, P3, P2, P2), 1),
        ((P0, P2, P1), 1),
        ((P0, P1), 1),
    ],
    ids=[
        "the only one",
        "latest",
        "lowest class",
        "latest of the lowest",
        "P2 before P1",
        "P1 where it is all there is",
    ],
)
def test_a_p0_without_a_place_takes_that_of_the_lowest_class_at_once(running: tuple[Priority, ...], victim: int):
    harness = create_running(*running)
    urgent = harness.add(num_prompt_tokens=2, max_tokens=2, priority=P0)
    schedule = harness.schedule()
    assert (schedule.preempted, schedule.started) == ((victim,), (urgent,))
    assert {share.sequence_id for share in schedule.scheduled} == {urgent, *range(len(running))} - {victim}
    harness.update()
    harness.drain()


@pytest.mark.parametrize("others", [(P0, P0), (P0,)], ids=["full of P0", "one P0"])
def test_a_p0_preempts_no_p0(others: tuple[Priority, ...]):
    harness = create_running(*others)
    harness.add(priority=P0)
    assert harness.schedule().preempted == ()
    harness.update()
    harness.drain()


def test_a_p0_takes_a_place_in_a_step_that_is_full_of_decodes():
    harness = create_running(P3, P3, P3, max_num_batched_tokens=3)
    urgent = harness.add(num_prompt_tokens=2, max_tokens=2, priority=P0)
    schedule = harness.schedule()
    assert {share.sequence_id: share.num_new_tokens for share in schedule.scheduled} == {urgent: 1, 0: 1, 1: 1}
    harness.update()
    harness.drain()


@pytest.mark.parametrize("priority", [P1, P2, P3])
def test_only_a_p0_takes_the_place_of_others(priority: Priority):
    harness = create_running(P3, P3)
    harness.add(priority=priority)
    assert harness.schedule().preempted == ()
    harness.update()
    harness.drain()


def test_a_class_at_its_guaranteed_share_keeps_its_place():
    # Of ten places P3 is guaranteed one and P2 two.
    harness = create_running(P3, P2, P2, P2, P1, P1, P1, P0, P0, P0)
    for victims in ((3,), ()):
        harness.add(max_tokens=20, priority=P0)
        assert harness.schedule().preempted == victims
        harness.update()
    assert harness.live[0].running and harness.live[1].running and harness.live[2].running


def test_shares_are_those_of_the_configuration():
    classes = ClassesConfig(p0=ClassConfig(share=0.1), p3=ClassConfig(share=0.4), p1=ClassConfig(share=0.1))
    harness = create_running(P3, P3, P1, P1, P0, classes=classes)
    harness.add(priority=P0)
    assert harness.schedule().preempted == (3,)


def test_a_p0_without_blocks_takes_those_of_the_lowest_class_and_no_more_than_it_needs():
    harness = SchedulerHarness(num_blocks=12, block_size=2, max_num_seqs=8, max_num_batched_tokens=64)
    low = [harness.add(num_prompt_tokens=4, max_tokens=8, priority=P3) for _ in range(4)]
    harness.schedule()
    harness.update()
    assert harness.scheduler.num_running == 4
    urgent = harness.add(num_prompt_tokens=7, max_tokens=2, priority=P0)
    schedule = harness.schedule()
    assert schedule.started == (urgent,)
    assert schedule.preempted == (low[3], low[2])
    harness.update()
    harness.drain()


def test_who_goes_needs_no_spare_block_any_more():
    harness = SchedulerHarness(num_blocks=8, block_size=2, max_num_batched_tokens=64)
    low = harness.add(num_prompt_tokens=4, max_tokens=4, priority=P3)
    harness.step()
    urgent = harness.add(num_prompt_tokens=16, max_tokens=1, priority=P0)  # the whole pool
    schedule = harness.schedule()
    assert (schedule.preempted, schedule.started) == ((low,), (urgent,))
    harness.update()
    harness.drain()


def test_nobody_is_preempted_in_vain():
    harness = SchedulerHarness(num_blocks=8, block_size=2, max_num_seqs=4, max_num_batched_tokens=64)
    harness.add(num_prompt_tokens=8, max_tokens=6, priority=P0)
    low = harness.add(num_prompt_tokens=2, max_tokens=4, priority=P3)
    harness.schedule()
    harness.update()
    harness.add(num_prompt_tokens=10, max_tokens=2, priority=P0)  # would not fit beside the P0 that runs
    schedule = harness.schedule()
    assert schedule.preempted == ()
    assert harness.live[low].running
    harness.update()
    harness.drain()


def test_a_p0_starts_in_the_place_it_took_though_its_class_has_had_more_than_its_share():
    harness = SchedulerHarness(num_blocks=16, max_num_seqs=1, max_num_batched_tokens=8)
    harness.add(num_prompt_tokens=60, max_tokens=1, priority=P0)
    harness.step()
    low = harness.add(num_prompt_tokens=2, max_tokens=9, priority=P3)
    while not harness.live[low].running:
        harness.step()
    # The other class is owed some tokens, and would be next if both waited.
    urgent = harness.add(num_prompt_tokens=2, max_tokens=2, priority=P0)
    schedule = harness.schedule()
    assert (schedule.preempted, schedule.started) == ((low,), (urgent,))
    harness.update()
    harness.drain()


def test_a_flood_of_p3_does_not_touch_a_p0():
    harness = SchedulerHarness(num_blocks=64, block_size=4, max_num_seqs=8, max_num_batched_tokens=16)
    for _ in range(200):
        harness.add(num_prompt_tokens=20, max_tokens=20, priority=P3)
    for _ in range(40):
        harness.step()
    for _ in range(10):
        urgent = harness.add(num_prompt_tokens=8, max_tokens=3, priority=P0)
        assert urgent in harness.schedule().started
        assert urgent in harness.update()
        for _ in range(10):
            harness.step()


def test_the_preempted_comes_back_to_its_old_place():
    harness = create_running(P3)
    old = 0
    for _ in range(3):
        harness.add(num_prompt_tokens=2, max_tokens=2, priority=P3)
    harness.add(num_prompt_tokens=2, max_tokens=2, priority=P0)
    assert harness.schedule().preempted == (old,)
    while not harness.live[old].running:
        harness.update()
        assert harness.schedule().started in ((), (old,))
    harness.update()
    harness.drain()


def test_whoever_comes_back_for_the_share_of_its_class_is_not_preempted_again():
    harness = create_running(P3, max_num_batched_tokens=4)
    harness.add(num_prompt_tokens=90, max_tokens=2, priority=P0)  # its class owes the other some tokens after that
    assert harness.schedule().preempted == (0,)
    while not harness.live[0].running:
        harness.update()
        harness.schedule()
    num_urgent = len(harness.live)
    while 0 in harness.live:
        harness.add(num_prompt_tokens=2, max_tokens=2, priority=P0)
        harness.update()
        assert harness.schedule().preempted == ()
    assert len(harness.live) >= num_urgent + 10
    harness.update()
    harness.drain()


def test_everybody_gets_on_though_p0s_come_whenever_it_has_just_been_started():
    """Its prompt takes three steps, and it has none of them for itself."""
    harness = SchedulerHarness(num_blocks=8, max_num_seqs=1, max_num_batched_tokens=4)
    old = harness.add(num_prompt_tokens=12, max_tokens=6, priority=P3)
    num_preemptions = 0
    for _ in range(200):
        schedule = harness.schedule()
        num_preemptions += len(schedule.preempted)
        if old in schedule.started:
            harness.add(num_prompt_tokens=1, max_tokens=2, priority=P0)
        harness.update()
        if old in harness.ended:
            break
    assert old in harness.ended
    assert num_preemptions >= 2
    harness.drain()


@pytest.mark.parametrize("priority", [P0, P3])
def test_decodes_beyond_the_target_do_not_keep_others_from_their_share(priority: Priority):
    harness = SchedulerHarness(num_blocks=1000, max_num_seqs=40, max_num_batched_tokens=64, target_itl_ms=10.0)

    def step() -> list[int]:  # 1 ms, 1 ms for each decode, and 0.1 ms for each token of a prompt
        schedule = harness.schedule()
        num_tokens = [share.num_new_tokens for share in schedule.scheduled]
        duration_ms = 1 + sum(1.0 if each == 1 else 0.1 * each for each in num_tokens)
        return harness.update(duration_s=duration_ms / 1e3)

    for index in range(1, 61):
        if index % 3:
            harness.add(num_prompt_tokens=2 + index % 11, max_tokens=150, priority=P3 if priority is P0 else P0)
        step()
    assert harness.scheduler.num_running < 20
    other = harness.add(num_prompt_tokens=8, max_tokens=1, priority=priority)
    num_steps = 0
    while other in harness.live:
        step()
        num_steps += 1
    assert num_steps <= 8


class StrictPolicy(ClassPolicy):
    """The most urgent first, always."""

    def pick(self, arrivals: Any) -> Priority:
        return min(arrivals)


class StrictScheduler(Scheduler):
    def __init__(self, config: SchedulerConfig, *args: Any, classes: ClassesConfig, **kwargs: Any) -> None:
        super().__init__(config, *args, classes=classes, **kwargs)
        self._policy = StrictPolicy(classes, burst_tokens=config.max_num_batched_tokens)


def create_flooded(create: type[Scheduler]) -> SchedulerHarness:
    harness = SchedulerHarness(
        num_blocks=64, block_size=4, max_num_seqs=6, max_num_batched_tokens=16, create=create, max_num_waiting=100_000
    )
    for _ in range(1500):
        harness.add(num_prompt_tokens=12, max_tokens=4, priority=P0)
    for _ in range(300):
        harness.add(num_prompt_tokens=12, max_tokens=4, priority=P3)
    return harness


def test_p3_gets_its_share_under_a_flood_of_p0():
    sampled = sampled_by_class(create_flooded(Scheduler), 800)
    assert sampled[P3] / sampled.total() == pytest.approx(0.1, abs=0.02)


def test_generated_tokens_count_as_prompts_do():
    harness = SchedulerHarness(num_blocks=64, block_size=4, max_num_seqs=6, max_num_batched_tokens=16)
    num_tokens: Counter[Priority] = Counter()
    for _ in range(800):
        waiting = Counter(entry.request.priority for entry in harness.live.values() if not entry.running)
        for priority, num_prompt_tokens, max_tokens in ((P0, 14, 2), (P3, 2, 14)):
            if not waiting[priority]:
                harness.add(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, priority=priority)
        for share in harness.schedule().scheduled:
            num_tokens[harness.live[share.sequence_id].request.priority] += share.num_new_tokens
        harness.update()
    assert num_tokens[P3] / num_tokens.total() == pytest.approx(0.1, abs=0.02)


def test_p3_would_starve_under_strict_order():
    assert sampled_by_class(create_flooded(StrictScheduler), 300)[P3] == 0


def longest_wait(seed: int, create: type[Scheduler]) -> float:
    """All classes always wait, in a random pool; the most tokens in a row that others get while P3 gets none, in units
    of what it takes to earn a step at P3's share and to empty the pool."""
    rng = random.Random(seed)
    max_num_seqs = rng.randint(1, 6)
    harness = SchedulerHarness(
        num_blocks=rng.randint(6, 30),
        block_size=rng.choice((1, 2, 4)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.randint(0, 12),
        max_in_flight=rng.randint(1, 3),
        num_park_blocks=rng.choice((0, 40)),
        create=create,
    )
    longest = num_tokens = 0
    for _ in range(1000):
        waiting = Counter(entry.request.priority for entry in harness.live.values() if not entry.running)
        for priority in Priority:
            if waiting[priority] < 2 and (priority is P3 or rng.random() < 0.7):
                harness.add(rng.randint(1, 12), rng.randint(1, 12), priority, prompt=rng.choice((None, 1)))
        harness.now += rng.uniform(0.0, 0.1)
        if len(harness.in_flight) < harness.max_in_flight:
            shares = harness.schedule().scheduled
            num_tokens += sum(share.num_new_tokens for share in shares)
            if any(harness.live[share.sequence_id].request.priority is P3 for share in shares):
                num_tokens = 0
            longest = max(longest, num_tokens)
        if len(harness.in_flight) == harness.max_in_flight or rng.random() < 0.5:
            harness.update()
    return longest / (harness.config.max_num_batched_tokens / 0.1 + harness.capacity)


@pytest.mark.parametrize("seed", range(8))
def test_the_wait_of_p3_is_bounded_whatever_comes(seed: int):
    assert longest_wait(seed, Scheduler) < 3


def test_the_wait_of_p3_would_not_be_under_strict_order():
    assert longest_wait(0, StrictScheduler) > 15


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_p3_finishes_though_p0s_come_for_ever(max_num_seqs: int):
    harness = SchedulerHarness(num_blocks=8, max_num_seqs=max_num_seqs, max_num_batched_tokens=8)
    old = harness.add(num_prompt_tokens=12, max_tokens=6, priority=P3)
    num_steps = 0
    while old in harness.live:
        if sum(not entry.running for entry in harness.live.values()) < 5:
            harness.add(num_prompt_tokens=4, max_tokens=6, priority=P0)
        harness.step()
        harness.now += 0.2
        num_steps += 1
        assert num_steps < 400
    harness.drain()


def test_a_large_p3_gets_its_room_though_small_p0s_overtake_it():
    harness = SchedulerHarness(num_blocks=10, block_size=4, max_num_seqs=8, max_num_batched_tokens=16)
    for _ in range(2):
        harness.add(num_prompt_tokens=4, max_tokens=30, priority=P1)
    harness.step()
    large = harness.add(num_prompt_tokens=36, max_tokens=2, priority=P3)
    overtaking = harness.add(num_prompt_tokens=2, max_tokens=2, priority=P0)
    schedule = harness.schedule()
    assert schedule.started == (overtaking,)
    harness.update()
    num_steps = 0
    while large in harness.live:
        while sum(not entry.running for entry in harness.live.values()) < 3:
            harness.add(num_prompt_tokens=2, max_tokens=8, priority=P0)
        harness.step()
        num_steps += 1
        assert num_steps < 400
    harness.drain()


def test_of_two_within_their_shares_the_one_whose_target_comes_first_starts_first():
    harness = SchedulerHarness(max_num_seqs=1, num_blocks=8)
    harness.add(max_tokens=1, priority=P3)
    harness.schedule()
    waiting = harness.add(priority=P1)
    harness.now = 0.4
    urgent = harness.add(priority=P0)
    harness.update()
    assert harness.schedule().started == (waiting,)
    harness.update()
    assert harness.schedule().started == (urgent,)
