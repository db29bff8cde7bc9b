"""Processes that die under load: no request fails, no token is lost, doubled or changed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter

import pytest
from chaos_cluster import Chaos, CreateChaos
from chaos_load import ChaosClient

FULL = bool(os.environ.get("CLUSTER_TEST_FULL"))
NUM_KILLS = 1000 if FULL else 50
NUM_CLIENTS = 16

pytestmark = pytest.mark.timeout(3600 if FULL else 600)

# What dies, how, and how often in a hundred.
DEATHS = {
    ("replica", signal.SIGKILL): 50,
    ("gateway", signal.SIGKILL): 25,
    ("both", signal.SIGKILL): 5,
    ("replica", signal.SIGTERM): 12,
    ("gateway", signal.SIGTERM): 8,
}


async def kill_some(chaos: Chaos, rng: random.Random, num_kills: int) -> Counter:
    """One death after the other, each once everybody has got further; what died is started again."""
    killed: Counter = Counter()
    while killed.total() < num_kills:
        role, number = rng.choices(list(DEATHS), list(DEATHS.values()))[0]
        victims = [rng.choice(chaos.replicas)] if role != "gateway" else []
        victims += [rng.choice(chaos.gateways)] if role != "replica" else []
        await asyncio.sleep(rng.uniform(0.0, 0.05))
        await asyncio.gather(*(victim.end(number) for victim in victims))
        await asyncio.gather(*(victim.start() for victim in victims))
        killed[role, number.name] += len(victims)
        await chaos.progress()
    return killed


async def test_nobody_notices_that_processes_die(create_chaos: CreateChaos):
    chaos = await create_chaos(num_replicas=3, num_gateways=2)
    chaos.load(NUM_CLIENTS, seed=1)
    killed = await kill_some(chaos, random.Random(2), NUM_KILLS)
    await chaos.unload()
    assert chaos.wrong() == []
    assert killed["replica", "SIGKILL"] > NUM_KILLS / 4 and killed["gateway", "SIGKILL"] > NUM_KILLS / 10
    # The kills have hit what they were meant to hit.
    assert sum(client.num_moves for client in chaos.clients) > NUM_KILLS / 4
    assert sum(client.num_resumes for client in chaos.clients) > NUM_KILLS / 4
    await chaos.settle()


async def test_the_only_replica_and_the_only_gateway(create_chaos: CreateChaos):
    """There is nowhere to go on: everybody waits for the next process."""
    chaos = await create_chaos(num_replicas=1, num_gateways=1)
    chaos.load(4, seed=3)
    await kill_some(chaos, random.Random(4), NUM_KILLS // 10)
    await chaos.unload()
    assert chaos.wrong() == []
    await chaos.settle()


async def test_processes_that_hang_are_left(create_chaos: CreateChaos):
    """Stopped, not dead: no connection breaks. What they still had to say when they go on again is not heard."""
    chaos = await create_chaos(num_replicas=2, num_gateways=2, step_s=0.05)
    chaos.load(12, seed=5)
    await chaos.progress()
    for _ in range(5 if FULL else 1):
        hung = [chaos.replicas[0], chaos.gateways[1]]
        for process in hung:
            process.send(signal.SIGSTOP)
        await chaos.progress()
        for process in hung:
            process.send(signal.SIGCONT)
        await chaos.progress()
    await chaos.unload()
    assert chaos.wrong() == []
    assert sum(client.num_resumes for client in chaos.clients) > 0
    assert sum(client.num_moves for client in chaos.clients) > 0
    await chaos.settle()


@pytest.mark.parametrize("fault", ["lost", "doubled", "changed"])
async def test_a_wrong_token_is_noticed(create_chaos: CreateChaos, fault: str, monkeypatch: pytest.MonkeyPatch):
    """The clients of these tests see one wrong token in a stream."""
    chaos = await create_chaos(num_replicas=1, num_gateways=1)
    taken = ChaosClient.count_chunk
    hits = []

    def tamper(client: ChaosClient, chunk):
        chunk = taken(client, chunk)
        if hits or len(chunk.token_ids) != 1:
            return chunk
        hits.append(chunk)
        token = chunk.token_ids[0]
        tokens = {"lost": (), "doubled": (token, token), "changed": (token % 26 + 97,)}[fault]
        return type(chunk)(
            **{name: getattr(chunk, name) for name in chunk.__dataclass_fields__} | {"token_ids": tokens}
        )

    monkeypatch.setattr(ChaosClient, "count_chunk", tamper)
    chaos.load(1, seed=6)
    await chaos.progress()
    await chaos.unload()
    assert hits and any("other tokens" in problem for problem in chaos.wrong())
