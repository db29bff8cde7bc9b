"""Tickets: in at once or never, turns in order, out once."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from cluster.core.config import AdmissionConfig, ClassConfig, ClassesConfig, TenantConfig
from cluster.core.request import Priority
from cluster.core.routing import Placement
from cluster.errors import DeadlineExceeded, Forbidden, Overloaded, QuotaExceeded
from cluster.gateway.admission import Admission, Ticket
from cluster.gateway.caller import Caller
from cluster.gateway.tenants import Tenants

P0, P1, P2, P3 = Priority


def prompt(num_tokens: int) -> Placement:
    return Placement(num_prompt_tokens=num_tokens, max_tokens=10)


class Slots:
    """Room for a number of requests of any class; prompts take ``token_s`` a token."""

    tokens_per_s: float | None = None

    def __init__(self, num_free: int) -> None:
        self.token_s: float | None = None
        self.num_free = num_free
        self.num_asked = 0
        self._callbacks: list[Callable[[], None]] = []

    def has_room(self, priority: Priority) -> bool:
        return self.num_free > 0

    def on_room(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def predicted_ttft_s(self, placement: Placement) -> float | None:
        return None if self.token_s is None else placement.num_prompt_tokens * self.token_s

    def take(self) -> None:
        assert self.num_free > 0, "given more turns than there is room"
        self.num_free -= 1

    def free(self, num: int = 1) -> None:
        self.num_free += num
        for callback in self._callbacks:
            callback()


class Gate:
    """An admission, and requests that take a slot when their turn has come."""

    def __init__(
        self,
        num_free: int = 0,
        *,
        classes: ClassesConfig | None = None,
        tenants: Sequence[TenantConfig] = (),
        num_gateways: int = 1,
        **bounds: int,
    ) -> None:
        self.now = 100.0
        self.slots = Slots(num_free)
        self.admission = Admission(
            "demo",
            AdmissionConfig(**bounds),
            classes or ClassesConfig(),
            self.slots,
            Tenants(tenants, lambda: num_gateways),
            clock=lambda: self.now,
        )
        self.placed: list[str] = []

    def enter(self, priority: Priority = P1, tenant: str = "", **request: Any) -> Ticket:
        caller = Caller(tenant=tenant)
        return self.admission.enter(
            **{"priority": priority, "caller": caller, "num_bytes": 0, "num_tokens": 10, "max_tokens": 10, **request}
        )

    async def run(self, name: str, ticket: Ticket) -> None:
        await ticket.turn()
        self.slots.take()
        self.placed.append(name)

    def waiting(self) -> int:
        return sum(each.requests for each in self.admission.backlog().values())


@contextlib.asynccontextmanager
async def waiting(gate: Gate, **tickets: Ticket) -> AsyncIterator[dict[str, asyncio.Task[None]]]:
    """Tasks that wait for their turns, in this order; ended afterwards."""
    tasks = {}
    for name, ticket in tickets.items():
        tasks[name] = asyncio.create_task(gate.run(name, ticket))
        await asyncio.sleep(0)
    yield tasks
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_where_there_is_room_a_turn_comes_without_waiting():
    gate = Gate(1)
    ticket = gate.enter()
    ticket.count(prompt(12))
    coroutine = ticket.turn()
    with pytest.raises(StopIteration):
        coroutine.send(None)
    ticket.leave(3)
    assert gate.waiting() == 0


async def test_turns_come_by_class_and_one_for_each_place():
    gate = Gate()
    async with waiting(gate, low=gate.enter(P3), high=gate.enter(P0), middle=gate.enter(P1), last=gate.enter(P3)):
        assert gate.placed == []
        gate.slots.free(2)
        await settle()
        assert gate.placed == ["high", "middle"]
        gate.slots.free(5)
        await settle()
        assert gate.placed == ["high", "middle", "low", "last"]
        assert gate.slots.num_free == 3


async def test_who_is_cancelled_while_it_waits_leaves_the_queue():
    gate = Gate()
    ticket = gate.enter()
    async with waiting(gate, one=ticket, two=gate.enter()) as tasks:
        tasks["one"].cancel()
        await settle()
        ticket.leave(0)
        assert gate.waiting() == 1
        gate.slots.free()
        await settle()
        assert gate.placed == ["two"]


async def test_a_full_queue_refuses_with_a_number():
    gate = Gate(max_queued_requests=2)
    gate.enter(P0), gate.enter(P0)
    with pytest.raises(Overloaded) as caught:
        gate.enter(P0)
    assert caught.value.retry_after_s > 0
    assert gate.waiting() == 2


async def test_a_p0_that_finds_the_queue_full_takes_the_place_of_the_newest_of_the_lowest_class():
    gate = Gate(max_queued_requests=3)
    tickets = {"first": gate.enter(P3), "second": gate.enter(P2), "third": gate.enter(P3)}
    async with waiting(gate, **tickets) as tasks:
        urgent = gate.enter(P0)
        await settle()
        with pytest.raises(Overloaded) as caught:
            tasks["third"].result()
        assert caught.value.retry_after_s > 0
        assert not tasks["first"].done() and not tasks["second"].done()
        tickets["third"].leave(0)
        assert gate.waiting() == 3
        urgent.leave(0)


async def test_who_gave_way_before_its_turn_hears_of_it_at_the_next_step():
    gate = Gate(max_queued_requests=1)
    low = gate.enter(P3)
    gate.enter(P0)
    with pytest.raises(Overloaded):
        low.count(prompt(10))
    with pytest.raises(Overloaded):
        await low.turn()
    low.leave(0)
    assert gate.waiting() == 1


async def test_the_exact_count_corrects_the_charge():
    gate = Gate()
    ticket = gate.enter(P1, num_bytes=8000, num_tokens=None)
    assert 0 < gate.admission.backlog()[P1].tokens < 2010
    ticket.count(prompt(5000))
    assert gate.admission.backlog()[P1].tokens == 5010
    ticket.leave(0)


async def test_the_exact_count_is_refused_where_it_does_not_fit():
    gate = Gate(max_queued_tokens=1000)
    gate.enter(P1, num_tokens=500)
    ticket = gate.enter(P1, num_bytes=400, num_tokens=None)
    with pytest.raises(Overloaded):
        ticket.count(prompt(600))
    ticket.leave(0)
    assert gate.admission.backlog()[P1].tokens == 510


async def test_bytes_per_token_are_learned():
    gate = Gate()
    for _ in range(500):
        ticket = gate.enter(num_bytes=10_000, num_tokens=None)
        ticket.count(prompt(5000))
        ticket.leave(0)
    gate.enter(num_bytes=10_000, num_tokens=None)
    assert gate.admission.backlog()[P1].tokens == pytest.approx(5010, rel=0.05)


async def test_the_deadline_ends_the_wait():
    gate = Gate()
    ticket = gate.enter(deadline_s=0.01)
    async with waiting(gate, one=ticket) as tasks:
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(tasks["one"], 10)
    ticket.leave(0)
    assert gate.waiting() == 0


async def test_a_class_limits_how_long_a_request_may_take():
    gate = Gate(classes=ClassesConfig(p1=ClassConfig(share=0.3, max_e2e_ms=2000)))
    assert gate.admission.max_e2e_s(P1) == 2.0
    assert gate.admission.max_e2e_s(P0) == math.inf


async def drained(gate: Gate, num: int, *, tokens_per_s: float, decode_s: float = 0.0) -> None:
    """Serves a backlog of requests of 20 tokens, so that the rate is known, and that they end ``decode_s`` later."""
    tickets = [gate.enter(P1) for _ in range(num)]
    async with waiting(gate, **{str(i): ticket for i, ticket in enumerate(tickets)}):
        for ticket in tickets:
            gate.now += 20 / tokens_per_s
            gate.slots.free()
            await settle()
            gate.now += decode_s
            ticket.leave(10)
            gate.now -= decode_s


async def test_a_first_token_that_would_come_too_late_is_refused_at_once_with_the_prediction():
    gate = Gate()
    await drained(gate, 50, tokens_per_s=100.0)
    for _ in range(10):
        gate.enter(P1)  # 200 tokens: 2 s
    with pytest.raises(Overloaded, match=r"first token is predicted to come (1\.[89]|2\.[01])\d s after") as caught:
        gate.enter(P1, max_ttft_s=1.0)
    assert caught.value.retry_after_s == pytest.approx(1.0, abs=0.2)
    assert gate.waiting() == 10
    accepted = gate.enter(P1, max_ttft_s=3.0)
    assert accepted.eta_s == pytest.approx(2.0, abs=0.2)
    assert accepted.position == 10


async def test_what_would_run_out_of_time_is_refused_at_once():
    gate = Gate()
    await drained(gate, 50, tokens_per_s=100.0, decode_s=3.0)
    for _ in range(10):
        gate.enter(P1)  # 2 s, and 3 s until the end of one
    for deadline_s in (1.0, 4.5):
        with pytest.raises(Overloaded, match="its end is predicted"):
            gate.enter(P1, deadline_s=deadline_s)
    gate.enter(P1, deadline_s=6.0)
    gate.enter(P1, deadline_s=3.8, max_tokens=1)


async def test_what_the_replicas_need_counts_too():
    gate = Gate(5)
    gate.slots.token_s = 0.01
    ticket = gate.enter(max_ttft_s=1.0)
    ticket.count(prompt(90))
    late = gate.enter(max_ttft_s=1.0)
    with pytest.raises(Overloaded, match=r"2\.00 s"):
        late.count(prompt(200))
    late.leave(0)
    gate.slots.token_s = 2.0
    with pytest.raises(Overloaded, match=r"2\.00 s"):
        gate.enter(max_ttft_s=1.0)


async def test_what_the_replicas_say_of_their_rate_counts_until_it_is_measured():
    gate = Gate()
    gate.slots.tokens_per_s = 10.0
    for _ in range(10):
        gate.enter()
    with pytest.raises(Overloaded, match=r"20\.00 s"):
        gate.enter(max_ttft_s=1.0)


async def test_a_refusal_says_when_the_backlog_will_have_been_served():
    gate = Gate(max_queued_requests=20)
    await drained(gate, 20, tokens_per_s=100.0)
    for _ in range(20):
        gate.enter(P1)
    with pytest.raises(Overloaded) as caught:
        gate.enter(P1)
    assert caught.value.retry_after_s == pytest.approx(4.0, abs=0.5)


async def test_a_ticket_is_left_with_once():
    ticket = Gate().enter()
    ticket.leave(0)
    with pytest.raises(RuntimeError):
        ticket.leave(0)


async def test_quotas_are_charged_by_the_estimate_corrected_and_given_back():
    gate = Gate(9, tenants=[TenantConfig(name="acme", tokens_per_min=1000)])
    ticket = gate.enter(tenant="acme", num_bytes=80, num_tokens=None)
    ticket.count(prompt(900))
    await ticket.turn()
    with pytest.raises(QuotaExceeded) as caught:
        gate.enter(tenant="acme", num_tokens=190)
    assert caught.value.retry_after_s == pytest.approx(6.6)  # 110 tokens
    gate.enter(tenant="umbrella", num_tokens=5000).leave(0)
    ticket.leave(0)
    gate.enter(tenant="acme", num_tokens=90).leave(0)


async def test_a_request_that_is_refused_for_lack_of_room_costs_no_quota():
    tenant = TenantConfig(name="acme", requests_per_s=1, max_concurrent_requests=1)
    gate = Gate(tenants=[tenant], max_queued_requests=1)
    other = gate.enter()
    with pytest.raises(Overloaded):
        gate.enter(tenant="acme", priority=P3)
    other.leave(0)
    gate.enter(tenant="acme", priority=P3).leave(0)
    with pytest.raises(QuotaExceeded):
        gate.enter(tenant="acme", priority=P3)
    gate.now += 1.0
    gate.enter(tenant="acme", priority=P3)


async def test_a_tenant_has_its_models_and_classes():
    allow = Gate(
        tenants=[TenantConfig(name="batch", max_priority="P2"), TenantConfig(name="other", models=("big",))]
    ).admission.allow
    with pytest.raises(Forbidden) as caught:
        allow(Caller(tenant="batch"), P1)
    assert caught.value.field == "priority"
    assert allow(Caller(tenant="batch"), None) is P2
    assert allow(Caller(tenant="batch"), P3) is P3
    assert allow(Caller(), None) is P1
    assert allow(Caller(), P0) is P0
    with pytest.raises(Forbidden, match="'demo'") as caught:
        allow(Caller(tenant="other"), None)
    assert caught.value.field == "model"
    with pytest.raises(Forbidden):
        allow(Caller(models=frozenset({"big"})), None)
    with pytest.raises(Forbidden):
        allow(Caller(max_priority=P1), P0)


async def test_each_gateway_enforces_its_part():
    gate = Gate(tenants=[TenantConfig(name="*", max_concurrent_requests=8)], num_gateways=4)
    gate.enter(tenant="acme"), gate.enter(tenant="acme"), gate.enter(tenant="umbrella")
    with pytest.raises(QuotaExceeded):
        gate.enter(tenant="acme")
