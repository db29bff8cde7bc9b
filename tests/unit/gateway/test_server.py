"""The server as operators see it: health, reflection, the port, draining, and its replicas."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from fake_replica import FakeReplica
from gateway_setup import CONNECTING, READY, CreateSetup, Setup, collect, failure, request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.core.routing_config import RoutingConfig
from cluster.errors import ConfigError, ModelNotFound
from cluster.gateway.config import GatewayConfig
from cluster.gateway.server import Gateway, ServedModel
from cluster.wire import SERVICE

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(setup: Setup) -> set[int]:
    stub = health_pb2_grpc.HealthStub(setup.channel)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in ("", SERVICE)}


async def listed_services(setup: Setup) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(setup.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="*")]))
    response = await call.read()
    call.cancel()
    return {service.name for service in response.list_services_response.service}


async def test_health_follows_the_replicas(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(), ready=False)
    await setup.wait_health(SERVING, SERVICE)
    assert await health(setup) == {SERVING}
    await setup.replica.stop()
    await setup.wait_health(NOT_SERVING, SERVICE)
    assert await health(setup) == {NOT_SERVING}
    stub = health_pb2_grpc.HealthStub(setup.channel)
    unknown = await failure(stub.Check(health_pb2.HealthCheckRequest(service="nope")))
    assert unknown.code == grpc.StatusCode.NOT_FOUND


async def test_one_model_without_a_replica_is_not_serving(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(), models=("test", "other"), ready=False)
    await setup.wait_states("test", READY)
    assert await health(setup) == {NOT_SERVING}


async def test_drain_refuses_what_is_new_and_waits_for_what_runs(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    running = asyncio.create_task(collect(setup.stub.GenerateStream(request())))
    await setup.replica.until(lambda: setup.replica.running)
    assert not await setup.gateway.drain(timeout_s=0.05)
    assert await health(setup) == {NOT_SERVING}
    refusal = await failure(setup.stub.Generate(request()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert refusal.retry_after_s > 0
    draining = asyncio.create_task(setup.gateway.drain(timeout_s=10))
    await setup.replica.allow(8)
    assert await draining
    assert len(await running) > 0


async def test_stop_ends_what_runs(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    call = asyncio.ensure_future(failure(setup.stub.Generate(request())))
    await setup.replica.until(lambda: setup.replica.running)
    await setup.stop()
    assert (await call).code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await setup.replica.until(lambda: not setup.replica.running)
    assert setup.gateway.num_generations == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", setup.port)).close()


async def test_reflection(create_setup: CreateSetup) -> None:
    on, off = await create_setup(), await create_setup(reflection=False)
    assert await listed_services(on) == {
        "cluster.v1.InferenceService", "inference.GRPCInferenceService", "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }  # fmt: skip
    assert (await failure(listed_services(off))).code == grpc.StatusCode.UNIMPLEMENTED


async def test_off_loopback_warns_and_does_not_reflect(
    create_setup: CreateSetup, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        setup = await create_setup(host="0.0.0.0", insecure=True)
    assert "without TLS" in caplog.text
    assert (await failure(listed_services(setup))).code == grpc.StatusCode.UNIMPLEMENTED


async def test_a_port_that_is_taken(create_setup: CreateSetup, checkpoint: Path) -> None:
    setup = await create_setup()
    second = Gateway(GatewayConfig(port=setup.port), [ServedModel("test", checkpoint)], secret="s")
    with pytest.raises(ConfigError, match=f"{setup.port}.*set gateway.port") as caught:
        await second.start()
    assert caught.value.field == "gateway.port"
    await second.stop()


async def test_requests_go_where_the_least_is_outstanding(create_setup: CreateSetup) -> None:
    replicas = FakeReplica(gated=True), FakeReplica(replica_id="replica-1", gated=True)
    setup = await create_setup(*replicas, routing=RoutingConfig(policy="least_tokens"))
    await setup.wait_states("test", READY, READY)
    loads = {"replica-0": 0, "replica-1": 0}
    calls = []
    for num_tokens in (50, 10, 10, 20, 30, 40):
        calls.append(asyncio.ensure_future(setup.stub.Generate(request("abc", max_tokens=num_tokens))))
        async with asyncio.timeout(10):
            while sum(len(replica.submits) for replica in replicas) < len(calls):
                await setup.model()
        model = await setup.model()
        now = {replica.replica_id: replica.outstanding_tokens for replica in model.replicas}
        chosen = [name for name in loads if now[name] != loads[name]]
        assert len(chosen) == 1
        assert loads[chosen[0]] == min(loads.values())
        loads[chosen[0]] += 3 + num_tokens
        assert now == loads
    # What has been generated is outstanding no more, nor is the prompt.
    num_running = len(replicas[0].running)
    await replicas[0].allow(1)
    async with asyncio.timeout(10):
        while (await setup.model()).replicas[0].outstanding_tokens != loads["replica-0"] - 4 * num_running:
            pass
    for replica in replicas:
        await replica.allow(100)
    await asyncio.gather(*calls)


async def test_replicas_come_and_go(create_setup: CreateSetup) -> None:
    first, second = FakeReplica(gated=True), FakeReplica(replica_id="replica-1")
    setup = await create_setup(first, second)
    setup.gateway.set_replicas("test", setup.replica_addresses("replica-0"))
    await setup.wait_states("test", READY)
    stream = setup.stub.GenerateStream(request(max_tokens=3))
    await first.until(lambda: first.running)
    setup.gateway.set_replicas("test", setup.replica_addresses("replica-1"))
    await setup.wait_states("test", READY)
    await setup.stub.Generate(request())
    assert (len(first.submits), len(second.submits)) == (1, 1)
    await first.allow(3)
    assert len(await collect(stream)) == 3
    assert (await setup.model()).replicas[0].replica_id == "replica-1"
    setup.gateway.set_replicas("test", [])
    await setup.wait_health(NOT_SERVING)
    assert (await failure(setup.stub.Generate(request()))).reason == "MODEL_WARMING"
    with pytest.raises(ModelNotFound):
        setup.gateway.set_replicas("nope", [])


async def test_a_wrong_secret(create_setup: CreateSetup, caplog: pytest.LogCaptureFixture) -> None:
    setup = await create_setup(FakeReplica(), secret="wrong", ready=False)
    with caplog.at_level(logging.WARNING):
        await setup.replica.until(lambda: setup.replica.num_rejected >= 2)
    assert (await setup.model()).replicas[0].state == CONNECTING
    assert "UNAUTHENTICATED" in caplog.text
    assert "wrong" not in caplog.text.replace("wrong cluster-secret", "")
    assert (await failure(setup.stub.Generate(request()))).reason == "MODEL_WARMING"


@pytest.mark.parametrize(("fields", "problem"), [({"model": "x"}, "'x'"), ({"protocol_version": 9}, "protocol 9")])
async def test_a_replica_that_is_another(
    create_setup: CreateSetup, caplog: pytest.LogCaptureFixture, fields: dict[str, object], problem: str
) -> None:
    with caplog.at_level(logging.WARNING):
        setup = await create_setup(FakeReplica(**fields), ready=False)
        await setup.replica.until(lambda: setup.replica.num_connections >= 2)
    assert problem in caplog.text
    assert (await setup.model()).replicas[0].state == CONNECTING


def test_the_gateway_loads_neither_torch_nor_ray() -> None:
    code = "import cluster.gateway.server, sys; print(*({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize(
    "name",
    ["default_deadline_s", "max_prompt_bytes", "max_message_bytes", "max_concurrent_streams", "max_unread_tokens"],
)
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match="positive") as caught:
        GatewayConfig(**{name: 0})
    assert caught.value.field == name
