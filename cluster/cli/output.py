"""What commands print: text as it comes, tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from cluster.client.results import Chunk, Progress


def print_text(text: str) -> None:
    """Without a newline, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Dataclasses and collections of them as one line of JSON, in ASCII; enums by value."""
    sys.stdout.write(json.dumps(value, default=_plain) + "\n")
    sys.stdout.flush()


def print_chunk(chunk: Chunk, *, as_json: bool) -> None:
    """A chunk of a stream; what it waits for goes to standard error."""
    if as_json:
        print_json(chunk)
    elif chunk.progress is not None:
        print(f"({_described(chunk.progress)})", file=sys.stderr, flush=True)
    else:
        print_text(chunk.text)


def _described(progress: Progress) -> str:
    words = {
        "queued": f"queued behind {progress.position}",
        "warming": "the model is warming up",
        "moving": "its replica was lost; it goes on at another",
    }
    eta = "" if progress.eta_ms is None else f", {progress.eta_ms / 1000:.1f} s to go"
    return words.get(progress.stage, progress.stage) + eta


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str | int]]) -> None:
    """A table without frames; numbers stand to the right. Not cut to a width when not written to a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in row))
    # Names come from servers: no markup in them is obeyed.
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 10_000).print(table)
