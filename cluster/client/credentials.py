"""How a client proves who it is, and who has to answer."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.errors import ConfigError

Token = str | Callable[[], str]
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Whom to trust and what to show. By default: no TLS and no token, as a gateway on loopback wants it.

    Attributes:
        tls: encrypt; on by itself where one of the files is given.
        ca_file: certificates (PEM) that the gateway's is checked against, instead of the system's.
        cert_file, key_file: our own certificate and its key (PEM), for mutual TLS.
        server_name: the name that the gateway's certificate must have, where it is not the host of the address.
        token: a JWT or an API key, sent with every call; or a function that returns one, for tokens that expire.
    """

    tls: bool = False
    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None
    server_name: str = ""
    token: Token = ""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("a certificate needs its key: give cert_file and key_file together", field="cert_file")
        if self.ca_file or self.cert_file:
            object.__setattr__(self, "tls", True)
        if self.server_name and not self.tls:
            raise ConfigError("there is no certificate to check a name against without tls", field="server_name")

    def __repr__(self) -> str:  # the token must not end up in a log
        return f"Credentials(tls={self.tls}, ca_file={self.ca_file}, cert_file={self.cert_file})"

    def metadata(self) -> Metadata:
        """What a call carries."""
        token = self.token() if callable(self.token) else self.token
        return (("authorization", f"Bearer {token}"),) if token else ()

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """None: without TLS.

        Raises:
            ConfigError: a file cannot be read.
        """
        if not self.tls:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca_file, "ca_file"),
            private_key=_read(self.key_file, "key_file"),
            certificate_chain=_read(self.cert_file, "cert_file"),
        )

    def check_address(self, address: str) -> None:
        """Raises ConfigError where a token would be sent to another machine for everyone to read."""
        if self.token and not self.tls and not _is_local(address):
            raise ConfigError(
                f"the token would go to {address} unencrypted: use TLS (tls, or ca_file for a CA of your own)",
                field="token",
            )


def _read(path: str | Path | None, field: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field=field) from None


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
