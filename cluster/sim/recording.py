"""What happened to each request, and when."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable

from cluster.sim.workload import Arrival


class Ending(enum.Enum):
    """How a request ended."""

    FINISHED = "finished"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    LOST = "lost"  # with its replica


class Record:
    """One request. Times are virtual seconds, None where it did not come to that.

    Attributes:
        arrival: as it came in.
        num_cached_tokens: of its prompt, found in the prefix cache when it first started.
        num_output_tokens: that it got.
        first_token_s, last_token_s: when.
        ended_s, ending: when it ended, and how.
    """

    __slots__ = (
        "arrival",
        "ended_s",
        "ending",
        "first_token_s",
        "last_token_s",
        "num_cached_tokens",
        "num_output_tokens",
    )

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.num_cached_tokens: int | None = None
        self.num_output_tokens = 0
        self.first_token_s: float | None = None
        self.last_token_s = 0.0
        self.ended_s = 0.0
        self.ending: Ending | None = None


class Recording:
    """The course of a run.

    Attributes:
        records: by request id, which counts the arrivals.
        token_times_s, token_gaps_s: of every token but the first of its request: when it came, and the time since the
            one before it. In the order of time.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.token_times_s = array("d")
        self.token_gaps_s = array("d")

    def arrive(self, arrival: Arrival) -> int:
        """Returns the request's id."""
        self.records.append(Record(arrival))
        return len(self.records) - 1

    def start(self, request_ids: Iterable[int], num_cached_tokens: Iterable[int]) -> None:
        """Each begins, or begins again; so many of its tokens were not to be computed."""
        for request_id, num_tokens in zip(request_ids, num_cached_tokens, strict=True):
            record = self.records[request_id]
            if record.num_cached_tokens is None:
                record.num_cached_tokens = num_tokens

    def sample(self, now: float, request_ids: Iterable[int]) -> None:
        """Each got a token."""
        for request_id in request_ids:
            record = self.records[request_id]
            if record.first_token_s is None:
                record.first_token_s = now
            else:
                self.token_times_s.append(now)
                self.token_gaps_s.append(now - record.last_token_s)
            record.last_token_s = now
            record.num_output_tokens += 1

    def end(self, now: float, request_id: int, ending: Ending) -> None:
        """Raises RuntimeError where it has ended before, or finished without all its tokens."""
        record = self.records[request_id]
        if record.ending is not None:
            raise RuntimeError(f"request {request_id} is {ending.value}, and was {record.ending.value} before")
        if ending is Ending.FINISHED and record.num_output_tokens != record.arrival.num_output_tokens:
            raise RuntimeError(
                f"request {request_id} finished with {record.num_output_tokens} tokens, not "
                f"{record.arrival.num_output_tokens}"
            )
        record.ending = ending
        record.ended_s = now

    def check_all_ended(self) -> None:
        """Raises RuntimeError where a request has not."""
        live = [request_id for request_id, record in enumerate(self.records) if record.ending is None]
        if live:
            raise RuntimeError(f"{len(live)} requests never ended, the first of them request {live[0]}")
