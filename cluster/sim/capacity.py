"""How much load a policy carries: the highest rate of requests at which it keeps its terms.

What chunks are worth against prompts whole and first follows from three times. A whole prompt stops all others for as
long as it takes, far beyond any target for the gap between two tokens. A gap is spoilt so when a request arrived in the
step before it, which has a probability of ``rate * decode step``; so with prompts first the 99th percentile breaks at a
rate near ``0.01 / decode step``, whatever the model can compute. Chunks carry nearly as much as can be computed:
``1 / (prompt + completion)``, where a completion's tokens cost what they add to a step that is full anyway. The ratio
of the two is ``100 * decode step / (prompt + completion)``: large where a step that reads all weights for a few tokens
is slow beside computing a prompt, as on a GPU, and small where arithmetic is scarcer than bandwidth, as on a CPU.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.scheduler import Scheduler
from cluster.sim.baselines import PrefillFirst
from cluster.sim.latency import StepLoad, StepTimes
from cluster.sim.recording import Ending
from cluster.sim.replica import Replica, StepScheduler
from cluster.sim.report import Report, percentile
from cluster.sim.simulator import Simulator
from cluster.sim.workload import Lengths, draw_arrivals, poisson_gaps

_WARM_UP = 0.1  # of the requests: they find a replica emptier than it stays
_TTFT_IN_PROMPTS = 10.0
_LEAST_SHARE = 2.0**-12
_BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What has to hold for a rate to be carried, besides that every request finishes.

    Attributes:
        itl_p99_s: at most so long is the 99th percentile of all gaps between a request's tokens, taken together.
        ttft_p50_s: at most so long is the median time to the first token. A queue that grows without end exceeds any
            bound in a run that is long enough.
    """

    itl_p99_s: float
    ttft_p50_s: float

    @classmethod
    def for_batch(cls, step_times: StepTimes, max_num_seqs: int, lengths: Sequence[Lengths]) -> Terms:
        """Twice a step of half the largest batch that only decodes, halfway through the workload's completions; ten
        times its mean prompt alone."""
        prompt = math.fsum(each.num_prompt_tokens for each in lengths) / len(lengths)
        output = math.fsum(each.num_output_tokens for each in lengths) / len(lengths)
        decode = StepLoad(
            num_samples=max(1, max_num_seqs // 2),
            sample_context=prompt + output / 2,
            num_prefill_tokens=0,
            prefill_attended=0.0,
        )
        prefill = StepLoad(
            num_samples=1,
            sample_context=prompt,
            num_prefill_tokens=round(prompt) - 1,
            prefill_attended=prompt / 2,
        )
        return cls(itl_p99_s=2 * step_times.step_s(decode), ttft_p50_s=_TTFT_IN_PROMPTS * step_times.step_s(prefill))

    def kept_in(self, report: Report) -> bool:
        return (
            report.endings.keys() <= {Ending.FINISHED.value}
            and report.itl_s.p99 <= self.itl_p99_s
            and report.ttft_s.p50 <= self.ttft_p50_s
        )


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The highest rate found to keep the terms, in requests a second, and how it went at that rate."""

    rate: float
    report: Report


def simulate(
    create_scheduler: Callable[[], StepScheduler],
    step_times: StepTimes,
    lengths: Sequence[Lengths],
    *,
    rate: float,
    num_requests: int,
    seed: int,
) -> Report:
    """One replica under requests that arrive at random, ``rate`` a second, each of a length drawn from ``lengths``.

    The same seed gives the same requests in the same order at every rate, and gaps in proportion. Reported is the time
    from the first tenth of the arrivals on to the last: no empty replica at either end.
    """
    rng = random.Random(seed)
    arrivals = draw_arrivals(poisson_gaps(rng, rate), lambda: rng.choice(lengths), num_requests)
    simulator = Simulator([Replica("replica", create_scheduler, step_times)], rng)
    recording = simulator.run(arrivals)
    return Report.of(recording, arrivals[int(_WARM_UP * num_requests)].at_s, arrivals[-1].at_s)


def find_capacity(
    report_at: Callable[[float], Report], terms: Terms, *, start_rate: float, precision: float = 0.01
) -> Capacity:
    """Doubles or halves the rate until it lies between one that keeps the terms and one that does not; then bisects.

    Args:
        precision: how far apart these two may be, as a share.

    Raises:
        RuntimeError: no rate keeps them.
    """
    rate = start_rate
    low: Capacity | None = None
    high: float | None = None
    while low is None or high is None or high > low.rate * (1 + precision):
        report = report_at(rate)
        if terms.kept_in(report):
            low = Capacity(rate=rate, report=report)
        elif rate < start_rate * _LEAST_SHARE:
            raise RuntimeError(f"not even {rate:.3g} requests a second keep {terms}")
        else:
            high = rate
        if low is None:
            rate /= 2
        elif high is None:
            rate *= 2
        else:
            rate = math.sqrt(low.rate * high)
    return low


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Chunked prefill against prefill first, on one machine, one workload and the same terms.

    Attributes:
        unbounded: chunked, without the term on gaps: near what can be computed at all.
    """

    terms: Terms
    chunked: Capacity
    prefill_first: Capacity
    unbounded: Capacity

    @property
    def ratio(self) -> float:
        return self.chunked.rate / self.prefill_first.rate


def compare(
    step_times: StepTimes, lengths: Sequence[Lengths], *, max_num_seqs: int, num_requests: int, seed: int
) -> Comparison:
    """Finds the capacities of the scheduler and of ``PrefillFirst``, with the same batch and pool.

    The pool holds a full batch of the workload's longest hundredth, so that it is not what binds. A step has as many
    prompt tokens as were measured at most; ``PrefillFirst`` takes a longer prompt whole all the same.
    """
    terms = Terms.for_batch(step_times, max_num_seqs, lengths)
    totals = sorted(each.num_prompt_tokens + each.num_output_tokens for each in lengths)
    num_tokens = max(max_num_seqs * percentile(totals, 99), 2 * totals[-1])
    limits = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, step_times.grid.num_prefill_tokens[-1]),
        max_num_waiting=num_requests,
    )
    paced = replace(limits, target_itl_ms=1e3 * terms.itl_p99_s)

    def capacity(create: Callable[[BlockManager], StepScheduler], terms: Terms) -> Capacity:
        return find_capacity(
            lambda rate: simulate(
                lambda: create(BlockManager(-(-round(num_tokens) // _BLOCK_SIZE), _BLOCK_SIZE)),
                step_times,
                lengths,
                rate=rate,
                num_requests=num_requests,
                seed=seed,
            ),
            terms,
            start_rate=1 / terms.ttft_p50_s,
        )

    return Comparison(
        terms=terms,
        chunked=capacity(lambda blocks: Scheduler(paced, blocks), terms),
        prefill_first=capacity(lambda blocks: PrefillFirst(limits, blocks), terms),
        unbounded=capacity(lambda blocks: Scheduler(limits, blocks), replace(terms, itl_p99_s=math.inf)),
    )
