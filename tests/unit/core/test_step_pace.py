"""What is measured of an engine's steps, on a made-up machine of known speed."""

from __future__ import annotations

import random

import pytest

from cluster.core.schedule import Schedule
from cluster.core.step import ScheduledSequence
from cluster.core.step_pace import StepPace


def plan(num_decodes: int, *chunks: int) -> Schedule:
    counts = [1] * num_decodes + list(chunks)
    scheduled = tuple(
        ScheduledSequence(
            sequence_id=i, num_computed_tokens=9, num_new_tokens=count, new_block_ids=(), samples=count == 1
        )
        for i, count in enumerate(counts)
    )
    return Schedule(scheduled=scheduled, started=(), dropped=(), preempted=(), expired=())


def test_nothing_is_known_before_anything_has_run():
    pace = StepPace()
    assert (pace.step_s, pace.prompt_token_s, pace.tokens_per_s) == (0.0, 0.0, 0.0)


def test_prompts_alone_tell_nothing_of_decodes():
    pace = StepPace()
    for _ in range(50):
        pace.observe(plan(0, 200), 0.1)
    assert pace.step_s == 0.0
    assert pace.tokens_per_s == pytest.approx(2000)
    assert 0 < pace.prompt_token_s <= 0.1 / 200


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_decodes_and_prompts_are_told_apart(noise: float):
    rng = random.Random(3)
    pace = StepPace()
    for step in range(400):
        num_decodes = rng.randint(20, 28)
        chunk = rng.randint(50, 400) if step % 3 == 0 else 0
        duration_s = 4e-3 + 1e-4 * num_decodes + 5e-5 * chunk
        pace.observe(plan(num_decodes, *[chunk] * bool(chunk)), duration_s * (1 + noise * rng.uniform(-1, 1)))
    assert pace.step_s == pytest.approx(4e-3 + 1e-4 * 24, rel=0.15)
    assert pace.prompt_token_s == pytest.approx(5e-5, rel=0.1)


def test_it_follows_the_machine():
    pace = StepPace()
    for _ in range(200):
        pace.observe(plan(10), 0.010)
    assert pace.step_s == pytest.approx(0.010, rel=0.01)
    for _ in range(2000):
        pace.observe(plan(10), 0.020)
    assert pace.step_s == pytest.approx(0.020, rel=0.05)
    assert pace.tokens_per_s == pytest.approx(500, rel=0.05)


def test_steps_without_time_say_nothing():
    pace = StepPace()
    pace.observe(plan(3), 0.0)
    pace.observe(plan(0), 1.0)
    assert (pace.step_s, pace.tokens_per_s) == (0.0, 0.0)
