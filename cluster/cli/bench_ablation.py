"""``cluster bench ablation``: what each of the engine's ideas is worth."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from cluster.bench.ablation import run
from cluster.bench.child import Workload
from cluster.bench.session import EngineSettings
from cluster.bench.shapes import SHAPE_NAMES
from cluster.bench.stamp import stamp
from cluster.cli.bench_options import Threads, checkpoint_directory, thread_count
from cluster.cli.options import Json
from cluster.cli.output import print_json, print_table


def ablation(
    shape: Annotated[
        str, typer.Option(help=f"Random weights in a shape by name: {', '.join(SHAPE_NAMES)}.")
    ] = "qwen2.5-0.5b",
    requests: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="Tokens of each completion.")] = 64,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """What continuous batching, fused kernels and int8 weights are each worth, in tokens per second of a whole run."""
    workload = Workload(num_requests=requests, concurrent=requests, prompt_tokens=prompt, new_tokens=new)
    with checkpoint_directory(None, shape) as checkpoint, Console(stderr=True).status("") as status:
        settings = EngineSettings(
            checkpoint=str(checkpoint),
            weights="float32",
            num_threads=thread_count(threads),
            max_num_seqs=requests,
            load_format="dummy",
        )
        stages = run(settings, workload, on_stage=lambda stage: status.update(f"{stage}..."))
    if json:
        print_json(stamp() | {"shape": shape, "workload": workload, "stages": stages})
    else:
        rows = [
            [stage.name, f"{stage.tokens_per_s:,.1f}", f"{stage.gain:.2f}x", f"{stage.total_gain:.2f}x", stage.backend]
            for stage in stages
        ]
        print_table(["stage", "tok/s", "gain", "in all", "engine"], rows)
