"""Layers to stages, against all splits that there are."""

from __future__ import annotations

import itertools
import random

import pytest

from cluster.core.layer_split import StageTimes, split_layers, stage_s
from cluster.errors import ConfigError


def counts_of(split: tuple[tuple[int, int], ...]) -> list[int]:
    return [end - first for first, end in split]


def slowest_s(times: list[StageTimes], counts: list[int]) -> float:
    return max(stage_s(times, stage, count) for stage, count in enumerate(counts))


def test_equal_stages_get_equal_runs_that_follow_each_other():
    assert split_layers(12, [StageTimes(layer_s=1.0)] * 4) == ((0, 3), (3, 6), (6, 9), (9, 12))


def test_one_stage_has_all():
    assert split_layers(7, [StageTimes(layer_s=1.0, embedding_s=3.0, head_s=9.0)]) == ((0, 7),)


def test_only_the_first_pays_for_the_embedding_and_only_the_last_for_the_head():
    times = [StageTimes(layer_s=1.0, embedding_s=1.0, head_s=3.0)] * 3
    assert counts_of(split_layers(11, times)) == [4, 5, 2]


def test_a_slow_device_has_fewer_layers():
    times = [StageTimes(layer_s=1.0), StageTimes(layer_s=3.0), StageTimes(layer_s=1.0)]
    assert counts_of(split_layers(14, times)) == [6, 2, 6]


def test_a_head_slower_than_all_else_leaves_the_last_stage_one_layer():
    times = [StageTimes(layer_s=1.0, head_s=100.0)] * 2
    assert counts_of(split_layers(8, times)) == [7, 1]


def test_memory_binds_where_time_would_give_more():
    times = [StageTimes(layer_s=1.0)] * 3
    assert counts_of(split_layers(12, times, [2, 12, 12])) == [2, 5, 5]
    assert counts_of(split_layers(12, times, [4, 4, 4])) == [4, 4, 4]


@pytest.mark.parametrize("seed", range(150))
def test_no_other_split_has_a_faster_slowest_stage(seed: int):
    rng = random.Random(seed)
    num_stages, num_layers = rng.randint(1, 4), rng.randint(4, 12)
    times = [
        StageTimes(
            layer_s=rng.choice((0.0, 1e-3, 1.5e-3, 4e-3)),
            embedding_s=rng.choice((0.0, 1e-4, 5e-3)),
            head_s=rng.choice((0.0, 2e-3, 8e-3)),
        )
        for _ in range(num_stages)
    ]
    bounds = [rng.randint(1, num_layers) for _ in range(num_stages)]
    all_counts = [
        list(counts)
        for counts in itertools.product(*(range(1, bound + 1) for bound in bounds))
        if sum(counts) == num_layers
    ]
    if not all_counts:
        with pytest.raises(ConfigError, match="the memory of"):
            split_layers(num_layers, times, bounds)
        return
    split = split_layers(num_layers, times, bounds)
    counts = counts_of(split)
    assert [first for first, _ in split] == [0, *(end for _, end in split[:-1])]
    assert split[-1][1] == num_layers
    assert counts in all_counts
    assert slowest_s(times, counts) == min(slowest_s(times, other) for other in all_counts)


@pytest.mark.parametrize(
    ("num_layers", "max_layers", "message"),
    [
        (2, None, "2 layers cannot be cut into 3 stages.*at most 2"),
        (9, [3, 0, 9], "stage 1 of 3 has no memory for a single layer"),
        (9, [3, 2, 3], r"has 9 layers; the memory of 3 stages holds 3 \+ 2 \+ 3 = 8"),
    ],
)
def test_what_does_not_fit_is_said(num_layers: int, max_layers: list[int] | None, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        split_layers(num_layers, [StageTimes(layer_s=1.0)] * 3, max_layers)
    assert caught.value.field == "pp"


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_times_that_are_none_are_refused(value: float):
    with pytest.raises(ConfigError) as caught:
        StageTimes(layer_s=1.0, head_s=value)
    assert caught.value.field == "head_s"
