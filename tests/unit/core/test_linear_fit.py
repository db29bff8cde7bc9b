"""Weights found from observations, with noise, pauses and changes among them."""

from __future__ import annotations

import random

import pytest

from cluster.core.linear_fit import LinearFit

WEIGHTS = (0.004, 0.0003, 0.00005)


def create_inputs(rng: random.Random) -> tuple[float, float, float]:
    return 1.0, rng.randint(0, 64), rng.choice((0, 0, 0, rng.randint(1, 500)))


def value_of(inputs: tuple[float, ...], weights: tuple[float, ...] = WEIGHTS) -> float:
    return sum(weight * each for weight, each in zip(weights, inputs, strict=True))


def create_fit(num_observed: int = 0, noise: float = 0.0, seed: int = 0) -> LinearFit:
    fit, rng = LinearFit((1.0, 1e-2, 1e-2)), random.Random(seed)
    for _ in range(num_observed):
        inputs = create_inputs(rng)
        fit.observe(inputs, value_of(inputs) * (1 + rng.gauss(0.0, noise)))
    return fit


def test_a_few_exact_observations_give_the_weights():
    assert create_fit(20).weights == pytest.approx(WEIGHTS, rel=0.02)
    assert create_fit(300).weights == pytest.approx(WEIGHTS, rel=1e-3)


def test_noise_is_averaged_out_and_known():
    fit = create_fit(500, noise=0.05)
    assert fit.weights == pytest.approx(WEIGHTS, rel=0.05)
    rng = random.Random(1)
    usual = sum(0.04 * value_of(create_inputs(rng)) for _ in range(200)) / 200  # mean of |N(0, 5 %)|
    assert fit.deviation == pytest.approx(usual, rel=0.6)


def test_a_pause_moves_the_weights_little():
    fit = create_fit(500, noise=0.02)
    fit.observe((1.0, 32, 0), 1.0)  # 14 ms are usual
    assert fit.weights == pytest.approx(WEIGHTS, rel=0.1)
    assert fit.deviation < 0.002


def test_a_lasting_change_is_followed():
    fit, rng = create_fit(500, noise=0.02), random.Random(2)
    slower = tuple(2 * weight for weight in WEIGHTS)
    for _ in range(600):
        inputs = create_inputs(rng)
        fit.observe(inputs, value_of(inputs, slower))
    assert fit.weights == pytest.approx(slower, rel=0.15)


def test_what_is_not_seen_for_long_is_remembered():
    fit = create_fit(500, noise=0.02)
    rng = random.Random(3)
    for _ in range(20_000):
        inputs = (1.0, rng.randint(0, 64), 0)
        fit.observe(inputs, value_of(inputs) * (1 + rng.gauss(0.0, 0.02)))
    assert fit.weights == pytest.approx(WEIGHTS, rel=0.1)
    inputs = (1.0, 32, 200)
    fit.observe(inputs, value_of(inputs) * 1.02)
    assert fit.weights == pytest.approx(WEIGHTS, rel=0.1)
