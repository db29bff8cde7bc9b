"""The replica's end of ``replica.proto``: gateways' streams on one side, an engine's thread on the other."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

import grpc

from cluster.engine.config import EngineConfig
from cluster.engine.executor import ModelInfo
from cluster.engine.submission import EngineLoad, StepEvents, Submission
from cluster.errors import Cancelled, ClusterError, Draining, EngineFault, InvalidRequest, ReplicaLost
from cluster.serve.addresses import join_host_port
from cluster.serve.engine_thread import Commands, Engine, EngineThread
from cluster.serve.replica_hello import hello
from cluster.serve.replica_stream import ReplicaStream
from cluster.v1 import replica_pb2, replica_pb2_grpc
from cluster.wire import PROTOCOL_VERSION, SECRET_KEY, priority_from_proto, sampling_from_proto

# A gateway that reads nothing for this many deltas (10 s of 64 streams at 100 tokens/s) is taken for stuck.
_MAX_PENDING_DELTAS = 65_536
_LOAD_INTERVAL_S = 0.1
_STALL_S = 120.0
_FLUSH_S = 5.0  # for gateways to take what they are told last
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


class _Route:
    """Where a submission's tokens go.

    Attributes:
        num_emitted_tokens: of each of its candidates that still run, by index, how many have gone there.
        generation_id: by which other gateways know it; empty: they do not.
    """

    __slots__ = ("generation_id", "num_emitted_tokens", "stream", "wire_id")

    def __init__(self, stream: ReplicaStream, wire_id: int, candidates: Iterable[int], generation_id: str) -> None:
        self.stream = stream
        self.wire_id = wire_id
        self.num_emitted_tokens = dict.fromkeys(candidates, 0)
        self.generation_id = generation_id


class ReplicaServer(replica_pb2_grpc.ReplicaServiceServicer):
    """Serves one engine to any number of gateways. Lives on one event loop.

    Args:
        create_engine: runs in the engine's thread.
        replica_id: as gateways know it.
        model: the served model's name.
        secret: gateways must present it.
        credentials: of TLS; None: no TLS.
        limits: of the engine.
        group: the replica's zone, rack or accelerator class; empty: none.
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
        credentials: grpc.ServerCredentials | None = None,
        limits: EngineConfig | None = None,
        group: str = "",
        host: str = "127.0.0.1",
        on_fault: Callable[[EngineFault], None] = lambda fault: None,
    ) -> None:
        self._engine = EngineThread(create_engine, on_step=self._publish, on_fault=self._die)
        self._replica_id = replica_id
        self._model = model
        self._secret = secret.encode()
        self._credentials = credentials
        self._limits = limits or EngineConfig()
        self._group = group
        self._host = host
        self._on_fault = on_fault
        self._streams: set[ReplicaStream] = set()
        self._cached_blocks: set[int] = set()
        self._routes: dict[int, _Route] = {}
        self._submission_ids = itertools.count()
        self._draining = False
        self._ending = asyncio.Event()
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
        address = join_host_port(self._host, 0)
        port: int = (
            self._server.add_insecure_port(address)
            if self._credentials is None
            else self._server.add_secure_port(address, self._credentials)
        )
        await self._server.start()
        return port

    def lose(self, fault: EngineFault) -> None:
        """The engine's model is gone, which it may not know while it has no work. From any thread."""
        self._engine.lose(fault)

    def check(self) -> None:
        """Raises EngineFault where the engine is dead or stuck. Being slow is not being stuck."""
        self._engine.check(_STALL_S)

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new work and waits for what runs; returns whether all of it finished in time. What did not is handed
        back, to go on elsewhere."""
        self._draining = True
        self._report_load_to_all()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            self._hand_back(f"the replica went away after {timeout_s:g} s of draining")
            return False
        return True

    async def stop(self) -> None:
        """Ends all streams, once what is pending on them is written, and the engine. Idempotent."""
        self._ending.set()
        await self._server.stop(grace=_FLUSH_S)
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
        stream = ReplicaStream()
        reader = asyncio.create_task(self._read(stream, request_iterator, context))
        writer = asyncio.create_task(stream.write(context.write))
        ending = asyncio.create_task(self._ending.wait())
        try:
            done, _ = await asyncio.wait([reader, writer, ending, stream.stuck], return_when=asyncio.FIRST_COMPLETED)
            if done == {ending}:
                # With an orderly end: one that is broken off may lose what is on its way.
                flushing = asyncio.create_task(stream.flush())
                await asyncio.wait([flushing, writer], timeout=_FLUSH_S, return_when=asyncio.FIRST_COMPLETED)
                flushing.cancel()
                return
            if stream.stuck.done():
                self._cancel_all(stream)  # now: the status may wait as long as the messages do
                writer.cancel()
                await asyncio.wait([writer])  # a status cannot go out while a message is being written
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the gateway has stopped reading")
            for task in done:
                task.result()
        finally:
            for task in (reader, writer, ending):
                task.cancel()
            self._streams.discard(stream)
            self._cancel_all(stream)
            self._report_load_to_all()  # each has its share of every quota

    async def _read(
        self,
        stream: ReplicaStream,
        request_iterator: AsyncIterator[replica_pb2.GatewayFrame],
        context: grpc.aio.ServicerContext,
    ) -> None:
        async for frame in request_iterator:
            if stream not in self._streams:
                await self._greet(stream, frame, context)
            self._obey(stream, frame)

    async def _greet(
        self, stream: ReplicaStream, frame: replica_pb2.GatewayFrame, context: grpc.aio.ServicerContext
    ) -> None:
        if frame.hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this replica speaks protocol {PROTOCOL_VERSION}, the gateway {frame.hello.protocol_version}",
            )
        stream.pending.hello.CopyFrom(
            hello(
                self.model_info,
                self._limits,
                replica_id=self._replica_id,
                model_name=self._model,
                group=self._group,
            )
        )
        if self._limits.prefix_cache:
            stream.reset_blocks(self._cached_blocks)
        self._streams.add(stream)
        self._report_load_to_all()

    def _obey(self, stream: ReplicaStream, frame: replica_pb2.GatewayFrame) -> None:
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
        for question in frame.cancels_by_name:
            named = self._cancel_by_name(question.generation_id)
            cancels += [(submission_id, None) for submission_id in named]
            stream.pending.cancel_replies.add(id=question.id, found=bool(named))
            self._report_load(stream)
        if submissions or cancels:
            self._engine.send(Commands(submissions=submissions, cancels=cancels))

    def _cancel_by_name(self, generation_id: str) -> list[int]:
        """Tells whoever submitted it; returns what the engine is to cancel."""
        found = [
            submission_id for submission_id, route in self._routes.items() if route.generation_id == generation_id != ""
        ]
        for submission_id in found:
            route = self._routes[submission_id]
            self._settle(submission_id, None)
            self._fail(route.stream, route.wire_id, Cancelled("the request was cancelled by name"))
        return found

    def _accept(self, stream: ReplicaStream, message: replica_pb2.Submit) -> Submission | None:
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
        self._routes[submission.submission_id] = _Route(stream, message.id, candidates, message.generation_id)
        self._idle.clear()
        return submission

    def _cancel_all(self, stream: ReplicaStream) -> None:
        submission_ids = list(stream.submission_ids.values())
        for submission_id in submission_ids:
            self._settle(submission_id, None)
        if submission_ids:
            self._engine.send(Commands(cancels=[(submission_id, None) for submission_id in submission_ids]))

    # -- to gateways --------------------------------------------------------------------------------------------------

    def _publish(self, events: StepEvents, load: EngineLoad) -> None:
        """One step's yield, sorted into one frame per stream."""
        changed, self.load = load != self.load, load
        touched: set[ReplicaStream] = set()
        routes = self._routes
        for delta in events.deltas:
            route = routes.get(delta.submission_id)
            if route is None or delta.candidate_index not in route.num_emitted_tokens:
                continue  # cancelled while the step ran
            route.num_emitted_tokens[delta.candidate_index] += len(delta.token_ids)
            route.stream.append(route.wire_id, delta)
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
        self._cached_blocks.update(events.cache_changes.added)
        self._cached_blocks.difference_update(events.cache_changes.removed)
        for stream in self._streams:
            stream.change_blocks(events.cache_changes)
            if len(stream.pending.deltas) > _MAX_PENDING_DELTAS and not stream.stuck.done():
                stream.stuck.set_result(None)
            if stream.has_block_changes and (idle or now - stream.told_blocks_at > _LOAD_INTERVAL_S):
                stream.tell_blocks(now)
                touched.add(stream)
            if stream in touched or (changed and (idle or now - stream.touched_at > _LOAD_INTERVAL_S)):
                self._report_load(stream)

    def _report_load(self, stream: ReplicaStream) -> None:
        load, message = self.load, stream.pending.load
        message.running = load.running
        message.waiting = load.waiting
        message.free_blocks = load.free_blocks
        message.num_blocks = load.num_blocks
        message.queued_tokens = load.queued_tokens
        message.draining = self._draining
        message.num_gateways = len(self._streams)
        message.step_s = load.step_s
        message.prompt_token_s = load.prompt_token_s
        message.tokens_per_s = load.tokens_per_s
        stream.touch(time.monotonic())

    def _report_load_to_all(self) -> None:
        for stream in self._streams:
            self._report_load(stream)

    def _fail(
        self,
        stream: ReplicaStream,
        wire_id: int,
        error: ClusterError,
        num_emitted_tokens: Mapping[int, int] | None = None,
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
            route.num_emitted_tokens.pop(candidate_index, None)
        if candidate_index is None or not route.num_emitted_tokens:
            del self._routes[submission_id]
            del route.stream.submission_ids[route.wire_id]
            if not self._routes:
                self._idle.set()

    def _die(self, fault: EngineFault) -> None:
        self._draining = True
        # The engine has handed back what it knew of; this is what came after its last step.
        self._hand_back(f"the replica died before the request began: {fault.message}")
        self._report_load_to_all()
        self._on_fault(fault)

    def _hand_back(self, why: str) -> None:
        """Ends what runs; whoever submitted it knows what has been emitted, and can have it go on elsewhere."""
        handed_back = list(self._routes.items())
        self._engine.send(Commands(cancels=[(submission_id, None) for submission_id, _ in handed_back]))
        for submission_id, route in handed_back:
            self._settle(submission_id, None)
            self._fail(route.stream, route.wire_id, ReplicaLost(why), route.num_emitted_tokens)
