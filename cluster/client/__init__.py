"""The gRPC clients: ``from cluster.client import Client, AsyncClient``."""

from cluster.client.async_client import AsyncClient
from cluster.client.client import Client

__all__ = ["AsyncClient", "Client"]
