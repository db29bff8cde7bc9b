"""Where clients reach what was bound."""

from __future__ import annotations

import ipaddress
import socket

from cluster.errors import ConfigError


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
    try:
        bound = ipaddress.ip_address(host)
    except ValueError:
        loopback, every = host == "localhost", False
    else:
        loopback, every = bound.is_loopback, bound.is_unspecified
    if loopback and node_ip != own_ip:
        raise ConfigError(
            f"the gateway runs on {node_ip} and listens on {host} there, which nobody else reaches: set it to 0.0.0.0, "
            "or to that node's address",
            field="gateway.host",
        )
    return join_host_port(node_ip if every else host, port)


def free_port(host: str) -> int:
    """A port that nobody has on ``host``, as of now.

    Raises:
        OSError: ``host`` is not this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])
