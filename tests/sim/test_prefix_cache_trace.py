"""What the prefix cache finds of real and made-up prompts, in shares of what a pool without bounds would find."""

from __future__ import annotations

import heapq
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence

import pytest
from sim_setup import trace

from cluster.core.block_manager import BlockManager
from cluster.core.cached_block import CachedBlock
from cluster.core.eviction_queue import EvictionQueue
from cluster.sim.prefix_trace import replay_prefixes
from cluster.sim.workload import MOONCAKE_BLOCK_TOKENS, Arrival, read_mooncake

MOONCAKE = "mooncake_conversation_trace.jsonl"
NUM_HELD = None if os.environ.get("CLUSTER_TEST_FULL") == "1" else 4000
MUST_AT_A_QUARTER = 0.95
MUST_AT_A_TENTH = 0.78  # least-recently-used: 0.75


class LeastRecentlyUsed(EvictionQueue):
    """Learns nothing: its bonus stays 0."""

    def recall(self, block_hash: bytes) -> bool:
        return False


class MostRecentlyUsed(EvictionQueue):
    def push(self, block: CachedBlock) -> None:
        block.last_used = -block.last_used
        super().push(block)


def of_prompts(prompts: Iterable[Sequence[int]]) -> list[Arrival]:
    """Prompts of whole blocks of one token, named by what no other block is named by."""
    return [
        Arrival(
            at_s=float(order),
            num_prompt_tokens=len(names) + 1,
            num_output_tokens=1,
            block_hashes=tuple(b"%d" % name for name in names),
        )
        for order, names in enumerate(prompts)
    ]


def unbounded(arrivals: Iterable[Arrival]) -> tuple[float, int]:
    """The rate of a pool that forgets nothing, and how many different blocks there are."""
    seen: set[bytes] = set()
    num_blocks = 0
    for arrival in arrivals:
        num_blocks += len(arrival.block_hashes)
        seen.update(arrival.block_hashes)
    return 1 - len(seen) / num_blocks, len(seen)


def share(
    arrivals: list[Arrival],
    pool: float,
    create_queue: Callable[[int], EvictionQueue] = EvictionQueue,
    *,
    block_size: int = 1,
    tpot_s: float = 0.0,
) -> float:
    """The rate with so large a pool, over the unbounded one. ``pool`` is a share of the different blocks."""
    best, num_different = unbounded(arrivals)
    num_blocks = int(num_different * pool)
    blocks = BlockManager(num_blocks, block_size, create_queue(num_blocks))
    rate = replay_prefixes(blocks, arrivals, tpot_s=tpot_s).rate
    blocks.check_integrity()
    return rate / best


@pytest.fixture(scope="module")
def conversations() -> list[Arrival]:
    """The trace's own accounting: each hash id is a block, the partly filled one at a prompt's end too."""
    with trace(MOONCAKE).open() as file:
        return of_prompts(json.loads(line)["hash_ids"] for line in file)


def test_conversations_unbounded(conversations: list[Arrival]) -> None:
    rate, num_different = unbounded(conversations)
    assert rate == pytest.approx(0.366, abs=5e-4)
    pool = BlockManager(num_different + 1, 1)
    assert replay_prefixes(pool, conversations).rate == pytest.approx(rate, abs=1e-12)


def test_conversations_in_a_quarter(conversations: list[Arrival]) -> None:
    assert share(conversations, 0.25) >= MUST_AT_A_QUARTER
    assert share(conversations, 0.25, MostRecentlyUsed) < MUST_AT_A_QUARTER


def test_conversations_in_a_tenth(conversations: list[Arrival]) -> None:
    assert share(conversations, 0.10) >= MUST_AT_A_TENTH
    assert share(conversations, 0.10, LeastRecentlyUsed) < MUST_AT_A_TENTH - 0.02


def test_conversations_that_hold_their_blocks_while_they_run() -> None:
    """As an engine has it: only full blocks are found, and 30 ms per output token pass before they are let go."""
    arrivals = read_mooncake(trace(MOONCAKE), MOONCAKE_BLOCK_TOKENS)[:NUM_HELD]
    plain, learnt = (
        share(arrivals, 0.10, queue, block_size=MOONCAKE_BLOCK_TOKENS, tpot_s=0.03)
        for queue in (LeastRecentlyUsed, EvictionQueue)
    )
    assert learnt > 1.04 * plain


def popular_prompts_among_scans(rng: random.Random) -> list[list[int]]:
    """Half of the prompts begin with one of 400 documents, some of them far more popular; half are never seen again."""
    weights = [1 / rank for rank in range(1, 401)]
    prompts, fresh = [], 10**6
    for _ in range(3000):
        document = rng.choices(range(400), weights)[0]
        beginning = [100 * document + index for index in range(20)] if rng.random() < 0.5 else []
        prompts.append([*beginning, *range(fresh, fresh + 15)])
        fresh += 15
    return prompts


def endless_conversations(rng: random.Random) -> list[list[int]]:
    """Each turn extends the last one, and four in five are followed by another, however long the conversation is: that
    a block was reused says nothing."""
    later: list[tuple[float, list[int]]] = []
    prompts, fresh = [], 1
    for order in range(4000):
        known = heapq.heappop(later)[1] if later and later[0][0] <= order else [0]
        length = rng.randint(2, 20)
        prompts.append([*known, *range(fresh, fresh + length)])
        fresh += length
        if rng.random() < 0.8:
            heapq.heappush(later, (order + rng.expovariate(1 / 120), prompts[-1]))
    return prompts


def changing_fashions(rng: random.Random) -> list[list[int]]:
    """All that was popular is forgotten every 500 prompts."""
    weights = [1 / rank for rank in range(1, 201)]
    prompts, fresh = [], 10**6
    for order in range(4000):
        document = rng.choices(range(200), weights)[0] + 200 * (order // 500)
        prompts.append([*(100 * document + index for index in range(20)), fresh])
        fresh += 1
    return prompts


@pytest.mark.parametrize("pool", [0.05, 0.10, 0.25, 0.50])
@pytest.mark.parametrize(
    ("create", "least"),
    [(popular_prompts_among_scans, 1.0), (endless_conversations, 0.99), (changing_fashions, 0.99)],
)
def test_it_is_never_much_worse_than_least_recently_used(
    create: Callable[[random.Random], list[list[int]]], least: float, pool: float
) -> None:
    arrivals = of_prompts(create(random.Random(0)))
    assert share(arrivals, pool) >= least * share(arrivals, pool, LeastRecentlyUsed)


def test_scans_do_not_drive_out_what_is_popular() -> None:
    arrivals = of_prompts(popular_prompts_among_scans(random.Random(0)))
    assert share(arrivals, 0.10) > 1.08 * share(arrivals, 0.10, LeastRecentlyUsed)


def test_a_prompt_larger_than_the_pool_is_passed_over() -> None:
    arrivals = of_prompts([[1, 2], [1, 2, 3, 4, 5, 6], [1, 2]])
    hits = replay_prefixes(BlockManager(4, 1), arrivals)
    assert (hits.num_blocks, hits.num_cached_blocks) == (10, 2)


def test_running_requests_make_room_in_the_order_of_their_ends() -> None:
    arrivals = of_prompts([[1, 2], [3], [1, 2], [4, 5, 6]])
    blocks = BlockManager(7, 1)
    # All still run when the third comes: it shares. The fourth needs four blocks, so the others end.
    hits = replay_prefixes(blocks, arrivals, tpot_s=100.0)
    assert hits.num_cached_blocks == 2
    assert blocks.block_table(0) == blocks.block_table(1) == ()
    assert len(blocks.block_table(3)) == 4
