"""``cluster status``: a server's health and its replicas."""

from __future__ import annotations

import typer

from cluster.cli.connection import Connection, connects
from cluster.cli.main import EXIT_FAILED
from cluster.cli.options import Json
from cluster.cli.output import print_json, print_table, print_text


@connects
def status(connection: Connection, as_json: Json = False) -> None:
    """Show a server's health and its replicas. The exit code is 1 while it takes no requests."""
    with connection.client() as client:
        serving = client.is_serving()
        models = client.models()
    if as_json:
        print_json({"address": connection.address, "serving": serving, "models": models})
    else:
        print_text(f"{connection.address} is {'serving' if serving else 'not serving'}\n")
        rows = [
            (
                model.name,
                replica.replica_id,
                replica.state,
                replica.running,
                replica.waiting,
                f"{replica.kv_usage:.1%}",
                replica.kv_capacity_tokens,
                replica.device,
                replica.address,
            )
            for model in models
            for replica in model.replicas
        ]
        if rows:
            columns = ("MODEL", "REPLICA", "STATE", "RUNNING", "WAITING", "KV USED", "KV TOKENS", "DEVICE", "ADDRESS")
            print_table(columns, rows)
    if not serving:
        raise typer.Exit(EXIT_FAILED)
