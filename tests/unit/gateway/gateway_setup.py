"""A gateway in front of fake replicas, and a check after each test that nothing is left of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from byte_checkpoint import write_byte_checkpoint
from fake_replica import SECRET, FakeReplica
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from cluster.core.config import ClassesConfig
from cluster.gateway.config import GatewayConfig
from cluster.gateway.server import Gateway, ReplicaAddress, ServedModel
from cluster.observability.metrics import Metric
from cluster.v1 import inference_pb2, inference_pb2_grpc

CONNECTING = inference_pb2.REPLICA_STATE_CONNECTING
READY = inference_pb2.REPLICA_STATE_READY
DRAINING = inference_pb2.REPLICA_STATE_DRAINING


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_checkpoint(tmp_path_factory.mktemp("checkpoint"))


class RecordingSink:
    """Keeps every measurement."""

    def __init__(self) -> None:
        self.records: list[tuple[str, float, dict[str, str]]] = []

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        self.records.append((metric.name, value, labels))

    def values(self, metric: Metric) -> list[float]:
        return [value for name, value, _ in self.records if name == metric.name]

    def outcomes(self) -> list[str]:
        return [labels["outcome"] for name, _, labels in self.records if name == "cluster_requests_total"]


@dataclass
class Setup:
    """A started gateway with a client's stub to it."""

    gateway: Gateway
    port: int
    replicas: list[FakeReplica]
    channel: grpc.aio.Channel
    stub: inference_pb2_grpc.InferenceServiceStub
    metrics: RecordingSink
    addresses: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    @property
    def replica(self) -> FakeReplica:
        return self.replicas[0]

    async def stop(self) -> None:
        """Stops the gateway, once."""
        if not self.stopped:
            self.stopped = True
            await self.gateway.stop()

    async def check_idle(self) -> None:
        """Nothing is open in the gateway and nothing is outstanding at a replica."""
        assert await self.gateway.drain(timeout_s=10), "a generation is left open"
        for model in (await self.stub.ListModels(inference_pb2.ListModelsRequest())).models:
            assert [replica.outstanding_tokens for replica in model.replicas] == [0] * len(model.replicas)

    def replica_addresses(self, *replica_ids: str) -> list[ReplicaAddress]:
        return [ReplicaAddress(replica_id, self.addresses[replica_id]) for replica_id in replica_ids]

    async def model(self, name: str = "test") -> inference_pb2.Model:
        return await self.stub.GetModel(inference_pb2.GetModelRequest(model=name))

    async def wait_states(self, name: str, *states: inference_pb2.ReplicaState) -> inference_pb2.Model:
        """Until the model's replicas are in these states, in their order."""
        async with asyncio.timeout(10):
            while True:
                model = await self.model(name)
                if tuple(replica.state for replica in model.replicas) == states:
                    return model

    async def wait_health(self, status: health_pb2.HealthCheckResponse.ServingStatus, service: str = "") -> None:
        """Until the gateway says so of itself."""
        call = health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest(service=service))
        async for response in call:
            if response.status == status:
                call.cancel()
                return

    async def wait_serving(self) -> None:
        await asyncio.wait_for(self.wait_health(health_pb2.HealthCheckResponse.SERVING), 10)


CreateSetup = Callable[..., Awaitable[Setup]]


@pytest.fixture
async def create_setup(checkpoint: Path) -> AsyncIterator[CreateSetup]:
    """Starts a gateway and its replicas. At the end: every generation is gone everywhere, and so is every task."""
    tasks_before = asyncio.all_tasks()
    setups: list[Setup] = []

    async def create(
        *replicas: FakeReplica,
        models: Sequence[str] = ("test",),
        secret: str = SECRET,
        ready: bool = True,
        classes: ClassesConfig | None = None,
        **config: object,
    ) -> Setup:
        metrics = RecordingSink()
        gateway = Gateway(
            GatewayConfig(**{"port": 0, "http_port": None} | config),
            [ServedModel(name, checkpoint) for name in models],
            secret=secret,
            classes=classes,
            metrics=metrics,
        )
        port = await gateway.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=(("grpc.use_local_subchannel_pool", 1),))
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        setup = Setup(gateway, port, list(replicas), channel, stub, metrics)
        setups.append(setup)
        for replica in replicas:
            setup.addresses[replica.replica_id] = await replica.start()
        gateway.set_replicas("test", setup.replica_addresses(*setup.addresses))
        if ready and replicas:
            await setup.wait_serving()
        return setup

    yield create
    for setup in setups:
        if not setup.stopped:
            await setup.check_idle()
        for replica in setup.replicas:
            await replica.until(lambda replica=replica: not replica.running)
        await setup.channel.close()
        await setup.stop()
        for replica in setup.replicas:
            await replica.stop()
    left = {task for task in asyncio.all_tasks() - tasks_before if task is not asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=5)  # grpc's own tasks end with their calls
    assert not [task for task in left if not task.done()]


def request(prompt: str = "hello", **fields: object) -> inference_pb2.GenerateRequest:
    """A request for 8 tokens with seed 7, unless told otherwise: sampling fields and request fields alike."""
    sampling = {"max_tokens": 8, "seed": 7}
    request_fields = {}
    for name, value in fields.items():
        target = sampling if name in inference_pb2.SamplingParams.DESCRIPTOR.fields_by_name else request_fields
        target[name] = value
    if not {"chat", "token_ids"} & request_fields.keys():
        request_fields["prompt"] = prompt
    sampling = {name: value for name, value in sampling.items() if value is not None}
    return inference_pb2.GenerateRequest(sampling=inference_pb2.SamplingParams(**sampling), **request_fields)


async def failure(call: Awaitable[object]) -> Failure:
    """Awaits a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return Failure(caught.value)


async def collect(stream: AsyncIterator[inference_pb2.GenerateChunk]) -> list[inference_pb2.GenerateChunk]:
    return [chunk async for chunk in stream]


class Failure:
    """A status with its google.rpc details."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.message = error.details()
        self.reason = self.field = ""
        self.retry_after_s: float | None = None
        status = rpc_status.from_call(error)
        details = {detail.TypeName(): detail.value for detail in status.details} if status else {}
        if info := details.get("google.rpc.ErrorInfo"):
            message = error_details_pb2.ErrorInfo.FromString(info)
            assert message.domain == "cluster.v1"
            self.reason = message.reason
        if bad_request := details.get("google.rpc.BadRequest"):
            self.field = error_details_pb2.BadRequest.FromString(bad_request).field_violations[0].field
        if retry := details.get("google.rpc.RetryInfo"):
            delay = error_details_pb2.RetryInfo.FromString(retry).retry_delay
            self.retry_after_s = delay.ToTimedelta().total_seconds()
