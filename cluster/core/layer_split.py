"""Which stage of a pipeline runs which layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from cluster.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """What a stage's device takes for the parts of a typical micro-batch, in seconds.

    Attributes:
        layer_s: one decoder layer.
        embedding_s: looking up the tokens; the first stage does it.
        head_s: last norm, output head and sampling; the last stage does it.
    """

    layer_s: float
    embedding_s: float = 0.0
    head_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layer_s", "embedding_s", "head_s"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, f"is {value}; a time must be finite and not negative")


def split_layers(
    num_layers: int, times: Sequence[StageTimes], max_layers: Sequence[int] | None = None
) -> tuple[tuple[int, int], ...]:
    """Cuts the layers into one run for each stage so that the slowest stage, which paces all, takes the least time.

    Layers are alike, so only their numbers count. Each stage starts with one, and the others go one by one to wherever
    they cost least: what a stage takes only grows with its layers, so no other split has a faster slowest stage.

    Args:
        num_layers: of the model.
        times: of each stage, first to last; stages may differ.
        max_layers: what each stage's memory holds, beside its embedding or head; None: all fits anywhere.

    Returns:
        First and last + 1 of each stage's layers.

    Raises:
        ConfigError: there are fewer layers than stages, or the layers do not fit.
    """
    num_stages = len(times)
    bounds = [num_layers] * num_stages if max_layers is None else list(max_layers)
    if len(bounds) != num_stages:
        raise ValueError(f"{len(bounds)} memory bounds for {num_stages} stages")
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(
            f"{num_layers} layers cannot be cut into {num_stages} stages: each needs one at least; set pp to at most "
            f"{num_layers}",
            field="pp",
        )
    for stage, bound in enumerate(bounds):
        if bound < 1:
            raise ConfigError(
                f"stage {stage} of {num_stages} has no memory for a single layer beside what else it holds; raise tp, "
                "or give the shards more memory",
                field="pp",
            )
    if sum(bounds) < num_layers:
        raise ConfigError(
            f"the model has {num_layers} layers; the memory of {num_stages} stages holds "
            f"{' + '.join(map(str, bounds))} = {sum(bounds)}; raise pp or tp, or give the shards more memory",
            field="pp",
        )
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        growing = [stage for stage in range(num_stages) if counts[stage] < bounds[stage]]
        counts[min(growing, key=lambda stage: stage_s(times, stage, counts[stage] + 1))] += 1
    return tuple(pairwise(accumulate(counts, initial=0)))


def stage_s(times: Sequence[StageTimes], stage: int, num_layers: int) -> float:
    """Seconds that a stage takes with ``num_layers`` layers."""
    own = times[stage]
    total = num_layers * own.layer_s
    if stage == 0:
        total += own.embedding_s
    if stage == len(times) - 1:
        total += own.head_s
    return total
