"""The HTTP port: who gets in, how many, and what it shows of the gateway."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
import yaml
from certificates import Authority
from fake_replica import SECRET, FakeReplica
from gateway_setup import CreateSetup
from prometheus_client.parser import text_string_to_metric_families

from cluster.gateway.callers_file import hash_api_key
from cluster.gateway.config import GatewayConfig
from cluster.gateway.openai import event_stream, handlers
from cluster.gateway.security_config import AuthConfig, ConnectionConfig, TlsConfig
from cluster.gateway.server import Gateway, ReplicaAddress, ServedModel

HELLO = {"prompt": "hello", "max_tokens": 8, "seed": 7}
COMPLETIONS = "/v1/completions"

Connect = Callable[..., aiohttp.ClientSession]
CreateGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """A session with a gateway's HTTP port; with ``trusted``, over TLS."""
    sessions = []

    def create(gateway: Gateway, trusted: ssl.SSLContext | None = None) -> aiohttp.ClientSession:
        scheme = "http" if trusted is None else "https"
        sessions.append(
            aiohttp.ClientSession(
                f"{scheme}://127.0.0.1:{gateway.http_port}",
                connector=aiohttp.TCPConnector(ssl=trusted or True, limit=0),
            )
        )
        return sessions[-1]

    yield create
    for session in sessions:
        await session.close()


@pytest.fixture
async def create_gateway(checkpoint: Path) -> AsyncIterator[CreateGateway]:
    """A gateway with a ready replica."""
    gateways, replica = [], FakeReplica()
    address = ReplicaAddress(replica.replica_id, await replica.start())

    async def create(**config: object) -> Gateway:
        gateway = Gateway(
            GatewayConfig(**{"port": 0, "http_port": 0} | config), [ServedModel("test", checkpoint)], secret=SECRET
        )
        gateways.append(gateway)
        await gateway.start()
        gateway.set_replicas("test", [address])
        await replica.until(lambda: replica.num_connections)
        return gateway

    yield create
    for gateway in gateways:
        await gateway.stop()
    await replica.stop()


@pytest.fixture
def callers(tmp_path: Path) -> AuthConfig:
    path = tmp_path / "callers.yaml"
    listed = [
        {"subject": "ann", "key_sha256": hash_api_key("k1")},
        {"subject": "low", "key_sha256": hash_api_key("k2"), "max_priority": "P2"},
        {"subject": "web", "certificate": "web"},
    ]
    path.write_text(yaml.safe_dump(listed))
    return AuthConfig(callers_file=str(path))


async def status(call: Awaitable[aiohttp.ClientResponse]) -> int:
    response = await call
    await response.read()
    return response.status


async def test_keys(create_gateway: CreateGateway, connect: Connect, callers: AuthConfig) -> None:
    session = connect(await create_gateway(auth=callers))
    for authorization in (None, "Bearer wrong", "k1"):
        headers = {"authorization": authorization} if authorization else {}
        async with session.post(COMPLETIONS, json=HELLO, headers=headers) as response:
            assert response.status == 401
            assert (await response.json())["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert await status(session.get("/metrics", headers=headers)) == 401
        assert await status(session.get("/v1/models", headers=headers)) == 401
        assert await status(session.get("/health", headers=headers)) in (200, 503)
    ann = {"authorization": "Bearer k1"}
    assert await status(session.post(COMPLETIONS, json=HELLO, headers=ann)) == 200
    assert await status(session.get("/metrics", headers=ann)) == 200
    low = {"authorization": "Bearer k2"}
    assert await status(session.post(COMPLETIONS, json=HELLO | {"priority": "P3"}, headers=low)) == 200
    assert await status(session.post(COMPLETIONS, json=HELLO | {"priority": "P0"}, headers=low)) == 403
    # On one connection, who called before says nothing of who calls now.
    assert await status(session.post(COMPLETIONS, json=HELLO)) == 401


async def test_mutual_tls(create_gateway: CreateGateway, connect: Connect, callers: AuthConfig, tmp_path: Path) -> None:
    authority = Authority()
    server, web, other = (authority.issue(name) for name in ("gateway", "web", "other"))
    files = {"server.pem": server.certificate, "server.key": server.key, "ca.pem": authority.pem}
    files |= {"web.pem": web.certificate + web.key, "other.pem": other.certificate + other.key}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tls = TlsConfig(
        certificate_file=str(tmp_path / "server.pem"),
        key_file=str(tmp_path / "server.key"),
        client_ca_file=str(tmp_path / "ca.pem"),
    )
    gateway = await create_gateway(tls=tls, auth=callers)

    def trust(certificate: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        if certificate:
            context.load_cert_chain(tmp_path / certificate)
        return context

    assert await status(connect(gateway, trust("web.pem")).get("/v1/models")) == 200
    assert await status(connect(gateway, trust("other.pem")).get("/v1/models")) == 401
    for trusted in (trust(None), None):
        with pytest.raises(aiohttp.ClientError):
            await connect(gateway, trusted).get("/health")


async def test_health_follows_drains(create_setup: CreateSetup, connect: Connect) -> None:
    setup = await create_setup(FakeReplica(), http_port=0)
    session = connect(setup.gateway)
    assert await status(session.get("/health")) == 200
    await setup.gateway.set_draining(True)
    assert await status(session.get("/health")) == 503
    async with session.post(COMPLETIONS, json=HELLO) as response:
        assert (response.status, response.headers["connection"]) == (503, "close")
        assert (await response.json())["error"]["code"] == "draining"
    await setup.gateway.set_draining(False)
    assert await status(session.get("/health")) == 200


async def test_connections_too_many_are_closed(create_setup: CreateSetup) -> None:
    setup = await create_setup(http_port=0, connections=ConnectionConfig(max_connections=2))
    held = [await asyncio.open_connection("127.0.0.1", setup.gateway.http_port) for _ in range(2)]
    request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    for reader, writer in held:
        writer.write(request)
        assert await reader.readuntil(b"\r\n") == b"HTTP/1.1 503 Service Unavailable\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", setup.gateway.http_port)
    writer.write(request)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readuntil(b"\r\n")
    for opened in (writer, *(writer for _, writer in held)):
        opened.close()


async def test_connections_that_say_nothing_are_closed(create_setup: CreateSetup) -> None:
    setup = await create_setup(http_port=0, connections=ConnectionConfig(idle_timeout_s=0.1))
    for said in (b"", b"GET /health HTTP/1.1\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", setup.gateway.http_port)
        writer.write(said)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_headers_that_are_too_large(create_setup: CreateSetup, connect: Connect) -> None:
    setup = await create_setup(http_port=0, connections=ConnectionConfig(max_metadata_bytes=4096))
    assert await status(connect(setup.gateway).get("/health", headers={"x": "y" * 3000})) == 503
    assert await status(connect(setup.gateway).get("/health", headers={"x": "y" * 5000})) == 400


async def test_a_body_that_does_not_come(create_setup: CreateSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "_BODY_TIMEOUT_S", 0.05)
    setup = await create_setup(http_port=0)
    reader, writer = await asyncio.open_connection("127.0.0.1", setup.gateway.http_port)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    writer.write(head)
    assert b" 408 " in await reader.readuntil(b"\r\n")
    writer.close()


async def test_who_reads_nothing_is_let_go(create_setup: CreateSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "_STALL_S", 0.05)
    # 16 candidates with 20 log probabilities for each token: more than any socket takes in.
    setup = await create_setup(FakeReplica(max_model_len=4096), http_port=0, max_unread_tokens=100)
    body = b'{"prompt": "x", "n": 16, "max_tokens": 2000, "logprobs": 20, "stream": true}'
    reader, writer = await asyncio.open_connection("127.0.0.1", setup.gateway.http_port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    await setup.replica.until(lambda: setup.replica.running)
    async with asyncio.timeout(30):
        await setup.gateway.wait_idle(30)
    await setup.replica.until(lambda: not setup.replica.running)
    assert setup.metrics.outcomes() in (["SLOW_READER"], ["CANCELLED"])
    assert reader is not None
    writer.close()


async def test_metrics(create_setup: CreateSetup, connect: Connect) -> None:
    setup = await create_setup(FakeReplica(gated=True), http_port=0)
    session = connect(setup.gateway)

    async def page() -> dict[str, dict[tuple[str, ...], float]]:
        """Values by the labels' values in the order of their names, by sample."""
        async with session.get("/metrics") as response:
            assert response.content_type == "text/plain"
            samples: dict[str, dict[tuple[str, ...], float]] = {}
            for family in text_string_to_metric_families(await response.text()):
                for sample in family.samples:
                    samples.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
            return samples

    idle = await page()
    assert idle["vllm:num_requests_waiting"] == {("replica-0", "test"): 0, ("gateway", "test"): 0}
    assert idle["vllm:kv_cache_usage_perc"] == {("replica-0", "test"): 0.25}
    running = [asyncio.create_task(status(session.post(COMPLETIONS, json=HELLO))) for _ in range(2)]
    await setup.replica.until(lambda: len(setup.replica.running) == 2)
    await setup.replica.allow(1)
    async with asyncio.timeout(10):
        while (busy := await page())["vllm:num_requests_running"] != {("replica-0", "test"): 2}:
            pass
    assert busy["vllm:time_to_first_token_seconds_count"] == {("test",): 2}
    await setup.replica.allow(20)
    assert await asyncio.gather(*running) == [200, 200]
    assert await status(session.post(COMPLETIONS, json=HELLO | {"n": 99})) == 400
    done = await page()
    assert done["vllm:generation_tokens_total"] == done["cluster_generated_tokens_total"] == {("test",): 16}
    assert done["vllm:prompt_tokens_total"] == {("test",): 10}
    assert done["vllm:request_success_total"] == {("test",): 2}
    assert done["vllm:e2e_request_latency_seconds_count"] == {("test",): 2}
    assert done["vllm:inter_token_latency_seconds_count"][("test",)] > 0
    assert done["cluster_requests_total"][("test", "OK")] == 2
    buckets = done["cluster_ttft_seconds_bucket"]
    assert buckets[("+Inf", "test")] == 2
    assert sorted(buckets.values()) == list(buckets.values())
