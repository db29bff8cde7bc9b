"""Who calls: a bearer token, an API key or a client certificate becomes a Caller. The same for every protocol."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import Unauthenticated
from cluster.gateway.caller import ANYONE, Caller
from cluster.gateway.callers_file import CallersFile
from cluster.gateway.jwt_verifier import JwtVerifier
from cluster.gateway.security_config import AuthConfig

_SCHEME = "bearer"


class Authenticator:
    """Tells callers apart.

    Where neither a file of callers nor JWT is configured, everybody is welcome; behind mutual TLS, as the tenant that
    the certificate names. Where one is, nobody is who shows nothing that it knows.

    Raises:
        ConfigError: a file cannot be read or makes no sense.
    """

    def __init__(self, config: AuthConfig) -> None:
        self._callers = None if config.callers_file is None else CallersFile(config.callers_file)
        self._jwt = None if config.jwt is None else JwtVerifier(config.jwt)

    @property
    def is_required(self) -> bool:
        """Whether callers must show something."""
        return self._callers is not None or self._jwt is not None

    def authenticate(self, metadata: Mapping[str, str | bytes], peer: str = "") -> Caller:
        """The caller of one call.

        Args:
            metadata: gRPC metadata or HTTP headers.
            peer: whom its verified certificate names (``tls.grpc_peer``, ``tls.ssl_peer``); "": it has none.

        Raises:
            Unauthenticated: it shows nothing, or something that is not known here.
        """
        caller = self.by_token(metadata)
        return self.by_certificate(peer) if caller is None else caller

    def by_token(self, metadata: Mapping[str, str | bytes]) -> Caller | None:
        """As ``authenticate``, by ``authorization`` alone; None where there is none, or nobody has to show one."""
        header = metadata.get("authorization", "")
        if not self.is_required or not header:
            return None
        scheme, _, token = header.strip().partition(" ") if isinstance(header, str) else ("", "", "")
        if scheme.lower() != _SCHEME or not token:
            raise Unauthenticated("authorization must be 'Bearer ' and a token or API key")
        caller = None if self._callers is None else self._callers.by_key(token)
        if caller is not None:
            return caller
        if self._jwt is None:
            raise Unauthenticated("the API key is not known here")
        return self._jwt.verify(token)

    def by_certificate(self, peer: str) -> Caller:
        """As ``authenticate``, of a call without a token."""
        if not self.is_required:
            return Caller(tenant=peer, subject=peer) if peer else ANYONE
        caller = self._callers.by_certificate(peer) if self._callers is not None and peer else None
        if caller is None:
            shown = f"the certificate of {peer!r} is not known here, and the call" if peer else "the call"
            raise Unauthenticated(f"{shown} has no 'authorization: Bearer ...' metadata")
        return caller
