"""A request's stay at one replica."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cluster.errors import ClusterError
from cluster.v1 import replica_pb2

if TYPE_CHECKING:
    from cluster.gateway.replica_link import ReplicaLink


class SubmissionSink(Protocol):
    """Who gets what a submission yields. Called on the event loop; must not block."""

    def on_tokens(self, delta: replica_pb2.TokenDelta) -> None:
        """What one step added to one candidate. ``delta`` is only valid during the call."""

    def on_failure(self, error: ClusterError) -> None:
        """The replica gave up on the submission; nothing follows."""

    def on_replica_lost(self, why: str, num_suspects: int) -> None:
        """The stream broke, the replica's engine has died, or it was drained for too long; nothing follows.

        Args:
            num_suspects: submissions that were lost at once and had not got anything: one of them may have killed the
                replica. 0: that was nobody's fault.
        """


class Submission:
    """What one ``Submit`` still has to yield: all its candidates, or those that it goes on with."""

    __slots__ = ("_link", "_prompt_tokens", "_remaining", "id", "sink", "started")

    def __init__(self, link: ReplicaLink, message: replica_pb2.Submit, sink: SubmissionSink) -> None:
        self.id = message.id
        self.sink = sink
        self.started = False  # whether anything has come
        self._link = link
        self._prompt_tokens = len(message.prompt_token_ids)
        max_tokens = message.sampling.max_tokens
        if message.emitted:
            self._remaining = {each.candidate_index: max_tokens - len(each.token_ids) for each in message.emitted}
        else:
            self._remaining = dict.fromkeys(range(message.sampling.n), max_tokens)

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
