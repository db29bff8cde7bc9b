"""gRPC servers of the gateway: their limits, and the binding of their ports."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import grpc

from cluster.errors import ConfigError
from cluster.gateway.config import GatewayConfig
from cluster.gateway.tls import ServerTls


def create_server(config: GatewayConfig, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> grpc.aio.Server:
    """A server with the configured limits; without ports."""
    limits = config.connections
    return grpc.aio.server(
        interceptors=interceptors,
        options=(
            # Two gateways on one port would share it in silence.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # At the first number gRPC begins to refuse at random, at the second always: here they are one.
            ("grpc.max_metadata_size", limits.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
            ("grpc.max_concurrent_streams", limits.max_streams),
            ("grpc.max_allowed_incoming_connections", limits.max_connections),
            ("grpc.server_handshake_timeout_ms", _ms(limits.handshake_timeout_s)),
            ("grpc.max_connection_idle_ms", _ms(limits.idle_timeout_s)),
            ("grpc.max_connection_age_ms", _ms(limits.max_age_s)),
            ("grpc.max_connection_age_grace_ms", _ms(config.max_deadline_s)),
            ("grpc.keepalive_time_ms", _ms(limits.keepalive_s)),
            ("grpc.keepalive_timeout_ms", _ms(limits.keepalive_timeout_s)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ),
    )


def bind(server: grpc.aio.Server, host: str, port: int, tls: ServerTls | None, *, field: str) -> int:
    """Adds a port; returns its number.

    Args:
        field: the section of the configuration that ``host`` and ``port`` are in.

    Raises:
        ConfigError: the address cannot be bound.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, tls.grpc_credentials())
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {host}:{port}: the port is taken, or the address is not this machine's. Stop what "
            f"listens there, or set {field}.port to another one (0 takes a free one)",
            field=f"{field}.port",
        ) from None


def check_exposure(config: GatewayConfig, host: str, *, field: str) -> None:
    """Raises ConfigError where ``host`` would let others than this machine in without TLS, unless told to."""
    if config.tls is None and not config.insecure and not is_loopback(host):
        raise ConfigError(
            f"{host} is not loopback, and there is no TLS: whoever is on the network could read every prompt. Set "
            "gateway.tls.certificate_file and key_file; or gateway.insecure: true where the network is trusted",
            field=f"{field}.host",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ms(seconds: float) -> int:
    return min(round(seconds * 1000), 2**31 - 1)
