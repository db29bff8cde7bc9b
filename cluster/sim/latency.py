"""How long a step takes: times measured on a grid of loads, and the planes between them."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.core.step import ScheduledSequence
from cluster.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """What a step computes, in the numbers that its time depends on.

    A token that is sampled from goes through the output head and attends alone, whether it is a decode's or the last of
    a prompt; the others, in chunks, do not reach the head.

    Attributes:
        num_samples: tokens that are sampled from.
        sample_context: how many tokens each of them attends to, itself included; their mean, 0 without any.
        num_prefill_tokens: the other tokens.
        prefill_attended: how many tokens each of those attends to, itself included; their mean, 0 without any.
    """

    num_samples: int
    sample_context: float
    num_prefill_tokens: int
    prefill_attended: float

    @classmethod
    def of(cls, shares: Iterable[ScheduledSequence]) -> StepLoad:
        num_samples = sum_context = num_prefill_tokens = sum_attended = 0
        for share in shares:
            num_chunk_tokens = share.num_new_tokens
            if share.samples:
                num_samples += 1
                sum_context += share.num_computed_tokens + num_chunk_tokens
                num_chunk_tokens -= 1
            if num_chunk_tokens:
                num_prefill_tokens += num_chunk_tokens
                sum_attended += num_chunk_tokens * share.num_computed_tokens
                sum_attended += num_chunk_tokens * (num_chunk_tokens + 1) // 2
        return cls(
            num_samples=num_samples,
            sample_context=sum_context / num_samples if num_samples else 0.0,
            num_prefill_tokens=num_prefill_tokens,
            prefill_attended=sum_attended / num_prefill_tokens if num_prefill_tokens else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The loads that were measured: every combination of the axes, each strictly rising and with two points or more.

    Attributes:
        num_samples: sequences that sample; from 0.
        sample_contexts: of each of these.
        num_prefill_tokens: of one chunk of a prompt; from 0.
        prefill_starts: tokens of that prompt before the chunk; from 0.
    """

    num_samples: tuple[int, ...]
    sample_contexts: tuple[int, ...]
    num_prefill_tokens: tuple[int, ...]
    prefill_starts: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, axis in vars(self).items():
            if len(axis) < 2 or any(low >= high for low, high in pairwise(axis)):
                raise ConfigError(f"the points must rise, two of them at least: {axis}", field=name)
            if name != "sample_contexts" and axis[0] != 0:
                raise ConfigError(f"the first point must be 0: {axis}", field=name)


class StepTimes:
    """Seconds of a step by its load: multilinear between the points of a grid, exact at them, and straight on outside.

    Attention's work is the product of tokens and of the tokens that each attends to, which is linear in either alone;
    so the planes are laid over these two, not over a chunk's start and size, in which it is a square.

    Args:
        grid: the loads.
        times_s: ``times_s[i][j][k][l]`` is that of the i-th number of samples, the j-th context, the k-th number of
            prefill tokens and the l-th start. Where nothing samples all contexts are alike, as are all starts where
            nothing is prefilled.
    """

    def __init__(self, grid: Grid, times_s: Sequence[Sequence[Sequence[Sequence[float]]]]) -> None:
        self.grid = grid
        self._times = times_s
        if not _has_shape(times_s, [len(axis) for axis in vars(grid).values()]):
            raise ConfigError("there is not one step time for every point of the grid")
        self._least_s = min(time_s for by_context in times_s for plane in by_context for row in plane for time_s in row)
        if not self._least_s > 0:
            raise ConfigError(f"a step cannot take {self._least_s} s")

    @classmethod
    def from_profile(cls, profile: dict[str, Any]) -> StepTimes:
        """Of what ``cluster bench profile`` has written.

        Raises:
            ConfigError: it is not such a profile.
        """
        try:
            grid = Grid(**{name: tuple(axis) for name, axis in profile["grid"].items()})
            times_s = [[[[ms / 1e3 for ms in d] for d in c] for c in b] for b in profile["step_ms"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"this is no profile of step times: {error!r}") from None
        return cls(grid, times_s)

    def step_s(self, load: StepLoad) -> float:
        """At least the shortest time that was measured."""
        grid = self.grid
        i, samples = _place(grid.num_samples, load.num_samples)
        j, context = _place(grid.sample_contexts, load.sample_context) if load.num_samples else (0, 0.0)
        k, tokens = _place(grid.num_prefill_tokens, load.num_prefill_tokens)
        total = 0.0
        for k_corner, tokens_share in ((k, 1 - tokens), (k + 1, tokens)):
            if not tokens_share:
                continue
            # The start at which a chunk of this corner's size attends to as much per token as the load does.
            num_tokens = grid.num_prefill_tokens[k_corner]
            l, start = 0, 0.0
            if num_tokens:
                l, start = _place(grid.prefill_starts, load.prefill_attended - (num_tokens + 1) / 2)
            for i_corner, samples_share in ((i, 1 - samples), (i + 1, samples)):
                for j_corner, context_share in ((j, 1 - context), (j + 1, context)):
                    share = tokens_share * samples_share * context_share
                    if share:
                        row = self._times[i_corner][j_corner][k_corner]
                        total += share * (row[l] + start * (row[l + 1] - row[l]))
        return max(total, self._least_s)


def read_profile(path: Path) -> dict[str, Any]:
    """Raises ConfigError where it is not JSON, OSError where it cannot be read."""
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(profile, dict):
        raise ConfigError(f"{path} is no profile of step times")
    return profile


def _has_shape(values: Any, shape: Sequence[int]) -> bool:
    if not shape:
        return isinstance(values, float)
    return len(values) == shape[0] and all(_has_shape(value, shape[1:]) for value in values)


def _place(axis: Sequence[int], value: float) -> tuple[int, float]:
    """The segment of the axis that is nearest, and where in it: 0 at its begin, 1 at its end, beyond where outside."""
    index = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
    return index, (value - axis[index]) / (axis[index + 1] - axis[index])
