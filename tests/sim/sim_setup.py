"""What the tests of the simulator are built from."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.request import Priority
from cluster.core.scheduler import Scheduler
from cluster.sim.latency import Grid, StepTimes
from cluster.sim.replica import Replica, StepScheduler
from cluster.sim.simulator import Simulator
from cluster.sim.workload import Arrival, Lengths, draw_arrivals, poisson_gaps

REPO = Path(__file__).resolve().parents[2]


def trace(name: str) -> Path:
    """A trace's file; skips the test where it is not at hand."""
    folder = Path(os.environ.get("CLUSTER_TRACES", REPO.parent / "shared" / "traces"))
    if not (folder / name).exists():
        pytest.skip(f"{folder} has no {name}; CLUSTER_TRACES names the folder of the traces")
    return folder / name


def linear_step_s(num_samples: float, sample_context: float, num_prefill_tokens: float, start: float) -> float:
    """A machine that reads 40 ms of weights a step and takes 4 ms for a token, more with a long context."""
    attended = start + (num_prefill_tokens + 1) / 2
    attention = num_samples * sample_context + num_prefill_tokens * attended
    return 0.040 + 0.004 * (num_samples + num_prefill_tokens) + 2e-7 * attention


def create_step_times(
    grid: Grid | None = None, step_s: Callable[[float, float, float, float], float] = linear_step_s
) -> StepTimes:
    grid = grid or Grid(
        num_samples=(0, 1, 8, 32),
        sample_contexts=(16, 512, 2048),
        num_prefill_tokens=(0, 16, 128, 1024),
        prefill_starts=(0, 1024),
    )
    return StepTimes(
        grid,
        [
            [
                [
                    [step_s(samples, context if samples else 0, tokens, start) for start in grid.prefill_starts]
                    for tokens in grid.num_prefill_tokens
                ]
                for context in grid.sample_contexts
            ]
            for samples in grid.num_samples
        ],
    )


def create_replicas(
    num_replicas: int = 1,
    *,
    num_blocks: int = 64,
    block_size: int = 16,
    policy: Callable[[SchedulerConfig, BlockManager], StepScheduler] = Scheduler,
    step_times: StepTimes | None = None,
    **limits: int,
) -> list[Replica]:
    config = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **limits})
    return [
        Replica(
            f"replica-{index}",
            lambda: policy(config, BlockManager(num_blocks, block_size)),
            step_times or create_step_times(),
        )
        for index in range(num_replicas)
    ]


def create_simulator(num_replicas: int = 1, *, seed: int = 0, **options: object) -> Simulator:
    return Simulator(create_replicas(num_replicas, **options), random.Random(seed))  # type: ignore[arg-type]


def create_arrivals(
    num_requests: int = 200,
    *,
    rate: float = 1.0,
    seed: int = 0,
    max_prompt_tokens: int = 200,
    max_output_tokens: int = 40,
    impatient: bool = False,
) -> list[Arrival]:
    """Drawn; where they are impatient some have deadlines, some clients leave, and all classes come."""
    rng = random.Random(seed)

    def lengths() -> Lengths:
        return Lengths(
            num_prompt_tokens=rng.randint(1, max_prompt_tokens), num_output_tokens=rng.randint(1, max_output_tokens)
        )

    arrivals = draw_arrivals(poisson_gaps(rng, rate), lengths, num_requests)
    if not impatient:
        return arrivals
    return [
        Arrival(
            at_s=arrival.at_s,
            num_prompt_tokens=arrival.num_prompt_tokens,
            num_output_tokens=arrival.num_output_tokens,
            priority=rng.choice(list(Priority)),
            deadline_s=rng.choice([None, None, rng.expovariate(0.2)]),
            leaves_after_s=rng.choice([None, None, rng.expovariate(0.2)]),
        )
        for arrival in arrivals
    ]
