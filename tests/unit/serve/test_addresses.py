"""Where clients reach what was bound."""

from __future__ import annotations

import socket

import pytest

from cluster.errors import ConfigError
from cluster.serve.addresses import free_port, gateway_address, join_host_port

HERE, THERE = "10.0.0.1", "10.0.0.2"


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:5"),
        ("localhost", "localhost:5"),
        ("::1", "[::1]:5"),
        ("2001:db8::7", "[2001:db8::7]:5"),
    ],
)
def test_ipv6_is_bracketed(host: str, address: str):
    assert join_host_port(host, 5) == address


@pytest.mark.parametrize(
    ("host", "node_ip", "address"),
    [
        ("127.0.0.1", HERE, "127.0.0.1:5"),
        ("::1", HERE, "[::1]:5"),
        ("0.0.0.0", HERE, "10.0.0.1:5"),
        ("0.0.0.0", THERE, "10.0.0.2:5"),
        ("::", THERE, "10.0.0.2:5"),
        ("::", "2001:db8::7", "[2001:db8::7]:5"),
        ("10.0.0.2", THERE, "10.0.0.2:5"),
        ("gateway.example", THERE, "gateway.example:5"),
    ],
)
def test_the_address_is_one_that_this_node_reaches(host: str, node_ip: str, address: str):
    assert gateway_address(host, 5, node_ip=node_ip, own_ip=HERE) == address


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_the_loopback_of_another_node_is_refused(host: str):
    with pytest.raises(ConfigError, match=THERE) as caught:
        gateway_address(host, 5, node_ip=THERE, own_ip=HERE)
    assert caught.value.field == "gateway.host"


def test_a_free_port_can_be_bound():
    with socket.create_server(("127.0.0.1", free_port("127.0.0.1"))):
        pass


def test_another_machine_has_no_free_port():
    with pytest.raises(OSError):
        free_port("203.0.113.1")
