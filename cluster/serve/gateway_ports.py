"""Which ports each of several gateways takes."""

from __future__ import annotations

import socket
from dataclasses import replace

from cluster.gateway.config import DEFAULT_HTTP_PORT, GatewayConfig

# Where a gateway that finds one of these taken may try the next place.
PORT_FIELDS = frozenset({"gateway.port", "gateway.http_port", "gateway.admin.port"})


def at_place(config: GatewayConfig, place: int) -> GatewayConfig:
    """The configuration of the gateway at a place of its node, from 0: ports that were chosen count up from there.

    So which ports there are is known beforehand, and a gateway that is built again finds free what its predecessor had.
    """
    http_port, admin = config.http_port, config.admin
    if http_port not in (None, 0, DEFAULT_HTTP_PORT):
        http_port += place
    if admin.port:
        admin = replace(admin, port=admin.port + place)
    return replace(config, port=config.port + place if config.port else 0, http_port=http_port, admin=admin)


def probe_port(host: str, port: int) -> None:
    """Raises OSError where nobody could listen there now; ``host`` may also not be this machine's."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # As gRPC binds: a port that only lingers after its last owner is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        probe.listen()


def is_free(host: str, port: int) -> bool:
    """Whether a listener would find the port free; 0 always is."""
    try:
        probe_port(host, port)
    except OSError:
        return False
    return True
