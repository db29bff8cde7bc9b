"""What the prefix cache saved reaches the client: gateway, replica and engine are real, only the model is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fake_replica import SECRET
from fakes import FakeExecutor
from gateway_setup import CreateSetup, collect, request

from cluster.core.config import SchedulerConfig
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.serve.replica_server import ReplicaServer

PROMPT = "what is the time?"  # 17 tokens, in blocks of 4


class EngineReplica:
    """A replica whose every completion is the alphabet."""

    replica_id = "replica-0"

    def __init__(self, **config: bool) -> None:
        executor = FakeExecutor(
            script=list(range(ord("a"), ord("z"))), vocab_size=257, max_model_len=512, num_blocks=64
        )
        engine_config = EngineConfig(scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16), **config)
        self._server = ReplicaServer(
            lambda: Engine(executor, engine_config), replica_id=self.replica_id, model="test", secret=SECRET
        )

    async def start(self) -> str:
        return f"127.0.0.1:{await self._server.start()}"

    @property
    def running(self) -> int:
        return self._server.load.running + self._server.load.waiting

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the product has no event for this
                await asyncio.sleep(0.001)

    async def stop(self) -> None:
        await self._server.stop()


async def test_a_repeated_prompt_says_what_it_found(create_setup: CreateSetup) -> None:
    setup = await create_setup(EngineReplica())
    usages = [(await setup.stub.Generate(request(PROMPT))).usage for _ in range(2)]
    assert [usage.cached_tokens for usage in usages] == [0, 16]
    assert [usage.prompt_tokens for usage in usages] == [17, 17]
    chunks = await collect(setup.stub.GenerateStream(request(PROMPT[:9], n=2)))
    assert [chunk.usage.cached_tokens for chunk in chunks if chunk.HasField("usage")] == [8, 8]


async def test_a_stop_string_that_the_gateway_finds_keeps_the_count(create_setup: CreateSetup) -> None:
    setup = await create_setup(EngineReplica())
    await setup.stub.Generate(request(PROMPT))
    response = await setup.stub.Generate(request(PROMPT, max_tokens=20, stop=["cd"]))
    assert response.candidates[0].text == "ab"
    assert response.usage.cached_tokens == 16


async def test_other_salts_find_nothing(create_setup: CreateSetup) -> None:
    setup = await create_setup(EngineReplica())
    salts = ["", "tenant", "tenant", "other", ""]
    usages = [(await setup.stub.Generate(request(PROMPT, cache_salt=salt))).usage for salt in salts]
    assert [usage.cached_tokens for usage in usages] == [0, 0, 16, 0, 16]


async def test_without_the_cache_nothing_is_found(create_setup: CreateSetup) -> None:
    setup = await create_setup(EngineReplica(prefix_cache=False))
    usages = [(await setup.stub.Generate(request(PROMPT))).usage for _ in range(2)]
    assert [usage.cached_tokens for usage in usages] == [0, 0]
