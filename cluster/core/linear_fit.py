"""A linear model that follows what is observed."""

from __future__ import annotations

from collections.abc import Sequence

_FORGETTING = 0.995
_NOISE = 1e-6
_NUM_FIRST = 16
_DEVIATION_SMOOTHING = 0.05
_OUTLIER = 5.0


class LinearFit:
    """Recursive least squares with forgetting (Haykin, Adaptive Filter Theory, ch. 10), made robust in two ways.

    An observation that is off by more than five usual deviations counts as if it were off by that much: a pause of the
    machine moves the fit little, and a lasting change moves it within some steps. And what has not been observed for
    long does not become less certain than it was at first, which would let the next observation throw the fit off.

    Args:
        scales: of each weight, how large it may be: the standard deviation around 0 before anything is observed.
    """

    def __init__(self, scales: Sequence[float]) -> None:
        self._scales = tuple(scales)
        self._weights = [0.0] * len(scales)  # in units of their scales, as is the covariance
        self._covariance = [[float(i == j) for j in range(len(scales))] for i in range(len(scales))]
        self._deviation = 0.0
        self._num_observed = 0

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(weight * scale for weight, scale in zip(self._weights, self._scales, strict=True))

    @property
    def deviation(self) -> float:
        """By how much an observation usually differs from what was predicted; the mean of recent ones."""
        return self._deviation

    @property
    def is_settled(self) -> bool:
        """Whether enough was observed for errors to say more of what is observed than of the first guess."""
        return self._num_observed > _NUM_FIRST

    def observe(self, inputs: Sequence[float], value: float) -> float:
        """Moves the weights towards ``sum(weight * input) == value``; returns what that sum was short of it before."""
        x = [scale * each for scale, each in zip(self._scales, inputs, strict=True)]
        shortfall = value - sum(weight * each for weight, each in zip(self._weights, x, strict=True))
        error = shortfall
        self._num_observed += 1
        if self.is_settled:
            limit = _OUTLIER * self._deviation + 1e-3 * abs(value)
            error = min(max(error, -limit), limit)
            self._deviation += _DEVIATION_SMOOTHING * (abs(error) - self._deviation)
        else:
            self._deviation += (abs(error) - self._deviation) / self._num_observed
        direction = [sum(c * each for c, each in zip(row, x, strict=True)) for row in self._covariance]
        total = _FORGETTING * _NOISE + sum(d * each for d, each in zip(direction, x, strict=True))
        for i, d in enumerate(direction):
            self._weights[i] += d / total * error
        covariance = [
            [(c - d_i * d_j / total) / _FORGETTING for c, d_j in zip(row, direction, strict=True)]
            for row, d_i in zip(self._covariance, direction, strict=True)
        ]
        shrink = [min(1.0, max(covariance[i][i], 1e-300) ** -0.5) for i in range(len(x))]
        self._covariance = [
            [c * s_i * s_j for c, s_j in zip(row, shrink, strict=True)]
            for row, s_i in zip(covariance, shrink, strict=True)
        ]
        return shortfall
