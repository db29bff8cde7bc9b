"""``cluster bench profile``: how long a step takes, by its load; what the simulator's time is made of.

The executor runs alone, with steps made up for the purpose. The KV of the tokens before a step's own is whatever the
pool holds: its content does not change the work.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.bench.session import EngineSettings
from cluster.bench.shapes import shape_of
from cluster.core.model_info import ModelInfo
from cluster.core.request import SamplingParams
from cluster.core.step import NewSequence, ScheduledSequence, StepInput
from cluster.errors import EngineFault
from cluster.sim.latency import Grid, StepLoad, StepTimes
from cluster.worker.local_executor import LocalExecutor

_ENOUGH_S = 2.0  # a load whose steps have taken this long is not repeated
_SAMPLING = SamplingParams(temperature=0.0, seed=0, ignore_eos=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """A load off the grid: what the grid says of it, and how long it took."""

    load: StepLoad
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Relative; above 0 where the grid says too much."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """All that ``cluster bench profile`` writes; ``sim.latency.StepTimes`` reads ``grid`` and ``step_ms``.

    Attributes:
        step_ms: the shortest time of each load of the grid, by the four axes in the grid's order.
        held_out: drawn loads within the grid.
        held_out_error: mean of the absolute relative errors of these.
        held_out_bias: their mean with the sign.
    """

    settings: EngineSettings
    model: ModelInfo
    rounds: int
    grid: Grid
    step_ms: list[list[list[list[float]]]]
    held_out: list[HeldOut]
    held_out_error: float
    held_out_bias: float


def run(
    settings: EngineSettings, grid: Grid, *, rounds: int, num_held_out: int, on_stage: Callable[[str], None]
) -> StepProfile:
    """Measures; ``on_stage`` is called with what begins.

    Args:
        settings: its ``max_num_seqs`` gives way to the grid's.
        rounds: times that each load is run, less for long ones; the shortest counts, because what the machine does
            beside only adds to it.

    Raises:
        ConfigError, CheckpointError, Unsupported: the model cannot be loaded, or its context is shorter than the
            grid's.
        EngineFault: the model failed.
    """
    on_stage("loading the model")
    with _Bench(settings, grid, rounds) as bench:
        step_ms = [
            [bench.plane_ms(num_samples, context, on_stage) for context in grid.sample_contexts]
            if num_samples
            # Nobody is there to have a context.
            else [bench.plane_ms(0, 0, on_stage)] * len(grid.sample_contexts)
            for num_samples in grid.num_samples
        ]
        step_times = StepTimes(grid, [[[[ms / 1e3 for ms in d] for d in c] for c in b] for b in step_ms])
        on_stage(f"{num_held_out} loads off the grid")
        held_out = []
        for num_samples, context, num_tokens, start in _draw(grid, num_held_out):
            ((load, seconds),) = bench.measure(num_samples, context, [(num_tokens, start)])
            predicted_ms = 1e3 * step_times.step_s(load)
            held_out.append(HeldOut(load=load, predicted_ms=predicted_ms, measured_ms=1e3 * seconds))
        model = bench.model
    errors = [point.error for point in held_out] or [math.nan]
    return StepProfile(
        settings=settings,
        model=model,
        rounds=rounds,
        grid=grid,
        step_ms=step_ms,
        held_out=held_out,
        held_out_error=statistics.fmean(map(abs, errors)),
        held_out_bias=statistics.fmean(errors),
    )


def _draw(grid: Grid, num_points: int) -> Iterable[tuple[int, int, int, int]]:
    """Loads within the grid; every other one without a prompt's chunk."""
    draw = random.Random(7)
    for index in range(num_points):
        yield (
            draw.randint(1, grid.num_samples[-1]),
            draw.randint(grid.sample_contexts[0], grid.sample_contexts[-1]),
            # As many small ones as large ones: sizes that matter differ by factors.
            0 if index % 2 else round(math.exp(draw.uniform(0, math.log(grid.num_prefill_tokens[-1])))),
            draw.randint(0, grid.prefill_starts[-1]),
        )


class _Bench:
    """An executor whose steps are timed; a context manager that releases the model."""

    def __init__(self, settings: EngineSettings, grid: Grid, rounds: int) -> None:
        self._grid = grid
        self._rounds = rounds
        worker = settings.worker()
        self._max_steps = 1 + rounds * len(grid.num_prefill_tokens) * len(grid.prefill_starts)
        max_context = grid.sample_contexts[-1] + self._max_steps
        max_prompt = grid.num_prefill_tokens[-1] + grid.prefill_starts[-1] + 1
        num_seqs = grid.num_samples[-1] + 1
        num_blocks = grid.num_samples[-1] * -(-max_context // worker.block_size) + -(-max_prompt // worker.block_size)
        shape = shape_of(Path(settings.checkpoint))
        # 4 bytes for each number hold the cache in any format.
        block_bytes = 2 * 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim * worker.block_size
        self._executor = LocalExecutor(
            Path(settings.checkpoint),
            replace(worker, kv_cache_bytes=num_blocks * block_bytes, max_model_len=max(max_context, max_prompt) + 1),
            num_seqs,
            num_seqs + grid.num_prefill_tokens[-1],
        )
        self.model = self._executor.model
        self._ids = itertools.count()
        self._num_steps = 0
        self._dropped: tuple[int, ...] = ()

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    def plane_ms(self, num_samples: int, context: int, on_stage: Callable[[str], None]) -> list[list[float]]:
        """Step times by the grid's numbers of prefill tokens, and by its starts."""
        on_stage(f"{num_samples} sequences of {context} tokens")
        tokens, starts = self._grid.num_prefill_tokens, self._grid.prefill_starts
        # Without a chunk there is no start. An empty step is not run: one token stands for none.
        nothing = (0 if num_samples else 1, 0)
        chunks = [nothing, *itertools.product(tokens[1:], starts)]
        times = iter([1e3 * seconds for _, seconds in self.measure(num_samples, context, chunks)])
        return [[next(times)] * len(starts), *([next(times) for _ in starts] for _ in tokens[1:])]

    def measure(
        self, num_samples: int, context: int, chunks: Iterable[tuple[int, int]]
    ) -> list[tuple[StepLoad, float]]:
        """Times steps of ``num_samples`` decodes, each beside one of the chunks: (tokens, start).

        The decodes attend to one token more with every step, from ``context`` on.

        Returns:
            By chunk, the load of its last step and the seconds of its shortest.
        """
        pool = itertools.count()
        decodes = [self._sequence(context, context - 1, context + self._max_steps, pool) for _ in range(num_samples)]
        if decodes:
            self._run(decodes)
        first_free_block, measured = next(pool), []
        for num_tokens, start in chunks:
            seconds: list[float] = []
            while len(seconds) < self._rounds and math.fsum(seconds) < _ENOUGH_S:
                shares = [_next_token(share) for _, share in decodes]
                decodes = [(new, share) for (new, _), share in zip(decodes, shares, strict=True)]
                prompts = []
                if num_tokens:
                    blocks = itertools.count(first_free_block)
                    prompts = [self._sequence(start + num_tokens + 1, start, start + num_tokens, blocks)]
                seconds.append(self._run(prompts, shares))
                self._dropped = tuple(new.sequence_id for new, _ in prompts)
            measured.append((StepLoad.of([*shares, *(share for _, share in prompts)]), min(seconds)))
        self._dropped += tuple(new.sequence_id for new, _ in decodes)
        return measured

    def _sequence(
        self, num_tokens: int, num_computed_tokens: int, capacity: int, pool: Iterator[int]
    ) -> tuple[NewSequence, ScheduledSequence]:
        """A sequence of so many tokens with blocks for ``capacity``; it computes as many of them as these hold."""
        sequence_id = next(self._ids)
        end = min(num_tokens, capacity)
        new = NewSequence(
            sequence_id=sequence_id,
            token_ids=[0] * num_tokens,
            num_prompt_tokens=num_tokens,
            sampling=_SAMPLING,
            candidate_index=0,
            stop_token_ids=(),
        )
        share = ScheduledSequence(
            sequence_id=sequence_id,
            num_computed_tokens=num_computed_tokens,
            num_new_tokens=end - num_computed_tokens,
            new_block_ids=tuple(itertools.islice(pool, -(-capacity // self.model.block_size))),
            samples=end == num_tokens,
        )
        return new, share

    def _run(
        self, new: Sequence[tuple[NewSequence, ScheduledSequence]], shares: Sequence[ScheduledSequence] = ()
    ) -> float:
        """Runs a step of new sequences and others' shares; returns its seconds."""
        step = StepInput(
            step_id=self._num_steps,
            new=tuple(sequence for sequence, _ in new),
            scheduled=(*shares, *(share for _, share in new)),
            dropped=self._dropped,
        )
        self._num_steps += 1
        self._dropped = ()
        start = time.perf_counter()
        self._executor.submit(step)
        output = self._executor.collect()
        seconds = time.perf_counter() - start
        if output.failed:
            raise EngineFault(f"a step of the profile failed: {next(iter(output.failed.values()))}")
        return seconds


def _next_token(share: ScheduledSequence) -> ScheduledSequence:
    return share._replace(
        num_computed_tokens=share.num_computed_tokens + share.num_new_tokens,
        num_new_tokens=1,
        new_block_ids=(),
    )
