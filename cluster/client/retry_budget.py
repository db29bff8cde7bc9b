"""How many repeated calls a client allows itself."""

from __future__ import annotations

import threading

MAX_TOKENS = 20.0
TOKEN_RATIO = 0.1


class RetryBudget:
    """As gRPC throttles retries: a failed call takes a token, a good one brings back a tenth of one, and calls are
    repeated while more than half of the tokens are there. So where most calls fail, clients do not add to the load.
    Safe to share between threads.
    """

    def __init__(self) -> None:
        self._tokens = MAX_TOKENS
        self._lock = threading.Lock()

    def spend(self) -> bool:
        """A call failed; whether it may be repeated."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1.0)
            return self._tokens > MAX_TOKENS / 2

    def earn(self) -> None:
        """A call succeeded."""
        with self._lock:
            self._tokens = min(MAX_TOKENS, self._tokens + TOKEN_RATIO)
