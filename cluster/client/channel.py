"""How a client's channels are set up; the same for both clients."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import grpc

from cluster.client.credentials import Credentials

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_DEADLINE_S = 600.0

CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),  # retry.py is the one retry layer
    # gRPC fails calls at once while it waits to reconnect. Its default of 1 s would waste our attempts.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A gateway that hangs, or whose host vanished, closes no socket; pings find out. Only while calls are open.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
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
    """Whether a blocking channel has a connection; asking makes it try to get one."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._watching = False
        self._ready = False

    def connected(self) -> bool:
        # gRPC tells of states only by calling back, from a thread that it keeps as long as somebody listens.
        with self._lock:
            ready, watching = self._ready, self._watching
            self._watching, self._ready = not ready, False
        if ready:
            self._channel.unsubscribe(self._note)
        elif not watching:
            self._channel.subscribe(self._note, try_to_connect=True)
        return ready

    def _note(self, state: grpc.ChannelConnectivity) -> None:
        with self._lock:
            self._ready = self._watching and state is grpc.ChannelConnectivity.READY
