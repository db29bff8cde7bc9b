"""What a routing policy is worth: a trace through one gateway to replicas, saturated and at a rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.core.config import SchedulerConfig
from cluster.core.routing_config import PolicyName, RoutingConfig
from cluster.sim.advertising_replica import AdvertisingReplica
from cluster.sim.gateway import QueueingGateway
from cluster.sim.latency import Grid, StepTimes
from cluster.sim.recording import Recording
from cluster.sim.report import Percentiles, Report
from cluster.sim.simulator import Simulator
from cluster.sim.workload import MOONCAKE_BLOCK_TOKENS, Arrival

_WARM_UP = 0.1  # of the requests: they find replicas emptier than they stay
_TAIL = 0.2  # of a saturated run's: at its end some replicas run out of work before others

# A replica of eight H100 with 70 billion parameters in bfloat16 and an FP8 KV cache: 25 ms for a step at least, 50 us
# for the arithmetic of a token, 7 ns for a token that a decode attends to (160 KB at 24 TB/s), 1 ns for one that a
# prompt's token does, and room for 3 million tokens of KV. Calculated, not measured: it is policies that are compared.
_NUM_KV_TOKENS = 3_000_000
_SCHEDULER = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048, park_bytes=0)
_GRID = Grid(num_samples=(0, 256), sample_contexts=(16, 16384), num_prefill_tokens=(0, 2048), prefill_starts=(0, 65536))


def _step_s(num_samples: int, context: int, num_prefill_tokens: int, start: int) -> float:
    attended = num_prefill_tokens * (start + (num_prefill_tokens + 1) / 2)
    return 0.025 + 5e-5 * (num_samples + num_prefill_tokens) + 7e-9 * num_samples * context + 1e-9 * attended


def _step_times() -> StepTimes:
    return StepTimes(
        _GRID,
        [
            [
                [
                    [_step_s(samples, context if samples else 0, tokens, start) for start in _GRID.prefill_starts]
                    for tokens in _GRID.num_prefill_tokens
                ]
                for context in _GRID.sample_contexts
            ]
            for samples in _GRID.num_samples
        ],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingOutcome:
    """How a policy did.

    Attributes:
        requests_per_s: that ended, without warm-up; in a saturated run without its end either.
        hit_rate: share of the prompts' blocks that were found in a prefix cache.
        ttft_s: of the requests after warm-up, in seconds.
    """

    requests_per_s: float
    hit_rate: float
    ttft_s: Percentiles


def hit_ceiling(arrivals: Sequence[Arrival]) -> float:
    """The hit rate of one cache for all that forgets nothing and is filled the moment that a request comes."""
    seen: set[bytes] = set()
    num_found = num_blocks = 0
    for arrival in arrivals:
        # The last token of a prompt is always computed, and its block with it.
        for block_hash in arrival.block_hashes[: (arrival.num_prompt_tokens - 1) // MOONCAKE_BLOCK_TOKENS]:
            if block_hash not in seen:
                break
            num_found += 1
        num_blocks += len(arrival.block_hashes)
        seen.update(arrival.block_hashes)
    return num_found / num_blocks


def replay_trace(
    arrivals: Sequence[Arrival], policy: PolicyName, *, rate: float | None, num_replicas: int = 8, seed: int = 0
) -> RoutingOutcome:
    """Sends a trace through one gateway.

    Args:
        arrivals: with blocks of MOONCAKE_BLOCK_TOKENS tokens.
        rate: requests a second, to which the trace's times are stretched or compressed; None: saturated, all wait from
            the beginning.
    """
    stretch = 0.0 if rate is None else len(arrivals) / rate / (arrivals[-1].at_s - arrivals[0].at_s)
    arrivals = [replace(each, at_s=(each.at_s - arrivals[0].at_s) * stretch) for each in arrivals]
    replicas = [
        AdvertisingReplica(
            f"replica-{index}",
            _SCHEDULER,
            num_blocks=_NUM_KV_TOKENS // MOONCAKE_BLOCK_TOKENS,
            block_size=MOONCAKE_BLOCK_TOKENS,
            step_times=_step_times(),
        )
        for index in range(num_replicas)
    ]
    gateway = QueueingGateway(replicas, RoutingConfig(policy=policy), random.Random(seed))
    recording = Simulator(replicas, random.Random(seed), gateway).run(arrivals)
    if rate is None:
        ends = sorted(record.ended_s for record in recording.records)
        start_s, end_s = ends[int(_WARM_UP * len(ends))], ends[int((1 - _TAIL) * len(ends))]
    else:
        start_s, end_s = arrivals[int(_WARM_UP * len(arrivals))].at_s, arrivals[-1].at_s
    report = Report.of(recording, start_s, end_s)
    return RoutingOutcome(requests_per_s=report.requests_per_s, hit_rate=_hit_rate(recording), ttft_s=report.ttft_s)


def _hit_rate(recording: Recording) -> float:
    num_cached_tokens = sum(record.num_cached_tokens or 0 for record in recording.records)
    num_blocks = sum(len(record.arrival.block_hashes) for record in recording.records)
    return num_cached_tokens / MOONCAKE_BLOCK_TOKENS / num_blocks
