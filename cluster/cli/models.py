"""``cluster models``: what a server serves."""

from __future__ import annotations

from cluster.cli.connection import Connection, connects
from cluster.cli.options import Json
from cluster.cli.output import print_json, print_table


@connects
def models(connection: Connection, as_json: Json = False) -> None:
    """List the models that a server has."""
    with connection.client() as client:
        served = client.models()
    if as_json:
        print_json(served)
        return
    rows = []
    for model in served:
        num_ready = sum(replica.state == "ready" for replica in model.replicas)
        replicas = f"{num_ready} of {len(model.replicas)} ready"
        rows.append((model.name, model.architecture, model.max_model_len, model.vocab_size, model.dtype, replicas))
    print_table(("MODEL", "ARCHITECTURE", "CONTEXT", "VOCABULARY", "DTYPE", "REPLICAS"), rows)
