"""Step times: exact where they were measured, right between, refused where they make no sense."""

from __future__ import annotations

import itertools
import random

import pytest
from sim_setup import create_step_times, linear_step_s

from cluster.core.step import ScheduledSequence
from cluster.errors import ConfigError
from cluster.sim.latency import Grid, StepLoad, StepTimes


def create_grid(**axes: tuple[int, ...]) -> Grid:
    return Grid(
        **{
            "num_samples": (0, 1, 5),
            "sample_contexts": (10, 70),
            "num_prefill_tokens": (0, 3, 40),
            "prefill_starts": (0, 100, 900),
            **axes,
        }
    )


def create_share(num_computed_tokens: int, num_new_tokens: int, *, samples: bool) -> ScheduledSequence:
    return ScheduledSequence(
        sequence_id=0,
        num_computed_tokens=num_computed_tokens,
        num_new_tokens=num_new_tokens,
        new_block_ids=(),
        samples=samples,
    )


def create_load(samples: int, context: float, tokens: int, start: float) -> StepLoad:
    return StepLoad(
        num_samples=samples,
        sample_context=context if samples else 0.0,
        num_prefill_tokens=tokens,
        prefill_attended=start + (tokens + 1) / 2 if tokens else 0.0,
    )


def test_a_steps_load_in_numbers():
    shares = [
        create_share(9, 1, samples=True),  # attends to 10
        create_share(4, 3, samples=True),  # its last token attends to 7, the others to 5 and 6
        create_share(20, 2, samples=False),  # 21 and 22
        create_share(0, 1, samples=False),  # 1
    ]
    assert StepLoad.of(shares) == StepLoad(
        num_samples=2, sample_context=8.5, num_prefill_tokens=5, prefill_attended=(5 + 6 + 21 + 22 + 1) / 5
    )


def test_a_step_without_samples_or_chunks():
    assert StepLoad.of([create_share(0, 2, samples=False)]) == StepLoad(
        num_samples=0, sample_context=0.0, num_prefill_tokens=2, prefill_attended=1.5
    )
    assert StepLoad.of([create_share(6, 1, samples=True)]).num_prefill_tokens == 0


def test_exact_at_every_point_of_the_grid():
    rng, grid = random.Random(3), create_grid()
    times: dict[tuple[int, int, int, int], float] = {}

    def step_s(samples: int, context: int, tokens: int, start: int) -> float:
        key = (samples, context if samples else 0, tokens, start if tokens else 0)
        return times.setdefault(key, rng.uniform(0.1, 9.0))

    model = create_step_times(grid, step_s)
    points = list(itertools.product(*vars(grid).values()))
    got = {point: model.step_s(create_load(*point)) for point in points}
    assert got == {point: pytest.approx(step_s(*point), rel=1e-12) for point in points}


def test_a_machine_whose_time_is_its_work_is_met_everywhere():
    model, rng = create_step_times(create_grid(), linear_step_s), random.Random(5)
    for _ in range(200):
        # Beyond the grid too: it goes on straight.
        point = rng.randint(1, 9), rng.uniform(1, 200), rng.randint(1, 60), rng.uniform(0, 2000)
        assert model.step_s(create_load(*point)) == pytest.approx(linear_step_s(*point), rel=1e-9), point


def test_several_short_prompts_cost_less_than_a_long_one_of_their_length():
    model = create_step_times()
    short = [create_share(0, 100, samples=True)] * 8
    one = [create_share(0, 793, samples=True), *[create_share(99, 1, samples=True)] * 7]
    assert sum(share.num_new_tokens for share in short) == sum(share.num_new_tokens for share in one)
    assert model.step_s(StepLoad.of(short)) < model.step_s(StepLoad.of(one))


def test_never_less_than_the_shortest_time_measured():
    grid = create_grid(sample_contexts=(1000, 2000))
    model = create_step_times(grid, lambda samples, context, tokens, start: 1.0 + 0.01 * max(0.0, context - 1000))
    assert model.step_s(create_load(5, 10.0, 0, 0)) == 1.0


@pytest.mark.parametrize("axis", [(0,), (0, 3, 3), (0, 5, 2), (1, 2)])
def test_axes_that_do_not_rise_from_zero_are_refused(axis):
    with pytest.raises(ConfigError, match="point"):
        create_grid(num_prefill_tokens=axis)


def profile() -> dict[str, object]:
    grid = {"num_samples": [0, 1], "sample_contexts": [1, 2], "num_prefill_tokens": [0, 1], "prefill_starts": [0, 1]}
    return {"grid": grid, "step_ms": [[[[1.0, 2.0]] * 2] * 2] * 2}


def test_a_profile_is_in_milliseconds():
    assert StepTimes.from_profile(profile()).step_s(create_load(0, 0, 1, 1)) == 0.002


@pytest.mark.parametrize(
    "change",
    [
        {"step_ms": [[[[1.0, 2.0]] * 2] * 2]},
        {"step_ms": [[[[1.0]] * 2] * 2] * 2},
        {"step_ms": [[[[0.0, 1.0]] * 2] * 2] * 2},
        {"step_ms": "fast"},
        {"grid": {"num_samples": [0, 1]}},
        {"grid": None},
    ],
)
def test_what_is_no_profile_is_refused(change):
    with pytest.raises(ConfigError):
        StepTimes.from_profile(profile() | change)
