"""The gateway's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.core.config import AdmissionConfig, TenantConfig
from cluster.core.routing_config import RoutingConfig
from cluster.errors import require
from cluster.gateway.replay import ReplayConfig
from cluster.gateway.security_config import AdminConfig, AuthConfig, ConnectionConfig, TlsConfig

DEFAULT_HTTP_PORT = 8000


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Where the gateway listens and what it lets in.

    Attributes:
        host: address to bind.
        port: gRPC port; 0 takes a free one.
        replicas: how many gateways there are. Those that share a node take the ports after ``port``, and of HTTP and
            administration those after theirs; clients are given all addresses.
        http_port: of OpenAI's API, health and metrics; 0 takes a free one, null turns HTTP off. Where the default is
            taken, a free one is used.
        routing: how requests are spread over a model's replicas.
        admission: how much may wait here for each model.
        tenants: what each may use; those that are not listed have no limits.
        default_deadline_s: for calls that bring none of their own.
        max_prompt_bytes: a larger prompt is refused before it is tokenized.
        max_message_bytes: a larger gRPC message is refused.
        max_concurrent_streams: open generations at once; more are refused.
        max_unread_tokens: a stream whose client leaves more of a candidate unread is ended.
        replay: what is kept of requests that have ended, for the same request again.
        drain_timeout_s: how long running generations may take to finish at shutdown.
        reflection: gRPC reflection; unset: on for loopback addresses only.
        max_deadline_s: no call lasts longer, whatever deadline it brings.
        insecure: listen off loopback without TLS; whoever reaches a port can read what goes over it.
        tls: certificates of all ports; unset: no TLS.
        auth: who may call.
        connections: limits on connections, per port.
        admin: the AdminService's port.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    replicas: int = 1
    http_port: int | None = DEFAULT_HTTP_PORT
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    tenants: tuple[TenantConfig, ...] = ()
    default_deadline_s: float = 600.0
    max_prompt_bytes: int = 8 * 2**20
    max_message_bytes: int = 16 * 2**20
    max_concurrent_streams: int = 4096
    max_unread_tokens: int = 8192
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    drain_timeout_s: float = 30.0
    reflection: bool | None = None
    max_deadline_s: float = 3600.0
    insecure: bool = False
    tls: TlsConfig | None = None
    auth: AuthConfig = field(default_factory=AuthConfig)
    connections: ConnectionConfig = field(default_factory=ConnectionConfig)
    admin: AdminConfig = field(default_factory=AdminConfig)

    def __post_init__(self) -> None:
        names = [tenant.name for tenant in self.tenants]
        for name in names:
            require(names.count(name) == 1, "tenants", f"two are called {name!r}; put their limits together")
        require(0 <= self.port <= 65535, "port", "must be in [0, 65535]")
        require(self.replicas >= 1, "replicas", "must be at least 1")
        require(self.port + self.replicas <= 65536, "replicas", "would take ports beyond 65535: lower port")
        require(self.http_port is None or 0 <= self.http_port <= 65535, "http_port", "must be in [0, 65535], or null")
        require(bool(self.host), "host", "must name an address, such as 127.0.0.1")
        for name in ("default_deadline_s", "max_prompt_bytes", "max_message_bytes", "max_concurrent_streams"):
            require(getattr(self, name) > 0, name, "must be positive")
        require(self.max_unread_tokens > 0, "max_unread_tokens", "must be positive")
        require(self.drain_timeout_s >= 0, "drain_timeout_s", "must not be negative")
        require(
            self.default_deadline_s <= self.max_deadline_s,
            "max_deadline_s",
            f"must be at least default_deadline_s, {self.default_deadline_s:g}",
        )
        require(
            self.connections.max_age_s >= self.max_deadline_s,
            "connections.max_age_s",
            f"must be at least max_deadline_s, {self.max_deadline_s:g}: a connection outlives every stream on it",
        )
