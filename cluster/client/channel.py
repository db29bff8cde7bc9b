"""How a client's channel is set up; the same for both clients."""

from __future__ import annotations

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_DEADLINE_S = 600.0

CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),  # retry.py is the one retry layer
    # gRPC fails calls at once while it waits to reconnect. Its default of 1 s would waste our attempts.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.max_receive_message_length", -1),  # an answer with log probabilities for many candidates is large
    ("grpc.max_send_message_length", -1),  # the server says what is too large for it
)
