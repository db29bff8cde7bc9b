"""A client's generation, from admission to its last chunk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cluster.errors import ClusterError, DeadlineExceeded, EngineFault, ModelWarming, ReplicaLost, SlowReader
from cluster.gateway.balancer import Balancer
from cluster.gateway.candidate import Candidate
from cluster.gateway.replica_link import ReplicaLink, Submission
from cluster.observability.metrics import ITL_S, TTFT_S, MetricSink
from cluster.v1 import inference_pb2, replica_pb2

# Refusals by one replica that another may not share. Nothing was executed.
_WORTH_ANOTHER_REPLICA = frozenset({"DRAINING", "OVERLOADED"})


class Generation:
    """What runs for one call. Replica links push into it, one reader waits on it; all on the event loop.

    It is the sink of its submission. A replica that is lost before the client got anything is replaced, once: a request
    that kills replicas must not go round them all. Where there is no other, the generation waits for one until its
    deadline. Later than that it fails with ReplicaLost, which says what the client has. A fault of the request alone is
    tried on another replica only where nothing was generated, and told as it is.

    Args:
        streams: whether the reader wants every delta, or only the end.
        max_unread_tokens: a stream whose client leaves more than this unread is ended.
        metrics: gets times to first token and between tokens.
    """

    def __init__(
        self, generation_id: str, request_id: str, *, streams: bool, max_unread_tokens: int, metrics: MetricSink
    ) -> None:
        self.generation_id = generation_id
        self.request_id = request_id
        self.error: Exception | None = None
        self.candidates: list[Candidate] = []
        self.num_prompt_tokens = 0
        self.seed = 0
        self._model = ""
        self._streams = streams
        self._max_unread_tokens = max_unread_tokens
        self._metrics = metrics
        self._balancer: Balancer | None = None
        self._submit: replica_pb2.Submit | None = None
        self._make_candidate: Callable[[int], Candidate] | None = None
        self._submission: Submission | None = None
        self._tried: list[ReplicaLink] = []
        self._replaced = False
        self._num_finished = 0
        self._sequence = 0
        self._num_sent_tokens = 0
        self._waiter: asyncio.Future[None] | None = None
        self._started_s = time.monotonic()
        self._expires_s = 0.0
        self._deadline: asyncio.TimerHandle | None = None

    def start(
        self,
        submit: replica_pb2.Submit,
        make_candidate: Callable[[int], Candidate],
        *,
        model: str,
        balancer: Balancer,
    ) -> None:
        """Sends the work to a replica; ``expire_after`` has been called.

        Raises:
            ClusterError: it was cancelled or its deadline passed meanwhile, or no replica is ready.
        """
        if self.error is not None:
            raise self.error
        self._model = model
        self.num_prompt_tokens = len(submit.prompt_token_ids)
        self.seed = submit.sampling.seed
        self._make_candidate = make_candidate
        self._submit = submit
        self._balancer = balancer
        self._place()

    def _place(self) -> None:
        """At the beginning of the work, whatever another replica had of it."""
        self.candidates = [self._make_candidate(index) for index in range(self._submit.sampling.n)]
        self._num_finished = 0
        self._submit.deadline_ms = max(int((self._expires_s - time.monotonic()) * 1000), 0)
        link = self._balancer.pick(excluded=self._tried)
        self._tried.append(link)
        self._submission = link.submit(self._submit, self)

    # -- from the replica ---------------------------------------------------------------------------------------------

    def on_tokens(self, delta: replica_pb2.TokenDelta) -> None:
        candidate = self.candidates[delta.candidate_index]
        try:
            candidate.push(delta)
        except Exception as error:  # a fault of one generation must not end the others on this link
            self.fail(error)
            return
        self._record_latency(candidate, len(delta.token_ids))
        if candidate.finished:
            self._num_finished += 1
            # Ends it at the replica where a stop string did it here; otherwise it has ended there and this is nothing.
            self._submission.cancel(delta.candidate_index)
        if self._streams:
            if candidate.unread_tokens > self._max_unread_tokens:
                self.fail(
                    SlowReader(
                        f"the client left more than {self._max_unread_tokens} tokens unread: read the stream faster, "
                        f"or call Generate"
                    )
                )
            else:
                self._wake()
        elif self._num_finished == len(self.candidates):
            self._wake()

    def _record_latency(self, candidate: Candidate, num_tokens: int) -> None:
        now = time.monotonic()
        if candidate.last_token_s is not None:
            self._metrics.record(ITL_S, (now - candidate.last_token_s) / max(num_tokens, 1), model=self._model)
        elif candidate.index == 0:
            self._metrics.record(TTFT_S, now - self._started_s, model=self._model)
        candidate.last_token_s = now

    def on_failure(self, error: ClusterError) -> None:
        if self._touched:
            self.fail(error)
        elif error.reason in _WORTH_ANOTHER_REPLICA:
            self._place_again(otherwise=error)
        elif error.reason == EngineFault.reason and not self._replaced:
            self._replaced = True
            self._place_again(otherwise=error)
        else:
            self.fail(error)

    def on_replica_lost(self, why: str) -> None:
        if self._sequence:
            self.fail(
                ReplicaLost(
                    f"the replica was lost after {self._num_sent_tokens} tokens had been sent, which stand: send the "
                    f"request again, or continue after them ({why})"
                )
            )
        elif self._replaced:
            self.fail(ReplicaLost(f"two replicas failed one after the other while they had this request ({why})"))
        else:
            self._replaced = True
            self._place_when_ready()

    def _place_when_ready(self) -> None:
        self._tried.clear()  # one that comes back after it was lost is as good as another
        try:
            self._place()
        except ModelWarming:
            self._balancer.wait_ready(self._place_when_ready)

    @property
    def _touched(self) -> bool:
        """Whether anything was generated, so that a second start would not be the first."""
        return any(candidate.num_tokens or candidate.finished for candidate in self.candidates)

    def _place_again(self, otherwise: ClusterError | None) -> None:
        try:
            self._place()
        except ModelWarming as error:
            self.fail(otherwise or error)

    # -- from anywhere ------------------------------------------------------------------------------------------------

    def fail(self, error: Exception) -> None:
        """Ends the generation with ``error``, here and at the replica. The first error counts."""
        if self.error is not None or self.done:
            return
        self.error = error
        self._end()
        self._wake()

    def expire_after(self, remaining_s: float) -> None:
        """Fails it when so much time has passed."""
        error = DeadlineExceeded("the deadline passed before the generation had finished")
        self._expires_s = time.monotonic() + remaining_s
        self._deadline = asyncio.get_running_loop().call_later(remaining_s, self.fail, error)

    def close(self) -> None:
        """The reader has gone: whatever still runs at a replica is cancelled."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._end()

    def _end(self) -> None:
        if self._submission is not None:
            self._submission.cancel()
            self._balancer.forget(self._place_when_ready)
        for candidate in self.candidates:
            candidate.drop()

    # -- for the reader -----------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Every candidate has finished and been taken, without an error."""
        finished = bool(self.candidates) and self._num_finished == len(self.candidates)
        return finished and self.error is None and not any(candidate.readable for candidate in self.candidates)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all candidates so far."""
        return sum(candidate.num_tokens for candidate in self.candidates)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Returns when there is something to take: a delta for a stream, else all candidates whole.

        Raises:
            Exception: the generation failed, or was failed by ``fail``.
        """
        if self._streams:
            ready = any(candidate.readable for candidate in self.candidates)
        else:
            ready = self._num_finished == len(self.candidates)
        if self.error is None and not ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.error is not None:
            raise self.error

    def take(self) -> list[inference_pb2.GenerateChunk]:
        """The unread chunks, at most one per candidate, numbered in the order of the stream."""
        chunks = [candidate.take() for candidate in self.candidates if candidate.readable]
        for chunk in chunks:
            chunk.sequence = self._sequence
            if self._sequence == 0:
                chunk.seed = self.seed
            self._sequence += 1
            self._num_sent_tokens += len(chunk.token_ids)
        return chunks
