"""One gateway's stream to one replica: every request to that replica is multiplexed on it.

Runs on the event loop and calls back synchronously: a frame of 64 streams costs one wake-up here, not 64.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc

from cluster.core.replica_view import ReplicaView
from cluster.core.request import Priority
from cluster.core.routing import Placement, ReplicaSnapshot
from cluster.errors import EngineFault, ReplicaLost, error_from_reason
from cluster.gateway.replica_channel import open_replica_channel
from cluster.gateway.submission import Submission, SubmissionSink
from cluster.v1 import inference_pb2, replica_pb2, replica_pb2_grpc
from cluster.wire import PROTOCOL_VERSION, SECRET_KEY

_MIN_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaAddress:
    """Where a replica listens: ``address`` is ``"host:port"``."""

    replica_id: str
    address: str


class ReplicaLink:
    """Keeps a stream to a replica open, submits work on it and hands back what comes.

    Attributes:
        hello: what the replica said of itself when it was met last; None before.
        load: what it has said of its load last.
        outstanding_tokens: prompt and completion tokens that this gateway sent it and that are not done.
        held: whether an operator has taken it out of service.

    Args:
        credentials: of TLS, see ``open_replica_channel``; None: no TLS.
        on_change: called when ``ready`` may have changed.
        on_room: called when less has been sent that has not begun.
        on_outcome: called with what a request's end, or its first token, says of the replica; None: nothing.
    """

    def __init__(
        self,
        replica: ReplicaAddress,
        *,
        model: str,
        gateway_id: str,
        secret: str,
        credentials: grpc.ChannelCredentials | None,
        on_change: Callable[[], None],
        on_room: Callable[[], None],
        on_outcome: Callable[[ReplicaLink, bool | None], None],
    ) -> None:
        self.replica = replica
        self.hello: replica_pb2.ReplicaHello | None = None
        self.load = replica_pb2.ReplicaLoad()
        self.outstanding_tokens = 0
        self.held = False
        self._model = model
        self._gateway_id = gateway_id
        self._secret = secret
        self._credentials = credentials
        self._on_change = on_change
        self._on_room = on_room
        self._on_outcome = on_outcome
        self._view = ReplicaView(replica.replica_id)
        self._connected_s = 0.0
        self._questions: dict[int, asyncio.Future[bool]] = {}
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
        return self._connected and not self._retired and not self.held and not self.load.draining

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def ready_s(self) -> float:
        """For how long there has been a stream, in seconds."""
        return time.monotonic() - self._connected_s if self._connected else 0.0

    @property
    def num_submissions(self) -> int:
        return len(self._submissions)

    def has_room(self, priority: Priority, weight: float) -> bool:
        """Whether one more request of this class may be sent now.

        Args:
            weight: which part of the usual may be under way.
        """
        return self._view.has_room(priority, weight)

    def snapshot(self, placement: Placement) -> ReplicaSnapshot:
        """The replica as routing sees it, for one request."""
        return self._view.snapshot(
            placement, outstanding_tokens=self.outstanding_tokens, ready=self.ready, ready_s=self.ready_s
        )

    def status(self, *, ejected: bool) -> inference_pb2.ReplicaStatus:
        """How the replica stands, for ListModels."""
        hello, load = self.hello or replica_pb2.ReplicaHello(), self.load
        if self.ready:
            state = inference_pb2.REPLICA_STATE_EJECTED if ejected else inference_pb2.REPLICA_STATE_READY
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
            group=hello.group,
            fingerprint=self._view.fingerprint,
        )

    # -- work ---------------------------------------------------------------------------------------------------------

    def submit(self, message: replica_pb2.Submit, sink: SubmissionSink, placement: Placement) -> Submission:
        """Sends a request; only while ``ready``. Sets ``message.id``.

        Args:
            placement: what the choice of this replica was made with.
        """
        message.id = next(self._ids)
        submission = Submission(self, message, sink)
        self._submissions[submission.id] = submission
        self.outstanding_tokens += submission.outstanding_tokens
        self._view.send(submission.id, placement)
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

    def cancel_by_name(self, generation_id: str) -> asyncio.Future[bool]:
        """Ends what any gateway has submitted under this name; whether it ran there. False where the stream breaks."""
        question = next(self._ids)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if not self._connected:
            answer.set_result(False)
            return answer
        self._questions[question] = answer
        self._outbox.cancels_by_name.append(replica_pb2.CancelByName(id=question, generation_id=generation_id))
        self._outbox_filled.set()
        return answer

    def hand_back(self, why: str) -> None:
        """Cancels all that runs there and gives it back to its sinks as lost, to go on elsewhere."""
        lost = list(self._submissions.values())
        for submission in lost:
            self.cancel(submission, None)
        for submission in lost:
            submission.sink.on_replica_lost(why, 0)

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
        if self._view.begin(submission.id):
            if self._connected:
                self._on_outcome(self, None)
            self._on_room()
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
        async with open_replica_channel(self.replica.address, self._credentials) as channel:
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
        self._view = ReplicaView(
            self.replica.replica_id,
            block_size=hello.block_size,
            max_num_batched_tokens=hello.max_num_batched_tokens,
            group=hello.group,
            model_digest=hello.fingerprint.model_digest,
            fingerprint=short_fingerprint(hello.fingerprint),
        )
        self._hear(frame.load)
        self._connected = True
        self._connected_s = time.monotonic()
        self._reported = False
        self._on_change()

    def _dispatch(self, frame: replica_pb2.ReplicaFrame) -> None:
        submissions = self._submissions
        # Before the deltas: a prompt is in the cache before it leaves the prompts that are about to be.
        if frame.HasField("cached_blocks"):
            blocks = frame.cached_blocks
            self._view.hear_of_blocks(reset=blocks.reset, added=blocks.added, removed=blocks.removed)
        num_started = 0
        for delta in frame.deltas:
            submission = submissions.get(delta.id)
            # Cancelled while the frame was on its way: nobody waits for it.
            if submission is None or not submission.runs(delta.candidate_index):
                continue
            if not submission.started:
                submission.started = True
                self._view.begin(submission.id)
                self._on_outcome(self, True)
                num_started += 1
            finished = delta.finish_reason != 0
            self.outstanding_tokens -= submission.settle(delta.candidate_index, len(delta.token_ids), finished)
            if finished and not submission.live:
                self._forget(submission)
            submission.sink.on_tokens(delta)
        # Before the failures: what fails here goes elsewhere, and must not come back to a replica that is dying.
        was_draining = self.load.draining
        self._hear(frame.load)
        if was_draining != frame.load.draining:
            self._on_change()
        if frame.failures:
            self._hear_of_failures(frame.failures, was_draining)
        for reply in frame.cancel_replies:
            answer = self._questions.pop(reply.id, None)
            if answer is not None and not answer.done():
                answer.set_result(reply.found)
        if num_started:
            self._on_room()

    def _hear(self, load: replica_pb2.ReplicaLoad) -> None:
        self.load = load
        # Of what runs, the next token is not computed either.
        self._view.queued_tokens = max(load.queued_tokens - load.running, 0)
        self._view.step_s = load.step_s
        self._view.prompt_token_s = load.prompt_token_s

    def _hear_of_failures(self, failures: Iterable[replica_pb2.Failure], was_draining: bool) -> None:
        failed = [(self._submissions[failure.id], failure) for failure in failures if failure.id in self._submissions]
        lost = [submission for submission, failure in failed if failure.reason == ReplicaLost.reason]
        num_suspects = 0 if was_draining else _num_suspects(lost)
        for submission, failure in failed:
            if self._submissions.get(submission.id) is not submission:
                continue  # what another failure led to has ended it
            if failure.reason == EngineFault.reason:
                self._view.begin(submission.id)
                self._on_outcome(self, False)
            self._forget(submission)
            if failure.reason == ReplicaLost.reason:
                submission.sink.on_replica_lost(failure.message, num_suspects)
            else:
                submission.sink.on_failure(error_from_reason(failure.reason, failure.message, field=failure.field))

    def _lose_submissions(self) -> None:
        lost, self._submissions = self._submissions, {}
        questions, self._questions = self._questions, {}
        self.outstanding_tokens = 0
        self.load = replica_pb2.ReplicaLoad()
        self._view = ReplicaView(self.replica.replica_id)
        if lost:
            self._on_outcome(self, False)
        self._on_change()
        for answer in questions.values():
            if not answer.done():
                answer.set_result(False)
        num_suspects = _num_suspects(lost.values())
        for submission in lost.values():
            submission.sink.on_replica_lost("the stream to the replica broke", num_suspects)


def _num_suspects(lost: Iterable[Submission]) -> int:
    return sum(not submission.started for submission in lost)


def short_fingerprint(fingerprint: replica_pb2.Fingerprint) -> str:
    """Equal where fingerprints are equal; "" for a replica that says nothing of itself."""
    packed = fingerprint.SerializeToString(deterministic=True)
    return hashlib.blake2b(packed, digest_size=6).hexdigest() if packed else ""
