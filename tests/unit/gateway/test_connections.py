"""Limits on connections, as clients meet them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from cluster.errors import ConfigError
from cluster.gateway.config import GatewayConfig
from cluster.gateway.listener import bind, create_server
from cluster.gateway.security_config import ConnectionConfig


async def test_connections_grow_old_without_anybody_noticing() -> None:
    """Calls go over to a new connection, and those that run on an old one end well."""

    async def peer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await asyncio.sleep(0.01)
        return context.peer().encode()

    async def stream(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        for _ in range(9):  # begun at any time, it lasts beyond the connection's age, but not beyond the longest stream
            await asyncio.sleep(0.1)
            await context.write(b"x")

    config = GatewayConfig(
        default_deadline_s=2, max_deadline_s=2, connections=ConnectionConfig(max_age_s=2, keepalive_s=1)
    )
    server = create_server(config, ())
    methods = {
        "peer": grpc.unary_unary_rpc_method_handler(peer),
        "stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Old", methods),))
    port = bind(server, "127.0.0.1", 0, None, field="gateway")
    await server.start()
    options = (("grpc.use_local_subchannel_pool", 1),)
    peers: set[bytes] = set()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:

        async def read() -> int:
            return len([part async for part in channel.stream_stream("/test.Old/stream")(iter([b""]))])

        streams = []
        until = time.monotonic() + 5
        while time.monotonic() < until:
            streams.append(asyncio.create_task(read()))
            peers.add(await channel.unary_unary("/test.Old/peer")(b""))
            await asyncio.sleep(0.1)
        assert set(await asyncio.gather(*streams)) == {9}
    assert len(peers) > 1
    await server.stop(None)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_deadline_s": 10}, "max_deadline_s"),
        ({"max_deadline_s": 9000}, "connections.max_age_s"),
        ({"connections": ConnectionConfig(max_age_s=3599)}, "connections.max_age_s"),
    ],
)
def test_a_connection_outlives_every_stream(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match="must be at least") as caught:
        GatewayConfig(**settings)
    assert caught.value.field == field


@pytest.mark.parametrize("name", list(ConnectionConfig.__dataclass_fields__))
def test_limits_of_connections_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match="positive") as caught:
        ConnectionConfig(**{name: 0})
    assert caught.value.field == name
