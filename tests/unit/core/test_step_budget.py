"""Prompts cut to what a step has time for."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cluster.core.config import SchedulerConfig
from cluster.core.schedule import Schedule
from cluster.core.step import ScheduledSequence
from cluster.core.step_budget import StepBudget

MIN_TOKENS = 16
CONTEXT = 500

StepTime = Callable[[int, int, int], float]


def linear(num_decodes: int, num_tokens: int, num_context_tokens: int) -> float:
    return 0.005 + 0.0002 * num_decodes + 0.0001 * num_tokens + 2e-7 * num_context_tokens


def create_budget(target_itl_ms: float | None = 50.0, max_num_batched_tokens: int = 2048) -> StepBudget:
    config = SchedulerConfig(max_num_batched_tokens=max_num_batched_tokens, target_itl_ms=target_itl_ms)
    return StepBudget(config, min_prefill_tokens=MIN_TOKENS)


def create_schedule(num_decodes: int, num_tokens: int, start: int = 0) -> Schedule:
    shares = [(CONTEXT, 1)] * num_decodes + ([(start, num_tokens)] if num_tokens else [])
    scheduled = tuple(
        ScheduledSequence(
            sequence_id=sequence_id,
            num_computed_tokens=num_computed_tokens,
            num_new_tokens=num_new_tokens,
            new_block_ids=(),
            samples=True,
        )
        for sequence_id, (num_computed_tokens, num_new_tokens) in enumerate(shares)
    )
    return Schedule(scheduled=scheduled, started=(), dropped=(), preempted=(), expired=())


def run(
    budget: StepBudget, num_steps: int, step_time: StepTime = linear, *, noise: float = 0.0, seed: int = 0
) -> list[tuple[int, float]]:
    """Steps with prompts in two of three; of those with decodes and prompts: tokens of prompts, and seconds."""
    rng = random.Random(seed)
    taken = []
    for _ in range(num_steps):
        num_decodes = rng.randint(1, 64)
        num_tokens = budget.num_prefill_tokens(num_decodes, [CONTEXT] * num_decodes, 0) if rng.random() < 0.67 else 0
        duration_s = step_time(num_decodes, num_tokens, num_decodes * CONTEXT) * (1 + rng.gauss(0.0, noise))
        budget.observe(create_schedule(num_decodes, num_tokens), duration_s)
        if num_tokens:
            taken.append((num_tokens, duration_s))
    return taken


@pytest.mark.parametrize("num_decodes", [0, 1, 64])
def test_without_a_target_the_limit_is_all(num_decodes: int):
    assert create_budget(None).num_prefill_tokens(num_decodes, [CONTEXT] * num_decodes, 0) == 2048 - num_decodes


def test_without_decodes_the_limit_is_all():
    assert create_budget().num_prefill_tokens(0, [], 0) == 2048


def test_steps_come_close_to_the_target_and_stay_below():
    budget = create_budget()
    run(budget, 100)
    durations = [duration_s for _, duration_s in run(budget, 300, seed=1)]
    assert max(durations) <= 0.0505
    assert sum(durations) / len(durations) >= 0.048


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_with_noise_about_one_step_in_a_hundred_takes_longer(noise: float):
    budget = create_budget()
    run(budget, 500, noise=noise)
    durations = [duration_s for _, duration_s in run(budget, 3000, noise=noise, seed=1)]
    assert sum(duration_s > 0.05 for duration_s in durations) / len(durations) <= 0.02
    assert sum(durations) / len(durations) >= 0.05 * (1 - 4 * noise)


def test_it_is_found_from_below():
    taken = run(create_budget(), 40)
    assert taken[0][0] == 64
    largest = 32
    for num_tokens, duration_s in taken:
        assert num_tokens <= 2 * largest
        assert duration_s <= 0.055
        largest = max(largest, num_tokens)
    assert largest > 300


def test_it_follows_a_machine_that_gets_slower():
    budget = create_budget()
    run(budget, 300)
    slower: StepTime = lambda *load: 1.5 * linear(*load)  # noqa: E731
    run(budget, 200, slower)
    assert max(duration_s for _, duration_s in run(budget, 200, slower, seed=1)) <= 0.053


def test_a_pause_does_not_starve_prompts():
    budget = create_budget()
    usual = run(budget, 300)[-1][0]
    budget.observe(create_schedule(32, 100), 3.0)
    assert min(num_tokens for num_tokens, _ in run(budget, 20)) > usual / 4


def test_prompts_wait_where_only_fewer_decodes_would_keep_the_target():
    budget = create_budget(10.0)
    run(budget, 200)
    assert budget.num_prefill_tokens(64, [CONTEXT] * 64, 0) == 0
    assert budget.num_prefill_tokens(64, [CONTEXT] * 64, 0, may_wait=False) == MIN_TOKENS
    assert 10 <= budget.num_prefill_tokens(8, [CONTEXT] * 8, 0) <= 26  # 2.6 ms are left, less a margin


@pytest.mark.parametrize("target_itl_ms", [0.001, 5.0])
def test_prompts_get_on_where_no_number_of_decodes_keeps_the_target(target_itl_ms: float):
    budget = create_budget(target_itl_ms)
    run(budget, 200)
    assert budget.num_prefill_tokens(64, [CONTEXT] * 64, 0) == MIN_TOKENS


def test_each_step_of_a_pipeline_has_its_part_of_the_target():
    config = SchedulerConfig(max_num_batched_tokens=2048, target_itl_ms=200.0)
    budget = StepBudget(config, min_prefill_tokens=MIN_TOKENS, num_stages=4)
    run(budget, 200)
    durations = [duration_s for _, duration_s in run(budget, 300, seed=1)]
    assert max(durations) <= 0.0505
    assert sum(durations) / len(durations) >= 0.048


def test_a_step_without_decodes_is_cut_where_others_wait_behind_it():
    budget = create_budget()
    run(budget, 200)
    assert budget.num_prefill_tokens(0, [], 0) == 2048
    assert 300 <= budget.num_prefill_tokens(0, [], 0, others_decode=True) <= 450  # 45 ms


def test_late_chunks_of_a_prompt_are_shorter():
    budget, rng = create_budget(), random.Random(0)
    for _ in range(500):
        num_decodes, start = rng.randint(1, 64), rng.choice((0, 1000, 4000))
        num_tokens = min(budget.num_prefill_tokens(num_decodes, [CONTEXT] * num_decodes, start), 300)
        pairs_s = 2e-8 * num_tokens * (start + num_tokens / 2)
        duration_s = linear(num_decodes, num_tokens, num_decodes * CONTEXT) + pairs_s
        budget.observe(create_schedule(num_decodes, num_tokens, start), duration_s)
    early, late = (budget.num_prefill_tokens(32, [CONTEXT] * 32, start) for start in (0, 8000))
    assert late == pytest.approx(early * 0.0001 / 0.00026, rel=0.05)


def test_it_never_exceeds_what_a_step_holds():
    budget = create_budget(10_000.0, max_num_batched_tokens=256)
    assert max(num_tokens for num_tokens, _ in run(budget, 200)) <= 255
    assert budget.num_prefill_tokens(64, [CONTEXT] * 64, 0) == 192
    assert create_budget(1.0, max_num_batched_tokens=70).num_prefill_tokens(64, [CONTEXT] * 64, 0) == 6
