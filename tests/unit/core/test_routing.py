"""Each policy on its own, and groups before replicas."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from cluster.core.routing import (
    LeastTokens,
    Placement,
    PrefixAffinity,
    ReplicaSnapshot,
    RoundRobin,
    Session,
    create_policy,
)

SPEED = {"step_s": 0.03, "prompt_token_s": 1e-4, "max_num_batched_tokens": 2048}


def create_placement(num_prompt_tokens: int = 4000, **fields: object) -> Placement:
    return Placement(num_prompt_tokens=num_prompt_tokens, max_tokens=100, **fields)  # type: ignore[arg-type]


def create_snapshot(replica_id: str, **fields: object) -> ReplicaSnapshot:
    return ReplicaSnapshot(replica_id=replica_id, ready=True, **{"outstanding_tokens": 0, **fields})  # type: ignore[arg-type]


def create_snapshots(*outstanding_tokens: int) -> list[ReplicaSnapshot]:
    return [create_snapshot(f"r{index}", outstanding_tokens=tokens) for index, tokens in enumerate(outstanding_tokens)]


def picks(
    policy: object, replicas: Sequence[ReplicaSnapshot], num: int, placement: Placement | None = None
) -> Counter[str]:
    placement = placement or create_placement()
    return Counter(policy.pick(placement, replicas).replica_id for _ in range(num))  # type: ignore[attr-defined]


# -- least tokens ------------------------------------------------------------------------------------------------------


def test_the_least_loaded_wins() -> None:
    assert picks(LeastTokens(random.Random(0)), create_snapshots(7, 3, 4), 20) == {"r1": 20}


def test_ties_are_drawn_evenly_and_repeatably() -> None:
    def draws() -> list[str]:
        policy = LeastTokens(random.Random(1))
        return [policy.pick(create_placement(), create_snapshots(3, 9, 3, 3)).replica_id for _ in range(900)]

    counts = Counter(draws())
    assert set(counts) == {"r0", "r2", "r3"}
    assert min(counts.values()) > 240  # of 300 expected; four standard deviations
    assert draws() == draws()


def test_a_fresh_replica_is_spared_by_its_weight() -> None:
    fresh = create_snapshot("fresh", weight=0.1)
    assert picks(LeastTokens(random.Random(0)), [fresh, *create_snapshots(30_000)], 10) == {"r0": 10}
    assert picks(LeastTokens(random.Random(0)), [fresh, *create_snapshots(50_000)], 10) == {"fresh": 10}


# -- round robin -------------------------------------------------------------------------------------------------------


def test_each_in_its_turn() -> None:
    policy, replicas = RoundRobin(), create_snapshots(9, 0, 5)
    order = [policy.pick(create_placement(), replicas).replica_id for _ in range(6)]
    assert order == ["r0", "r1", "r2"] * 2


def test_turns_by_weight() -> None:
    replicas = [create_snapshot("whole"), create_snapshot("quarter", weight=0.25)]
    assert picks(RoundRobin(), replicas, 100) == {"whole": 80, "quarter": 20}


def test_who_was_away_has_no_turns_to_catch_up_on() -> None:
    policy, replicas = RoundRobin(), create_snapshots(0, 0, 0)
    picks(policy, replicas, 3)
    picks(policy, replicas[:2], 40)
    assert picks(policy, replicas, 30) == {"r0": 10, "r1": 10, "r2": 10}


# -- prefix affinity ---------------------------------------------------------------------------------------------------


def test_a_prompt_goes_where_its_prefix_is() -> None:
    replicas = [create_snapshot("cold", **SPEED), create_snapshot("warm", cached_tokens=2000, **SPEED)]
    assert picks(PrefixAffinity(random.Random(0)), replicas, 10) == {"warm": 10}


def test_affinity_falls_away_on_imbalance() -> None:
    def replicas(backlog_tokens: int) -> list[ReplicaSnapshot]:
        warm = create_snapshot("warm", cached_tokens=2000, backlog_tokens=backlog_tokens, **SPEED)
        return [create_snapshot("cold", **SPEED), warm]

    assert picks(PrefixAffinity(random.Random(0)), replicas(8_000), 10) == {"warm": 10}
    assert picks(PrefixAffinity(random.Random(0)), replicas(20_000), 10) == {"cold": 10}


def test_a_slow_replica_gets_less() -> None:
    slow = create_snapshot("slow", cached_tokens=1000, step_s=0.06, prompt_token_s=2e-4, max_num_batched_tokens=2048)
    assert picks(PrefixAffinity(random.Random(0)), [slow, create_snapshot("fast", **SPEED)], 10) == {"fast": 10}


def test_what_is_near_goes_by_outstanding_tokens() -> None:
    replicas = [
        create_snapshot("idle", outstanding_tokens=100, backlog_tokens=20, **SPEED),
        create_snapshot("busy", outstanding_tokens=9000, **SPEED),
    ]
    assert picks(PrefixAffinity(random.Random(0)), replicas, 10) == {"idle": 10}


def test_prediction_counts_the_backlog_the_rest_of_the_prompt_and_steps() -> None:
    replica = create_snapshot("r", backlog_tokens=3000, cached_tokens=1000, **SPEED)
    assert replica.ttft_s(4000) == pytest.approx(6000 * 1e-4 + 3 * 0.03)
    assert create_snapshot("r", cached_tokens=4000, **SPEED).ttft_s(4000) == pytest.approx(1e-4 + 0.03)


# -- session -----------------------------------------------------------------------------------------------------------


def homes(replicas: Sequence[ReplicaSnapshot], num_sessions: int = 400) -> dict[str, str]:
    policy = Session(LeastTokens(random.Random(0)))
    return {
        session: policy.pick(create_placement(session_id=session), replicas).replica_id
        for session in map(str, range(num_sessions))
    }


def test_a_session_stays_and_others_do_not_move_when_a_replica_goes() -> None:
    before, after = homes(create_snapshots(0, 5, 9, 1)), homes(create_snapshots(7, 7, 7))
    assert min(Counter(before.values()).values()) > 70  # of 100 expected
    assert all(after[session] == home for session, home in before.items() if home != "r3")


def test_requests_of_no_session_go_by_the_other_policy() -> None:
    assert picks(Session(LeastTokens(random.Random(0))), create_snapshots(5, 1), 10) == {"r1": 10}


# -- groups ------------------------------------------------------------------------------------------------------------


def create_groups(**groups: int) -> list[ReplicaSnapshot]:
    return [create_snapshot(f"{group}{i}", group=group) for group, num in groups.items() for i in range(num)]


def by_group(counts: Counter[str]) -> Counter[str]:
    groups: Counter[str] = Counter()
    for replica_id, num in counts.items():
        groups[replica_id[0]] += num
    return groups


def test_round_robin_gives_groups_their_parts_and_replicas_theirs() -> None:
    counts = picks(create_policy("round_robin", random.Random(0)), create_groups(a=3, b=1), 400)
    assert all(abs(num - 100) <= 1 for num in counts.values()) and len(counts) == 4


def test_the_group_with_the_least_work_each_goes_first() -> None:
    replicas = create_groups(a=2, b=2)
    for replica, tokens in zip(replicas, (0, 900, 400, 300), strict=True):
        replica.outstanding_tokens = tokens
    # The idlest replica of all is in the group that has more to do.
    assert picks(create_policy("least_tokens", random.Random(0)), replicas, 10) == {"b1": 10}


def test_affinity_finds_the_group_that_holds_the_prefix() -> None:
    replicas = create_groups(a=2, b=2)
    replicas[2].cached_tokens = 3000
    assert picks(create_policy("prefix_affinity", random.Random(0)), replicas, 10) == {"b0": 10}


@pytest.mark.parametrize("name", ["round_robin", "least_tokens", "prefix_affinity", "session"])
def test_a_lost_group_leaves_its_work_to_the_others(name: str) -> None:
    policy, replicas = create_policy(name, random.Random(0)), create_groups(a=2, b=2)  # type: ignore[arg-type]
    assert set(by_group(picks(policy, replicas, 50))) <= {"a", "b"}
    assert by_group(picks(policy, replicas[:2], 50)) == {"a": 50}
    session = create_placement(session_id="somebody")
    assert policy.pick(session, replicas[:2]).group == "a"


def test_sessions_spread_over_groups_by_their_sizes() -> None:
    policy = create_policy("session", random.Random(0))
    replicas = create_groups(a=3, b=1)
    sessions = [create_placement(session_id=str(index)) for index in range(400)]
    counts = by_group(Counter(policy.pick(session, replicas).replica_id for session in sessions))
    assert 260 < counts["a"] < 340
