"""``cluster generate``: continue a text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli.connection import Connection, connects
from cluster.cli.options import (
    Deadline,
    MaxTokens,
    Model,
    PriorityOption,
    Progress,
    Seed,
    Temperature,
    TopK,
    TopP,
    priority_of,
    sampling_of,
)
from cluster.cli.output import print_chunk, print_json, print_text
from cluster.client.channel import DEFAULT_DEADLINE_S
from cluster.client.requests import GenerateOptions
from cluster.client.results import GenerationResult


@connects
def generate(
    connection: Connection,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    model: Model = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="How many candidates; more than one are printed at the end.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", metavar="K", help="With --json: log probabilities, and the K likeliest.")
    ] = None,
    priority: PriorityOption = "P1",
    deadline: Deadline = DEFAULT_DEADLINE_S,
    max_ttft_ms: Annotated[
        int | None,
        typer.Option("--max-ttft-ms", min=1, help="Be refused at once if the first token would come later than this."),
    ] = None,
    progress: Progress = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print when finished.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per chunk; with --no-stream, one in all.")
    ] = False,
) -> None:
    """Continue a text. The completion streams to standard output; the prompt is not repeated."""
    if logprobs is not None and not as_json:
        raise typer.BadParameter("log probabilities are printed with --json only", param_hint="--logprobs")
    sampling = sampling_of(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        n=n,
        logprobs=logprobs,
    )
    options: GenerateOptions = {
        "model": model,
        "priority": priority_of(priority),
        "deadline_s": deadline,
        "progress": progress,
    }
    if max_ttft_ms is not None:
        options["max_ttft_ms"] = max_ttft_ms
    text = sys.stdin.read() if prompt == "-" else prompt
    with connection.client() as client:
        if no_stream or (n > 1 and not as_json):
            result = client.generate(text, sampling, **options)
            print_json(result) if as_json else _print_candidates(result)
            return
        with client.stream(text, sampling, **options) as chunks:
            for chunk in chunks:
                print_chunk(chunk, as_json=as_json)
        if not as_json:
            print_text("\n")


def _print_candidates(result: GenerationResult) -> None:
    for candidate in result.candidates:
        if len(result.candidates) > 1:
            print_text(f"--- candidate {candidate.index}\n")
        print_text(candidate.text + "\n")
