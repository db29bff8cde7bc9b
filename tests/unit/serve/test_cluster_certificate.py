"""The streams between gateways and replicas over TLS: who does not show the cluster's certificate learns nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import grpc
import pytest
from fakes import FakeExecutor

from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.gateway.balancer import Balancer
from cluster.gateway.replica_channel import REPLICA_TLS_NAME
from cluster.gateway.replica_link import ReplicaAddress
from cluster.serve.cluster_certificate import ClusterCertificate
from cluster.serve.config import LoggingConfig
from cluster.serve.identity import ClusterIdentity
from cluster.serve.replica_server import ReplicaServer

METHOD = "/test.Echo/once"
SECRET = "s3cret"


@pytest.fixture(scope="module")
def certificate() -> ClusterCertificate:
    return ClusterCertificate.create()


@pytest.fixture
def started(certificate: ClusterCertificate) -> Iterator[int]:
    """The port of a server as a replica has it."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        methods = {"once": grpc.unary_unary_rpc_method_handler(lambda request, context: request)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))
        port = server.add_secure_port("127.0.0.1:0", certificate.server_credentials())
        server.start()
        yield port
        server.stop(None).wait()


def call(port: int, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    options = (("grpc.ssl_target_name_override", REPLICA_TLS_NAME), ("grpc.use_local_subchannel_pool", 1))
    address = f"127.0.0.1:{port}"
    if credentials is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        channel = grpc.secure_channel(address, credentials, options=options)
    with channel:
        try:
            assert channel.unary_unary(METHOD)(b"x", timeout=10) == b"x"
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_both_ends_show_the_certificate(started: int, certificate: ClusterCertificate) -> None:
    assert call(started, certificate.channel_credentials()) is grpc.StatusCode.OK


def test_nobody_else_gets_through(started: int, certificate: ClusterCertificate) -> None:
    other = ClusterCertificate.create()
    for credentials in (
        None,
        grpc.ssl_channel_credentials(certificate.certificate),  # it is no secret
        grpc.ssl_channel_credentials(certificate.certificate, other.key, other.certificate),
        other.channel_credentials(),  # a gateway of another cluster: it would trust no such replica either
    ):
        assert call(started, credentials) is grpc.StatusCode.UNAVAILABLE


def test_the_key_is_not_printed(certificate: ClusterCertificate) -> None:
    identity = ClusterIdentity(secret="s3cret", start_id=None, logging=LoggingConfig(), certificate=certificate)
    assert "PRIVATE" not in f"{identity!r} {certificate!r} {certificate}"


@asynccontextmanager
async def balance(address: str, credentials: grpc.ChannelCredentials | None) -> AsyncIterator[Balancer]:
    """A gateway's end of the stream to a replica."""
    balancer = Balancer("m", gateway_id="g", secret=SECRET, credentials=credentials, on_change=lambda: None)
    balancer.set_replicas([ReplicaAddress("r", address)])
    yield balancer
    await balancer.close()


async def test_a_gateway_and_a_replica(certificate: ClusterCertificate) -> None:
    server = ReplicaServer(
        lambda: Engine(FakeExecutor(), EngineConfig()),
        replica_id="r",
        model="m",
        secret=SECRET,
        credentials=certificate.server_credentials(),
    )
    address = f"127.0.0.1:{await server.start()}"
    async with balance(address, certificate.channel_credentials()) as balancer, asyncio.timeout(20):
        ready = asyncio.Event()
        balancer.wait_ready(ready.set)
        await ready.wait()
        assert balancer.hello().architecture == "FakeForCausalLM"
    # The secret alone, in clear or with another certificate, does not do.
    for credentials in (None, ClusterCertificate.create().channel_credentials()):
        async with balance(address, credentials) as balancer:
            await asyncio.sleep(0.3)
            assert not balancer.ready
    await server.stop()
