"""The replica's end of ``replica.proto``: gateways' streams on one side, an engine's thread on the other."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import asdict

import grpc

from cluster.engine.executor import ModelInfo
from cluster.engine.submission import Delta, EngineLoad, StepEvents, Submission
from cluster.errors import ClusterError, Draining, EngineFault, InvalidRequest, ReplicaLost
from cluster.serve.engine_thread import Commands, Engine, EngineThread
from cluster.v1 import replica_pb2, replica_pb2_grpc
from cluster.wire import (
    PROTOCOL_VERSION,
    SECRET_KEY,
    finish_reason_to_proto,
    logprobs_to_proto,
    priority_from_proto,
    sampling_from_proto,
)

# A gateway that reads nothing for this many deltas (10 s of 64 streams at 100 tokens/s) is taken for stuck.
_MAX_PENDING_DELTAS = 65_536
_LOAD_INTERVAL_S = 0.1
_STALL_S = 120.0
_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Gateways ping every 10 s to find dead hosts; the default policy would call that abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)


class _Stream:
    """One gateway's stream. What is not yet written gathers in one frame, so a slow reader costs no extra messages."""

    def __init__(self) -> None:
        self.submission_ids: dict[int, int] = {}  # wire id -> the engine's submission id
        self.pending = replica_pb2.ReplicaFrame()
        self.filled = asyncio.Event()
        self.reported_at = 0.0
        self.stuck: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take_pending(self) -> replica_pb2.ReplicaFrame:
        frame, self.pending = self.pending, replica_pb2.ReplicaFrame()
        self.filled.clear()
        return frame


class _Route:
    """Where a submission's tokens go, and which of its candidates still run."""

    __slots__ = ("candidates", "stream", "wire_id")

    def __init__(self, stream: _Stream, wire_id: int, candidates: Iterable[int]) -> None:
        self.stream = stream
        self.wire_id = wire_id
        self.candidates = set(candidates)


class ReplicaServer(replica_pb2_grpc.ReplicaServiceServicer):
    """Serves one engine to any number of gateways. Lives on one event loop.

    Args:
        create_engine: runs in the engine's thread.
        replica_id: as gateways know it.
        model: the served model's name.
        secret: gateways must present it.
        host: address to bind.
        on_fault: called on the loop when the engine has died and its failures are on their way.
    """

    def __init__(
        self,
        create_engine: Callable[[], Engine],
        *,
        replica_id: str,
        model: str,
        secret: str,
        host: str = "127.0.0.1",
        on_fault: Callable[[EngineFault], None] = lambda fault: None,
    ) -> None:
        self._engine = EngineThread(create_engine, on_step=self._publish, on_fault=self._die)
        self._replica_id = replica_id
        self._model = model
        self._secret = secret.encode()
        self._host = host
        self._on_fault = on_fault
        self._streams: set[_Stream] = set()
        self._routes: dict[int, _Route] = {}
        self._submission_ids = itertools.count()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        replica_pb2_grpc.add_ReplicaServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.load = EngineLoad(running=0, waiting=0, free_blocks=0, num_blocks=0, queued_tokens=0, num_preemptions=0)
        self.model_info: ModelInfo

    async def start(self) -> int:
        """Builds the engine, then listens; returns the port."""
        self.model_info = model = await self._engine.start()
        self.load = EngineLoad(
            running=0,
            waiting=0,
            free_blocks=model.num_blocks,
            num_blocks=model.num_blocks,
            queued_tokens=0,
            num_preemptions=0,
        )
        port: int = self._server.add_insecure_port(f"{self._host}:0")
        await self._server.start()
        return port

    def lose(self, fault: EngineFault) -> None:
        """The engine's model is gone, which it may not know while it has no work. From any thread."""
        self._engine.lose(fault)

    def check(self) -> None:
        """Raises EngineFault where the engine is dead or stuck. Being slow is not being stuck."""
        self._engine.check(_STALL_S)

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new work and waits for what runs; returns whether all of it finished in time."""
        self._draining = True
        for stream in self._streams:
            self._report_load(stream)
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Ends all streams and the engine. Idempotent."""
        await self._server.stop(grace=None)
        await self._engine.stop()

    # -- from gateways ------------------------------------------------------------------------------------------------

    async def Connect(
        self, request_iterator: AsyncIterator[replica_pb2.GatewayFrame], context: grpc.aio.ServicerContext
    ) -> None:
        """See replica.proto."""
        metadata = dict(context.invocation_metadata() or ())
        presented = metadata.get(SECRET_KEY, "")
        if not hmac.compare_digest(presented.encode() if isinstance(presented, str) else presented, self._secret):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's secret is missing or wrong")
        stream = _Stream()
        reader = asyncio.create_task(self._read(stream, request_iterator, context))
        writer = asyncio.create_task(self._write(stream, context))
        try:
            done, _ = await asyncio.wait([reader, writer, stream.stuck], return_when=asyncio.FIRST_COMPLETED)
            if stream.stuck.done():
                self._cancel_all(stream)  # now: the status may wait as long as the messages do
                writer.cancel()
                await asyncio.wait([writer])  # a status cannot go out while a message is being written
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the gateway has stopped reading")
            for task in done:
                task.result()
        finally:
            reader.cancel()
            writer.cancel()
            self._streams.discard(stream)
            self._cancel_all(stream)

    async def _read(
        self,
        stream: _Stream,
        request_iterator: AsyncIterator[replica_pb2.GatewayFrame],
        context: grpc.aio.ServicerContext,
    ) -> None:
        async for frame in request_iterator:
            if stream not in self._streams:
                await self._greet(stream, frame, context)
            self._obey(stream, frame)

    async def _greet(self, stream: _Stream, frame: replica_pb2.GatewayFrame, context: grpc.aio.ServicerContext) -> None:
        if frame.hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this replica speaks protocol {PROTOCOL_VERSION}, the gateway {frame.hello.protocol_version}",
            )
        model = self.model_info
        stream.pending.hello.CopyFrom(
            replica_pb2.ReplicaHello(
                replica_id=self._replica_id,
                model=self._model,
                architecture=model.architecture,
                max_model_len=model.max_model_len,
                vocab_size=model.vocab_size,
                dtype=model.dtype,
                device=model.device,
                kv_capacity_tokens=model.kv_capacity_tokens,
                protocol_version=PROTOCOL_VERSION,
                batch_invariant=model.batch_invariant,
            )
        )
        self._streams.add(stream)
        self._report_load(stream)

    async def _write(self, stream: _Stream, context: grpc.aio.ServicerContext) -> None:
        while True:
            await stream.filled.wait()
            await context.write(stream.take_pending())

    def _obey(self, stream: _Stream, frame: replica_pb2.GatewayFrame) -> None:
        submissions = [
            submission for message in frame.submits if (submission := self._accept(stream, message)) is not None
        ]
        cancels = []
        for cancel in frame.cancels:
            submission_id = stream.submission_ids.get(cancel.id)
            if submission_id is None:
                continue  # it has ended meanwhile
            candidate_index = cancel.candidate_index if cancel.HasField("candidate_index") else None
            cancels.append((submission_id, candidate_index))
            self._settle(submission_id, candidate_index)
        if submissions or cancels:
            self._engine.send(Commands(submissions=submissions, cancels=cancels))

    def _accept(self, stream: _Stream, message: replica_pb2.Submit) -> Submission | None:
        try:
            if self._draining:
                raise Draining("this replica is going away")
            if message.id in stream.submission_ids:
                raise InvalidRequest(f"submission {message.id} is already live on this stream", field="id")
            priority = priority_from_proto(message.priority)
            if priority is None:
                raise InvalidRequest(f"there is no class {message.priority}", field="priority")
            submission = Submission(
                submission_id=next(self._submission_ids),
                prompt_token_ids=list(message.prompt_token_ids),
                sampling=sampling_from_proto(message.sampling),
                priority=priority,
                deadline=time.monotonic() + message.deadline_ms / 1000 if message.HasField("deadline_ms") else None,
                cache_salt=message.cache_salt,
                emitted={emitted.candidate_index: list(emitted.token_ids) for emitted in message.emitted},
            )
            if len(submission.emitted) < len(message.emitted):
                raise InvalidRequest("emitted names a candidate twice", field="emitted")
        except ClusterError as error:
            self._fail(stream, message.id, error)
            return None
        stream.submission_ids[message.id] = submission.submission_id
        candidates = submission.emitted or range(submission.sampling.n)
        self._routes[submission.submission_id] = _Route(stream, message.id, candidates)
        self._idle.clear()
        return submission

    def _cancel_all(self, stream: _Stream) -> None:
        submission_ids = list(stream.submission_ids.values())
        for submission_id in submission_ids:
            self._settle(submission_id, None)
        if submission_ids:
            self._engine.send(Commands(cancels=[(submission_id, None) for submission_id in submission_ids]))

    # -- to gateways --------------------------------------------------------------------------------------------------

    def _publish(self, events: StepEvents, load: EngineLoad) -> None:
        """One step's yield, sorted into one frame per stream."""
        changed, self.load = load != self.load, load
        touched: set[_Stream] = set()
        routes = self._routes
        for delta in events.deltas:
            route = routes.get(delta.submission_id)
            if route is None or delta.candidate_index not in route.candidates:
                continue  # cancelled while the step ran
            _append(route.stream.pending, route.wire_id, delta)
            touched.add(route.stream)
            if delta.finish_reason is not None:
                self._settle(delta.submission_id, delta.candidate_index)
        for failure in events.failures:
            route = routes.get(failure.submission_id)
            if route is not None:
                self._settle(failure.submission_id, None)
                # Told with the failures, so that nothing of this is sent here again.
                self._draining |= isinstance(failure.error, ReplicaLost)
                self._fail(route.stream, route.wire_id, failure.error, failure.num_emitted_tokens)
                touched.add(route.stream)
        # Others hear of the load too, but not at every step; the last change before silence always gets through.
        idle = load.running == 0 and load.waiting == 0
        now = time.monotonic()
        for stream in self._streams:
            if len(stream.pending.deltas) > _MAX_PENDING_DELTAS and not stream.stuck.done():
                stream.stuck.set_result(None)
            if stream in touched or (changed and (idle or now - stream.reported_at > _LOAD_INTERVAL_S)):
                self._report_load(stream)

    def _report_load(self, stream: _Stream) -> None:
        load, message = self.load, stream.pending.load
        message.running = load.running
        message.waiting = load.waiting
        message.free_blocks = load.free_blocks
        message.num_blocks = load.num_blocks
        message.queued_tokens = load.queued_tokens
        message.draining = self._draining
        stream.reported_at = time.monotonic()
        stream.filled.set()

    def _fail(
        self, stream: _Stream, wire_id: int, error: ClusterError, num_emitted_tokens: Mapping[int, int] | None = None
    ) -> None:
        stream.pending.failures.add(
            id=wire_id,
            reason=error.reason,
            message=error.message,
            field=error.field,
            num_emitted_tokens=num_emitted_tokens,
        )
        self._report_load(stream)

    def _settle(self, submission_id: int, candidate_index: int | None) -> None:
        """Forgets a candidate, or all of them, and the submission with its last one."""
        route = self._routes.get(submission_id)
        if route is None:
            return
        if candidate_index is not None:
            route.candidates.discard(candidate_index)
        if candidate_index is None or not route.candidates:
            del self._routes[submission_id]
            del route.stream.submission_ids[route.wire_id]
            if not self._routes:
                self._idle.set()

    def _die(self, fault: EngineFault) -> None:
        self._draining = True
        # The engine has handed back what it knew of; this is what came after its last step.
        unknown = ReplicaLost(f"the replica died before the request began: {fault.message}")
        for submission_id, route in list(self._routes.items()):
            self._settle(submission_id, None)
            self._fail(route.stream, route.wire_id, unknown)
        for stream in self._streams:
            self._report_load(stream)
        self._on_fault(fault)


def _append(frame: replica_pb2.ReplicaFrame, wire_id: int, delta: Delta) -> None:
    """Runs once per token: fields at their default are left out."""
    message = frame.deltas.add(id=wire_id, candidate_index=delta.candidate_index, token_ids=delta.token_ids)
    if delta.logprobs:
        message.logprobs.extend(logprobs_to_proto(delta.logprobs))
    if delta.finish_reason is not None:
        message.finish_reason = finish_reason_to_proto(delta.finish_reason)
    if delta.cached_tokens:
        message.cached_tokens = delta.cached_tokens
    if delta.times is not None:
        message.times.CopyFrom(replica_pb2.StayTimes(**asdict(delta.times)))
