"""``cluster bench``: what an engine does on this machine, near its limits or not, and what a server's users see."""

from __future__ import annotations

import typer

from cluster.cli.bench_ablation import ablation
from cluster.cli.bench_capacity import capacity
from cluster.cli.bench_engine import engine
from cluster.cli.bench_profile import profile
from cluster.cli.bench_serve import compare_reports, serve

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(engine)
app.command()(ablation)
app.command()(profile)
app.command()(capacity)
app.command()(serve)
app.command("compare")(compare_reports)


@app.callback()
def bench() -> None:
    """Measure the engine on this machine, or a running server."""
