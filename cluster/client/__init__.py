"""The gRPC clients: ``from cluster.client import Client, AsyncClient``."""

from cluster.client.async_client import AsyncClient
from cluster.client.client import Client
from cluster.client.credentials import Credentials

__all__ = ["AsyncClient", "Client", "Credentials"]
