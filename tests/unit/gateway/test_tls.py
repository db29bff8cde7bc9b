"""The gateway's ports over TLS: who gets through, with which certificate, and as whom."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
import yaml
from certificates import Authority, Pem
from gateway_setup import failure
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import ConfigError
from cluster.gateway.auth import Authenticator
from cluster.gateway.caller import current_caller
from cluster.gateway.callers_file import hash_api_key
from cluster.gateway.config import GatewayConfig
from cluster.gateway.interceptors import AuthInterceptor
from cluster.gateway.listener import bind, create_server
from cluster.gateway.security_config import AuthConfig, TlsConfig
from cluster.gateway.server import Gateway, ServedModel
from cluster.gateway.tls import ServerTls, ssl_peer
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc

SPIFFE_ID = "spiffe://example.org/web"
WHO = "/test.Who/"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def write_tls(tmp_path: Path, authority: Authority) -> Callable[..., TlsConfig]:
    """Writes the server's files, as an operator who renews them would: by replacing each."""

    def write(server: Pem | None = None, client_ca: bytes | None = None) -> TlsConfig:
        server = server or authority.issue("gateway")
        contents = {"server.pem": server.certificate, "server.key": server.key, "ca.pem": client_ca}
        for name, content in contents.items():
            if content is not None:
                (tmp_path / "new").write_bytes(content)
                os.replace(tmp_path / "new", tmp_path / name)
        return TlsConfig(
            certificate_file=str(tmp_path / "server.pem"),
            key_file=str(tmp_path / "server.key"),
            client_ca_file=None if client_ca is None else str(tmp_path / "ca.pem"),
        )

    return write


WriteTls = Callable[..., TlsConfig]


def connect(port: int, trusted: bytes | None, client: Pem | None = None) -> grpc.aio.Channel:
    """With ``trusted`` None: without TLS."""
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    if trusted is None:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
    credentials = grpc.ssl_channel_credentials(trusted, client and client.key, client and client.certificate)
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options)


@pytest.fixture
async def create_gateway(checkpoint: Path) -> AsyncIterator[Callable[..., Awaitable[int]]]:
    """Starts a gateway without replicas; returns its port."""
    gateways = []

    async def create(**config: object) -> int:
        gateways.append(Gateway(GatewayConfig(port=0, **config), [ServedModel("test", checkpoint)], secret="s"))
        return await gateways[-1].start()

    yield create
    for gateway in gateways:
        await gateway.stop()


CreateGateway = Callable[..., Awaitable[int]]


async def count(channel: grpc.aio.Channel, **metadata: str) -> int:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = pb.CountTokensRequest(prompt="four")
    return (await stub.CountTokens(request, metadata=tuple(metadata.items()), timeout=10)).tokens


async def is_healthy(channel: grpc.aio.Channel) -> bool:
    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return True


async def test_tls(create_gateway: CreateGateway, write_tls: WriteTls, authority: Authority) -> None:
    port = await create_gateway(tls=write_tls())
    async with connect(port, authority.pem) as channel:
        assert await count(channel) == 4
    for trusted in (Authority("another").pem, None):
        async with connect(port, trusted) as channel:
            assert (await failure(count(channel))).code == grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls(create_gateway: CreateGateway, write_tls: WriteTls, authority: Authority) -> None:
    port = await create_gateway(tls=write_tls(client_ca=authority.pem))
    async with connect(port, authority.pem, authority.issue("client")) as channel:
        assert await count(channel) == 4
    for client in (None, Authority().issue("client"), authority.issue("client", expired=True)):
        async with connect(port, authority.pem, client) as channel:
            assert (await failure(count(channel))).code == grpc.StatusCode.UNAVAILABLE


async def test_listed_certificates_and_keys(
    create_gateway: CreateGateway, write_tls: WriteTls, authority: Authority, tmp_path: Path
) -> None:
    path = tmp_path / "callers.yaml"
    callers = [
        {"subject": "web", "certificate": SPIFFE_ID},
        {"subject": "batch", "key_sha256": hash_api_key("k1")},
    ]
    path.write_text(yaml.safe_dump(callers))
    port = await create_gateway(tls=write_tls(client_ca=authority.pem), auth=AuthConfig(callers_file=str(path)))
    async with connect(port, authority.pem, authority.issue("x", SPIFFE_ID)) as channel:
        assert await count(channel) == 4
        assert (await failure(count(channel, authorization="Bearer k2"))).code == grpc.StatusCode.UNAUTHENTICATED
    async with connect(port, authority.pem, authority.issue("web")) as channel:
        refusal = await failure(count(channel))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert "'web'" in refusal.message
        assert await count(channel, authorization="Bearer k1") == 4
        assert await is_healthy(channel)


async def test_everything_but_health_wants_a_key(create_gateway: CreateGateway, tmp_path: Path) -> None:
    path = tmp_path / "callers.yaml"
    path.write_text(yaml.safe_dump([{"subject": "batch", "key_sha256": hash_api_key("k1")}]))
    port = await create_gateway(auth=AuthConfig(callers_file=str(path)))
    async with connect(port, None) as channel:
        assert await is_healthy(channel)
        methods = [f"/cluster.v1.InferenceService/{method.name}"
                   for method in pb.DESCRIPTOR.services_by_name["InferenceService"].methods]  # fmt: skip
        methods.append("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        for method in methods:
            refusal = await failure(channel.unary_unary(method)(b"", timeout=10))
            assert refusal.code == grpc.StatusCode.UNAUTHENTICATED, method
        assert await count(channel, authorization="Bearer k1") == 4


async def test_a_refused_call_is_not_read(create_gateway: CreateGateway, tmp_path: Path) -> None:
    """Its message waits in the transport's window, however large it is."""
    path = tmp_path / "callers.yaml"
    path.write_text("[]")
    port = await create_gateway(auth=AuthConfig(callers_file=str(path)), max_message_bytes=1000)
    async with connect(port, None) as channel:
        call = channel.unary_unary("/cluster.v1.InferenceService/Generate")
        refusals = [await failure(call(bytes(10**6), timeout=10)) for _ in range(3)]
        # Read, it would have been too large.
        assert {refusal.code for refusal in refusals} == {grpc.StatusCode.UNAUTHENTICATED}


async def start_who(
    tls: TlsConfig | None, auth: AuthConfig, *, check_interval_s: float = 1.0, admins_only: bool = False
) -> tuple[grpc.aio.Server, int]:
    """A server behind the gateway's edge whose methods tell who calls."""

    async def once(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await asyncio.sleep(0.01)  # others call meanwhile
        return current_caller().subject.encode()

    async def stream(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async for _ in requests:
            await context.write(current_caller().subject.encode())

    server_tls = tls and ServerTls(tls, check_interval_s=check_interval_s)
    interceptor = AuthInterceptor(
        Authenticator(auth),
        certificates=server_tls is not None and server_tls.is_mutual,
        open_services=["test.Open"],
        admins_only=admins_only,
    )
    server = create_server(GatewayConfig(), (interceptor,))
    methods = {
        "once": grpc.unary_unary_rpc_method_handler(once),
        "stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    for service in ("test.Who", "test.Open"):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    port = bind(server, "127.0.0.1", 0, server_tls, field="gateway")
    await server.start()
    return server, port


async def test_each_call_knows_its_own_caller(tmp_path: Path) -> None:
    path = tmp_path / "callers.yaml"
    callers = [{"subject": f"caller-{i}", "key_sha256": hash_api_key(f"k{i}")} for i in range(8)]
    path.write_text(yaml.safe_dump(callers))
    server, port = await start_who(None, AuthConfig(callers_file=str(path)))
    async with connect(port, None) as channel:
        once, stream = channel.unary_unary(f"{WHO}once"), channel.stream_stream(f"{WHO}stream")

        async def names(i: int) -> set[bytes]:
            metadata = (("authorization", f"Bearer k{i}"),)
            single = await once(b"", metadata=metadata)
            return {single, *[part async for part in stream(iter([b"", b""]), metadata=metadata)]}

        found = await asyncio.gather(*(names(i % 8) for i in range(64)))
        assert found == [{f"caller-{i % 8}".encode()} for i in range(64)]
        assert await channel.unary_unary("/test.Open/once")(b"") == b""
    await server.stop(None)


async def test_certificates_name_the_caller(write_tls: WriteTls, authority: Authority) -> None:
    server, port = await start_who(write_tls(client_ca=authority.pem), AuthConfig())
    for client, name in {
        authority.issue("web", SPIFFE_ID): SPIFFE_ID,
        authority.issue("web"): "web",
        authority.issue("", SPIFFE_ID): SPIFFE_ID,
        authority.issue(SPIFFE_ID): "",
    }.items():
        async with connect(port, authority.pem, client) as channel:
            assert (await channel.unary_unary(f"{WHO}once")(b"")).decode() == name
            stream = channel.stream_stream(f"{WHO}stream")(iter([b""]))
            assert [part.decode() async for part in stream] == [name]
    await server.stop(None)


async def test_administrators_alone(write_tls: WriteTls, authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "callers.yaml"
    callers = [
        {"subject": "user", "key_sha256": hash_api_key("k1")},
        {"subject": "boss", "key_sha256": hash_api_key("k2"), "admin": True},
        {"subject": "web", "certificate": "web"},
        {"subject": "ops", "certificate": "ops", "admin": True},
    ]
    path.write_text(yaml.safe_dump(callers))
    server, port = await start_who(
        write_tls(client_ca=authority.pem), AuthConfig(callers_file=str(path)), admins_only=True
    )
    async with connect(port, authority.pem, authority.issue("ops")) as channel:
        once = channel.unary_unary(f"{WHO}once")
        assert await once(b"") == b"ops"
        assert await once(b"", metadata=(("authorization", "Bearer k2"),)) == b"boss"
        refusal = await failure(once(b"", metadata=(("authorization", "Bearer k1"),)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN")
    async with connect(port, authority.pem, authority.issue("web")) as channel:
        refusal = await failure(channel.unary_unary(f"{WHO}once")(b""))
        assert refusal.code == grpc.StatusCode.PERMISSION_DENIED
        stream = channel.stream_stream(f"{WHO}stream")(iter([b""]))
        assert (await failure(stream.read())).code == grpc.StatusCode.PERMISSION_DENIED
    await server.stop(None)


async def test_certificates_are_renewed_without_a_restart(write_tls: WriteTls, authority: Authority) -> None:
    old_clients = Authority("old clients")
    server, port = await start_who(write_tls(client_ca=old_clients.pem), AuthConfig(), check_interval_s=0)
    old = connect(port, authority.pem, old_clients.issue("old"))
    assert await old.unary_unary(f"{WHO}once")(b"") == b"old"
    renewed, new_clients = Authority("renewed"), Authority("new clients")
    # Half-way: a certificate without its key changes nothing.
    write_tls(Pem(renewed.issue("gateway").certificate, renewed.issue("gateway").key))
    async with connect(port, authority.pem, old_clients.issue("old")) as channel:
        assert await channel.unary_unary(f"{WHO}once")(b"") == b"old"
    write_tls(renewed.issue("gateway"), new_clients.pem)
    async with connect(port, renewed.pem, new_clients.issue("new")) as channel:
        assert await channel.unary_unary(f"{WHO}once")(b"") == b"new"
    for trusted, client in ((authority.pem, new_clients), (renewed.pem, old_clients)):
        async with connect(port, trusted, client.issue("x")) as channel:
            assert (await failure(channel.unary_unary(f"{WHO}once")(b"", timeout=10))).code == (
                grpc.StatusCode.UNAVAILABLE
            )
    # What is open stays open.
    assert await old.unary_unary(f"{WHO}once")(b"") == b"old"
    await old.close()
    await server.stop(None)


def handshake(listening: ssl.SSLContext, trusted: bytes, client: Pem | None, tmp_path: Path) -> str:
    """Over Python's sockets, as the HTTP server does; whom the server takes the client for.

    Raises:
        ssl.SSLError: either end refuses.
    """
    context = ssl.create_default_context(cadata=trusted.decode())
    if client is not None:
        (tmp_path / "client.pem").write_bytes(client.certificate + client.key)
        context.load_cert_chain(tmp_path / "client.pem")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = listening.wrap_bio(incoming, outgoing, server_side=True)
    caller = context.wrap_bio(outgoing, incoming, server_hostname="localhost")
    for _ in range(4):
        for end in (caller, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ssl_peer(server.getpeercert())


def test_the_context_for_http_is_renewed_too(write_tls: WriteTls, authority: Authority, tmp_path: Path) -> None:
    old_clients, new_clients, renewed = Authority("old clients"), Authority("new clients"), Authority("renewed")
    context = ServerTls(write_tls(client_ca=old_clients.pem), check_interval_s=0).ssl_context()
    assert handshake(context, authority.pem, old_clients.issue("a", SPIFFE_ID), tmp_path) == SPIFFE_ID
    with pytest.raises(ssl.SSLError):
        handshake(context, authority.pem, None, tmp_path)
    write_tls(renewed.issue("gateway"), new_clients.pem)
    assert handshake(context, renewed.pem, new_clients.issue("b"), tmp_path) == "b"
    for trusted, client in ((authority, new_clients), (renewed, old_clients)):
        with pytest.raises(ssl.SSLError):
            handshake(context, trusted.pem, client.issue("x"), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("server.pem", b"nonsense", r"server\.pem holds no certificate"),
        ("server.key", b"nonsense", r"server\.key is no private key"),
        ("server.key", Authority().issue("x").key, r"server\.key is not the key of"),
        ("ca.pem", b"nonsense", r"ca\.pem holds no certificate"),
    ],
)
async def test_files_that_cannot_be_used(
    create_gateway: CreateGateway,
    write_tls: WriteTls,
    authority: Authority,
    tmp_path: Path,
    name: str,
    content: bytes,
    problem: str,
) -> None:
    config = write_tls(client_ca=authority.pem)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        await create_gateway(tls=config)
    assert caught.value.field.startswith("gateway.tls")


async def test_off_loopback_without_tls_is_refused(create_gateway: CreateGateway, write_tls: WriteTls) -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match=r"gateway\.tls.*gateway\.insecure: true") as caught:
            await create_gateway(host=host)
        assert caught.value.field == "gateway.host"
    assert await create_gateway(host="0.0.0.0", tls=write_tls())
    assert await create_gateway(host="0.0.0.0", insecure=True)
