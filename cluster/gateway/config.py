"""The gateway's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import require


DEFAULT_HTTP_PORT = 8000


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Where the gateway listens and what it lets in.

    Attributes:
        host: address to bind.
        port: gRPC port; 0 takes a free one.
        http_port: of OpenAI's API, health and metrics; 0 takes a free one, null turns HTTP off. Where the default is
            taken, a free one is used.
        default_deadline_s: for calls that bring none of their own.
        max_prompt_bytes: a larger prompt is refused before it is tokenized.
        max_message_bytes: a larger gRPC message is refused.
        max_concurrent_streams: open generations at once; more are refused.
        max_unread_tokens: a stream whose client leaves more of a candidate unread is ended.
        drain_timeout_s: how long running generations may take to finish at shutdown.
        reflection: gRPC reflection; unset: on for loopback addresses only.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int | None = DEFAULT_HTTP_PORT
    default_deadline_s: float = 600.0
    max_prompt_bytes: int = 8 * 2**20
    max_message_bytes: int = 16 * 2**20
    max_concurrent_streams: int = 4096
    max_unread_tokens: int = 8192
    drain_timeout_s: float = 30.0
    reflection: bool | None = None

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", "must be in [0, 65535]")
        require(self.http_port is None or 0 <= self.http_port <= 65535, "http_port", "must be in [0, 65535], or null")
        require(bool(self.host), "host", "must name an address, such as 127.0.0.1")
        for name in ("default_deadline_s", "max_prompt_bytes", "max_message_bytes", "max_concurrent_streams"):
            require(getattr(self, name) > 0, name, "must be positive")
        require(self.max_unread_tokens > 0, "max_unread_tokens", "must be positive")
        require(self.drain_timeout_s >= 0, "drain_timeout_s", "must not be negative")
