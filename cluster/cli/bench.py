"""``cluster bench``: what an engine does on this machine, near its limits or not, and what a server's users see."""

from __future__ import annotations

from typing import ClassVar

import typer

from cluster.cli.lazy_commands import Entry, LazyGroup


class _BenchGroup(LazyGroup):
    """Whoever puts load on a server elsewhere needs no torch."""

    TABLE: ClassVar = {
        "engine": Entry(module="cluster.cli.bench_engine", function="engine", help="Rates by batch size."),
        "ablation": Entry(
            module="cluster.cli.bench_ablation", function="ablation", help="What each part of the engine is worth."
        ),
        "profile": Entry(module="cluster.cli.bench_profile", function="profile", help="Step times, to simulate with."),
        "capacity": Entry(
            module="cluster.cli.bench_capacity", function="capacity", help="The load that schedules carry, simulated."
        ),
        "serve": Entry(module="cluster.cli.bench_serve", function="serve", help="Load on a running server."),
        "compare": Entry(
            module="cluster.cli.bench_serve", function="compare_reports", help="Two reports of serve side by side."
        ),
    }


app = typer.Typer(cls=_BenchGroup, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def bench() -> None:
    """Measure an engine on this machine, or a running server."""
