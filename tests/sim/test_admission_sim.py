"""Classes and tenants from the gateway's queue to the engine's steps: shares, and nobody who starves."""

from __future__ import annotations

import pytest
from gateway_sim import Flow, GatewaySim

from cluster.core.request import Priority

P0, P1, P2, P3 = Priority
CAPACITY = 3.4  # requests of 48 + 16 tokens per second and replica


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


@pytest.mark.parametrize(
    "lengths",
    [
        {},
        {"max_tokens": 400},  # far more than what is used: refunds
        {"num_prompt_tokens": 8, "num_output_tokens": 56, "max_tokens": 56},
    ],
    ids=["as asked", "refunded", "long completions"],
)
def test_classes_that_all_flood_get_their_shares(lengths: dict[str, int]):
    sim = GatewaySim(count_from_s=50.0, max_queued_requests=100)
    flows = [Flow(priority=priority, rate=3 * CAPACITY, **lengths) for priority in Priority]
    sim.run(*flows, until_s=350.0)
    assert sim.shares(*flows) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)


def test_shares_hold_where_requests_differ_by_class():
    sim = GatewaySim(count_from_s=50.0, max_queued_requests=100)
    flows = [
        Flow(priority=P0, rate=3 * CAPACITY, num_prompt_tokens=16, num_output_tokens=8),
        Flow(priority=P1, rate=3 * CAPACITY, num_prompt_tokens=200, num_output_tokens=4),
        Flow(priority=P2, rate=3 * CAPACITY, num_prompt_tokens=16, num_output_tokens=60, max_tokens=200),
        Flow(priority=P3, rate=3 * CAPACITY, num_prompt_tokens=300, num_output_tokens=60, max_tokens=60),
    ]
    sim.run(*flows, until_s=350.0)
    assert sim.shares(*flows) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)


def test_shares_hold_across_gateways_that_do_not_talk():
    sim = GatewaySim(num_gateways=3, num_replicas=2, count_from_s=50.0, max_queued_requests=100)
    flows = [
        Flow(priority=P0, rate=6 * CAPACITY, gateway=0),
        Flow(priority=P1, rate=6 * CAPACITY, gateway=0),
        Flow(priority=P2, rate=6 * CAPACITY, gateway=1),
        Flow(priority=P3, rate=6 * CAPACITY, gateway=2),
    ]
    sim.run(*flows, until_s=250.0)
    assert sim.shares(*flows) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)


def test_p3_gets_its_share_under_a_flood_of_p0():
    sim = GatewaySim(count_from_s=50.0, max_queued_requests=100)
    urgent, low = Flow(priority=P0, rate=4 * CAPACITY), Flow(priority=P3, rate=CAPACITY)
    sim.run(urgent, low, until_s=300.0)
    assert sim.shares(urgent, low)[1] >= 0.08
    assert len(sim.ttfts_s[low]) > 50  # and those that were let in were served


def test_a_flood_of_p3_hardly_touches_a_p0():
    p0 = Flow(priority=P0, rate=0.1 * CAPACITY)
    alone, beside = GatewaySim(), GatewaySim()
    alone.run(p0, until_s=1000.0)
    beside.run(p0, Flow(priority=P3, rate=3 * CAPACITY), until_s=1000.0)
    one_step_s = 0.040 + 0.004 * 64 + 0.05
    assert percentile(beside.ttfts_s[p0], 0.99) <= percentile(alone.ttfts_s[p0], 0.99) + 1.2 * one_step_s
    assert beside.refused[p0] == 0


def test_tenants_of_a_class_get_equal_shares_whatever_they_ask_for():
    sim = GatewaySim(count_from_s=50.0, max_queued_requests=100)
    greedy = Flow(priority=P1, tenant="greedy", rate=100 * CAPACITY)
    modest = Flow(priority=P1, tenant="modest", rate=1.0 * CAPACITY)
    sim.run(greedy, modest, until_s=250.0)
    assert sim.shares(greedy, modest) == pytest.approx([0.5, 0.5], abs=0.02)


def test_tenants_share_by_tokens_not_by_requests():
    sim = GatewaySim(count_from_s=50.0, max_queued_requests=100)
    long = Flow(priority=P1, tenant="long", rate=2 * CAPACITY, num_prompt_tokens=300, max_tokens=500)
    short = Flow(priority=P1, tenant="short", rate=8 * CAPACITY, num_prompt_tokens=16, num_output_tokens=4)
    sim.run(long, short, until_s=300.0)
    assert sim.shares(long, short) == pytest.approx([0.5, 0.5], abs=0.03)


def test_a_tenant_below_its_share_does_not_wait_for_the_flood():
    sim = GatewaySim(count_from_s=50.0, max_queued_requests=200)
    greedy = Flow(priority=P1, tenant="greedy", rate=20 * CAPACITY)
    modest = Flow(priority=P1, tenant="modest", rate=0.2 * CAPACITY)
    sim.run(greedy, modest, until_s=350.0)
    assert sim.refused[modest] == 0
    assert percentile(sim.ttfts_s[modest], 0.99) < 0.25 * percentile(sim.ttfts_s[greedy], 0.5)


def test_what_is_left_over_goes_to_those_that_want_it():
    sim = GatewaySim(count_from_s=50.0, max_queued_requests=100)
    p2, p3 = Flow(priority=P2, rate=0.1 * CAPACITY), Flow(priority=P3, rate=3 * CAPACITY)
    sim.run(p2, p3, until_s=250.0)
    full = GatewaySim(count_from_s=50.0, max_queued_requests=100)
    full.run(p3, until_s=250.0)
    assert sim.computed.total() >= 0.95 * full.computed.total()
