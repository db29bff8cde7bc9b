"""What became of each request."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from cluster.core.request import Priority

OK = "OK"
CUT_OFF = "CUT OFF (the run was over)"


@dataclass(kw_only=True, slots=True)
class Record:
    """Of one request. Times are in seconds from the start of the run.

    Attributes:
        load: the index of the load that it belongs to.
        due_s: when it had to be sent: latencies count from here, so that a client that is late hides nothing.
        sent_s: when it was.
        ended_s: when its answer was complete, or its failure known; None: under way.
        status: OK, or what the server, or the connection, said.
        times_s, counts: when each message with tokens came, and how many tokens were in it; 1 where that is not told.
        num_new_tokens: of the completion, as the server counts them.
        cached_tokens: of the prompt.
        num_moves: how often it went on at another replica.
        retry_after_s: what a refusal advised.
    """

    load: int
    priority: Priority
    num_prompt_tokens: int
    due_s: float
    sent_s: float = 0.0
    ended_s: float | None = None
    status: str = ""
    times_s: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("L"))
    num_new_tokens: int = 0
    cached_tokens: int = 0
    num_moves: int = 0
    retry_after_s: float | None = None

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def ttft_s(self) -> float | None:
        """From when it was due to its first token."""
        return self.times_s[0] - self.due_s if self.times_s else None

    @property
    def tpot_s(self) -> float | None:
        """From its first token to its last, by the tokens after the first; None where there are none."""
        if self.num_new_tokens < 2 or not self.times_s:
            return None
        return (self.times_s[-1] - self.times_s[0]) / (self.num_new_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """From when it was due to its end."""
        return None if self.ended_s is None else self.ended_s - self.due_s
