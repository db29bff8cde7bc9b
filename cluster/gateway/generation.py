"""A client's generation, from admission to its last token, wherever it runs."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

from cluster.core.routing import Placement
from cluster.errors import ClusterError, DeadlineExceeded, EngineFault, ModelWarming, ReplicaLost, SlowReader
from cluster.gateway.balancer import Balancer
from cluster.gateway.candidate import Candidate
from cluster.gateway.ledger import LedgerBook
from cluster.gateway.reader import Reader
from cluster.gateway.replica_link import ReplicaLink
from cluster.gateway.submission import Submission
from cluster.observability.metrics import ITL_S, TTFT_S, MetricSink
from cluster.v1 import inference_pb2, replica_pb2

# Refusals by one replica that another may not share. Nothing was executed.
_WORTH_ANOTHER_REPLICA = frozenset({"DRAINING", "OVERLOADED"})
_MAX_SUSPICION = 3.0  # of having killed replicas
_MAX_LOSSES = 8  # without a token in between, whoever else was there
_REFUSED_AGAIN_S = 0.05


def moving() -> inference_pb2.Progress:
    return inference_pb2.Progress(stage=inference_pb2.Progress.STAGE_MOVING)


def warming() -> inference_pb2.Progress:
    return inference_pb2.Progress(stage=inference_pb2.Progress.STAGE_WARMING)


class Generation:
    """What runs for a request. Replica links push into it, readers wait on it; all on the event loop.

    It is the sink of its submission. When its replica is lost it goes on at another, from what it has: a stream is not
    ended by the death of a replica, and each token is there once. Work that has tokens stays with its model's digest,
    and with equal fingerprints where there are any. Where there is no replica it waits for one until its deadline.

    A request that kills replicas must not go round them all. Whoever is lost with a replica that had given it nothing
    yet is suspected, each of k with 1/k: at three it ends with ReplicaLost. A token clears it; a drain is nobody's
    fault. A fault of the request alone is tried on another replica where nothing was generated, once.

    Attributes:
        error: why it ended before its time.
        seed, num_prompt_tokens: known once it has started.
        fingerprint: of the replica that made its last tokens, as bytes; empty before there are any.

    Args:
        metrics: gets times to first token and between tokens.
    """

    def __init__(self, generation_id: str, *, metrics: MetricSink) -> None:
        self.generation_id = generation_id
        self.error: Exception | None = None
        self.candidates: list[Candidate] = []
        self.num_prompt_tokens = 0
        self.seed = 0
        self.fingerprint = b""
        self._readers: list[Reader] = []
        self._model = ""
        self._metrics = metrics
        self._balancer: Balancer | None = None
        self._placement: Placement | None = None
        self._submit: replica_pb2.Submit | None = None
        self._submission: Submission | None = None
        self.fingerprint = b""  # of whoever makes its tokens, as clients are told
        self._fingerprint: replica_pb2.Fingerprint | None = None  # of whoever made the last tokens
        self._tried: list[ReplicaLink] = []
        self._num_losses = 0
        self._suspicion = 0.0
        self._faulted = False
        self._stay_started = False
        self._num_finished = 0
        self._ended = False
        self._exact = True
        self._started_s = time.monotonic()
        self._book = LedgerBook(self._started_s)
        self._expires_s = self._told_expires_s = 0.0  # in monotonic seconds: its deadline, and what the replica knows
        self._deadline: asyncio.TimerHandle | None = None
        self._later: asyncio.TimerHandle | None = None
        self._progress: Callable[[], inference_pb2.Progress] | None = None
        self._on_end: list[Callable[[], None]] = []

    # -- its beginning ------------------------------------------------------------------------------------------------

    def start(
        self,
        submit: replica_pb2.Submit,
        candidates: list[Candidate],
        *,
        model: str,
        balancer: Balancer,
        placement: Placement,
        fingerprint: replica_pb2.Fingerprint | None = None,
    ) -> None:
        """Sends the work to a replica; ``expire_after`` has been called.

        Args:
            candidates: of which those that a client has had a part of go on after that.
            fingerprint: of whoever made that part; None: not known, or there is none.

        Raises:
            ClusterError: it was cancelled or its deadline passed meanwhile.
        """
        if self.error is not None:
            raise self.error
        self._model = model
        self.num_prompt_tokens = len(submit.prompt_token_ids)
        self.seed = submit.sampling.seed
        self._submit = submit
        self._balancer = balancer
        self._placement = placement
        self._fingerprint = fingerprint
        self.candidates = candidates
        self._exact = fingerprint is not None or not self._touched
        self._num_finished = sum(bool(candidate.finish_reason) for candidate in candidates)
        self._readers = [reader for reader in self._readers if reader.begin()]
        if self.complete or not self._readers:
            self._end()
        else:
            self._place_when_ready()
        self._wake()

    # -- its place ----------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        """At a replica, where it goes on from what it has.

        Raises:
            ModelWarming: none is ready that was not tried.
        """
        submit, placement = self._submit, self._placement
        touched = self._touched
        del submit.emitted[:]
        if touched:
            most = max(len(candidate.token_ids) for candidate in self.candidates)
            placement = dataclasses.replace(
                placement,
                num_prompt_tokens=placement.num_prompt_tokens + most,
                max_tokens=max(placement.max_tokens - most, 1),
            )
        fingerprint = self._fingerprint if touched else None
        link = self._balancer.pick(
            placement,
            excluded=self._tried,
            only_digest=None if fingerprint is None else fingerprint.model_digest,
            prefer=fingerprint,
        )
        now = time.monotonic()
        if touched:
            submit.emitted.extend(
                replica_pb2.EmittedTokens(candidate_index=candidate.index, token_ids=candidate.token_ids)
                for candidate in self.candidates
                if not candidate.finish_reason
            )
            for candidate in self.candidates:
                candidate.move()
            found = link.hello.fingerprint
            self._exact = self._exact and found == fingerprint and found.batch_invariant
        submit.deadline_ms = max(int((self._expires_s - now) * 1000), 0)
        self._told_expires_s = self._expires_s
        self._tried.append(link)
        self._stay_started = False
        self._book.place(link.replica.replica_id, now)
        self._submission = link.submit(submit, self, placement)
        self._fingerprint = link.hello.fingerprint
        self.fingerprint = self._fingerprint.SerializeToString(deterministic=True)
        if self._progress is not moving:
            self._progress = None

    def _place_when_ready(self) -> None:
        """At any replica, as soon as there is one: one that comes back after it was lost is as good as another."""
        self._later = None
        self._tried.clear()
        try:
            self._place()
        except ModelWarming:
            if self._progress is not moving:
                self.report(warming)
            self._balancer.wait_ready(self._place_when_ready)

    @property
    def _touched(self) -> bool:
        """Whether anything was generated, so that another start would not be the first."""
        return any(candidate.token_ids or candidate.finish_reason for candidate in self.candidates)

    # -- from the replica ---------------------------------------------------------------------------------------------

    def on_tokens(self, delta: replica_pb2.TokenDelta) -> None:
        candidate = self.candidates[delta.candidate_index]
        try:
            candidate.push(delta)
        except Exception as error:  # a fault of one generation must not end the others on this link
            self.fail(error)
            return
        now = time.monotonic()
        if not self._stay_started:
            self._begin_stay(now)
        if candidate.first_token_s is None:
            candidate.first_token_s = now
            if candidate.index == 0:
                self._metrics.record(TTFT_S, now - self._started_s, model=self._model)
        if candidate.finish_reason:
            candidate.last_token_s = now
            self._finish(delta, now)
        for reader in self._readers:
            if not reader.notice(candidate):
                self._cut_off(reader)

    def _begin_stay(self, now: float) -> None:
        self._stay_started = True
        self.fingerprint = self._fingerprint.SerializeToString()
        self._num_losses = 0
        self._suspicion = 0.0
        self._progress = None
        self._book.start(now)

    def _finish(self, delta: replica_pb2.TokenDelta, now: float) -> None:
        self._num_finished += 1
        self._book.finish(delta.times if delta.HasField("times") else None)
        # Ends it at the replica where a stop string did it here; otherwise it has ended there and this is nothing.
        self._submission.cancel(delta.candidate_index)
        if self.complete:
            self._end()

    def on_failure(self, error: ClusterError) -> None:
        now = time.monotonic()
        refused = error.reason in _WORTH_ANOTHER_REPLICA
        if refused and not self._stay_started:
            self._book.refuse()
            self._place_again(error)
            return
        self._book.leave(now)
        if error.reason == EngineFault.reason and not self._touched and not self._faulted:
            self._faulted = True
            self._place_again(error)
        elif refused or (error.reason == DeadlineExceeded.reason and self._told_expires_s < self._expires_s):
            self._place_when_ready()  # a deadline that was put off while it ran is none
        else:
            self.fail(error)

    def _place_again(self, error: ClusterError) -> None:
        """Elsewhere, after one replica did not want it."""
        try:
            self._place()
        except ModelWarming:
            if error.reason != "DRAINING" and not self._touched:
                self.fail(error)
            else:
                self._later = asyncio.get_running_loop().call_later(_REFUSED_AGAIN_S, self._place_when_ready)

    def on_replica_lost(self, why: str, num_suspects: int) -> None:
        self._book.leave(time.monotonic())
        if num_suspects and not self._stay_started:
            self._num_losses += 1
            self._suspicion += 1 / num_suspects
        if self._suspicion >= _MAX_SUSPICION or self._num_losses >= _MAX_LOSSES:
            self.fail(
                ReplicaLost(
                    f"{self._num_losses} replicas were lost one after the other while they had this request, which got "
                    f"no token from any of them: it is not sent to more. What was sent before stands ({why})"
                )
            )
            return
        self.report(moving)
        self._place_when_ready()

    def _cut_off(self, reader: Reader) -> None:
        """A reader that leaves too much unread."""
        error = SlowReader("the client left too many tokens unread: read the stream faster, or call Generate")
        reader.fail(error)
        self._readers = [each for each in self._readers if each is not reader]
        if not self._readers:
            self.fail(error)

    # -- from anywhere ------------------------------------------------------------------------------------------------

    def report(self, progress: Callable[[], inference_pb2.Progress]) -> None:
        """From now on it waits for this, until it is at a replica."""
        self._progress = progress
        self._wake()

    def fail(self, error: Exception) -> None:
        """Ends the generation with ``error``, here and at the replica. The first error counts."""
        if self._ended:
            return
        self.error = error
        self._end()
        self._wake()

    def expire_after(self, remaining_s: float) -> None:
        """Fails it when so much time has passed. Of several calls, the latest time counts."""
        expires_s = time.monotonic() + remaining_s
        if self._ended or expires_s <= self._expires_s:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._expires_s = expires_s
        error = DeadlineExceeded("the deadline passed before the generation had finished")
        self._deadline = asyncio.get_running_loop().call_later(remaining_s, self.fail, error)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Calls back once when it is over, whatever its end; at once where it is."""
        if self._ended:
            callback()
        else:
            self._on_end.append(callback)

    def _end(self) -> None:
        """Nothing runs for it any more."""
        self._ended = True
        self._book.end(time.monotonic())
        self._progress = None
        for timer in (self._deadline, self._later):
            if timer is not None:
                timer.cancel()
        if self._submission is not None:
            self._submission.cancel()
        if self._balancer is not None:
            self._balancer.forget(self._place_when_ready)
        self._submit = self._submission = self._placement = None
        self._tried.clear()
        callbacks, self._on_end = self._on_end, []
        for callback in callbacks:
            callback()

    # -- for readers --------------------------------------------------------------------------------------------------

    def attach(self, reader: Reader) -> None:
        """From now on the reader hears of what is new."""
        if not self.candidates or reader.begin():
            self._readers.append(reader)

    def detach(self, reader: Reader) -> None:
        """The reader has gone. With the last one, whatever still runs is cancelled."""
        self._readers = [each for each in self._readers if each is not reader]
        if not self._readers and not self._ended:
            self._end()

    @property
    def num_readers(self) -> int:
        return len(self._readers)

    @property
    def complete(self) -> bool:
        """Every candidate has its end."""
        return self._num_finished == len(self.candidates) and bool(self.candidates)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all candidates so far."""
        return sum(len(candidate.token_ids) for candidate in self.candidates)

    @property
    def num_new_tokens(self) -> int:
        """Of these, those that were not there when it was resumed."""
        return self.num_tokens - sum(candidate.resumed_tokens for candidate in self.candidates)

    @property
    def num_bytes(self) -> int:
        """That it takes in memory, about."""
        return sum(candidate.num_bytes for candidate in self.candidates)

    def record_gap(self, between_tokens_s: float) -> None:
        """As a reader has seen it. Told once per message: for each token it would cost as much as the token."""
        self._metrics.record(ITL_S, between_tokens_s, model=self._model)

    def progress(self) -> inference_pb2.Progress | None:
        """What it waits for; None: for nothing but its next token."""
        return None if self._progress is None else self._progress()

    def ledger(self) -> inference_pb2.Ledger:
        """Where its time has gone so far."""
        return self._book.ledger(
            time.monotonic(),
            cached_tokens=max((candidate.cached_tokens for candidate in self.candidates), default=0),
            exact=self._exact,
        )

    def _wake(self) -> None:
        for reader in self._readers:
            reader.wake()
