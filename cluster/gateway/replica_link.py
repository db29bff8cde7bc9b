"""One gateway's stream to one replica: every request to that replica is multiplexed on it.

Runs on the event loop and calls back synchronously: a frame of 64 streams costs one wake-up here, not 64.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import grpc

from cluster.errors import ClusterError, EngineFault, ReplicaLost, error_from_reason
from cluster.v1 import inference_pb2, replica_pb2, replica_pb2_grpc
from cluster.wire import PROTOCOL_VERSION, SECRET_KEY

_MIN_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 2.0
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Each attempt connects at once: the link has its own backoff, and a shared subchannel would add a second one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    # A host that vanishes closes no socket; pings find out.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaAddress:
    """Where a replica listens: ``address`` is ``"host:port"``."""

    replica_id: str
    address: str


class SubmissionSink(Protocol):
    """Who gets what a submission yields. Called on the event loop; must not block."""

    def on_tokens(self, delta: replica_pb2.TokenDelta) -> None:
        """What one step added to one candidate. ``delta`` is only valid during the call."""

    def on_failure(self, error: ClusterError) -> None:
        """The replica gave up on the submission; nothing follows."""

    def on_replica_lost(self, why: str) -> None:
        """The stream broke, or the replica's engine has died; nothing follows."""


class Submission:
    """A request's stay at one replica."""

    __slots__ = ("_link", "_prompt_tokens", "_remaining", "id", "sink")

    def __init__(self, link: ReplicaLink, message: replica_pb2.Submit, sink: SubmissionSink) -> None:
        self.id = message.id
        self.sink = sink
        self._link = link
        self._prompt_tokens = len(message.prompt_token_ids)
        self._remaining: dict[int, int] = dict.fromkeys(range(message.sampling.n), message.sampling.max_tokens)

    @property
    def live(self) -> bool:
        """Whether any candidate is still to come."""
        return bool(self._remaining)

    @property
    def outstanding_tokens(self) -> int:
        return self._prompt_tokens + sum(self._remaining.values())

    def settle(self, candidate_index: int, num_tokens: int, finished: bool) -> int:
        """Books what a candidate received; returns how many outstanding tokens that takes away.

        Raises:
            KeyError: no such candidate is running.
        """
        settled, self._prompt_tokens = self._prompt_tokens, 0
        remaining = self._remaining[candidate_index]
        if finished:
            del self._remaining[candidate_index]
            return settled + remaining
        num_tokens = min(num_tokens, remaining)
        self._remaining[candidate_index] = remaining - num_tokens
        return settled + num_tokens

    def cancel(self, candidate_index: int | None = None) -> None:
        """Tells the replica to stop, one candidate or all. What had ended is left alone; the sink hears no more."""
        self._link.cancel(self, candidate_index)

    def runs(self, candidate_index: int) -> bool:
        return candidate_index in self._remaining


class ReplicaLink:
    """Keeps a stream to a replica open, submits work on it and hands back what comes.

    Args:
        on_change: called when ``ready`` may have changed.
    """

    def __init__(
        self,
        replica: ReplicaAddress,
        *,
        model: str,
        gateway_id: str,
        secret: str,
        on_change: Callable[[], None],
    ) -> None:
        self.replica = replica
        self.hello: replica_pb2.ReplicaHello | None = None
        self.load = replica_pb2.ReplicaLoad()
        self.outstanding_tokens = 0
        self._model = model
        self._gateway_id = gateway_id
        self._secret = secret
        self._on_change = on_change
        self._submissions: dict[int, Submission] = {}
        self._ids = itertools.count(1)
        self._connected = False
        self._retired = False
        self._reported = False
        self._outbox = replica_pb2.GatewayFrame()
        self._outbox_filled = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"replica-link-{replica.replica_id}")

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the replica takes new work."""
        return self._connected and not self._retired and not self.load.draining

    @property
    def num_submissions(self) -> int:
        return len(self._submissions)

    def status(self) -> inference_pb2.ReplicaStatus:
        """How the replica stands, for ListModels."""
        hello, load = self.hello or replica_pb2.ReplicaHello(), self.load
        if self.ready:
            state = inference_pb2.REPLICA_STATE_READY
        elif self._connected:
            state = inference_pb2.REPLICA_STATE_DRAINING
        else:
            state = inference_pb2.REPLICA_STATE_CONNECTING
        return inference_pb2.ReplicaStatus(
            replica_id=self.replica.replica_id,
            state=state,
            address=self.replica.address,
            running=load.running,
            waiting=load.waiting,
            outstanding_tokens=self.outstanding_tokens,
            kv_capacity_tokens=hello.kv_capacity_tokens,
            kv_usage=1 - load.free_blocks / load.num_blocks if load.num_blocks else 0.0,
            device=hello.device,
        )

    # -- work ---------------------------------------------------------------------------------------------------------

    def submit(self, message: replica_pb2.Submit, sink: SubmissionSink) -> Submission:
        """Sends a request; only while ``ready``. Sets ``message.id``."""
        message.id = next(self._ids)
        submission = Submission(self, message, sink)
        self._submissions[submission.id] = submission
        self.outstanding_tokens += submission.outstanding_tokens
        self._outbox.submits.append(message)
        self._outbox_filled.set()
        return submission

    def cancel(self, submission: Submission, candidate_index: int | None) -> None:
        """See Submission.cancel."""
        if self._submissions.get(submission.id) is not submission:
            return
        if candidate_index is not None:
            if not submission.runs(candidate_index):
                return
            self.outstanding_tokens -= submission.settle(candidate_index, 0, True)
        self._outbox.cancels.append(replica_pb2.Cancel(id=submission.id, candidate_index=candidate_index))
        self._outbox_filled.set()
        if candidate_index is None or not submission.live:
            self._forget(submission)

    def retire(self) -> None:
        """Takes no new work from now on, and closes when what runs has finished."""
        self._retired = True
        if not self._submissions:
            self._task.cancel()

    async def close(self) -> None:
        """Ends the stream; what runs on it is lost."""
        self._retired = True
        self._task.cancel()
        await asyncio.wait([self._task])

    @property
    def closed(self) -> bool:
        return self._task.done()

    def _forget(self, submission: Submission) -> None:
        self.outstanding_tokens -= submission.outstanding_tokens
        del self._submissions[submission.id]
        if self._retired and not self._submissions:
            self._task.cancel()

    # -- the stream ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff_s = _MIN_BACKOFF_S
        while not self._retired:
            try:
                await self._converse()
                problem = "it closed the stream"
            except grpc.aio.AioRpcError as error:
                problem = f"{error.code().name}: {error.details()}"
            except EngineFault as error:
                problem = error.message
            finally:
                was_connected, self._connected = self._connected, False
                self._lose_submissions()
            self._report(problem, was_connected)
            backoff_s = _MIN_BACKOFF_S if was_connected else min(2 * backoff_s, _MAX_BACKOFF_S)
            # Jitter: many gateways must not meet a restarted replica in step.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    def _report(self, problem: str, was_connected: bool) -> None:
        """One line per loss, not one per attempt."""
        level = logging.WARNING if was_connected or not self._reported else logging.DEBUG
        self._reported = True
        logger.log(level, "no stream to replica %s at %s: %s", self.replica.replica_id, self.replica.address, problem)

    async def _converse(self) -> None:
        """One stream, from connecting to its end.

        Raises:
            grpc.aio.AioRpcError: it ended with a status.
            EngineFault: the replica is not the one that we look for.
        """
        self._outbox = replica_pb2.GatewayFrame(
            hello=replica_pb2.GatewayHello(gateway_id=self._gateway_id, protocol_version=PROTOCOL_VERSION)
        )
        self._outbox_filled.set()
        async with grpc.aio.insecure_channel(self.replica.address, options=_CHANNEL_OPTIONS) as channel:
            call = replica_pb2_grpc.ReplicaServiceStub(channel).Connect(metadata=((SECRET_KEY, self._secret),))
            writer = asyncio.create_task(self._write_frames(call))
            try:
                frame = await call.read()
                if frame is not grpc.aio.EOF:
                    self._meet(frame)
                while frame is not grpc.aio.EOF:
                    self._dispatch(frame)
                    frame = await call.read()
            finally:
                writer.cancel()
                call.cancel()
                await asyncio.wait([writer])

    async def _write_frames(self, call: grpc.aio.StreamStreamCall) -> None:
        """Sends what has gathered since the last write, until the stream breaks (the reader says why)."""
        try:
            while True:
                await self._outbox_filled.wait()
                self._outbox_filled.clear()
                frame, self._outbox = self._outbox, replica_pb2.GatewayFrame()
                await call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return

    def _meet(self, frame: replica_pb2.ReplicaFrame) -> None:
        hello = frame.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise EngineFault(f"it speaks protocol {hello.protocol_version}, this gateway {PROTOCOL_VERSION}")
        if hello.model != self._model:
            raise EngineFault(f"it serves {hello.model!r}, not {self._model!r}")
        self.hello = hello
        self.load = frame.load
        self._connected = True
        self._reported = False
        self._on_change()

    def _dispatch(self, frame: replica_pb2.ReplicaFrame) -> None:
        submissions = self._submissions
        for delta in frame.deltas:
            submission = submissions.get(delta.id)
            # Cancelled while the frame was on its way: nobody waits for it.
            if submission is None or not submission.runs(delta.candidate_index):
                continue
            finished = delta.finish_reason != 0
            self.outstanding_tokens -= submission.settle(delta.candidate_index, len(delta.token_ids), finished)
            if finished and not submission.live:
                self._forget(submission)
            submission.sink.on_tokens(delta)
        # Before the failures: what fails here goes elsewhere, and must not come back to a replica that is dying.
        was_draining, self.load = self.load.draining, frame.load
        if was_draining != frame.load.draining:
            self._on_change()
        for failure in frame.failures:
            submission = submissions.get(failure.id)
            if submission is None:
                continue
            self._forget(submission)
            if failure.reason == ReplicaLost.reason:
                submission.sink.on_replica_lost(failure.message)
            else:
                submission.sink.on_failure(error_from_reason(failure.reason, failure.message, field=failure.field))

    def _lose_submissions(self) -> None:
        lost, self._submissions = self._submissions, {}
        self.outstanding_tokens = 0
        self.load = replica_pb2.ReplicaLoad()
        self._on_change()
        for submission in lost.values():
            submission.sink.on_replica_lost("the stream to the replica broke")
