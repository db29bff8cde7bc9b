"""``cluster bench engine``: rates by batch size."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from cluster.bench.engine_benchmark import EngineFigures, Plan, run
from cluster.bench.session import EngineSettings, WeightFormat
from cluster.bench.stamp import stamp
from cluster.cli.bench_options import Model, Shape, Threads, checkpoint_directory, thread_count, whole_numbers
from cluster.cli.options import Json
from cluster.cli.output import print_json, print_table, print_text


def engine(
    model: Model = None,
    shape: Shape = None,
    weights: Annotated[WeightFormat, typer.Option(help="Number format of the matrices.")] = "float32",
    load_format: Annotated[
        Literal["auto", "dummy"], typer.Option(help="dummy makes weights up from config.json alone, as for a shape.")
    ] = "auto",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Requests that run together.")] = "1,8,16,32",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="Tokens of each completion.")] = 64,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that is timed alone.")] = 512,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is run; medians are shown.")] = 1,
    json: Json = False,
) -> None:
    """Tokens per second by batch size, their share of the roofline, and the time of a step by part.

    Decode counts the tokens that came after every request had its first one, over the time from then to the end; a
    run's rate counts all tokens over all the time, prompts included.
    """
    plan = Plan(
        batches=whole_numbers(batch, "--batch"),
        prompt_tokens=prompt,
        new_tokens=new,
        prefill_tokens=prefill,
        rounds=rounds,
    )
    with checkpoint_directory(model, shape) as checkpoint, Console(stderr=True).status("") as status:
        settings = EngineSettings(
            checkpoint=str(checkpoint),
            weights=weights,
            num_threads=thread_count(threads),
            max_num_seqs=max(plan.batches),
            load_format=load_format if shape is None else "dummy",
        )
        figures = run(settings, plan, on_stage=lambda stage: status.update(f"{stage}..."))
    if json:
        print_json(stamp() | {"figures": figures})
    else:
        _print_figures(figures)


def _print_figures(figures: EngineFigures) -> None:
    machine, model = figures.machine, figures.model
    parts = list(figures.batches[0].parts_ms)
    print_table(
        ["requests", "decode tok/s", "of roofline", "run tok/s", *(f"{part} ms" for part in parts)],
        [
            [
                batch.num_requests,
                _rate(batch.decode_tokens_per_s),
                _share(batch.decode_share),
                _rate(batch.run_tokens_per_s),
                *(f"{batch.parts_ms.get(part, 0.0):.2f}" for part in parts),
            ]
            for batch in figures.batches
        ],
    )
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in machine.ops_per_s.items())
    lines = {
        f"prefill of {figures.plan.prefill_tokens}": (
            f"{_rate(figures.prefill_tokens_per_s)} tok/s, {_share(figures.prefill_share)} of the roofline"
        ),
        "first token": f"{figures.first_token_s:.2f} s from the start of a fresh process",
        "memory": (
            f"{_mib(figures.peak_bytes)} at most, of which {_mib(figures.overhead_bytes)} beside weights "
            f"({_mib(figures.weight_bytes)}) and KV"
        ),
        "engine": f"{model.architecture}, {model.backend}",
        "machine": (f"{machine.num_threads} threads read {machine.read_bytes_per_s / 1e9:.1f} GB/s; GOP/s: {rates}"),
    }
    print_text("\n")
    for name, text in lines.items():
        print_text(f"{name}: {text}\n")


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
