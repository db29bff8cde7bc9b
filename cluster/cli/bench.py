"""``cluster bench``: what an engine does on this machine, and how near that is to the machine's limits."""

from __future__ import annotations

import typer

from cluster.cli.bench_ablation import ablation
from cluster.cli.bench_capacity import capacity
from cluster.cli.bench_engine import engine
from cluster.cli.bench_profile import profile

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(engine)
app.command()(ablation)
app.command()(profile)
app.command()(capacity)


@app.callback()
def bench() -> None:
    """Measure the engine on this machine."""
