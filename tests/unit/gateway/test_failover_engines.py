"""Streams that move between real engines and replica servers; only the model is made up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import pytest
from fake_replica import SECRET
from fakes import FakeExecutor
from gateway_setup import READY, CreateSetup, collect, request
from test_generate import joined
from test_ledger import ledger_of

from cluster.core.config import SchedulerConfig
from cluster.core.step import StepInput
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.serve.replica_server import ReplicaServer


class PacedExecutor(FakeExecutor):
    """Takes its time, so that there is something to interrupt."""

    def submit(self, step: StepInput) -> None:
        super().submit(step)
        self.pace()


class EngineReplica:
    """A replica whose tokens depend on the random key alone; it can be drained, and dies with its server."""

    def __init__(self, number: int, pace: Callable[[], None]) -> None:
        self.replica_id = f"replica-{number}"
        self._stopped = False
        executor = PacedExecutor(vocab_size=127, max_model_len=512, num_blocks=64)
        executor.pace = pace
        config = EngineConfig(scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=32))
        self._server = ReplicaServer(
            lambda: Engine(executor, config), replica_id=self.replica_id, model="test", secret=SECRET
        )

    async def start(self) -> str:
        return f"127.0.0.1:{await self._server.start()}"

    async def hand_back(self) -> None:
        """As Serve does it: what does not finish in time goes on elsewhere."""
        await self._server.drain(timeout_s=0.0)

    @property
    def running(self) -> int:
        return 0 if self._stopped else self._server.load.running + self._server.load.waiting

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the product has no event for this
                await asyncio.sleep(0.001)

    async def stop(self) -> None:
        self._stopped = True
        await self._server.stop()


@pytest.mark.parametrize("seed", range(6))
async def test_drains_and_deaths_change_nothing(create_setup: CreateSetup, seed: int) -> None:
    rng = random.Random(seed)
    messages = [
        request(
            "tell me " * rng.randint(1, 8),
            seed=rng.getrandbits(32),
            max_tokens=rng.randint(40, 80),
            n=rng.randint(1, 3),
            logprobs=rng.choice([None, 2]),
            stop=rng.choice([(), ("a", "q"), ("xy",)]),
            min_tokens=rng.randint(0, 4),
        )
        for _ in range(12)
    ]
    calm = await create_setup(EngineReplica(0, lambda: None))
    expected = await asyncio.gather(*map(calm.stub.Generate, messages))
    replicas = [EngineReplica(number, lambda: time.sleep(0.005)) for number in range(4)]
    setup = await create_setup(*replicas)
    await setup.wait_states("test", *[READY] * 4)
    calls = [setup.stub.GenerateStream(message) for message in messages]
    streams = [asyncio.create_task(collect(call)) for call in calls]
    alive = list(replicas)
    for _ in range(3):
        await asyncio.sleep(rng.random() * 0.02)
        async with asyncio.timeout(10):
            while not (busy := [replica for replica in alive if replica.running]):  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0.001)
        alive.remove(victim := rng.choice(busy))
        await (victim.hand_back() if rng.random() < 0.5 else victim.stop())
    for chunks, message, whole in zip(await asyncio.gather(*streams), messages, expected, strict=True):
        got = [joined(chunks, candidate) for candidate in range(message.sampling.n)]
        assert got == list(whole.candidates)
    assert setup.metrics.outcomes() == ["OK"] * 12
    ledgers = [await ledger_of(call) for call in calls]
    assert any(ledger.num_moves for ledger in ledgers), "nothing was interrupted"
