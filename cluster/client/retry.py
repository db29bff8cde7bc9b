"""The one retry layer: whether, where and when a call that failed is made again, while its deadline allows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import grpc

from cluster.client.addresses import AddressBook
from cluster.client.retry_budget import RetryBudget
from cluster.client.status import error_of, never_sent
from cluster.errors import Cancelled, ClusterError, Draining, InvalidRequest, ServerUnreachable

MAX_ATTEMPTS = 4
RECONNECT_S = 60.0
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0
# A stream that takes one gateway after the other with it must not go on for ever.
_MAX_BREAKS = 5


class Attempts:
    """The attempts at one call, under one deadline.

    Before the first chunk a call is made again where it was not executed (UNAVAILABLE: the gateway says so, or there
    was no connection), and where a connection broke under it: its request id lets the gateway join the one that runs,
    and nobody has seen anything of another. To go to a gateway that has not been asked yet is free; to ask them
    again is a retry, which waits and takes from the budget.

    Once chunks came (``received``), the call is a stream that goes on from what it has. That takes nothing from the
    budget: it waits for a gateway that answers, and for one that has room, and ends with the deadline at the latest.
    Where gateways have answered before and none does now, any call waits for them so.

    The wait doubles each time with full jitter, so that clients do not come back in step, and is never shorter than the
    server's RetryInfo. A wait that would outlast the deadline is not begun: the caller learns the error at once.

    Args:
        name: the call's request id.
        max_attempts: how often each gateway is asked at most.
        only: the one address that it may go to, without waiting for it; None: any.
        reconnect_s: for how long a call looks for a gateway that answers.

    Attributes:
        address: where the next attempt goes.

    Raises:
        InvalidRequest: the deadline is no positive number.
    """

    def __init__(
        self,
        gateways: AddressBook,
        budget: RetryBudget,
        *,
        name: str,
        deadline_s: float,
        max_attempts: int = MAX_ATTEMPTS,
        reconnect_s: float = RECONNECT_S,
        only: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        if not 0 < deadline_s < float("inf"):
            raise InvalidRequest(f"deadline_s is {deadline_s}; it must be a positive number", field="deadline_s")
        self._gateways = gateways
        self._budget = budget
        self._name = name
        self._deadline_s = deadline_s
        self._max_attempts = max_attempts
        self._reconnect_s = reconnect_s
        self._only = only
        self._clock = clock
        self._rng = rng or random.Random()
        self._deadline = clock() + deadline_s
        self._failed = 0
        self._tried: set[str] = set()
        self._breaks = 0
        self._cut_off_at: float | None = None
        self.address = only or gateways.pick(name)

    def remaining_s(self) -> float:
        """What is left of the deadline: the next attempt's gRPC timeout."""
        return max(0.0, self._deadline - self._clock())

    def succeeded(self) -> None:
        """The call, or the first chunk of a stream, came back."""
        self._budget.earn()
        self._gateways.met = True

    def progressed(self) -> None:
        """Chunks come: what went wrong before is over."""
        self._failed = self._breaks = 0
        self._tried.clear()
        self._cut_off_at = None

    def backoff_s(self, failure: grpc.RpcError, *, received: bool = False) -> float:
        """How long to wait before the next attempt, which goes to ``address``.

        Args:
            failure: how this attempt ended.
            received: whether chunks came, of this attempt or of one before.

        Raises:
            ClusterError: there is to be no further attempt; the failure, typed.
        """
        if self._gateways.closed:
            raise Cancelled("the client was closed") from None
        error = error_of(failure, address=self.address, deadline_s=self._deadline_s)
        if isinstance(error, ServerUnreachable):
            self._gateways.report_lost(self.address)
        elif isinstance(error, Draining):
            self._gateways.report_draining(self.address)
        self._tried.add(self.address)
        self.address = self._only or self._gateways.pick(self._name, tried=self._tried)
        fresh = self.address not in self._tried
        lost = isinstance(error, ServerUnreachable) and self._gateways.met and self._only is None
        if received or lost:
            self._check_resumable(failure, error)
        elif not self._may_repeat(failure, error, fresh):
            raise error from None
        if fresh:
            return 0.0
        self._tried.clear()  # after the wait all of them may be asked again
        self._failed += 1
        backoff_s = self._rng.uniform(0, min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (self._failed - 1)))
        wait_s = max(backoff_s, error.retry_after_s or 0.0)
        if wait_s >= self.remaining_s():
            raise error from None
        return wait_s

    def _may_repeat(self, failure: grpc.RpcError, error: ClusterError, fresh: bool) -> bool:
        if failure.code() is not grpc.StatusCode.UNAVAILABLE and not isinstance(error, ServerUnreachable):
            return False
        return fresh or (self._failed + 1 < self._max_attempts and self._budget.spend())

    def _check_resumable(self, failure: grpc.RpcError, error: ClusterError) -> None:
        if not isinstance(error, ServerUnreachable):
            if not error.retryable:
                raise error from None
            return
        now = self._clock()
        if self._cut_off_at is None:
            self._cut_off_at = now
        if not never_sent(failure):
            self._breaks += 1
        if self._breaks > _MAX_BREAKS:
            raise ServerUnreachable(f"the call was cut off {self._breaks} times without a chunk in between: {error}")
        if now - self._cut_off_at >= self._reconnect_s:
            raise ServerUnreachable(f"no gateway could be reached for {self._reconnect_s:g} s: {error}")
