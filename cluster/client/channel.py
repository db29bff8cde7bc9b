"""How a client's channels are set up; the same for both clients."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.credentials import Credentials

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_DEADLINE_S = 600.0

_PROBE_S = 10.0
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),  # retry.py is the one retry layer
    # gRPC fails calls at once while it waits to reconnect. Its default of 1 s would waste our attempts.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.min_reconnect_backoff_ms", 2000),  # in truth how long one attempt to connect may take
    # A gateway that hangs, or whose host vanished, closes no socket; pings find out. Only while calls are open.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the one that counts; its default is a minute
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", -1),  # an answer with log probabilities for many candidates is large
    ("grpc.max_send_message_length", -1),  # the server says what is too large for it
)


def open_channel(module: ModuleType, address: str, credentials: Credentials) -> Any:
    """A channel of ``module``, which is grpc or grpc.aio.

    Raises:
        ConfigError: the credentials do not do for this address.
    """
    credentials.check_address(address)
    options = CHANNEL_OPTIONS
    if credentials.server_name:
        options = (*options, ("grpc.ssl_target_name_override", credentials.server_name))
    channel_credentials = credentials.channel_credentials()
    if channel_credentials is None:
        return module.insecure_channel(address, options=options)
    return module.secure_channel(address, channel_credentials, options=options)


class ConnectionWatch:
    """Whether a server answers on a blocking channel, without waiting for it: asking begins to find out."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._check = health_pb2_grpc.HealthStub(channel).Check
        self._lock = threading.Lock()
        self._asked: grpc.Future | None = None

    def connected(self) -> bool:
        """Whether it has answered since this was asked first, or since it said so last."""
        with self._lock:
            if self._asked is not None and not self._asked.done():
                return False
            answered = self._asked is not None and self._asked.code() not in _NO_ANSWER
            request = health_pb2.HealthCheckRequest()
            try:
                self._asked = None if answered else self._check.future(request, timeout=_PROBE_S, wait_for_ready=True)
            except ValueError:  # the channel was closed meanwhile
                return False
            return answered
