"""One engine for all: the urgent, the patient, those with a cached prompt, and more than its memory holds."""

from __future__ import annotations

import asyncio

import pytest
from fault_setup import CreateFaults, EngineReplica, FaultCluster, PacedExecutor, Stream, ask, expected, until

from cluster.v1 import inference_pb2 as pb

P0, P1, P3 = pb.PRIORITY_P0, pb.PRIORITY_P1, pb.PRIORITY_P3
HOT = [70] * 64


class Flood:
    """Keeps so many requests open that begin with the same long prompt, cached after the first."""

    def __init__(self, cluster: FaultCluster, priority: pb.Priority, num_open: int = 8) -> None:
        self._cluster = cluster
        self._priority = priority
        self._tasks = [asyncio.create_task(self._run(index)) for index in range(num_open)]
        self.num_done = self.cached_tokens = 0

    async def _run(self, seed: int) -> None:
        while True:
            seed += 100
            request = ask([*HOT, 65 + seed % 50], priority=self._priority, max_tokens=4, seed=seed)
            answer = await self._cluster.stub.Generate(request)
            assert list(answer.candidates[0].token_ids) == expected(request)
            self.num_done += 1
            self.cached_tokens += answer.usage.cached_tokens

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        failures = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert {type(each) for each in failures} == {asyncio.CancelledError}


@pytest.mark.parametrize("flood_of", [P0, P1], ids=["more urgent", "of the same class"])
async def test_a_hot_prefix_does_not_starve_the_cold(create_faults: CreateFaults, flood_of: pb.Priority):
    """Hot prefix starves cold requests: ageing bounds the wait, while the flood goes on."""
    replica = EngineReplica(executor=PacedExecutor(step_s=0.001), max_num_seqs=2, max_num_batched_tokens=32)
    cluster = await create_faults(replica)
    flood = Flood(cluster, flood_of)
    await until(lambda: flood.num_done > 30)
    waits = []
    for seed in range(5):
        before = flood.num_done
        cold = Stream(cluster.front, ask([80 + seed] * 40, priority=P3 if flood_of == P0 else P1, seed=seed))
        await cold.whole()
        waits.append(flood.num_done - before)
    at_end = flood.num_done
    await until(lambda: flood.num_done > at_end + 5)  # it has not let up
    assert flood.cached_tokens / flood.num_done > 50  # and is hot
    # In requests of the flood. It computes 5 tokens for each, and 48 for a cold one, whose class has a tenth of all.
    assert max(waits) < 250
    await flood.end()


async def test_a_p0_finds_the_batch_full_of_p3(create_faults: CreateFaults):
    """P0 arrives, batch full of P3: the lowest is preempted, resumed later, and nothing of it is lost."""
    executor = PacedExecutor(step_s=0.005)
    cluster = await create_faults(EngineReplica(executor=executor, max_num_seqs=2))
    batch = [Stream(cluster.front, ask(max_tokens=120, seed=seed, priority=P3)) for seed in range(2)]
    for stream in batch:
        await stream.has(5)
    urgent = Stream(cluster.front, ask(max_tokens=10, seed=9, priority=P0))
    await urgent.whole()
    assert cluster.replica.engine.load().num_preemptions == 1
    assert all(len(stream.tokens) < 120 for stream in batch)  # it has not waited for them
    for stream in batch:
        await stream.whole()
    ledgers = [await stream.ledger() for stream in batch]
    assert sorted(ledger.num_preemptions for ledger in ledgers) == [0, 1]
    assert not any(ledger.num_moves for ledger in ledgers)
    assert (await urgent.ledger()).num_preemptions == 0


@pytest.mark.parametrize("park_bytes", [0, 2**20], ids=["recomputed", "parked"])
async def test_running_work_uses_up_all_blocks(create_faults: CreateFaults, park_bytes: int):
    """KV exhausted by running work: preempt and recompute or park; nobody fails, and no token changes."""
    executor = PacedExecutor(num_blocks=24, max_model_len=90)
    cluster = await create_faults(EngineReplica(executor=executor, park_bytes=park_bytes))
    streams = [Stream(cluster.front, ask([65 + seed] * 5, max_tokens=80, seed=seed)) for seed in range(8)]
    for stream in streams:
        await stream.whole()
    # Eight of them need 8 * 22 blocks.
    assert cluster.replica.engine.load().num_preemptions > 3
    assert sorted(cluster.front.metrics.outcomes) == ["OK"] * 8
    assert sum([(await stream.ledger()).num_preemptions for stream in streams]) > 3


async def test_where_blocks_suffice_nobody_is_preempted(create_faults: CreateFaults):
    """The same requests in a pool that holds them: what the test above counts comes from the lack of blocks."""
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(num_blocks=200, max_model_len=90)))
    streams = [Stream(cluster.front, ask([65 + seed] * 5, max_tokens=80, seed=seed)) for seed in range(8)]
    for stream in streams:
        await stream.whole()
    assert cluster.replica.engine.load().num_preemptions == 0
