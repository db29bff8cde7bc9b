"""Routing before simulated replicas: a real trace of conversations, and made-up loads that show what it is made of."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from sim_setup import create_step_times, trace

from cluster.core.config import SchedulerConfig
from cluster.core.routing_config import PolicyName, RoutingConfig
from cluster.sim.advertising_replica import AdvertisingReplica
from cluster.sim.gateway import QueueingGateway
from cluster.sim.recording import Ending, Recording
from cluster.sim.replica import Replica
from cluster.sim.routing_study import RoutingOutcome, hit_ceiling, replay_trace
from cluster.sim.simulator import Crash, Simulator
from cluster.sim.workload import MOONCAKE_BLOCK_TOKENS, Arrival, read_mooncake

BLOCK_SIZE = 16
NUM_CONVERSATIONS = None if os.environ.get("CLUSTER_TEST_FULL") == "1" else 700


@pytest.fixture(scope="module")
def conversations() -> list[Arrival]:
    return read_mooncake(trace("mooncake_conversation_trace.jsonl"), MOONCAKE_BLOCK_TOKENS)[:NUM_CONVERSATIONS]


@pytest.fixture(scope="module")
def saturated(conversations: list[Arrival]) -> dict[PolicyName, RoutingOutcome]:
    names: list[PolicyName] = ["prefix_affinity", "round_robin"]
    return {name: replay_trace(conversations, name, rate=None) for name in names}


def test_conversations_saturated(saturated: dict[PolicyName, RoutingOutcome]) -> None:
    assert saturated["prefix_affinity"].requests_per_s >= 1.15 * saturated["round_robin"].requests_per_s


def test_conversations_at_four_fifths_of_saturation(
    conversations: list[Arrival], saturated: dict[PolicyName, RoutingOutcome]
) -> None:
    rate = 0.8 * saturated["prefix_affinity"].requests_per_s
    affinity = replay_trace(conversations, "prefix_affinity", rate=rate)
    in_turn = replay_trace(conversations, "round_robin", rate=rate)
    assert in_turn.ttft_s.p99 >= 3 * affinity.ttft_s.p99
    assert affinity.hit_rate >= 0.9 * hit_ceiling(conversations)
    assert in_turn.hit_rate < 0.5 * hit_ceiling(conversations)


def test_the_ceiling_is_what_was_seen_before() -> None:
    def arrival(num_prompt_tokens: int, *names: int) -> Arrival:
        return Arrival(
            at_s=0.0,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=1,
            block_hashes=tuple(bytes([name]) for name in names),
        )

    block = MOONCAKE_BLOCK_TOKENS
    arrivals = [arrival(2 * block + 1, 1, 2), arrival(2 * block, 1, 2), arrival(3 * block + 1, 1, 2, 3)]
    # The last token of a prompt is computed, so the second's last block is.
    assert hit_ceiling(arrivals) == pytest.approx((0 + 1 + 2) / 7)


# -- made-up loads -----------------------------------------------------------------------------------------------------


def create_replicas(slowness: Sequence[float]) -> list[AdvertisingReplica]:
    config = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=256)

    def create(index: int, factor: float) -> AdvertisingReplica:
        def step_s(num_samples: float, context: float, num_prefill_tokens: float, start: float) -> float:
            return factor * (0.01 + 5e-4 * (num_samples + num_prefill_tokens))

        step_times = create_step_times(step_s=step_s)
        return AdvertisingReplica(
            f"replica-{index}", config, num_blocks=2048, block_size=BLOCK_SIZE, step_times=step_times
        )

    return [create(index, factor) for index, factor in enumerate(slowness)]


def run(
    arrivals: Sequence[Arrival],
    policy: PolicyName,
    *,
    slowness: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    faults: Sequence[Crash] = (),
) -> tuple[Recording, Counter[str]]:
    """What happened, and how many requests each replica took."""
    replicas = create_replicas(slowness)
    taken: Counter[str] = Counter()

    class CountingGateway(QueueingGateway):
        def next(self, now: float) -> tuple[int, AdvertisingReplica] | None:  # type: ignore[override]
            sent = super().next(now)
            if sent is not None and sent[1] is not None:
                taken[sent[1].replica_id] += 1
            return sent  # type: ignore[return-value]

    gateway = CountingGateway(replicas, RoutingConfig(policy=policy), random.Random(0))
    return Simulator(replicas, random.Random(0), gateway).run(arrivals, faults), taken


class SeveralGateways:
    """Each arrival at one of them, in turn. They know of each other only what replicas say of their load."""

    def __init__(self, replicas: Sequence[AdvertisingReplica], num: int) -> None:
        config = RoutingConfig(policy="prefix_affinity")
        self._gateways = [QueueingGateway(replicas, config, random.Random(index)) for index in range(num)]

    def arrive(self, request_id: int, arrival: Arrival) -> None:
        self._gateways[request_id % len(self._gateways)].arrive(request_id, arrival)

    def next(self, now: float) -> tuple[int, Replica | None] | None:
        return next((sent for gateway in self._gateways if (sent := gateway.next(now)) is not None), None)

    def hear(self, replica: Replica, sampled: Sequence[int]) -> None:
        assert isinstance(replica, AdvertisingReplica)
        changes = replica.take_cache_changes()
        for gateway in self._gateways:
            gateway.learn(replica.replica_id, changes, sampled)

    def forget(self, request_id: int) -> None:
        for gateway in self._gateways:
            gateway.forget(request_id)

    def lose(self, replica: Replica) -> None:
        for gateway in self._gateways:
            gateway.lose(replica)


def create_conversations(num: int, num_turns: int, rate: float, seed: int = 0) -> list[Arrival]:
    """Each turn is the last one's prompt and some more; turns of all conversations come mixed."""
    rng = random.Random(seed)
    left = dict.fromkeys(range(num), num_turns)
    arrivals, now = [], 0.0
    while left:
        index = rng.choice(list(left))
        now += rng.expovariate(rate)
        num_blocks = 8 * (num_turns - left[index] + 1)
        arrivals.append(
            Arrival(
                at_s=now,
                num_prompt_tokens=num_blocks * BLOCK_SIZE + 5,
                num_output_tokens=8,
                block_hashes=tuple(b"%08d%08d" % (index, block) for block in range(num_blocks)),
            )
        )
        left[index] -= 1
        if not left[index]:
            del left[index]
    return arrivals


def cached_share(recording: Recording) -> float:
    """Of what there was to be found."""
    found = sum(record.num_cached_tokens or 0 for record in recording.records) / BLOCK_SIZE
    return found / sum(len(record.arrival.block_hashes) - 8 for record in recording.records)


def test_a_conversation_stays_where_it_began() -> None:
    arrivals = create_conversations(60, 5, rate=20.0)
    affinity, taken = run(arrivals, "prefix_affinity")
    in_turn, _ = run(arrivals, "round_robin")
    assert cached_share(affinity) > 0.9 > 0.5 > cached_share(in_turn)
    assert max(taken.values()) < 2 * min(taken.values())


def test_gateways_that_do_not_talk_to_each_other_find_what_one_would() -> None:
    arrivals = create_conversations(60, 5, rate=20.0)
    outcomes = []
    for num in (1, 3):
        replicas = create_replicas((1.0,) * 4)
        recording = Simulator(replicas, random.Random(0), SeveralGateways(replicas, num)).run(arrivals)
        first_tokens = sorted(each.first_token_s - each.arrival.at_s for each in recording.records)  # type: ignore[operator]
        outcomes.append((cached_share(recording), first_tokens[len(first_tokens) * 9 // 10]))
    (one_share, one_ttft_s), (share, ttft_s) = outcomes
    assert share > 0.95 * one_share
    assert ttft_s < 1.2 * one_ttft_s


def test_what_all_begin_with_comes_to_be_everywhere() -> None:
    rng, now = random.Random(1), 0.0
    arrivals = []
    for index in range(400):
        now += rng.expovariate(40.0)
        blocks = [b"shared%10d" % block for block in range(16)] + [
            b"%16d" % (100 * index + block) for block in range(4)
        ]
        arrivals.append(
            Arrival(at_s=now, num_prompt_tokens=20 * BLOCK_SIZE + 1, num_output_tokens=8, block_hashes=tuple(blocks))
        )
    recording, taken = run(arrivals, "prefix_affinity")
    assert max(taken.values()) < 1.5 * min(taken.values())
    assert sum(record.num_cached_tokens == 16 * BLOCK_SIZE for record in recording.records) > 380


def test_a_slow_replica_gets_what_it_can_do() -> None:
    arrivals = create_conversations(200, 1, rate=20.0)
    _, taken = run(arrivals, "prefix_affinity", slowness=(1.0, 1.0, 1.0, 4.0))
    assert taken["replica-3"] < 0.5 * min(taken[f"replica-{index}"] for index in range(3))
    _, in_turn = run(arrivals, "round_robin", slowness=(1.0, 1.0, 1.0, 4.0))
    assert in_turn["replica-3"] == 50


@pytest.mark.parametrize("policy", ["round_robin", "least_tokens", "prefix_affinity", "session"])
def test_a_replica_that_crashes_gets_nothing_until_it_is_back_and_then_knows_nothing(policy: PolicyName) -> None:
    arrivals = create_conversations(60, 5, rate=20.0)
    recording, taken = run(arrivals, policy, faults=[Crash(at_s=5.0, replica_index=0, down_s=3.0)])
    endings = Counter(record.ending for record in recording.records)
    assert set(endings) <= {Ending.FINISHED, Ending.LOST} and endings[Ending.LOST] < 20
    assert taken["replica-0"] > 20


def test_while_all_are_down_requests_wait() -> None:
    arrivals = create_conversations(20, 1, rate=20.0)
    crashes = [Crash(at_s=0.0, replica_index=index, down_s=5.0) for index in range(4)]
    recording, _ = run(arrivals, "prefix_affinity", faults=crashes)
    assert {record.ending for record in recording.records} == {Ending.FINISHED}
    assert min(record.first_token_s or 0.0 for record in recording.records) > 5.0


def test_the_same_seed_gives_the_same_run() -> None:
    arrivals = create_conversations(30, 3, rate=20.0)
    one, other = (run(arrivals, "prefix_affinity")[0] for _ in range(2))
    assert [record.ended_s for record in one.records] == [record.ended_s for record in other.records]
