"""The gateway's configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Where the gateway listens and what it lets in.

    Attributes:
        host: address to bind.
        port: gRPC port; 0 takes a free one.
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
    default_deadline_s: float = 600.0
    max_prompt_bytes: int = 8 * 2**20
    max_message_bytes: int = 16 * 2**20
    max_concurrent_streams: int = 4096
    max_unread_tokens: int = 8192
    drain_timeout_s: float = 30.0
    reflection: bool | None = None
