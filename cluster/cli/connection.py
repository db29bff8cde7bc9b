"""The client of the command line."""

from __future__ import annotations

import os

from cluster.client import Client


def connect(address: str) -> Client:
    """A client whose gRPC core keeps quiet: its notices would mix with the answer, and what matters is a status."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return Client(address)
