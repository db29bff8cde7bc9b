"""A pipeline of stages in virtual time, around the scheduler that runs in production: how much of it idles."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.core.block_manager import BlockManager
from cluster.core.config import SchedulerConfig
from cluster.core.request import Request
from cluster.core.schedule import Schedule
from cluster.core.scheduler import Scheduler
from cluster.errors import ConfigError
from cluster.sim.latency import StepLoad, StepTimes
from cluster.sim.report import Percentiles
from cluster.sim.workload import Lengths

_BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class StageProfile:
    """What one stage takes for its part of a step, as ``cluster bench profile`` writes it for a whole model.

    Attributes:
        grid: the axes of ``sim.latency.Grid`` by name.
        step_ms: milliseconds at its points, by the axes in their order.
    """

    grid: dict[str, list[int]]
    step_ms: list[list[list[list[float]]]]

    @classmethod
    def linear(
        cls, *, fixed_ms: float, sample_ms: float = 0.0, token_ms: float = 0.0, attended_ms: float = 0.0
    ) -> StageProfile:
        """A stage that takes ``fixed_ms`` for any step, and so much more for each token that is sampled from, for each
        other token, and for each pair of a token and one that it attends to."""
        grid = {
            "num_samples": [0, 1],
            "sample_contexts": [1, 2],
            "num_prefill_tokens": [0, 1],
            "prefill_starts": [0, 1],
        }
        step_ms = [
            [
                [
                    [
                        fixed_ms
                        + samples * (sample_ms + context * attended_ms)
                        + tokens * (token_ms + (start + 1) * attended_ms)
                        for start in grid["prefill_starts"]
                    ]
                    for tokens in grid["num_prefill_tokens"]
                ]
                for context in grid["sample_contexts"]
            ]
            for samples in grid["num_samples"]
        ]
        return cls(grid=grid, step_ms=step_ms)


@dataclass(frozen=True, kw_only=True)
class PipelineProfile:
    """Times of a whole pipeline, as measured.

    Attributes:
        stages: first to last.
        hop_ms: from the end of a stage to where the next can begin, and from the last stage's sampled tokens to where
            the first can use them.
        leader_ms: that the engine takes for a plan and its results; it does one after the other.
    """

    stages: tuple[StageProfile, ...]
    hop_ms: float = 0.0
    leader_ms: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PipelineProfile:
        """
        Raises:
            ConfigError: it is no such profile.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            stages = tuple(StageProfile(grid=stage["grid"], step_ms=stage["step_ms"]) for stage in values.pop("stages"))
            return cls(stages=stages, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"this is no profile of a pipeline: {error!r}") from None

    @classmethod
    def read(cls, path: Path) -> PipelineProfile:
        """As ``from_json``; raises OSError where the file cannot be read."""
        return cls.from_json(path.read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """Of the steady state: from when the first step has come to the last stage until requests begin to run out.

    Attributes:
        duration_s: of it.
        num_steps: that were done in it.
        idle_shares: of each stage, how much of that time it had nothing that it could do, though there was work.
        bubble: that of the busiest stage: what the way through the stages costs. In no order could the same steps take
            less than ``1 - bubble`` of the time, as long as one stage is the slowest throughout.
        mean_idle: of all stages: what the bubble and stages of unequal times cost together.
        tokens_per_s: sampled.
        itl_s: from one token of a request to its next.
        ttft_s: from a request's arrival to its first token, of all that got one.
    """

    duration_s: float
    num_steps: int
    idle_shares: tuple[float, ...]
    bubble: float
    mean_idle: float
    tokens_per_s: float
    itl_s: Percentiles
    ttft_s: Percentiles


class Pipeline:
    """Stages that each run every step, in the order of the steps. A stage is free for the next step at once: what it
    hands on waits at the stage after it.

    Attributes:
        times: of each step that was run, when each stage began and ended it.
    """

    def __init__(self, profile: PipelineProfile) -> None:
        if not profile.stages:
            raise ConfigError("a pipeline has one stage at least", field="stages")
        self._stages = [StepTimes.from_profile(asdict(stage)) for stage in profile.stages]
        self._hop_s = profile.hop_ms / 1e3
        self._free_at = [0.0] * len(self._stages)
        self._token_at: dict[int, float] = {}
        self.times: list[list[tuple[float, float]]] = []

    def run(self, schedule: Schedule, at_s: float) -> float:
        """Runs a step that is known to the stages at ``at_s``; returns when the last of them ends it."""
        load = StepLoad.of(schedule.scheduled)
        ready = max([at_s, *(self._token_at.get(share.sequence_id, 0.0) for share in schedule.scheduled)])
        times: list[tuple[float, float]] = []
        for stage, step_times in enumerate(self._stages):
            begin = max(ready, self._free_at[stage])
            end = self._free_at[stage] = begin + step_times.step_s(load)
            ready = end + self._hop_s
            times.append((begin, end))
        for share in schedule.scheduled:
            if share.samples:
                self._token_at[share.sequence_id] = ready
        self.times.append(times)
        return end


def simulate(
    profile: PipelineProfile,
    lengths: Sequence[Lengths],
    *,
    num_requests: int = 64,
    max_num_batched_tokens: int = 1024,
    target_itl_ms: float | None = None,
) -> PipelineReport:
    """One replica that has ``num_requests`` requests at any time, as long as there are lengths for new ones.

    The engine is as in production: it has one step more in flight than there are stages, places in its batch for all
    requests, and a pool that holds them.

    Args:
        lengths: of the requests in their order, ``num_requests`` at least. With no more of them all come at once, and
            the steady state ends with the first that is done.

    Raises:
        ConfigError: there are too few lengths.
    """
    if len(lengths) < num_requests:
        raise ConfigError(f"{num_requests} requests need a length each; there are {len(lengths)}")
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in lengths)
    config = SchedulerConfig(
        max_num_seqs=num_requests,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_waiting=num_requests,
        target_itl_ms=target_itl_ms,
    )
    # A block for each to grow into beside those that the longest would fill.
    blocks = BlockManager(num_requests * (-(-longest // _BLOCK_SIZE) + 1), _BLOCK_SIZE)
    run = _Run(profile, Scheduler(config, blocks, num_stages=len(profile.stages)), lengths)
    run.to_end(num_requests)
    return run.report()


class _Run:
    """What an engine does with a pipeline."""

    def __init__(self, profile: PipelineProfile, scheduler: Scheduler, lengths: Sequence[Lengths]) -> None:
        num_stages = len(profile.stages)
        self._pipeline = Pipeline(profile)
        self._scheduler = scheduler
        self._lengths = lengths
        self._max_in_flight = num_stages + 1 if num_stages > 1 else 1
        self._leader_s = profile.leader_ms / 1e3
        self._now = 0.0
        self._arrivals: list[float] = []
        self._token_times: list[list[float]] = []  # of each request
        self._steady_until = math.inf

    def to_end(self, num_requests: int) -> None:
        """Raises RuntimeError where the scheduler has work and plans none."""
        in_flight: deque[tuple[Schedule, float, float]] = deque()  # with the times of submission and of the end
        collected_at = -math.inf
        for _ in range(num_requests):
            self._arrive()
        while self._scheduler.has_work:
            while len(in_flight) < self._max_in_flight:
                schedule = self._scheduler.schedule(self._now)
                if not schedule.scheduled:
                    break
                self._now += self._leader_s
                in_flight.append((schedule, self._now, self._pipeline.run(schedule, self._now)))
            if not in_flight:
                raise RuntimeError(f"the scheduler has work at {self._now} s and plans none")
            schedule, submitted_at, end = in_flight.popleft()
            self._now = max(self._now, end)
            began_at, collected_at = max(submitted_at, collected_at), self._now
            for share in schedule.scheduled:
                if share.samples:
                    self._token_times[share.sequence_id].append(self._now)
            for _ in self._scheduler.update(schedule, (), duration_s=self._now - began_at):
                self._arrive()
        self._scheduler.check_integrity()

    def report(self) -> PipelineReport:
        steps = self._pipeline.times
        since, until = steps[0][-1][0], self._steady_until
        duration_s = until - since
        idle_shares = tuple(
            1 - math.fsum(max(0.0, min(end, until) - max(begin, since)) for begin, end in stage) / duration_s
            for stage in zip(*steps, strict=True)
        )
        pairs = [pair for times in self._token_times for pair in pairwise(times) if since <= pair[1] < until]
        return PipelineReport(
            duration_s=duration_s,
            num_steps=sum(since <= times[-1][1] < until for times in steps),
            idle_shares=idle_shares,
            bubble=min(idle_shares),
            mean_idle=math.fsum(idle_shares) / len(idle_shares),
            tokens_per_s=sum(since <= at_s < until for times in self._token_times for at_s in times) / duration_s,
            itl_s=Percentiles.of(later - earlier for earlier, later in pairs),
            ttft_s=Percentiles.of(
                times[0] - arrival
                for times, arrival in zip(self._token_times, self._arrivals, strict=True)
                if times[0] < until
            ),
        )

    def _arrive(self) -> None:
        """The next request comes, if there is one."""
        request_id = len(self._arrivals)
        if request_id == len(self._lengths):
            self._steady_until = min(self._steady_until, self._now)
            return
        self._arrivals.append(self._now)
        self._token_times.append([])
        self._scheduler.add(
            Request(
                request_id=request_id,
                num_prompt_tokens=self._lengths[request_id].num_prompt_tokens,
                max_tokens=self._lengths[request_id].num_output_tokens,
                arrival=self._now,
            )
        )
