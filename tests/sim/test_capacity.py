"""What chunks are worth, and that the budget keeps what it promises, on machines whose times are formulas."""

from __future__ import annotations

import random

import pytest
from sim_setup import create_step_times

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.scheduler import Scheduler
from cluster.core.step_budget import StepBudget
from cluster.sim.capacity import Terms, compare, find_capacity, simulate
from cluster.sim.latency import Grid, StepLoad, StepTimes
from cluster.sim.report import Percentiles, Report
from cluster.sim.workload import Lengths

CONVERSATIONS = [
    Lengths(num_prompt_tokens=prompt, num_output_tokens=output)
    for prompt, output in [(180, 60), (400, 30), (1000, 80), (1100, 20), (2700, 110)]
]


def create_machine(weights_s: float, token_s: float, pair_s: float) -> StepTimes:
    """A step reads all weights, or computes its tokens, whichever takes longer; and attends."""

    def step_s(samples: float, context: float, tokens: float, start: float) -> float:
        pairs = samples * context + tokens * (start + (tokens + 1) / 2)
        return max(weights_s, (samples + tokens) * token_s) + pair_s * pairs

    grid = Grid(
        num_samples=(0, 1, 4, 16),
        sample_contexts=(16, 4096),
        num_prefill_tokens=(0, 8, 32, 128, 1024),
        prefill_starts=(0, 2048),
    )
    return create_step_times(grid, step_s)


ACCELERATOR = create_machine(weights_s=5e-3, token_s=2e-5, pair_s=1e-9)
PROCESSOR = create_machine(weights_s=0.1, token_s=3e-3, pair_s=3e-7)


class _Noisy(StepTimes):
    """Steps that take up to some tenths longer than they should."""

    def __init__(self, times: StepTimes, deviation: float) -> None:
        super().__init__(times.grid, times._times)
        self._rng = random.Random(11)
        self._deviation = deviation

    def step_s(self, load: StepLoad) -> float:
        return super().step_s(load) * (1 + abs(self._rng.gauss(0, self._deviation)))


def p99_over_target(step_times: StepTimes, rate: float, budget: type[StepBudget] = StepBudget) -> float:
    """At a rate near the capacity, the 99th percentile of gaps as a share of the target."""
    terms = Terms.for_batch(step_times, 16, CONVERSATIONS)
    config = SchedulerConfig(
        max_num_seqs=16, max_num_batched_tokens=2048, max_num_waiting=1000, target_itl_ms=1e3 * terms.itl_p99_s
    )

    def create() -> Scheduler:
        scheduler = Scheduler(config, BlockManager(4096, 16))
        scheduler._budget = budget(config, 16)
        return scheduler

    report = simulate(create, step_times, CONVERSATIONS, rate=rate, num_requests=150, seed=2)
    assert set(report.endings) == {"finished"}
    return report.itl_s.p99 / terms.itl_p99_s


@pytest.mark.parametrize("deviation", [0.0, 0.05, 0.2])
@pytest.mark.parametrize(("machine", "rate"), [(PROCESSOR, 0.2), (ACCELERATOR, 15.0)], ids=["processor", "accelerator"])
def test_the_budget_keeps_99_of_100_gaps_within_the_target(machine, rate, deviation):
    assert 0.5 < p99_over_target(_Noisy(machine, deviation), rate) <= 1.0


class _NoMargin(StepBudget):
    """A budget that trusts its fit."""

    def observe(self, *args: object) -> None:
        super().observe(*args)  # type: ignore[arg-type]
        self._margin_s = 0.0


def test_without_a_margin_noise_spoils_more():
    assert p99_over_target(_Noisy(PROCESSOR, 0.05), 0.2, _NoMargin) > 1.02


def test_chunks_carry_a_multiple_where_reading_weights_is_slow_beside_computing():
    limits = {"max_num_seqs": 16, "num_requests": 60, "seed": 0}
    accelerator = compare(ACCELERATOR, CONVERSATIONS, **limits)
    assert accelerator.ratio >= 2.6
    processor = compare(PROCESSOR, CONVERSATIONS, **limits)
    assert 1 < processor.ratio < accelerator.ratio
    for found in (accelerator, processor):
        for capacity in (found.chunked, found.prefill_first):
            assert found.terms.kept_in(capacity.report)


def test_terms_come_from_the_machine_and_the_workload():
    terms = Terms.for_batch(PROCESSOR, 16, [Lengths(num_prompt_tokens=1000, num_output_tokens=48)])
    assert terms.itl_p99_s == pytest.approx(2 * (0.1 + 8 * 1024 * 3e-7))
    assert terms.ttft_p50_s == pytest.approx(10 * (1000 * 3e-3 + 3e-7 * (1000 * 1001 / 2)), rel=0.01)


def report_at(rate: float, *, itl_s: float = 0.1, ttft_s: float = 0.1, ending: str = "finished") -> Report:
    def same(value: float) -> Percentiles:
        return Percentiles(p50=value, p90=value, p99=value, mean=value, max=value)

    return Report(
        start_s=0.0,
        end_s=1.0,
        endings={ending: 10},
        requests_per_s=rate,
        tokens_per_s=rate,
        ttft_s=same(ttft_s),
        itl_s=same(itl_s),
        e2e_s=same(1.0),
    )


@pytest.mark.parametrize("start_rate", [0.01, 3.0, 500.0])
@pytest.mark.parametrize("broken", [{"itl_s": 0.3}, {"ttft_s": 0.3}, {"ending": "refused"}])
def test_the_highest_rate_that_keeps_every_term_is_found(start_rate, broken):
    found = find_capacity(
        lambda rate: report_at(rate, **(broken if rate > 7.0 else {})),
        Terms(itl_p99_s=0.2, ttft_p50_s=0.2),
        start_rate=start_rate,
        precision=0.01,
    )
    assert 7.0 / 1.01 <= found.rate <= 7.0
    assert found.report.requests_per_s == found.rate


def test_terms_that_no_rate_keeps_are_an_error():
    with pytest.raises(RuntimeError, match="not even"):
        find_capacity(lambda rate: report_at(rate), Terms(itl_p99_s=0.01, ttft_p50_s=1.0), start_rate=1.0)
