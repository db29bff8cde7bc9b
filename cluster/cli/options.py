"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cluster.core.request import Priority, SamplingParams
from cluster.errors import InvalidRequest

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Which model; needed where the server has several.")]
Deadline = Annotated[float, typer.Option("--deadline", metavar="SECONDS", help="Give up after this long.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="End after this many tokens.", show_default="as the context holds")
]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", help="Nucleus mass; 1 is off.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k likeliest; 0 is off.")]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same tokens.", show_default="drawn anew")
]
PriorityName = Literal["P0", "P1", "P2", "P3"]
Progress = Annotated[bool, typer.Option("--progress", help="Tell, on standard error, what the request waits for.")]
PriorityOption = Annotated[PriorityName, typer.Option("--priority", help="The request's class; P0 goes first.")]


def priority_of(name: PriorityName) -> Priority:
    return Priority[name]


def sampling_of(**values: object) -> SamplingParams:
    """SamplingParams of the options; a value out of range is wrong usage and names its option."""
    try:
        return SamplingParams(**values)  # type: ignore[arg-type]
    except InvalidRequest as error:
        option = "--" + error.field.removeprefix("sampling.").replace("_", "-")
        raise typer.BadParameter(error.message, param_hint=option) from None
