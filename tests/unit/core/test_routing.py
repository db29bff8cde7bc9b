"""The least outstanding tokens win; ties are drawn; nobody ready is no error."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from cluster.core.routing import LeastTokens, ReplicaSnapshot


def create_snapshots(*outstanding_tokens: int, ready: bool = True) -> list[ReplicaSnapshot]:
    return [
        ReplicaSnapshot(replica_id=f"r{index}", ready=ready, outstanding_tokens=tokens)
        for index, tokens in enumerate(outstanding_tokens)
    ]


@pytest.mark.parametrize("replicas", [[], create_snapshots(0, 5, ready=False)])
def test_nobody_ready_is_none(replicas: list[ReplicaSnapshot]):
    assert LeastTokens(random.Random(0)).pick(replicas) is None


def test_the_least_loaded_wins():
    policy = LeastTokens(random.Random(0))
    assert {policy.pick(create_snapshots(7, 3, 4)) for _ in range(20)} == {"r1"}


def test_who_is_not_ready_is_passed_over_even_when_idle():
    idle = ReplicaSnapshot(replica_id="idle", ready=False, outstanding_tokens=0)
    assert LeastTokens(random.Random(0)).pick([idle, *create_snapshots(9, 8)]) == "r1"


def test_ties_are_drawn_evenly_and_repeatably():
    def draws() -> list[str | None]:
        policy = LeastTokens(random.Random(1))
        return [policy.pick(create_snapshots(3, 9, 3, 3)) for _ in range(900)]

    counts = Counter(draws())
    assert set(counts) == {"r0", "r2", "r3"}
    assert min(counts.values()) > 240  # of 300 expected; four standard deviations
    assert draws() == draws()


def test_a_generator_is_taken_too():
    assert LeastTokens(random.Random(0)).pick(iter(create_snapshots(2, 1))) == "r1"
