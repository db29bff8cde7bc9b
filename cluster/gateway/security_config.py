"""Who may connect, how, and how much at once: the parts of the gateway's configuration that guard its ports."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import require


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """PEM files on the gateway's node. They are read again when they change; connections that are open stay.

    Attributes:
        certificate_file: the server's certificate, followed by the intermediate ones.
        key_file: its private key, not encrypted.
        client_ca_file: certificates that clients' own must be signed by, which makes TLS mutual; unset: clients bring
            none.
    """

    certificate_file: str
    key_file: str
    client_ca_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("certificate_file", "key_file"):
            require(bool(getattr(self, name)), name, "must name a PEM file")


@dataclass(frozen=True, kw_only=True)
class JwtConfig:
    """Bearer tokens that an identity provider signs (RS, PS, ES or EdDSA). ``exp`` and ``sub`` are required in them.

    Attributes:
        jwks_file: the provider's public keys as a JSON Web Key Set; read again when it changes.
        issuer: what ``iss`` must be.
        audience: what ``aud`` must have, so that no token made for another service opens this one.
        tenant_claim: the claim that names the tenant; where a token has none, its ``sub`` is the tenant.
        admin_scope: who has it in ``scope`` may use the AdminService.
        leeway_s: how far the provider's clock may be off.
    """

    jwks_file: str
    issuer: str
    audience: str
    tenant_claim: str = "tenant"
    admin_scope: str = "cluster.admin"
    leeway_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("jwks_file", "issuer", "audience", "tenant_claim", "admin_scope"):
            require(bool(getattr(self, name)), name, "must not be empty")
        require(self.leeway_s >= 0, "leeway_s", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """How callers prove who they are. With neither a file of callers nor JWT, whoever connects may call; with either of
    them, nobody else.

    Attributes:
        callers_file: YAML list of callers, each known by the SHA-256 of an API key or by its client certificate; read
            again when it changes.
        jwt: bearer tokens of an identity provider.
    """

    callers_file: str | None = None
    jwt: JwtConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ConnectionConfig:
    """Limits on connections, so that no client costs more memory than it should.

    Attributes:
        max_connections: at once, per port; more are closed.
        max_streams: calls at once on one connection.
        max_metadata_bytes: of one call's metadata; more is refused.
        handshake_timeout_s: a connection that is not established by then is closed.
        idle_timeout_s: a connection without calls for so long is closed.
        max_age_s: an older connection gets no new calls, so that clients spread over gateways anew; at least
            gateway.max_deadline_s, and calls have that long again to end.
        keepalive_s: silence after which a client is asked whether it is there.
        keepalive_timeout_s: how long it may take to answer that.
    """

    max_connections: int = 16_384
    max_streams: int = 1024
    max_metadata_bytes: int = 16 * 2**10
    handshake_timeout_s: float = 10.0
    idle_timeout_s: float = 1800.0
    max_age_s: float = 7200.0
    keepalive_s: float = 30.0
    keepalive_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            require(getattr(self, name) > 0, name, "must be positive")


@dataclass(frozen=True, kw_only=True)
class AdminConfig:
    """The AdminService's port. It has the gateway's TLS; where callers are authenticated, it is for administrators.

    Attributes:
        host: address to bind.
        port: 0 takes a free one; unset: the one after the gateways' ports, or a free one where that is taken.
    """

    host: str = "127.0.0.1"
    port: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.host), "host", "must name an address, such as 127.0.0.1")
        require(self.port is None or 0 <= self.port <= 65535, "port", "must be in [0, 65535]")
