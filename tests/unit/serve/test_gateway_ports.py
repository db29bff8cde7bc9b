"""Ports of several gateways on one node."""

from __future__ import annotations

import contextlib
import dataclasses
import socket

import pytest

from cluster.errors import ConfigError
from cluster.gateway.config import DEFAULT_HTTP_PORT, GatewayConfig
from cluster.gateway.security_config import AdminConfig
from cluster.serve.addresses import free_port, with_ports
from cluster.serve.gateway_ports import at_place, is_free
from cluster.serve.preflight import check_ports


def ports_of(config: GatewayConfig) -> tuple[int, int | None, int | None]:
    return config.port, config.http_port, config.admin.port


def test_chosen_ports_count_up():
    config = GatewayConfig(port=6000, replicas=3, http_port=7000, admin=AdminConfig(port=9000))
    assert [ports_of(at_place(config, place)) for place in range(3)] == [
        (6000, 7000, 9000),
        (6001, 7001, 9001),
        (6002, 7002, 9002),
    ]


@pytest.mark.parametrize("http_port", [None, 0, 8000])
def test_what_nobody_chose_is_left_alone(http_port: int | None):
    config = GatewayConfig(port=0, replicas=2, http_port=http_port)
    assert ports_of(at_place(config, 1)) == (0, http_port, None)


def test_nothing_else_differs():
    config = GatewayConfig(port=6000, replicas=2, drain_timeout_s=7.0)
    assert dataclasses.replace(at_place(config, 1), port=6000) == config


def test_a_row_of_free_ports():
    first = free_port("127.0.0.1", 4)
    held = [socket.create_server(("127.0.0.1", first + place)) for place in range(4)]
    assert not any(is_free("127.0.0.1", first + place) for place in range(4))
    for listener in held:
        listener.close()


def test_ports_to_stay_with():
    config = with_ports(GatewayConfig(port=0, replicas=2, http_port=0))
    row = {config.port, config.port + 1, config.http_port, config.http_port + 1}
    assert len(row) == 4
    assert all(is_free("127.0.0.1", port) for port in row)
    assert with_ports(config) == config
    assert with_ports(GatewayConfig(port=6000, http_port=None)) == GatewayConfig(port=6000, http_port=None)


def test_another_port_where_the_default_for_http_is_taken():
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(OSError):  # somebody else has it, which will do
            taken.enter_context(socket.create_server(("127.0.0.1", DEFAULT_HTTP_PORT)))
        assert with_ports(GatewayConfig(port=6000)).http_port not in (None, 0, DEFAULT_HTTP_PORT)


@pytest.mark.parametrize("taken", [0, 1])
def test_start_up_ends_where_a_gateways_port_is_taken(taken: int):
    first = free_port("127.0.0.1", 2)
    config = GatewayConfig(port=first, replicas=2)
    check_ports(config)
    with (
        socket.create_server(("127.0.0.1", first + taken)),
        pytest.raises(ConfigError, match=f"127.0.0.1:{first + taken}"),
    ):
        check_ports(config)


@pytest.mark.parametrize("values", [{"replicas": 0}, {"port": 65535, "replicas": 2}])
def test_numbers_that_cannot_be(values: dict[str, int]):
    with pytest.raises(ConfigError) as caught:
        GatewayConfig(**values)
    assert caught.value.field == "replicas"
