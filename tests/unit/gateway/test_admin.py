"""The AdminService: what it tells, what it changes, and whom it obeys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import yaml
from fake_replica import FakeReplica
from gateway_setup import DRAINING, READY, CreateSetup, collect, failure, request
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import ConfigError
from cluster.gateway.callers_file import hash_api_key
from cluster.gateway.config import GatewayConfig
from cluster.gateway.security_config import AdminConfig, AuthConfig
from cluster.gateway.server import Gateway, ServedModel
from cluster.v1 import admin_pb2 as pb
from cluster.v1 import admin_pb2_grpc, inference_pb2


@asynccontextmanager
async def administer(gateway: Gateway) -> AsyncIterator[admin_pb2_grpc.AdminServiceStub]:
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.admin_port}", options=options) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


class RecordingControl:
    """What would start and stop replicas."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    async def load(self, model: str) -> None:
        self.calls.append(("load", model))

    async def unload(self, model: str) -> None:
        self.calls.append(("unload", model))


async def test_status_and_configuration(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True), max_unread_tokens=77)
    running = asyncio.create_task(collect(setup.stub.GenerateStream(request())))
    await setup.replica.until(lambda: setup.replica.running)
    async with administer(setup.gateway) as admin:
        status = await admin.GetStatus(pb.GetStatusRequest())
        assert status.gateway_id.startswith("gateway-")
        assert status.version
        assert (status.draining, status.open_generations) == (False, 1)
        assert status.uptime_s > 0
        [queue] = status.queues
        assert queue.model == "test"
        assert [entry.priority for entry in queue.classes] == [1, 2, 3, 4]
        assert [entry.requests for entry in queue.classes] == [0, 0, 0, 0]
        assert status.models == [await setup.model()]
        configuration = json.loads((await admin.GetConfig(pb.GetConfigRequest())).json)
        assert configuration["gateway"]["max_unread_tokens"] == 77
        assert configuration["gateway"]["host"] == "127.0.0.1"
    await setup.replica.allow(8)
    await running


async def test_the_gateway_out_of_service_and_back(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    running = asyncio.create_task(collect(setup.stub.GenerateStream(request())))
    await setup.replica.until(lambda: setup.replica.running)
    async with administer(setup.gateway) as admin:
        assert (await admin.Drain(pb.DrainRequest())).running == 1
        await setup.wait_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await failure(setup.stub.Generate(request()))).reason == "DRAINING"
        assert (await admin.GetStatus(pb.GetStatusRequest())).draining
        assert (await admin.Drain(pb.DrainRequest(timeout_ms=10))).running == 1
        waiting = asyncio.ensure_future(admin.Drain(pb.DrainRequest(timeout_ms=10_000)))
        await setup.replica.allow(8)
        assert (await waiting).running == 0
        await running
        await admin.Undrain(pb.UndrainRequest())
        await setup.wait_serving()
        call = asyncio.ensure_future(setup.stub.Generate(request()))
        await setup.replica.until(lambda: setup.replica.running)
        await setup.replica.allow(8)
        await call


async def test_shutting_down_is_for_good(create_setup: CreateSetup) -> None:
    setup = await create_setup()
    async with administer(setup.gateway) as admin:
        assert await setup.gateway.drain(timeout_s=1)
        for call in (admin.Undrain(pb.UndrainRequest()), admin.Drain(pb.DrainRequest())):
            assert (await failure(call)).reason == "DRAINING"


async def test_a_replica_out_of_service_and_back(create_setup: CreateSetup) -> None:
    replicas = FakeReplica(), FakeReplica(replica_id="replica-1")
    setup = await create_setup(*replicas)
    await setup.wait_states("test", READY, READY)
    async with administer(setup.gateway) as admin:
        assert (await admin.Drain(pb.DrainRequest(replica_id="replica-0"))).running == 0
        await setup.wait_states("test", DRAINING, READY)
        for _ in range(4):
            await setup.stub.Generate(request())
        assert (len(replicas[0].submits), len(replicas[1].submits)) == (0, 4)
        await admin.Undrain(pb.UndrainRequest(replica_id="replica-0"))
        await setup.wait_states("test", READY, READY)
        await admin.Drain(pb.DrainRequest(replica_id="replica-1"))
        await setup.stub.Generate(request())
        assert len(replicas[0].submits) == 1


async def test_streams_of_a_drained_replica_go_on_elsewhere(create_setup: CreateSetup) -> None:
    replicas = FakeReplica(gated=True), FakeReplica(replica_id="replica-1", gated=True)
    setup = await create_setup(*replicas)
    await setup.wait_states("test", READY, READY)
    running = asyncio.create_task(collect(setup.stub.GenerateStream(request(max_tokens=20))))
    async with asyncio.timeout(10):
        while not any(replica.running for replica in replicas):
            await setup.model()
    first, second = replicas if replicas[0].running else replicas[::-1]
    await first.allow(5)
    async with administer(setup.gateway) as admin:
        assert (await admin.Drain(pb.DrainRequest(replica_id=first.replica_id, timeout_ms=0))).running == 1
    await second.until(lambda: second.running)
    await second.allow(20)
    chunks = await running
    assert sum(len(chunk.token_ids) for chunk in chunks) == 20
    assert not first.running


@pytest.mark.parametrize(
    ("method", "message", "field"),
    [
        ("Drain", pb.DrainRequest(replica_id="nope"), "replica_id"),
        ("Undrain", pb.UndrainRequest(replica_id="nope"), "replica_id"),
        ("Drain", pb.DrainRequest(timeout_ms=2**64 - 1), "timeout_ms"),
    ],
)
async def test_what_makes_no_sense(create_setup: CreateSetup, method: str, message: object, field: str) -> None:
    setup = await create_setup(FakeReplica())
    async with administer(setup.gateway) as admin:
        refusal = await failure(getattr(admin, method)(message))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


@pytest.fixture
async def create_gateway(checkpoint: Path) -> AsyncIterator[Callable[..., Gateway]]:
    gateways = []

    def create(model_control: RecordingControl | None = None, **config: object) -> Gateway:
        served = [ServedModel("one", checkpoint), ServedModel("two", checkpoint)]
        config = {"port": 0, "http_port": 0, **config}
        gateways.append(Gateway(GatewayConfig(**config), served, secret="s", model_control=model_control))
        return gateways[-1]

    yield create
    for gateway in gateways:
        await gateway.stop()


CreateGateway = Callable[..., Gateway]


async def test_unloading_and_loading(create_gateway: CreateGateway) -> None:
    control = RecordingControl()
    gateway = create_gateway(control)
    port = await gateway.start()
    async with administer(gateway) as admin, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        generate = channel.unary_unary("/cluster.v1.InferenceService/Generate")
        data = inference_pb2.GenerateRequest(model="one", prompt="x").SerializeToString()
        await admin.UnloadModel(pb.UnloadModelRequest(model="one"))
        refusal = await failure(generate(data, timeout=5))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_WARMING")
        assert "operator" in refusal.message
        await admin.UnloadModel(pb.UnloadModelRequest(model="two"))
        # A gateway from which all has been unloaded is ready for what is left, which is nothing.
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        await admin.LoadModel(pb.LoadModelRequest(model="one"))
        assert "operator" not in (await failure(generate(data, timeout=0.3))).message
        assert control.calls == [("unload", "one"), ("unload", "two"), ("load", "one")]
        assert (await failure(admin.LoadModel(pb.LoadModelRequest(model="x")))).code == grpc.StatusCode.NOT_FOUND
        assert (await failure(admin.LoadModel(pb.LoadModelRequest()))).code == grpc.StatusCode.INVALID_ARGUMENT


async def test_without_anybody_to_tell(create_gateway: CreateGateway) -> None:
    gateway = create_gateway()
    await gateway.start()
    async with administer(gateway) as admin:
        for call in (admin.LoadModel(pb.LoadModelRequest(model="one")),
                     admin.UnloadModel(pb.UnloadModelRequest(model="one"))):  # fmt: skip
            assert (await failure(call)).code == grpc.StatusCode.UNIMPLEMENTED


async def test_administrators_alone(create_gateway: CreateGateway, tmp_path: Path) -> None:
    path = tmp_path / "callers.yaml"
    entries = [
        {"subject": "user", "key_sha256": hash_api_key("k1")},
        {"subject": "boss", "key_sha256": hash_api_key("k2"), "admin": True},
    ]
    path.write_text(yaml.safe_dump(entries))
    gateway = create_gateway(auth=AuthConfig(callers_file=str(path)))
    await gateway.start()
    codes = {None: grpc.StatusCode.UNAUTHENTICATED, "k1": grpc.StatusCode.PERMISSION_DENIED}
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.admin_port}", options=options) as channel:
        for method in pb.DESCRIPTOR.services_by_name["AdminService"].methods:
            call = channel.unary_unary(f"/cluster.v1.AdminService/{method.name}")
            for key, code in codes.items():
                metadata = (("authorization", f"Bearer {key}"),) if key else ()
                assert (await failure(call(b"", metadata=metadata))).code == code, method.name
        await channel.unary_unary("/cluster.v1.AdminService/GetStatus")(b"", metadata=(("authorization", "Bearer k2"),))
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        # It is an admin port and nothing else.
        generate = channel.unary_unary("/cluster.v1.InferenceService/Generate")
        assert (await failure(generate(b""))).code == grpc.StatusCode.UNIMPLEMENTED


async def test_where_it_listens(create_gateway: CreateGateway) -> None:
    first = create_gateway()
    port = await first.start()
    assert first.admin_port not in (0, port)
    # Nobody chose the port, and the next one is taken.
    second = create_gateway(port=first.admin_port - 1)
    if await _is_free(first.admin_port - 1):
        await second.start()
        assert second.admin_port not in (0, first.admin_port)
    # This one was chosen.
    third = create_gateway(admin=AdminConfig(port=first.admin_port))
    with pytest.raises(ConfigError, match=r"set gateway\.admin\.port") as caught:
        await third.start()
    assert caught.value.field == "gateway.admin.port"


async def _is_free(port: int) -> bool:
    try:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", port)
    except OSError:
        return False
    server.close()
    await server.wait_closed()
    return True


async def test_off_loopback_it_is_for_administrators(create_gateway: CreateGateway, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.tls") as caught:
        await create_gateway(admin=AdminConfig(host="0.0.0.0")).start()
    assert caught.value.field == "gateway.admin.host"
    await create_gateway(admin=AdminConfig(host="0.0.0.0"), insecure=True).start()
