"""TLS of the gateway's ports: certificates from files, for gRPC and for HTTP, and who the other end says it is."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from cluster.errors import ConfigError
from cluster.gateway.security_config import TlsConfig
from cluster.gateway.watched_files import WatchedFiles

_FIELD = "gateway.tls"
_SPIFFE = "spiffe://"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Material:
    """The files' contents at one time, for both kinds of server."""

    grpc_configuration: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext


class ServerTls:
    """What the gateway's ports show to clients and ask of them.

    New connections get what the files say then: nothing has to be restarted for a new certificate.

    Raises:
        ConfigError: a file cannot be read, or they do not belong together.
    """

    def __init__(self, config: TlsConfig, *, check_interval_s: float = 1.0) -> None:
        self._config = config
        paths = [config.certificate_file, config.key_file]
        if config.client_ca_file is not None:
            paths.append(config.client_ca_file)
        self._files = WatchedFiles(paths, self._parse, field=_FIELD, check_interval_s=check_interval_s)

    @property
    def is_mutual(self) -> bool:
        """Whether every client proves a certificate of its own."""
        return self._config.client_ca_file is not None

    def grpc_credentials(self) -> grpc.ServerCredentials:
        shown = self._files.current()

        def fetch() -> grpc.ServerCertificateConfiguration | None:  # before each handshake, on gRPC's threads
            nonlocal shown
            latest = self._files.current()
            if latest is shown:
                return None
            shown = latest
            return latest.grpc_configuration

        return grpc.dynamic_ssl_server_credentials(
            shown.grpc_configuration, fetch, require_client_authentication=self.is_mutual
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For servers on Python's sockets, such as the HTTP one."""
        # The context that a server listens with is fixed; each handshake is handed the one that is current.
        context = self._create_context()

        def choose(connection: ssl.SSLObject, server_name: str | None, listening: ssl.SSLContext) -> None:
            connection.context = self._files.current().context

        context.sni_callback = choose
        return context

    def _parse(self, certificate: bytes, key: bytes, client_ca: bytes | None = None) -> _Material:
        self._check_pair(certificate, key)
        if client_ca is not None and not _certificates(client_ca, self._config.client_ca_file or ""):
            raise ConfigError(f"{self._config.client_ca_file} holds no certificate", field=f"{_FIELD}.client_ca_file")
        return _Material(
            grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca), self._create_context()
        )

    def _check_pair(self, certificate: bytes, key: bytes) -> None:
        """gRPC would only say that no handshake succeeds."""
        config = self._config
        chain = _certificates(certificate, config.certificate_file)
        try:
            private = load_pem_private_key(key, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{config.key_file} is no private key in PEM without a passphrase: {error}", field=f"{_FIELD}.key_file"
            ) from error
        shown, own = (
            public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            for public in (chain[0].public_key(), private.public_key())
        )
        if shown != own:
            raise ConfigError(
                f"{config.key_file} is not the key of the first certificate in {config.certificate_file}",
                field=f"{_FIELD}.key_file",
            )
        if chain[0].not_valid_after_utc < datetime.now(UTC):
            logger.error("the certificate in %s has expired: clients will refuse it", config.certificate_file)

    def _create_context(self) -> ssl.SSLContext:
        config = self._config
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(config.certificate_file, config.key_file)
            if config.client_ca_file is not None:
                context.load_verify_locations(config.client_ca_file)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the files do not make a certificate: {error}", field=_FIELD) from error
        return context


def _certificates(pem: bytes, path: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificate in PEM: {error}", field=_FIELD) from error


def grpc_peer(auth_context: Mapping[str, Sequence[bytes]]) -> str:
    """Whom a client's verified certificate names, out of ``ServicerContext.auth_context()``: its SPIFFE ID where it
    has one, else its common name; "" without a certificate.
    """
    uris = [name.decode(errors="replace") for name in auth_context.get("peer_uri", ())]
    common_names = [name.decode(errors="replace") for name in auth_context.get("x509_common_name", ())]
    return _peer(uris, common_names)


def ssl_peer(certificate: Mapping[str, Any] | None) -> str:
    """``grpc_peer`` out of ``ssl.SSLSocket.getpeercert()``."""
    if not certificate:
        return ""
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    common_names = [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]
    return _peer(uris, common_names)


def _peer(uris: Sequence[str], common_names: Sequence[str]) -> str:
    spiffe_ids = [uri for uri in uris if uri.startswith(_SPIFFE)]
    if spiffe_ids:
        return spiffe_ids[0] if len(spiffe_ids) == 1 else ""  # several: by the standard, none is to be believed
    # A common name is free text: it must not pass for an ID that only its authority gives out.
    names = [name for name in common_names if not name.startswith(_SPIFFE)]
    return names[0] if names else ""
