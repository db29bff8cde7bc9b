"""``cluster bench engine``: one engine at several batch sizes, against what the machine could do."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cluster.bench.child import Outcome, Workload, run_in_child
from cluster.bench.probe import Device, Machine, probe
from cluster.bench.roofline import Roofline
from cluster.bench.session import EngineSettings, Run, Session, StepParts, random_prompts
from cluster.bench.shapes import shape_of
from cluster.core.model_info import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run.

    Attributes:
        batches: numbers of requests that run together, one after the other.
        prompt_tokens, new_tokens: of each request.
        prefill_tokens: of the prompt whose computation alone is timed.
        rounds: times that each is run; medians count.
    """

    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """Of one batch size. Rates are in tokens per second, as ``Timeline`` defines them.

    Attributes:
        decode_share: of the roofline.
        parts_ms: of the median decode step.
        overhead_ms: of that step, all but the model's forward pass.
    """

    num_requests: int
    decode_tokens_per_s: float | None
    decode_share: float | None
    run_tokens_per_s: float
    parts_ms: dict[str, float]
    overhead_ms: float


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """All that ``cluster bench engine`` reports.

    Attributes:
        machine: the better of two measurements, before and after.
        prefill_tokens_per_s, prefill_share: of one long prompt, alone; its share of the roofline.
        first_token_s: of a fresh process.
        peak_bytes: largest resident size of that process, after its largest batch.
        overhead_bytes: of it, what is neither weights nor keys and values of that batch.
    """

    settings: EngineSettings
    plan: Plan
    machine: Machine
    model: ModelInfo
    weight_bytes: int
    batches: list[BatchFigures]
    prefill_tokens_per_s: float
    prefill_share: float
    first_token_s: float
    peak_bytes: int
    overhead_bytes: int


def run(settings: EngineSettings, plan: Plan, on_stage: Callable[[str], None]) -> EngineFigures:
    """Measures; ``on_stage`` is called with what begins.

    Raises:
        ConfigError, CheckpointError, Unsupported: the model cannot be loaded.
        InvalidRequest: the plan does not fit into the model's context.
    """
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    on_stage("measuring the machine")
    machine = probe(device, settings.num_threads)
    largest = max(plan.batches)
    on_stage(f"a fresh process: first token, then {largest} requests")
    fresh = run_in_child(
        settings,
        Workload(
            num_requests=largest,
            concurrent=largest,
            prompt_tokens=plan.prompt_tokens,
            new_tokens=plan.new_tokens,
        ),
    )
    on_stage("loading the model")
    draw = random.Random(1)
    runs: dict[int, list[Run]] = {}
    with Session(settings) as session:
        model = session.model
        on_stage(f"a prompt of {plan.prefill_tokens} tokens")
        prefill = _prefill_tokens_per_s(session, draw, plan)
        for num_requests in plan.batches:
            on_stage(f"{num_requests} requests")
            runs[num_requests] = _runs(session, draw, plan, num_requests)
    on_stage("measuring the machine again")
    machine = machine.best_of(probe(device, settings.num_threads))
    roofline = Roofline(
        shape=shape_of(Path(settings.checkpoint)),
        weights=settings.weights,
        kv_bytes=getattr(torch, model.kv_cache_dtype).itemsize,
        machine=machine,
    )
    return EngineFigures(
        settings=settings,
        plan=plan,
        machine=machine,
        model=model,
        weight_bytes=round(roofline.resident_bytes),
        batches=[_figures_of(num_requests, runs[num_requests], plan, roofline) for num_requests in plan.batches],
        prefill_tokens_per_s=prefill,
        prefill_share=prefill / roofline.prefill_tokens_per_s(plan.prefill_tokens),
        first_token_s=fresh.first_token_s,
        peak_bytes=fresh.peak_bytes,
        overhead_bytes=_overhead_bytes(fresh, roofline, plan),
    )


def _prefill_tokens_per_s(session: Session, draw: random.Random, plan: Plan) -> float:
    def once() -> float:
        prompts = random_prompts(draw, 1, plan.prefill_tokens, session.model.vocab_size)
        return plan.prefill_tokens / session.run(prompts, 1).timeline.end_s

    once()
    return statistics.median([once() for _ in range(plan.rounds)])


def _runs(session: Session, draw: random.Random, plan: Plan, num_requests: int) -> list[Run]:
    vocab_size = session.model.vocab_size
    # What is recorded, captured or allocated for a batch of this size is not the steady state.
    session.run(random_prompts(draw, num_requests, 1, vocab_size), 3)
    return [
        session.run(random_prompts(draw, num_requests, plan.prompt_tokens, vocab_size), plan.new_tokens)
        for _ in range(plan.rounds)
    ]


def _figures_of(num_requests: int, runs: Sequence[Run], plan: Plan, roofline: Roofline) -> BatchFigures:
    decodes = [rate for run in runs if (rate := run.timeline.decode_tokens_per_s) is not None]
    decode = statistics.median(decodes) if decodes else None
    parts_ms = _median_parts_ms([step for run in runs for step in run.decode_steps])
    best = roofline.decode_tokens_per_s(num_requests, plan.prompt_tokens, plan.new_tokens)
    return BatchFigures(
        num_requests=num_requests,
        decode_tokens_per_s=decode,
        decode_share=None if decode is None else decode / best,
        run_tokens_per_s=statistics.median([run.timeline.tokens_per_s for run in runs]),
        parts_ms=parts_ms,
        overhead_ms=sum(ms for part, ms in parts_ms.items() if part != "forward"),
    )


def _median_parts_ms(steps: Sequence[StepParts]) -> dict[str, float]:
    rows = [asdict(step) for step in steps]
    return {part: 1e3 * statistics.median([row[part] for row in rows]) for part in (rows[0] if rows else ())}


def _overhead_bytes(fresh: Outcome, roofline: Roofline, plan: Plan) -> int:
    kv_tokens = max(plan.batches) * (plan.prompt_tokens + plan.new_tokens)
    return round(fresh.peak_bytes - roofline.resident_bytes - kv_tokens * roofline.kv_bytes_per_token)
