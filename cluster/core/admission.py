"""Who may wait for a model at a gateway, and whose turn it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cluster.core.class_policy import ClassPolicy
from cluster.core.config import AdmissionConfig, ClassesConfig
from cluster.core.drain_forecast import drain
from cluster.core.fair_queue import FairQueue, QueuedRequest
from cluster.core.queue_limits import QueueLimits
from cluster.core.request import Priority
from cluster.core.service_rate import ServiceRate
from cluster.errors import Overloaded

_BURST_TOKENS = 4096
_AGEING_S = 30.0
_MIN_RETRY_S = 0.05
_MAX_RETRY_S = 60.0
_UNKNOWN_RETRY_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassBacklog:
    """What waits of one class.

    Attributes:
        requests: how many.
        tokens: theirs, prompts and expected completions.
        oldest_s: how long the first of them has waited.
    """

    requests: int
    tokens: int
    oldest_s: float


class AdmissionQueue:
    """The bounded queue of one model: classes by ``ClassPolicy``, the same that orders an engine's; within a class
    tenants by what they have had, and each tenant's requests by their deadlines (``FairQueue``).

    - **A request** is counted from ``add`` on, by an estimate that ``resize`` corrects; it takes part from
      ``make_ready`` on; ``pop`` gives it its turn, and it is charged; ``settle`` says what it has cost. ``remove``
      takes it back before its turn.
    - **Bounds** are those of ``QueueLimits``. Whoever has to make room for another is returned by the call that did it,
      no longer in the queue.
    - **Deadlines**: the class's target after the arrival, the request's own, or its limit to the first token, whichever
      is first; at most 30 s after the arrival, so that who has none is not overtaken for ever.
    - **Forecasts** are backlog by measured rate (``ServiceRate``, ``drain``), None while the rate is not known.

    Pure: ``now`` is any monotonic clock in seconds. Not thread-safe.

    Args:
        config: bounds of all classes.
        classes: their shares, targets and own bounds.
        known_rate: tokens per second that replicas say they serve, used until it was measured here; None: not known.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        classes: ClassesConfig,
        *,
        known_rate: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._policy = ClassPolicy(classes, burst_tokens=_BURST_TOKENS)
        self._targets_s = {priority: each.target_s for priority, each in classes.by_priority().items()}
        self._queues = {priority: FairQueue() for priority in Priority}
        self._limits = QueueLimits(config, classes, self._queues)
        self._rate = ServiceRate()
        self._known_rate = known_rate
        self._num_added = 0

    def __len__(self) -> int:
        return sum(queue.num_requests for queue in self._queues.values())

    @property
    def num_ready(self) -> int:
        """Requests that could have their turn now."""
        return sum(queue.num_ready for queue in self._queues.values())

    def backlog(self, now: float) -> dict[Priority, ClassBacklog]:
        """What waits, by class."""
        return {
            priority: ClassBacklog(
                requests=queue.num_requests,
                tokens=queue.num_tokens,
                oldest_s=0.0 if queue.oldest_arrival is None else max(0.0, now - queue.oldest_arrival),
            )
            for priority, queue in self._queues.items()
        }

    @property
    def tokens_per_s(self) -> float | None:
        """At which the queue is served; None: not known yet."""
        return self._rate.tokens_per_s or self._known_rate()

    def add(
        self,
        *,
        now: float,
        priority: Priority,
        tenant: str,
        num_tokens: int,
        max_ttft_s: float = math.inf,
        deadline: float = math.inf,
    ) -> tuple[QueuedRequest, list[QueuedRequest]]:
        """Counts a request in, and returns it with those that had to go for it.

        Args:
            num_tokens: that it is expected to cost, prompt and completion.
            max_ttft_s: how soon its first token has to come.
            deadline: when it is worthless.

        Raises:
            Overloaded: there is no room for it.
        """
        pushed_out = self._limits.make_room(priority, tenant, (1, num_tokens))
        if pushed_out is None:
            raise self._overloaded(priority)
        within_s = min(self._targets_s[priority], max_ttft_s, _AGEING_S)
        request = QueuedRequest(
            priority=priority,
            tenant=tenant,
            arrival=now,
            due=min(now + within_s, deadline),
            order=self._num_added,
            num_tokens=num_tokens,
        )
        self._num_added += 1
        self._queues[priority].add(request)
        return request, pushed_out

    def resize(self, request: QueuedRequest, num_tokens: int) -> list[QueuedRequest]:
        """Corrects what one that waits is expected to cost; returns those that had to go for it.

        Raises:
            Overloaded: there is no room for so many; it is out of the queue.
        """
        queue = self._queues[request.priority]
        more = num_tokens - request.num_tokens
        pushed_out = self._limits.make_room(request.priority, request.tenant, (0, more)) if more > 0 else []
        if pushed_out is None:
            error = self._overloaded(request.priority)
            queue.remove(request)
            raise error
        queue.resize(request, num_tokens)
        return pushed_out

    def make_ready(self, request: QueuedRequest, now: float) -> None:
        """From now on it may have its turn."""
        self._queues[request.priority].make_ready(request)
        self._rate.advance(now, busy=True)

    def pop(self, now: float, has_room: Callable[[Priority], bool]) -> QueuedRequest | None:
        """Gives the next one its turn, of those classes that there is room for; None: nobody can have it."""
        heads = {
            priority: head
            for priority, queue in self._queues.items()
            if queue.num_ready and has_room(priority) and (head := queue.head()) is not None
        }
        if not heads:
            return None
        priority = self._policy.pick({each: self._arrival(head) for each, head in heads.items()})
        request = heads[priority]
        waiting = self._waiting()
        self._queues[priority].take(request)
        self._policy.charge(priority, request.num_tokens, waiting)
        self._rate.advance(now, busy=self.num_ready > 0)
        if now > request.arrival:
            self._rate.serve(request.num_tokens)
        return request

    def settle(self, request: QueuedRequest, num_tokens: int) -> None:
        """What one that has had its turn has cost in the end: what it did not use is refunded, what it used beyond that
        is charged."""
        saved = request.num_tokens - num_tokens
        if saved > 0:
            self._policy.refund(request.priority, saved, self._waiting())
        elif saved < 0:
            self._policy.charge(request.priority, -saved, self._waiting())
        self._queues[request.priority].settle(request, num_tokens)
        request.num_tokens = num_tokens

    def remove(self, request: QueuedRequest, now: float) -> None:
        """Takes out one that waits, before its turn."""
        self._queues[request.priority].remove(request)
        self._rate.advance(now, busy=self.num_ready > 0)

    def wait_s(self, request: QueuedRequest) -> float | None:
        """How long one that waits has to wait yet, as things stand; None: not known.

        Where others wait too it is no less than one of them takes: there is no room now, and whoever has it goes first.
        """
        num_requests = len(self)
        if num_requests == 1:
            return 0.0
        rate, forecast = self.tokens_per_s, self._forecast(request)
        if rate is None or forecast is None:
            return None
        num_tokens = sum(queue.num_tokens for queue in self._queues.values())
        return max(forecast[0], num_tokens / num_requests / rate)

    def position(self, request: QueuedRequest) -> int:
        """How many go before one that waits, as things stand."""
        forecast = self._forecast(request, tokens_per_s=1.0)
        if forecast is None:
            return 0
        return sum(
            round(self._queues[priority].num_requests * served / self._queues[priority].num_tokens)
            for priority, served in forecast[1].items()
            if self._queues[priority].num_tokens
        )

    def retry_after_s(self, priority: Priority) -> float:
        """When one that was refused may come again: when what waits of its class now will have been served."""
        rate = self.tokens_per_s
        if rate is None:
            return _UNKNOWN_RETRY_S
        seconds, _ = drain(
            self._queues[priority].num_tokens,
            priority,
            {each: queue.num_tokens for each, queue in self._queues.items()},
            share=self._policy.share,
            tokens_per_s=rate,
        )
        return min(max(seconds, _MIN_RETRY_S), _MAX_RETRY_S)

    def check_integrity(self) -> None:
        """Raises RuntimeError where the books do not balance."""
        for queue in self._queues.values():
            queue.check_integrity()

    def _forecast(
        self, request: QueuedRequest, tokens_per_s: float | None = None
    ) -> tuple[float, dict[Priority, float]] | None:
        rate = self.tokens_per_s if tokens_per_s is None else tokens_per_s
        if rate is None:
            return None
        return drain(
            self._queues[request.priority].num_tokens_before(request),
            request.priority,
            {each: queue.num_tokens for each, queue in self._queues.items()},
            share=self._policy.share,
            tokens_per_s=rate,
        )

    def _arrival(self, head: QueuedRequest) -> float:
        """When it would have come, had it only the target of its class."""
        target_s = self._targets_s[head.priority]
        return head.arrival if math.isinf(target_s) else head.due - target_s

    def _waiting(self) -> list[Priority]:
        return [priority for priority, queue in self._queues.items() if queue.num_ready]

    def _overloaded(self, priority: Priority) -> Overloaded:
        queue, retry_after_s = self._queues[priority], self.retry_after_s(priority)
        return Overloaded(
            f"too much waits at this gateway: of class {priority.name} {queue.num_requests} requests with "
            f"{queue.num_tokens} tokens, of all classes {len(self)} requests; come back in {retry_after_s:.2f} s",
            retry_after_s=retry_after_s,
        )
