"""Who may take a request at all: ready, of the same weights, not ejected, not too fresh; who goes first."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from cluster.core.router import Router
from cluster.core.routing import Placement, ReplicaSnapshot
from cluster.core.routing_config import RoutingConfig
from cluster.errors import ConfigError

PLACEMENT = Placement(num_prompt_tokens=100, max_tokens=10)


def create_router(**fields: object) -> Router:
    return Router(RoutingConfig(**{"policy": "least_tokens"} | fields), random.Random(0))  # type: ignore[arg-type]


def create_snapshot(replica_id: str, **fields: object) -> ReplicaSnapshot:
    return ReplicaSnapshot(replica_id=replica_id, **{"ready": True, "outstanding_tokens": 0} | fields)  # type: ignore[arg-type]


def eject(router: Router, replica_id: str, num_replicas: int = 2) -> None:
    for _ in range(5):
        router.outliers.record(replica_id, False, 0.0, num_replicas)


def test_nobody_ready_is_none() -> None:
    router = create_router()
    assert router.pick(PLACEMENT, [], now=0.0) is None
    assert router.pick(PLACEMENT, [create_snapshot("r", ready=False)], now=0.0) is None


def test_who_is_not_ready_is_passed_over_even_when_idle() -> None:
    replicas = [create_snapshot("idle", ready=False), create_snapshot("busy", outstanding_tokens=9)]
    assert create_router().pick(PLACEMENT, replicas, now=0.0) == "busy"


def test_work_that_goes_on_never_goes_to_other_weights() -> None:
    replicas = [
        create_snapshot("new", model_digest="b"),
        create_snapshot("old", model_digest="a", outstanding_tokens=9),
    ]
    router = create_router()
    assert router.pick(PLACEMENT, replicas, now=0.0, only_digest="a") == "old"
    assert router.pick(PLACEMENT, replicas[:1], now=0.0, only_digest="a") is None


def test_equal_fingerprints_go_first_and_others_do_where_there_are_none() -> None:
    replicas = [
        create_snapshot("other", model_digest="a", fingerprint="avx2"),
        create_snapshot("equal", model_digest="a", fingerprint="amx", outstanding_tokens=9),
    ]
    router = create_router()
    assert router.pick(PLACEMENT, replicas, now=0.0, only_digest="a", prefer="amx") == "equal"
    assert router.pick(PLACEMENT, replicas[:1], now=0.0, only_digest="a", prefer="amx") == "other"


def test_an_ejected_replica_is_probed_by_one_request_and_comes_back() -> None:
    router, replicas = (
        create_router(ejection_s=5.0),
        [create_snapshot("bad"), create_snapshot("good", outstanding_tokens=9)],
    )
    eject(router, "bad")
    assert {router.pick(PLACEMENT, replicas, now=4.0) for _ in range(20)} == {"good"}
    assert [router.pick(PLACEMENT, replicas, now=5.0) for _ in range(4)] == ["bad", "good", "good", "good"]
    router.outliers.record("bad", True, 5.5, 2)
    assert router.pick(PLACEMENT, replicas, now=5.5) == "bad"


def test_an_ejected_replica_is_better_than_none() -> None:
    router = create_router()
    eject(router, "bad")
    assert router.pick(PLACEMENT, [create_snapshot("bad"), create_snapshot("good", ready=False)], now=0.0) == "bad"


def test_a_fresh_replica_gets_a_growing_part() -> None:
    def part(ready_s: float) -> float:
        router = create_router(policy="round_robin", slow_start_s=10.0)
        replicas = [create_snapshot("old"), create_snapshot("fresh", ready_s=ready_s)]
        return Counter(router.pick(PLACEMENT, replicas, now=0.0) for _ in range(1100))["fresh"] / 1100

    assert part(0.0) == pytest.approx(0.1 / 1.1, abs=0.01)
    assert part(5.0) == pytest.approx(0.5 / 1.5, abs=0.01)
    assert part(10.0) == pytest.approx(0.5, abs=0.01)


def test_where_all_are_fresh_none_is_spared() -> None:
    router = create_router(slow_start_s=10.0)
    assert router.weight(0.0, 0.0) == 1.0
    assert router.weight(1.0, 100.0) == pytest.approx(0.1)
    assert create_router(slow_start_s=0.0).weight(0.0, 100.0) == 1.0


def test_a_replica_that_has_not_measured_is_taken_for_as_fast_as_the_others() -> None:
    router = create_router(policy="prefix_affinity")
    slow = create_snapshot("slow", step_s=1.0, prompt_token_s=0.1, max_num_batched_tokens=64)
    fast = create_snapshot("fast", step_s=0.1, prompt_token_s=0.01, max_num_batched_tokens=64)
    unknown = create_snapshot("unknown", max_num_batched_tokens=64)
    assert router.pick(PLACEMENT, [slow, fast, unknown], now=0.0) == "fast"
    assert router.pick(PLACEMENT, [slow, unknown], now=0.0) in ("slow", "unknown")


def test_predictions() -> None:
    router = create_router()
    known = create_snapshot("known", step_s=0.1, prompt_token_s=0.01, max_num_batched_tokens=1000, backlog_tokens=900)
    unknown = create_snapshot("unknown")
    assert router.predict_ttft_s(PLACEMENT, [unknown]) is None
    assert router.predict_ttft_s(PLACEMENT, [known]) == pytest.approx(10.1)
    # Who has not measured is as fast as the others, and this one has nothing to do.
    assert router.predict_ttft_s(PLACEMENT, [known, unknown]) == pytest.approx(1.1)
    known.ready = False
    assert router.predict_ttft_s(PLACEMENT, [known]) is None


def test_a_lost_group_fails_nobody() -> None:
    router = create_router(policy="prefix_affinity")
    replicas = [create_snapshot(f"{zone}{i}", group=zone) for zone in "ab" for i in range(2)]
    assert {router.pick(PLACEMENT, replicas, now=0.0)[0] for _ in range(40)} == {"a", "b"}  # type: ignore[index]
    for replica in replicas[:2]:
        replica.ready = False
    assert {router.pick(PLACEMENT, replicas, now=0.0) for _ in range(40)} == {"b0", "b1"}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"slow_start_s": -1.0}, "slow_start_s"),
        ({"eject_after": -1}, "eject_after"),
        ({"ejection_s": 0.0}, "ejection_s"),
        ({"ejection_s": 10.0, "max_ejection_s": 9.0}, "max_ejection_s"),
    ],
)
def test_a_configuration_that_makes_no_sense(fields: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig(**fields)  # type: ignore[arg-type]
    assert caught.value.field == path


@pytest.mark.parametrize(("fingerprint", "chosen"), [("amx", "idle"), ("", "busy")])
def test_who_was_slow_once_gets_work_again_where_others_are_its_likes(fingerprint: str, chosen: str) -> None:
    """A replica without work measures nothing: what it said last may be long past."""
    replicas = [
        create_snapshot("idle", fingerprint=fingerprint, step_s=0.02, prompt_token_s=1e-4),
        create_snapshot("busy", fingerprint=fingerprint, step_s=0.005, prompt_token_s=1e-4, outstanding_tokens=9000),
    ]
    assert create_router(policy="prefix_affinity").pick(PLACEMENT, replicas, now=0.0) == chosen
