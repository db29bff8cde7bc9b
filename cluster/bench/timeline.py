"""When each token of a batch of requests came out, and the rates that follow; the same definitions for every engine."""

from __future__ import annotations

from collections.abc import Iterable


class Timeline:
    """Tokens of requests that were handed over together at time 0."""

    def __init__(self, num_requests: int, events: Iterable[tuple[float, int, int]] = ()) -> None:
        """
        Args:
            events: (seconds since the start, index of the request, number of its tokens), in order of time.
        """
        self.num_requests = num_requests
        self.events = list(events)

    def record(self, at_s: float, request: int, num_tokens: int = 1) -> None:
        self.events.append((at_s, request, num_tokens))

    @property
    def num_tokens(self) -> int:
        return sum(count for _, _, count in self.events)

    @property
    def end_s(self) -> float:
        """When the last token came; 0 before the first."""
        return self.events[-1][0] if self.events else 0.0

    @property
    def all_started_s(self) -> float | None:
        """When the last of the requests had its first token; None while one has none."""
        waiting = set(range(self.num_requests))
        for at_s, request, _ in self.events:
            waiting.discard(request)
            if not waiting:
                return at_s
        return None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens that came after every request had its first, over the time from then to the end.

        The prompts are computed by then, so this is decode alone; what the earlier requests had generated meanwhile
        does not count. None: no token came later.
        """
        start_s = self.all_started_s
        if start_s is None:
            return None
        num_tokens = sum(count for at_s, _, count in self.events if at_s > start_s)
        return num_tokens / (self.end_s - start_s) if num_tokens else None

    @property
    def tokens_per_s(self) -> float:
        """All tokens over all the time, prompts included: the whole run."""
        return self.num_tokens / self.end_s if self.events else 0.0
