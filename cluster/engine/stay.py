"""How a candidate spends its time in an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StayTimes:
    """In seconds, of a candidate that is done.

    Attributes:
        queue_s: until it first had a place in the batch.
        prefill_s: from then to its first token here.
        decode_s: from then to its end.
        preempted_s: of prefill and decode, out of the batch again.
        num_preemptions: how often it lost its place.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    preempted_s: float = 0.0
    num_preemptions: int = 0


class Stay:
    """One candidate's, as it goes on. Times are on the engine's clock.

    Args:
        arrived_at: when it came in.
    """

    __slots__ = ("_arrived_at", "_first_token_at", "_left_at", "_num_preemptions", "_preempted_s", "_started_at")

    def __init__(self, arrived_at: float) -> None:
        self._arrived_at = arrived_at
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._left_at: float | None = None  # the batch; None: it is there, or has not been there yet
        self._preempted_s = 0.0
        self._num_preemptions = 0

    def enter(self, now: float) -> None:
        """It has a place in the batch, for the first time or again."""
        if self._started_at is None:
            self._started_at = now
        self._come_back(now)

    def leave(self, now: float) -> None:
        """It was preempted."""
        self._left_at = now
        self._num_preemptions += 1

    def sample(self, now: float) -> None:
        """Its first token here is there."""
        self._first_token_at = now

    def end(self, now: float) -> StayTimes:
        """It is done, after a first token here."""
        self._come_back(now)  # its last token was under way when it lost its place
        started_at = now if self._started_at is None else self._started_at
        first_token_at = now if self._first_token_at is None else self._first_token_at
        return StayTimes(
            queue_s=started_at - self._arrived_at,
            prefill_s=first_token_at - started_at,
            decode_s=now - first_token_at,
            preempted_s=self._preempted_s,
            num_preemptions=self._num_preemptions,
        )

    def _come_back(self, now: float) -> None:
        if self._left_at is not None:
            self._preempted_s += now - self._left_at
            self._left_at = None
