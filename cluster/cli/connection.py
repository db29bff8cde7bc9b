"""The client of the command line, and the options that say where the gateways are and how to reach them."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.client import Client, Credentials
from cluster.client.channel import DEFAULT_ADDRESS

TOKEN_VARIABLE = "CLUSTER_TOKEN"

_ADDRESS = typer.Option(
    "--address", "-a", metavar="HOST:PORT", help="Where the server listens; of several gateways: all, with commas."
)
_TLS = typer.Option("--tls", help="Encrypt, and check the server by the system's certificates.")
_CA_FILE = typer.Option("--ca-file", metavar="PEM", help="Check the server by these certificates instead.")
_CERT_FILE = typer.Option("--cert-file", metavar="PEM", help="Our own certificate, for mutual TLS.")
_KEY_FILE = typer.Option("--key-file", metavar="PEM", help="Its key.")
_SERVER_NAME = typer.Option("--server-name", metavar="NAME", help="What the server's certificate is for, if no host.")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a command reaches the gateways. The fields are the options; a token comes from $CLUSTER_TOKEN."""

    address: Annotated[str, _ADDRESS] = DEFAULT_ADDRESS
    tls: Annotated[bool, _TLS] = False
    ca_file: Annotated[Path | None, _CA_FILE] = None
    cert_file: Annotated[Path | None, _CERT_FILE] = None
    key_file: Annotated[Path | None, _KEY_FILE] = None
    server_name: Annotated[str, _SERVER_NAME] = ""

    def client(self) -> Client:
        """A client of the gateways.

        Raises:
            ConfigError: the options do not go together, or a file cannot be read.
        """
        return Client(self.address, credentials=self.credentials())

    def credentials(self) -> Credentials:
        """For a client whose gRPC core keeps quiet: its notices would mix with answers, and what matters is a status.

        Raises:
            ConfigError: the options do not go together.
        """
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        return Credentials(
            tls=self.tls,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
            server_name=self.server_name,
            token=os.environ.get(TOKEN_VARIABLE, ""),
        )


def connects(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter ``connection`` is given by options of its own, after the command's."""
    options = inspect.signature(Connection, eval_str=True).parameters.values()
    own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        connection = Connection(**{option.name: arguments.pop(option.name) for option in options})
        command(connection=connection, **arguments)

    parameters = [parameter for parameter in own if parameter.name != "connection"]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    with_options.__signature__ = inspect.Signature([*parameters, *options])  # type: ignore[attr-defined]
    with_options.__annotations__ = {}  # the signature has them
    del with_options.__wrapped__  # type: ignore[attr-defined]
    return with_options
