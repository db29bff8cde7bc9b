"""Options that the benchmarks share, and what they stand for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cluster.bench.shapes import SHAPE_NAMES, shape_named, write_checkpoint
from cluster.checkpoint import resolve_checkpoint

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="A Hugging Face directory, a Hub id, or an embedded model.")
]
Shape = Annotated[str | None, typer.Option(help=f"Random weights in a shape by name: {', '.join(SHAPE_NAMES)}.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the forward pass.", show_default="all cores")]


@contextmanager
def checkpoint_directory(model: str | None, shape: str | None) -> Iterator[Path]:
    """The model's directory, or one with the shape's configuration alone that lives as long as the context."""
    if (model is None) == (shape is None):
        raise typer.BadParameter("give one of --model and --shape")
    if model is not None:
        yield resolve_checkpoint(model)
    else:
        with tempfile.TemporaryDirectory(prefix="cluster-bench-") as directory:
            yield write_checkpoint(shape_named(shape or ""), Path(directory), weights=False)


def thread_count(threads: int | None) -> int:
    return threads or len(os.sched_getaffinity(0))


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Positive ones, from a list with commas; anything else is wrong usage and names the option."""
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is no list of positive whole numbers", param_hint=option)
    return numbers
