"""Where clients reach what was bound."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import replace

from cluster.errors import ConfigError
from cluster.gateway.config import DEFAULT_HTTP_PORT, GatewayConfig
from cluster.gateway.listener import is_loopback
from cluster.serve.gateway_ports import is_free

_PORT_TRIES = 100


def join_host_port(host: str, port: int) -> str:
    """``"host:port"``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def gateway_address(host: str, port: int, *, node_ip: str, own_ip: str) -> str:
    """Where this process reaches a gateway.

    Args:
        host: what the gateway was told to bind, on its node.
        port: what it has bound.
        node_ip: its node's address.
        own_ip: the address of this process's node.

    Raises:
        ConfigError: it listens on the loopback of another node.
    """
    if is_loopback(host) and node_ip != own_ip:
        raise ConfigError(
            f"the gateway runs on {node_ip} and listens on {host} there, which nobody else reaches: set it to 0.0.0.0, "
            "or to that node's address",
            field="gateway.host",
        )
    return join_host_port(reachable_host(host, node_ip), port)


def reachable_host(host: str, node_ip: str) -> str:
    """What to call a host that binds ``host``: its node's address where that means all of them."""
    try:
        return node_ip if ipaddress.ip_address(host).is_unspecified else host
    except ValueError:
        return host


def with_ports(config: GatewayConfig) -> GatewayConfig:
    """With numbers where free ports are wanted, so that a gateway that is built again takes the same.

    Raises:
        OSError: ``config.host`` is not this machine's.
    """
    host, count = config.host, config.replicas
    if config.port == 0:
        config = replace(config, port=free_port(host, count))
    http_port = config.http_port
    if http_port == 0 or (http_port == DEFAULT_HTTP_PORT and not is_free(host, http_port)):
        row = range(config.port, config.port + count)
        http_port = config.port
        while http_port in row or http_port + count - 1 in row:
            http_port = free_port(host, count)
        config = replace(config, http_port=http_port)
    return config


def free_port(host: str, count: int = 1) -> int:
    """The first of ``count`` ports in a row that nobody has on ``host``, as of now.

    Raises:
        OSError: ``host`` is not this machine's, or has no such row.
    """
    for _ in range(_PORT_TRIES):
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            port = int(probe.getsockname()[1])
        if port + count <= 65536 and all(is_free(host, port + place) for place in range(1, count)):
            return port
    raise OSError(f"{host} has no {count} free ports in a row")
