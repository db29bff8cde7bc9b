"""The one retry layer: it repeats what was not executed, while the deadline allows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import grpc

from cluster.client.status import error_of, never_sent
from cluster.errors import InvalidRequest, ServerUnreachable

MAX_ATTEMPTS = 4
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0


class Attempts:
    """The attempts at one call, under one deadline.

    Repeated is, before the first chunk, what was not executed: UNAVAILABLE where the gateway itself says so, or where
    there was no connection to send the call on. A connection that breaks under a call is UNAVAILABLE to gRPC, too, but
    then nobody knows what was executed, and the caller decides.

    The wait doubles each time with full jitter, so that clients do not come back in step, and is never shorter than the
    server's RetryInfo. A wait that would outlast the deadline is not begun: the caller learns the error at once.

    Raises:
        InvalidRequest: the deadline is no positive number.
    """

    def __init__(
        self,
        *,
        address: str,
        deadline_s: float,
        max_attempts: int = MAX_ATTEMPTS,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        if not 0 < deadline_s < float("inf"):
            raise InvalidRequest(f"deadline_s is {deadline_s}; it must be a positive number", field="deadline_s")
        self._address = address
        self._deadline_s = deadline_s
        self._max_attempts = max_attempts
        self._clock = clock
        self._rng = rng or random.Random()
        self._deadline = clock() + deadline_s
        self._failed = 0

    def remaining_s(self) -> float:
        """What is left of the deadline: the next attempt's gRPC timeout."""
        return max(0.0, self._deadline - self._clock())

    def backoff_s(self, failure: grpc.RpcError, *, received: bool = False) -> float:
        """How long to wait before the next attempt.

        Args:
            failure: how this attempt ended.
            received: whether chunks came, after which nothing is repeated.

        Raises:
            ClusterError: there is to be no further attempt; the failure, typed.
        """
        self._failed += 1
        error = error_of(failure, address=self._address, deadline_s=self._deadline_s)
        unavailable = failure.code() is grpc.StatusCode.UNAVAILABLE
        not_executed = unavailable and (never_sent(failure) or not isinstance(error, ServerUnreachable))
        if received or not not_executed or self._failed >= self._max_attempts:
            raise error from None
        backoff_s = self._rng.uniform(0, min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (self._failed - 1)))
        wait_s = max(backoff_s, error.retry_after_s or 0.0)
        if wait_s >= self.remaining_s():
            raise error from None
        return wait_s
