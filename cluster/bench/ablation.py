"""``cluster bench ablation``: what each of the engine's ideas is worth, one put on top of the other.

Every stage is a fresh process that completes the same requests and is measured as a whole, prompts included. The first
stages run on torch's kernels with torch's defaults, so nothing of ours slows down what it is compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.bench.child import Outcome, Workload, run_in_child
from cluster.bench.session import EngineSettings

# The same at every request: the rate of some of them, one after the other, is the rate of all.
_ALONE = 4


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the ladder: everything before it, and this."""

    name: str
    batched: bool
    kernels: Literal["auto", "torch"]
    weights: Literal["float32", "int8"]


STAGES = (
    Stage(name="one at a time", batched=False, kernels="torch", weights="float32"),
    Stage(name="+ continuous batching", batched=True, kernels="torch", weights="float32"),
    Stage(name="+ fused kernels", batched=True, kernels="auto", weights="float32"),
    Stage(name="+ int8 weights", batched=True, kernels="auto", weights="int8"),
)


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """What a stage reached.

    Attributes:
        tokens_per_s: of the whole run.
        gain: over the stage before; 1 for the first.
        total_gain: over the first stage.
        backend: model code and kernels that ran.
    """

    name: str
    tokens_per_s: float
    gain: float
    total_gain: float
    backend: str


def run(settings: EngineSettings, workload: Workload, on_stage: Callable[[str], None]) -> list[StageFigures]:
    """Runs every stage.

    Args:
        settings: of the engine; its kernels and number format are the stage's.
        workload: the requests; the first stage runs a few of them, one at a time.
        on_stage: called with each stage's name as it begins.

    Raises:
        subprocess.CalledProcessError: a stage failed; it has said why on standard error.
    """
    outcomes = []
    for stage in STAGES:
        on_stage(stage.name)
        outcomes.append(
            run_in_child(
                dataclasses.replace(settings, weights=stage.weights, kernels=stage.kernels),
                workload if stage.batched else _one_at_a_time(workload),
            )
        )
    return gains(outcomes)


def gains(outcomes: list[Outcome]) -> list[StageFigures]:
    """The stages' figures, from what they did."""
    rates = [outcome.tokens_per_s for outcome in outcomes]
    return [
        StageFigures(
            name=stage.name,
            tokens_per_s=rate,
            gain=rate / before,
            total_gain=rate / rates[0],
            backend=outcome.backend,
        )
        for stage, outcome, rate, before in zip(STAGES, outcomes, rates, [rates[0], *rates], strict=False)
    ]


def _one_at_a_time(workload: Workload) -> Workload:
    return dataclasses.replace(workload, num_requests=min(_ALONE, workload.num_requests), concurrent=1)
