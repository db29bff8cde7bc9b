"""A real engine in this process, driven by token ids, with the parts of its steps timed."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.bench.timeline import Timeline
from cluster.core.config import SchedulerConfig
from cluster.core.model_info import ModelInfo
from cluster.core.request import SamplingParams
from cluster.core.step import StepInput, StepOutput
from cluster.distributed.config import ParallelConfig
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.executor import Executor
from cluster.engine.submission import Submission
from cluster.worker.config import WorkerConfig
from cluster.worker.executors import create_executor

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """An engine under measurement; what is not named here is as served by default.

    Attributes:
        checkpoint: its directory.
        weights, num_threads, kernels, load_format: as in WorkerConfig.
        max_num_seqs: requests that run together.
        tp, pp: as in ParallelConfig; a group's shards share ``num_threads`` out.
    """

    checkpoint: str
    weights: WeightFormat
    num_threads: int
    max_num_seqs: int
    kernels: Literal["auto", "torch"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    tp: int = 1
    pp: int = 1

    def worker(self) -> WorkerConfig:
        return WorkerConfig(
            weights=self.weights,
            num_threads=max(1, self.num_threads // (self.tp * self.pp)),
            kernels=self.kernels,
            load_format=self.load_format,
        )

    def scheduler(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=max(SchedulerConfig.max_num_batched_tokens, self.max_num_seqs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepParts:
    """Seconds of a step by part.

    Attributes:
        schedule: to plan it.
        inputs: to make its arrays, and the worker's other bookkeeping; where a device runs behind the host, also to
            wait for it.
        forward: the model, output head included.
        sampling: to draw the tokens.
        output: to take them in and hand them out.
    """

    schedule: float
    inputs: float
    forward: float
    sampling: float
    output: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a batch of requests took.

    Attributes:
        decode_steps: of the steps after every request had its first token.
    """

    timeline: Timeline
    decode_steps: list[StepParts]


class _TimedExecutor:
    """An executor that notes when its step was handed over and when it was done."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.model = inner.model
        self.max_in_flight = inner.max_in_flight
        self.submitted = self.collected = self.worker_s = 0.0
        self.output: StepOutput | None = None

    def submit(self, step: StepInput) -> None:
        self.submitted = time.perf_counter()
        self._inner.submit(step)
        self.worker_s = time.perf_counter() - self.submitted

    def collect(self) -> StepOutput:
        began = time.perf_counter()
        self.output = self._inner.collect()
        self.collected = time.perf_counter()
        self.worker_s += self.collected - began
        return self.output

    def shutdown(self) -> None:
        self._inner.shutdown()


class Session:
    """A context manager; leaving it releases the model."""

    def __init__(self, settings: EngineSettings) -> None:
        """Loads the model.

        Raises:
            ConfigError: the machine cannot hold it.
            CheckpointError: the checkpoint is missing or broken.
            Unsupported: its architecture does not run here.
        """
        scheduler = settings.scheduler()
        self._executor = _TimedExecutor(
            create_executor(
                Path(settings.checkpoint),
                settings.worker(),
                ParallelConfig(tp=settings.tp, pp=settings.pp),
                scheduler.max_num_seqs,
                scheduler.max_num_batched_tokens,
            )
        )
        self._engine = Engine(self._executor, EngineConfig(scheduler=scheduler))
        self._ids = itertools.count()

    @property
    def model(self) -> ModelInfo:
        return self._engine.model

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.shutdown()

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, on_tokens: Callable[[int, int], None] | None = None
    ) -> Run:
        """Completes the prompts together: greedy, to exactly ``new_tokens`` each.

        Args:
            on_tokens: called with a prompt's index and a number of its tokens, as they come.

        Raises:
            InvalidRequest: a prompt and its completion do not fit into the context.
            EngineFault: the model failed.
        """
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, seed=0)
        timeline, steps = Timeline(len(prompts)), list[tuple[float, StepParts]]()
        requests = {next(self._ids): index for index in range(len(prompts))}
        start = time.perf_counter()
        for submission_id, index in requests.items():
            self._engine.add(
                Submission(submission_id=submission_id, prompt_token_ids=prompts[index], sampling=sampling)
            )
        while self._engine.has_work:
            began = time.perf_counter()
            events = self._engine.step()
            done = time.perf_counter()
            for failure in events.failures:
                raise failure.error
            for delta in events.deltas:
                request, count = requests[delta.submission_id], len(delta.token_ids)
                timeline.record(done - start, request, count)
                if on_tokens is not None:
                    on_tokens(request, count)
            steps.append((done - start, self._parts(began, done)))
        started_s = timeline.all_started_s or 0.0
        return Run(timeline=timeline, decode_steps=[parts for at_s, parts in steps if at_s > started_s])

    def _parts(self, began: float, done: float) -> StepParts:
        timed, output = self._executor, self._executor.output
        forward, sampling = (output.forward_s, output.sampling_s) if output is not None else (0.0, 0.0)
        return StepParts(
            schedule=timed.submitted - began,
            inputs=timed.worker_s - forward - sampling,
            forward=forward,
            sampling=sampling,
            output=done - timed.collected,
        )


def random_prompts(draw: random.Random, num_prompts: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Prompts that share no prefix."""
    return [[draw.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num_prompts)]
