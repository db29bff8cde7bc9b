"""The stages of a start, each with its name and time while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from cluster.serve.startup_state import StartupState


class StartupDisplay:
    """Shows stages on standard error: live on a terminal, else one plain line as each begins and as each ends.

    A context manager; ``update`` is called with the whole state as often as one likes.
    """

    def __init__(self) -> None:
        self._states: Sequence[StartupState] = ()
        self._printed: set[tuple[str, int, bool]] = set()
        self._live: Live | None = None
        if sys.stderr.isatty():
            self._live = Live(
                console=Console(stderr=True), get_renderable=self._table, refresh_per_second=10, redirect_stderr=False
            )

    def __enter__(self) -> StartupDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, states: Sequence[StartupState]) -> None:
        # An actor that Serve replaced is no longer told of; what was shown of others stays.
        known = {state.actor: state for state in self._states} | {state.actor: state for state in states}
        self._states = list(known.values())
        if self._live is None:
            self._print_new()

    def _print_new(self) -> None:
        for state in self._states:
            for index, (name, seconds, ended) in enumerate(_durations(state)):
                if (state.actor, index, False) not in self._printed:
                    self._printed.add((state.actor, index, False))
                    print(f"{state.actor}: {name} ...", file=sys.stderr, flush=True)
                if ended and (state.actor, index, True) not in self._printed:
                    self._printed.add((state.actor, index, True))
                    print(f"{state.actor}: {name}: {seconds:.1f} s", file=sys.stderr, flush=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for state in self._states:
            for name, seconds, ended in _durations(state):
                mark = "[green]✓[/]" if ended else "[yellow]…[/]"
                table.add_row(mark, f"[dim]{state.actor}[/]", name, f"{seconds:6.1f} s")
        return table


def _durations(state: StartupState) -> Iterator[tuple[str, float, bool]]:
    """Name, seconds so far, and whether it has ended, for each stage."""
    for index, (name, began) in enumerate(state.stages):
        ended_at = state.stages[index + 1][1] if index + 1 < len(state.stages) else state.ended_at
        yield name, (ended_at or time.time()) - began, ended_at is not None
