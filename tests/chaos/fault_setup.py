"""Gateways in front of real engines with a fake model, all over real gRPC; after each test nothing is left of it."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import aiohttp
import grpc
import pytest
from fakes import FakeExecutor, draw_token
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.core.config import SchedulerConfig
from cluster.core.step import StepInput, StepOutput
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.executor import Executor
from cluster.errors import EngineFault
from cluster.gateway.config import GatewayConfig
from cluster.gateway.replica_link import ReplicaAddress
from cluster.gateway.security_config import AdminConfig
from cluster.gateway.server import Gateway, ServedModel
from cluster.observability.metrics import Metric
from cluster.serve.replica_server import ReplicaServer
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc

SECRET = "test-secret"
VOCAB_SIZE = 257  # the tokenizer's: a token is a byte, or the end of text
READY = pb.REPLICA_STATE_READY
PROMPT = (65, 66, 67)


async def until(holds: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Until it holds."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - of other objects' state, which nobody announces
            await asyncio.sleep(0.002)


class PacedExecutor(FakeExecutor):
    """Its steps end when they are allowed to, or after a time. Both can be changed while it runs.

    Args:
        gated: each step waits for ``allow``.
        step_s: how long a step takes otherwise.
    """

    def __init__(self, *, gated: bool = False, step_s: float = 0.0, **options: object) -> None:
        super().__init__(**{"vocab_size": VOCAB_SIZE, "max_model_len": 512, "num_blocks": 200} | options)
        self.step_s = step_s
        self._gated = gated
        self._permits = threading.Semaphore(0)

    def allow(self, num_steps: int = 1) -> None:
        self._permits.release(num_steps)

    def open(self) -> None:
        """From now on nothing waits."""
        self._gated, self.step_s = False, 0.0
        self._permits.release(1)

    def collect(self) -> StepOutput:
        if self._gated:
            self._permits.acquire()
        elif self.step_s:
            threading.Event().wait(self.step_s)
        return super().collect()

    def scheduled_in(self, step: StepInput) -> set[int]:
        return {share.sequence_id for share in step.scheduled}

    def ever_scheduled(self) -> set[int]:
        """Ids of all sequences that were part of a step."""
        return {sequence_id for step in self.steps for sequence_id in self.scheduled_in(step)}


class EngineReplica:
    """A replica's server with a real engine.

    Args:
        limits: of the scheduler.
    """

    def __init__(
        self,
        replica_id: str = "replica-0",
        executor: Executor | None = None,
        *,
        prefix_cache: bool = True,
        **limits: object,
    ) -> None:
        scheduler = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32} | limits)
        config = EngineConfig(scheduler=scheduler, prefix_cache=prefix_cache)
        self.replica_id = replica_id
        self.executor = executor or PacedExecutor()
        self.engine = Engine(self.executor, config)
        self.faults: list[EngineFault] = []
        self.address = ""
        self.stopped = False
        self.server = ReplicaServer(
            lambda: self.engine,
            replica_id=replica_id,
            model="test",
            secret=SECRET,
            limits=config,
            on_fault=self.faults.append,
        )

    async def start(self) -> EngineReplica:
        self.address = f"127.0.0.1:{await self.server.start()}"
        return self

    @property
    def at_gateways(self) -> ReplicaAddress:
        return ReplicaAddress(self.replica_id, self.address)

    @property
    def num_submissions(self) -> int:
        """That it follows: what was cancelled is none of them any more."""
        return len(self.server._routes)

    async def kill(self) -> None:
        """Breaks every stream, as a death does."""
        await self.server._server.stop(grace=None)
        await self.stop()

    async def stop(self) -> None:
        self.stopped = True
        if isinstance(self.executor, PacedExecutor):
            self.executor.open()
        await self.server.stop()

    async def check_idle(self) -> None:
        """Queues are empty and all blocks are free."""
        await until(lambda: not self.num_submissions and not self.engine.has_work)
        load = self.engine.load()
        assert (load.running, load.waiting, load.queued_tokens) == (0, 0, 0)
        assert load.free_blocks == load.num_blocks
        self.engine.check_integrity()
        # What gateways are told is the same.
        await until(lambda: self.server.load.free_blocks == load.num_blocks and not self.server.load.waiting)


class CountingSink:
    """Keeps how requests ended."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        if metric.name == "cluster_requests_total":
            self.outcomes.append(labels["outcome"])


class FrontGateway:
    """A gateway with a stub to it."""

    def __init__(self, checkpoint: Path, **config: object) -> None:
        self.metrics = CountingSink()
        defaults = {"port": 0, "http_port": None, "admin": AdminConfig(port=0)}
        self.gateway = Gateway(
            GatewayConfig(**defaults | config), [ServedModel("test", checkpoint)], secret=SECRET, metrics=self.metrics
        )
        self.address = ""
        self.stopped = False
        self.channel: grpc.aio.Channel
        self.stub: inference_pb2_grpc.InferenceServiceStub

    async def start(self) -> FrontGateway:
        self.address = f"127.0.0.1:{await self.gateway.start()}"
        # Fixed flow control windows: else gRPC widens them until a slow reader is none.
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0))
        self.channel = grpc.aio.insecure_channel(self.address, options=options)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return self

    async def states(self) -> list[int]:
        model = await self.stub.GetModel(pb.GetModelRequest(model="test"))
        return [replica.state for replica in model.replicas]

    async def wait_states(self, *states: int) -> None:
        async with asyncio.timeout(20):
            while tuple(await self.states()) != states:  # noqa: ASYNC110 - it is asked over the wire
                await asyncio.sleep(0.005)

    def num_queued(self) -> int:
        """Requests that wait here for their turn."""
        (entry,) = self.gateway._catalog
        return sum(backlog.requests for backlog in entry.admission.backlog().values())

    async def check_idle(self) -> None:
        """No generation is open, nothing waits, nothing is outstanding."""
        await until(lambda: not self.gateway.num_generations and not self.num_queued())
        assert await self.gateway.wait_idle(10), "a call is left open"
        model = await self.stub.GetModel(pb.GetModelRequest(model="test"))
        assert [replica.outstanding_tokens for replica in model.replicas] == [0] * len(model.replicas)

    async def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            await self.gateway.stop()
            await self.channel.close()


class FaultCluster:
    """Gateways that all know the same replicas."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self.gateways: list[FrontGateway] = []
        self.replicas: list[EngineReplica] = []

    @property
    def front(self) -> FrontGateway:
        return self.gateways[0]

    @property
    def stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        return self.front.stub

    @property
    def replica(self) -> EngineReplica:
        return self.replicas[0]

    @property
    def executor(self) -> PacedExecutor:
        return self.replica.executor

    @property
    def addresses(self) -> str:
        return ",".join(front.address for front in self.gateways)

    async def start(
        self, replicas: Sequence[EngineReplica], *, num_gateways: int = 1, **config: object
    ) -> FaultCluster:
        for _ in range(num_gateways):
            self.gateways.append(await FrontGateway(self._checkpoint, **config).start())
        await self.add(*replicas)
        return self

    async def add(self, *replicas: EngineReplica) -> None:
        """Starts replicas, and tells the gateways of all that have not been stopped."""
        for replica in replicas:
            self.replicas.append(await replica.start())
        alive = [replica.at_gateways for replica in self.replicas if not replica.stopped]
        for front in self.gateways:
            front.gateway.set_replicas("test", alive)
            await front.wait_states(*[READY] * len(alive))

    async def check_idle(self) -> None:
        for replica in self.replicas:
            if not replica.stopped and not replica.engine.fault:
                await replica.check_idle()
        for front in self.gateways:
            if not front.stopped:
                await front.check_idle()

    async def stop(self) -> None:
        for front in self.gateways:
            await front.stop()
        for replica in self.replicas:
            await replica.stop()


class Baseline:
    """What of this process is there before a test and must be there after it."""

    def __init__(self) -> None:
        self.tasks = asyncio.all_tasks()
        self.threads = set(threading.enumerate())
        self.descriptors = _num_descriptors()

    async def check(self) -> None:
        """Asyncio tasks, engines' threads and descriptors are as many as they were."""
        left = {task for task in asyncio.all_tasks() - self.tasks if task is not asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=5)  # grpc's own tasks end with their calls
        left = {task for task in left if not task.done()}
        assert not left, [(task.get_name(), task.get_coro(), task.get_stack()) for task in left]
        assert not [thread for thread in set(threading.enumerate()) - self.threads if thread.name == "engine"]
        await until(lambda: _num_descriptors() <= self.descriptors, timeout_s=5)


def _num_descriptors() -> int:
    gc.collect()  # grpc closes a channel's connections with the channel
    return len(os.listdir("/proc/self/fd"))


async def _warm_up(checkpoint: Path) -> None:
    """Has everything made that is made once per process and stays, such as grpc's own pipes."""
    cluster = await FaultCluster(checkpoint).start([EngineReplica()], http_port=0)
    await cluster.stub.Generate(ask("warm"))
    url = f"http://127.0.0.1:{cluster.front.gateway.http_port}/health"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 200
    await cluster.stop()


CreateFaults = Callable[..., Awaitable[FaultCluster]]


@pytest.fixture
async def create_faults(checkpoint: Path) -> AsyncIterator[CreateFaults]:
    """Starts a gateway in front of replicas. Before the test ends, everything must have come back to where it was."""
    await _warm_up(checkpoint)
    baseline = Baseline()
    clusters: list[FaultCluster] = []

    async def create(*replicas: EngineReplica, **config: object) -> FaultCluster:
        clusters.append(FaultCluster(checkpoint))
        return await clusters[-1].start(replicas or [EngineReplica()], **config)

    yield create
    await asyncio.gather(*(cluster.check_idle() for cluster in clusters))
    await asyncio.gather(*(cluster.stop() for cluster in clusters))
    clusters.clear()
    await baseline.check()


# -- what is asked for -----------------------------------------------------------------------------------------------


def ask(prompt: str | Sequence[int] = PROMPT, **fields: object) -> pb.GenerateRequest:
    """A request for 8 tokens with seed 7, unless told otherwise: sampling fields and request fields alike."""
    sampling: dict[str, object] = {"max_tokens": 8, "seed": 7}
    request: dict[str, object] = {}
    for name, value in fields.items():
        target = sampling if name in pb.SamplingParams.DESCRIPTOR.fields_by_name else request
        target[name] = value
    if isinstance(prompt, str):
        request["prompt"] = prompt
    else:
        request["token_ids"] = pb.TokenIds(ids=prompt)
    return pb.GenerateRequest(sampling=pb.SamplingParams(**sampling), **request)


def expected(
    request: pb.GenerateRequest, candidate_index: int = 0, *, num_prompt_tokens: int | None = None
) -> list[int]:
    """The tokens that the fake model draws, wherever and in whatever company."""
    sampling = request.sampling
    start = len(request.token_ids.ids) or len(request.prompt.encode())
    return [
        draw_token(sampling.seed, candidate_index, start + index, VOCAB_SIZE) for index in range(sampling.max_tokens)
    ]


def tokens_of(chunks: Sequence[pb.GenerateChunk], candidate_index: int = 0) -> list[int]:
    """Each at its place: a token twice, or left out, fails."""
    tokens: list[int] = []
    for chunk in chunks:
        if chunk.candidate_index == candidate_index and chunk.token_ids:
            assert chunk.token_offset == len(tokens)
            tokens += chunk.token_ids
    return tokens


class Stream:
    """A stream under way, read as it comes."""

    def __init__(self, front: FrontGateway, request: pb.GenerateRequest, **call: object) -> None:
        self.request = request
        self.call = front.stub.GenerateStream(request, **call)
        self.chunks: list[pb.GenerateChunk] = []
        self._task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for chunk in self.call:
            self.chunks.append(chunk)

    @property
    def tokens(self) -> list[int]:
        return tokens_of(self.chunks)

    async def has(self, num_tokens: int) -> None:
        """Until as many tokens have come."""
        await until(lambda: len(self.tokens) >= num_tokens or self._task.done())
        assert len(self.tokens) >= num_tokens

    async def whole(self) -> list[int]:
        """Its tokens, once it has ended well; they are the right ones."""
        await asyncio.wait_for(self._task, 30)
        assert self.tokens == expected(self.request)
        return self.tokens

    async def ledger(self) -> pb.Ledger:
        """Of a stream that has ended."""
        trailers = dict(await self.call.trailing_metadata())
        return pb.Ledger.FromString(trailers["cluster-ledger-bin"])

    async def failure(self) -> Failure:
        """How it ended, badly."""
        return await failure(self._task)


async def failure(call: Awaitable[object]) -> Failure:
    """Awaits a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(asyncio.ensure_future(call), 30)
    return Failure(caught.value)


class Failure:
    """A status with its google.rpc details."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        self.reason = self.field = ""
        self.retry_after_s: float | None = None
        status = rpc_status.from_call(error)
        details = {detail.TypeName(): detail.value for detail in status.details} if status else {}
        if info := details.get("google.rpc.ErrorInfo"):
            self.reason = error_details_pb2.ErrorInfo.FromString(info).reason
        if bad_request := details.get("google.rpc.BadRequest"):
            self.field = error_details_pb2.BadRequest.FromString(bad_request).field_violations[0].field
        if retry := details.get("google.rpc.RetryInfo"):
            self.retry_after_s = error_details_pb2.RetryInfo.FromString(retry).retry_delay.ToTimedelta().total_seconds()
