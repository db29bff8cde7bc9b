"""The turnstile of one model: who may enter, and who has to wait for how long."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Protocol

from cluster.core.admission import AdmissionQueue, ClassBacklog
from cluster.core.config import AdmissionConfig, ClassesConfig
from cluster.core.fair_queue import QueuedRequest
from cluster.core.quotas import QuotaLease
from cluster.core.request import Priority
from cluster.core.routing import Placement
from cluster.core.token_estimate import BytesPerToken, CompletionLength
from cluster.errors import ClusterError, DeadlineExceeded, Overloaded
from cluster.gateway.caller import Caller
from cluster.gateway.tenants import Tenants

_MIN_RETRY_S = 0.05


class Replicas(Protocol):
    """What an admission has to know of a model's replicas; its balancer does."""

    @property
    def tokens_per_s(self) -> float | None:
        """That they compute for this gateway; None: not known."""
        ...

    def has_room(self, priority: Priority) -> bool:
        """Whether some replica may be given one more request of the class."""
        ...

    def on_room(self, callback: Callable[[], None]) -> None:
        """Has ``callback`` called on the event loop whenever room may have appeared."""
        ...

    def predicted_ttft_s(self, placement: Placement) -> float | None:
        """Until the first token of a request that is sent now; None: not known."""
        ...


class Admission:
    """Lets requests for one model in, by what waits for it, and to the replicas, in turn. Event loop only.

    Args:
        model: its name.
        config: bounds of the queue.
        classes: shares, targets and bounds of the priority classes.
        replicas: of the model.
        tenants: what callers may use, of all models.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        model: str,
        config: AdmissionConfig,
        classes: ClassesConfig,
        replicas: Replicas,
        tenants: Tenants,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._tenants = tenants
        self._queue = AdmissionQueue(config, classes, known_rate=lambda: replicas.tokens_per_s)
        self._classes = classes.by_priority()
        self._replicas = replicas
        self._clock = clock
        self._bytes_per_token = BytesPerToken()
        self._completions = {priority: CompletionLength() for priority in Priority}
        self._tickets: dict[QueuedRequest, Ticket] = {}
        self._is_placing = False
        replicas.on_room(self._give_turns)

    def backlog(self) -> dict[Priority, ClassBacklog]:
        """What waits, by class."""
        return self._queue.backlog(self._clock())

    def allow(self, caller: Caller, asked: Priority | None) -> Priority:
        """The class of a request that asks for this one; None: for none in particular.

        Raises:
            Forbidden: the caller may not use the model or the class.
        """
        self._tenants.check_model(caller, self._model)
        return self._tenants.priority(caller, asked)

    def max_e2e_s(self, priority: Priority) -> float:
        """How long a request of the class may take; infinite: as long as it likes."""
        return self._classes[priority].max_e2e_s

    def enter(
        self,
        *,
        caller: Caller,
        priority: Priority,
        num_bytes: int,
        max_tokens: int | None,
        n: int = 1,
        deadline_s: float = math.inf,
        max_ttft_s: float = math.inf,
        num_tokens: int | None = None,
    ) -> Ticket:
        """Lets a request in before it is tokenized, at once or never. Whoever has a ticket leaves with it.

        Args:
            caller: who sends it.
            priority: its class, which ``allow`` has let pass.
            num_bytes: of its text.
            max_tokens: of each completion; None: as many as the context holds.
            n: completions.
            deadline_s: until its deadline.
            max_ttft_s: until its first token at the latest.
            num_tokens: of its prompt, where that is known without tokenizing.

        Raises:
            QuotaExceeded: its tenant has used up a quota.
            Overloaded: too much waits, or it would wait longer than it may.
        """
        now = self._clock()
        if num_tokens is None:
            num_prompt_tokens = self._bytes_per_token.num_tokens(num_bytes)
        else:
            num_prompt_tokens, num_bytes = num_tokens, 0
        num_expected_tokens = self._completions[priority].expected(max_tokens, n)
        lease = self._tenants.quotas.enter(caller.tenant, num_prompt_tokens + num_expected_tokens, now)
        try:
            request, pushed_out = self._queue.add(
                now=now,
                priority=priority,
                tenant=caller.tenant,
                num_tokens=num_prompt_tokens + num_expected_tokens,
                max_ttft_s=max_ttft_s,
                deadline=now + deadline_s,
            )
        except Overloaded:
            lease.undo(now)
            raise
        self._push_out(pushed_out)
        ticket = Ticket(
            self,
            request,
            lease,
            num_bytes=num_bytes,
            num_prompt_tokens=num_prompt_tokens,
            num_expected_tokens=num_expected_tokens,
            n=n,
            deadline=now + deadline_s,
            max_ttft_s=max_ttft_s,
        )
        self._tickets[request] = ticket
        try:
            # Whatever the prompt is, a replica may have it in its cache.
            placement = Placement(num_prompt_tokens=1, max_tokens=max_tokens or 1, priority=priority)
            self._check_forecast(ticket, placement)
        except Overloaded as error:
            ticket.refuse(error)
            ticket.leave(0)
            raise
        return ticket

    def _check_forecast(self, ticket: Ticket, placement: Placement) -> None:
        """Raises Overloaded where its first token is predicted to come too late, or its last after its deadline."""
        request = ticket.request
        waited_s = self._clock() - request.arrival
        wait_s = self._queue.wait_s(request) or 0.0
        if math.isfinite(ticket.max_ttft_s):
            replica_s = self._replicas.predicted_ttft_s(placement) or 0.0
            self._check_time("first token", waited_s + wait_s + replica_s, ticket.max_ttft_s, field="max_ttft_ms")
        if wait_s > 0.0 and math.isfinite(ticket.deadline):
            # What would run out of time half-way had better not begin.
            service_s = self._completions[request.priority].expected_s(ticket.num_expected_tokens / ticket.n)
            self._check_time("end", waited_s + wait_s + service_s, ticket.deadline - request.arrival, field="")

    @staticmethod
    def _check_time(what: str, predicted_s: float, limit_s: float, *, field: str) -> None:
        if predicted_s > limit_s:
            retry_after_s = max(predicted_s - limit_s, _MIN_RETRY_S)
            raise Overloaded(
                f"its {what} is predicted to come {predicted_s:.2f} s after it arrived, and may come {limit_s:.2f} s "
                f"after that at most; come back in {retry_after_s:.2f} s, or allow more time",
                field=field,
                retry_after_s=retry_after_s,
            )

    def _push_out(self, requests: list[QueuedRequest]) -> None:
        for request in requests:
            retry_after_s = self._queue.retry_after_s(request.priority)
            self._tickets[request].refuse(
                Overloaded(
                    f"gave way to others while it waited: too much waits at this gateway, and class "
                    f"{request.priority.name} has more than its share; come back in {retry_after_s:.2f} s",
                    retry_after_s=retry_after_s,
                )
            )

    def _give_turns(self) -> None:
        """Gives the next one its turn. Those after it have to wait until it is placed: it takes room."""
        if self._is_placing:
            return
        request = self._queue.pop(self._clock(), self._replicas.has_room)
        if request is None:
            return
        self._tickets[request].give_turn()
        if self._queue.num_ready:
            # Runs after the task that waits for this turn: its wake-up was put in the event loop's queue before.
            self._is_placing = True
            asyncio.get_running_loop().call_soon(self._placed)

    def _placed(self) -> None:
        self._is_placing = False
        self._give_turns()


class Ticket:
    """A request's way through an admission: ``count``, ``turn``, and ``leave`` whatever happens."""

    def __init__(
        self,
        admission: Admission,
        request: QueuedRequest,
        lease: QuotaLease,
        *,
        num_bytes: int,
        num_prompt_tokens: int,
        num_expected_tokens: int,
        n: int,
        deadline: float,
        max_ttft_s: float,
    ) -> None:
        self.request = request
        self.deadline = deadline
        self.max_ttft_s = max_ttft_s
        self._admission = admission
        self._lease = lease
        self._num_bytes = num_bytes
        self._num_prompt_tokens = num_prompt_tokens
        self.num_expected_tokens = num_expected_tokens
        self.n = n
        self._had_turn = False
        self._began_at = 0.0
        self._has_left = False
        self._refusal: ClusterError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def position(self) -> int:
        """How many go first, as things stand."""
        return self._admission._queue.position(self.request) if self.request.is_queued else 0

    @property
    def eta_s(self) -> float | None:
        """Until its turn, as things stand; None: not known."""
        return self._admission._queue.wait_s(self.request) if self.request.is_queued else 0.0

    def count(self, placement: Placement) -> None:
        """Says what the request is, once it is tokenized.

        Args:
            placement: as it would be sent now.

        Raises:
            Overloaded: it gave way to others meanwhile, or with so many tokens there is no room, or its first token
                would come too late.
        """
        self._check_refusal()
        admission, num_prompt_tokens = self._admission, placement.num_prompt_tokens
        if self._num_bytes:
            admission._bytes_per_token.observe(self._num_bytes, num_prompt_tokens)
        self._num_prompt_tokens = num_prompt_tokens
        num_tokens = num_prompt_tokens + self.num_expected_tokens
        self._lease.correct(num_tokens, admission._clock())
        try:
            admission._push_out(admission._queue.resize(self.request, num_tokens))
            admission._check_forecast(self, placement)
        except Overloaded as error:
            self.refuse(error)
            raise

    async def turn(self) -> None:
        """Returns when it may be placed, which has to follow at once: the next one waits for that.

        Raises:
            Overloaded: it gave way to others.
            DeadlineExceeded: its deadline passed first.
        """
        self._check_refusal()
        admission = self._admission
        admission._queue.make_ready(self.request, admission._clock())
        admission._give_turns()
        if self._had_turn:
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None
        if math.isfinite(self.deadline):
            timer = loop.call_later(max(self.deadline - admission._clock(), 0.0), self._expire)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def leave(self, num_completion_tokens: int, *, cached_tokens: int = 0) -> None:
        """Ends it, queued, running or done; what it did not use is refunded. Once, whatever happened.

        Args:
            num_completion_tokens: of all candidates together.
            cached_tokens: of the prompt, that were not computed; tenants' quotas count them all the same.
        """
        if self._has_left:
            raise RuntimeError("a ticket was left with twice")
        self._has_left = True
        admission, request = self._admission, self.request
        now = admission._clock()
        del admission._tickets[request]
        if not self._had_turn:
            if request.is_queued:
                admission._queue.remove(request, now)
            if self._refusal is None:
                self._lease.release(0, now)
            else:
                self._lease.undo(now)
            return
        admission._completions[request.priority].observe(num_completion_tokens, self.n, now - self._began_at)
        admission._queue.settle(request, self._num_prompt_tokens - cached_tokens + num_completion_tokens)
        self._lease.release(self._num_prompt_tokens + num_completion_tokens, now)

    def give_turn(self) -> None:
        self._had_turn = True
        self._began_at = self._admission._clock()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def refuse(self, error: ClusterError) -> None:
        """It is out of the queue: whoever waits for its turn gets the error, now or when he asks."""
        self._refusal = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def _expire(self) -> None:
        if self.request.is_queued:
            self._admission._queue.remove(self.request, self._admission._clock())
            self.refuse(DeadlineExceeded("the deadline passed before the request had its turn; nothing was executed"))

    def _check_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal
