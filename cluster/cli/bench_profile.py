"""``cluster bench profile``: step times by load, for the simulator."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.bench.profile import StepProfile, run
from cluster.bench.session import EngineSettings, WeightFormat
from cluster.bench.stamp import stamp
from cluster.cli.bench_options import Model, Shape, Threads, checkpoint_directory, thread_count, whole_numbers
from cluster.cli.output import print_table, print_text
from cluster.sim.latency import Grid


def profile(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, as JSON.")],
    model: Model = None,
    shape: Shape = None,
    weights: Annotated[WeightFormat, typer.Option(help="Number format of the matrices.")] = "float32",
    decodes: Annotated[str, typer.Option(metavar="N,...", help="Sequences that sample.")] = "1,2,4,8,16,32",
    contexts: Annotated[str, typer.Option(metavar="N,...", help="Tokens of each of these.")] = "128,2048",
    prefill: Annotated[str, typer.Option(metavar="N,...", help="Tokens of a prompt beside.")] = "32,128,512,2048",
    starts: Annotated[str, typer.Option(metavar="N,...", help="Tokens of that prompt before.")] = "2048",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each step is run; the shortest counts.")] = 3,
    held_out: Annotated[int, typer.Option(min=0, help="Loads off the grid, to say how good it is.")] = 16,
) -> None:
    """Time steps by load: sequences that sample, their contexts, tokens of a prompt beside them, and its context.

    Every combination is run, and some between, which say how far off what lies between the points is.
    """
    grid = Grid(
        num_samples=(0, *whole_numbers(decodes, "--decodes")),
        sample_contexts=whole_numbers(contexts, "--contexts"),
        num_prefill_tokens=(0, *whole_numbers(prefill, "--prefill")),
        prefill_starts=(0, *whole_numbers(starts, "--starts")),
    )
    with checkpoint_directory(model, shape) as checkpoint, Console(stderr=True).status("") as status:
        settings = EngineSettings(
            checkpoint=str(checkpoint),
            weights=weights,
            num_threads=thread_count(threads),
            max_num_seqs=grid.num_samples[-1],
            load_format="auto" if shape is None else "dummy",
        )
        measured = run(
            settings,
            grid,
            rounds=rounds,
            num_held_out=held_out,
            on_stage=lambda stage: status.update(f"{stage}..."),
        )
    out.write_text(json.dumps(stamp() | dataclasses.asdict(measured)) + "\n", encoding="utf-8")
    _print(measured)
    print_text(f"\nwritten to {out}\n")


def _print(measured: StepProfile) -> None:
    """The milliseconds of steps whose prompts begin at 0."""
    grid = measured.grid
    print_table(
        ["decodes", "context", *(f"+ {tokens:,} prefill ms" for tokens in grid.num_prefill_tokens)],
        [
            [num_samples, context, *(f"{by_start[0]:.2f}" for by_start in by_tokens)]
            for num_samples, by_context in zip(grid.num_samples, measured.step_ms, strict=True)
            for context, by_tokens in zip(grid.sample_contexts, by_context, strict=True)
        ],
    )
    if measured.held_out:
        print_text(
            f"\n{len(measured.held_out)} loads off the grid: {measured.held_out_error:.1%} off on average, "
            f"{measured.held_out_bias:+.1%} with the sign\n"
        )
