"""Connections to replicas."""

from __future__ import annotations

import grpc

# What a replica's certificate names: all of a cluster show the same one, whatever their addresses are.
REPLICA_TLS_NAME = "replica.cluster"

_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Each attempt connects at once: the link has its own backoff, and a shared subchannel would add a second one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    # A host that vanishes closes no socket, nor does a process that is stopped; pings find out.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the one that counts; its default is a minute
    ("grpc.http2.max_pings_without_data", 0),
)


def open_replica_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel of its own to a replica, not yet connected.

    Args:
        credentials: of TLS, with a certificate that names REPLICA_TLS_NAME; None: no TLS.
    """
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    options = (*_OPTIONS, ("grpc.ssl_target_name_override", REPLICA_TLS_NAME))
    return grpc.aio.secure_channel(address, credentials, options=options)
