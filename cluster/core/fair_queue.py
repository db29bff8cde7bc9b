"""The queue of one class: fair between tenants, the earliest deadline first within each."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from cluster.core.request import Priority

_DUE_KEY = attrgetter("due_key")
_MIN_SWEEP = 64


@dataclass(eq=False, kw_only=True, slots=True)
class QueuedRequest:
    """A request at a gateway: counts, never content. The queue that it is in changes it.

    Attributes:
        priority: class.
        tenant: on whose account.
        arrival: when it came in, in monotonic seconds.
        due: when it should have its turn at the latest.
        order: how many requests came before it; tells equal times apart.
        num_tokens: that it is expected to cost, prompt and completion.
        is_ready: whether it may have its turn.
        is_queued: whether it is in a queue.
    """

    priority: Priority
    tenant: str
    arrival: float
    due: float
    order: int
    num_tokens: int
    is_ready: bool = False
    is_queued: bool = False
    account: TenantAccount | None = field(default=None, repr=False)

    @property
    def due_key(self) -> tuple[float, int]:
        """Sorts by deadline."""
        return self.due, self.order


class TenantAccount:
    """What one tenant has in a class's queue.

    Attributes:
        start: the virtual time of its next turn: tokens that it has had, on the clock of the class.
        num_tokens: of all its requests that wait.
        ready: its requests that may have their turn, the earliest deadline first.
        unready: the others, in the order in which they came.
    """

    __slots__ = ("num_tokens", "ready", "start", "unready")

    def __init__(self, start: float) -> None:
        self.start = start
        self.num_tokens = 0
        self.ready: list[QueuedRequest] = []
        self.unready: dict[QueuedRequest, None] = {}

    def __len__(self) -> int:
        return len(self.ready) + len(self.unready)

    def num_tokens_before(self, request: QueuedRequest) -> int:
        """Of its requests, those that are due before this one; of one that nobody ready is due after, all others."""
        if not self.ready or request.due_key >= self.ready[-1].due_key:
            return self.num_tokens - request.num_tokens
        return sum(r.num_tokens for r in (*self.ready, *self.unready) if r.due_key < request.due_key)


class FairQueue:
    """Start-time fair queueing (Goyal, 1996) of tenants, in tokens: next is the tenant that has had the least, and of
    its requests the one with the earliest deadline. A tenant that comes anew begins where the others are: it saves
    nothing up. What it did not use of a turn, it gets back.

    Requests come in before they may have their turn, so that they are counted from the beginning.

    Attributes:
        num_requests: that are here.
        num_tokens: theirs.
        num_ready: of the requests, those that may have their turn.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, TenantAccount] = {}
        self._requests: dict[QueuedRequest, None] = {}
        self._virtual_time = 0.0
        self.num_requests = 0
        self.num_ready = 0
        self.num_tokens = 0
        self._num_removed = 0  # since tenants that are gone were forgotten

    @property
    def oldest_arrival(self) -> float | None:
        """Of those here; None: nobody is."""
        first = next(iter(self._requests), None)
        return None if first is None else first.arrival

    def add(self, request: QueuedRequest) -> None:
        """Takes in one that may not have its turn yet."""
        account = self._accounts.get(request.tenant)
        if account is None:
            account = self._accounts[request.tenant] = TenantAccount(self._virtual_time)
        elif not account:
            account.start = max(account.start, self._virtual_time)
        request.account = account
        request.is_queued = True
        account.unready[request] = None
        account.num_tokens += request.num_tokens
        self._requests[request] = None
        self.num_requests += 1
        self.num_tokens += request.num_tokens

    def resize(self, request: QueuedRequest, num_tokens: int) -> None:
        """Another number of tokens of one that is here."""
        change = num_tokens - request.num_tokens
        request.num_tokens = num_tokens
        self._account(request).num_tokens += change
        self.num_tokens += change

    def make_ready(self, request: QueuedRequest) -> None:
        """From now on it may have its turn."""
        account = self._account(request)
        del account.unready[request]
        bisect.insort(account.ready, request, key=_DUE_KEY)
        request.is_ready = True
        self.num_ready += 1

    def head(self) -> QueuedRequest | None:
        """Whose turn is next; None: nobody's who may have it."""
        accounts = [account for account in self._accounts.values() if account.ready]
        if not accounts:
            return None
        return min(accounts, key=lambda account: (account.start, account.ready[0].due_key)).ready[0]

    def take(self, request: QueuedRequest) -> None:
        """Removes the head for its turn, and its tenant pays."""
        account = self._account(request)
        self._virtual_time = max(self._virtual_time, account.start)
        account.start += request.num_tokens
        self.remove(request)

    def settle(self, request: QueuedRequest, num_tokens: int) -> None:
        """What one that had its turn has cost in the end, in place of what its tenant paid."""
        self._account(request).start += num_tokens - request.num_tokens

    def remove(self, request: QueuedRequest) -> None:
        """Takes out one that is here."""
        account = self._account(request)
        if request.is_ready:
            del account.ready[bisect.bisect_left(account.ready, request.due_key, key=_DUE_KEY)]
            self.num_ready -= 1
        else:
            del account.unready[request]
        account.num_tokens -= request.num_tokens
        del self._requests[request]
        self.num_requests -= 1
        self.num_tokens -= request.num_tokens
        request.is_queued = False
        if not self._requests:
            # Nobody waits: what was had before gives nobody a claim any more.
            self._accounts.clear()
            self._virtual_time = 0.0
            self._num_removed = 0
            return
        self._num_removed += 1
        if self._num_removed > len(self._accounts) + _MIN_SWEEP:
            self._num_removed = 0
            self._accounts = {
                name: account
                for name, account in self._accounts.items()
                if account or account.start > self._virtual_time
            }

    def num_tokens_before(self, request: QueuedRequest) -> int:
        """Tokens that go before one that is here, as things stand."""
        own = self._account(request)
        before = own.num_tokens_before(request)
        reach = before + request.num_tokens
        return before + sum(min(account.num_tokens, reach) for account in self._accounts.values() if account is not own)

    def num_removable(self, tenant: str, size: tuple[int, int]) -> tuple[int, int]:
        """Requests and tokens of tenants that have more of them than this one would have with ``size`` more."""
        own = self._accounts.get(tenant) or TenantAccount(0.0)
        num_requests, num_tokens = len(own) + size[0], own.num_tokens + size[1]
        others = [account for account in self._accounts.values() if account is not own]
        return (
            sum(max(len(account) - num_requests, 0) for account in others),
            sum(max(account.num_tokens - num_tokens, 0) for account in others),
        )

    def newest(self, *, by_tokens: bool) -> QueuedRequest:
        """Who goes first where too much waits: the newest of the tenant that has the most.

        Args:
            by_tokens: whether the most tokens count, or the most requests.

        Raises:
            ValueError: nobody is here.
        """
        account = max(self._accounts.values(), key=lambda account: account.num_tokens if by_tokens else len(account))
        if account.unready:
            return next(reversed(account.unready))
        return account.ready[-1]

    def check_integrity(self) -> None:
        """Raises RuntimeError where the books do not balance."""
        requests: Iterable[QueuedRequest] = [
            r for account in self._accounts.values() for r in (*account.ready, *account.unready)
        ]
        if set(requests) != set(self._requests) or not all(r.is_queued for r in requests):
            raise RuntimeError("the tenants' queues and the class's differ")
        if self.num_requests != len(self._requests):
            raise RuntimeError(f"{self.num_requests} requests were counted, and they are not there")
        if self.num_tokens != sum(r.num_tokens for r in requests):
            raise RuntimeError(f"{self.num_tokens} tokens were counted, and they are not there")
        if self.num_ready != sum(r.is_ready for r in requests):
            raise RuntimeError(f"{self.num_ready} requests were counted as ready, and they are not there")
        for account in self._accounts.values():
            if account.num_tokens != sum(r.num_tokens for r in (*account.ready, *account.unready)):
                raise RuntimeError("a tenant's tokens were counted, and they are not there")
            if account.ready != sorted(account.ready, key=_DUE_KEY):
                raise RuntimeError("a tenant's requests are out of order")

    @staticmethod
    def _account(request: QueuedRequest) -> TenantAccount:
        if request.account is None:
            raise RuntimeError("a request was asked for that never was in a queue")
        return request.account
