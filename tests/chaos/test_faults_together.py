"""All that clients and processes do to a cluster, at once and drawn at random: every answer is right or an honest
error, and afterwards nothing is left. CLUSTER_TEST_FULL=1 goes on for longer.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter

import grpc
import pytest
from fault_setup import CreateFaults, EngineReplica, FaultCluster, PacedExecutor, ask, expected, tokens_of, until

from cluster.core.config import AdmissionConfig, TenantConfig
from cluster.v1 import inference_pb2 as pb

FULL = os.environ.get("CLUSTER_TEST_FULL") == "1"
NUM_KILLS = 200 if FULL else 8
NUM_CLIENTS = 24
SEEDS = range(8) if FULL else range(2)

pytestmark = pytest.mark.timeout(1800 if FULL else 180)


class Client:
    """Does one thing after the other, most of them sensible."""

    def __init__(self, cluster: FaultCluster, number: int, seed: int) -> None:
        self.ends: Counter[str] = Counter()
        self._cluster = cluster
        self._number = number
        self._rng = random.Random(f"{seed}/{number}")

    async def run(self, ended: asyncio.Event) -> None:
        while not ended.is_set():
            await self._ask()

    def _draw(self) -> pb.GenerateRequest:
        rng = self._rng
        # A few prompts and names, so that caches, joins and replays have something to do.
        prompt = [65 + rng.randrange(4)] * rng.choice((1, 8, 30, 70))
        request = ask(prompt, seed=rng.randrange(5), max_tokens=rng.choice((1, 5, 30, 60)), n=rng.choice((1, 1, 1, 3)))
        request.priority = rng.randrange(5)
        if rng.random() < 0.2:
            request.request_id = f"{hash(request.SerializeToString()) % 50}"
        elif rng.random() < 0.2:
            request.request_id = f"{self._number}-{rng.getrandbits(40)}"
        request.progress = rng.random() < 0.1
        if rng.random() < 0.05:
            request.max_ttft_ms = rng.choice((1, 1000))
        if rng.random() < 0.05:
            request.sampling.temperature = -1.0
        return request

    async def _ask(self) -> None:
        rng, request = self._rng, self._draw()
        stub = rng.choice([front for front in self._cluster.gateways if not front.stopped]).stub
        timeout = rng.uniform(0.001, 0.2) if rng.random() < 0.15 else 60.0
        streams = rng.random() < 0.6
        method = stub.GenerateStream if streams else stub.Generate
        call = method(request, timeout=timeout)
        cancel = asyncio.create_task(self._cancel(call, request)) if rng.random() < 0.25 else None
        try:
            if streams:
                self._check(request, [chunk async for chunk in call])
            else:
                self._check(request, (await call).candidates)
            self.ends["OK"] += 1
        except asyncio.CancelledError:
            assert cancel is not None
            self.ends["CANCELLED"] += 1
        except grpc.aio.AioRpcError as error:
            self._judge(error, request, timeout)
        finally:
            if cancel is not None:
                await asyncio.gather(cancel, return_exceptions=True)

    async def _cancel(self, call: grpc.aio.Call, request: pb.GenerateRequest) -> None:
        await asyncio.sleep(self._rng.expovariate(20.0))
        if request.request_id and self._rng.random() < 0.5:
            stub = self._rng.choice(self._cluster.gateways).stub
            await stub.CancelGeneration(pb.CancelGenerationRequest(generation_id=request.request_id))
        else:
            call.cancel()

    def _check(self, request: pb.GenerateRequest, parts: list) -> None:
        for index in range(request.sampling.n):
            if parts and isinstance(parts[0], pb.Candidate):
                tokens = list(parts[index].token_ids)
            else:
                tokens = tokens_of(parts, index)
            assert tokens == expected(request, index), request

    def _judge(self, error: grpc.aio.AioRpcError, request: pb.GenerateRequest, timeout: float) -> None:
        name = error.code().name
        allowed = {"RESOURCE_EXHAUSTED"}
        if request.sampling.temperature < 0:
            allowed = {"INVALID_ARGUMENT"}
        if timeout < 1:
            allowed.add("DEADLINE_EXCEEDED")
        # Others know some of the names, too.
        if request.request_id:
            allowed |= {"ALREADY_EXISTS", "CANCELLED", "DEADLINE_EXCEEDED"}
        assert name in allowed, f"{name}: {error.details()} for {request}"
        self.ends[name] += 1


def create_replica(rng: random.Random, number: int) -> EngineReplica:
    executor = PacedExecutor(
        step_s=rng.choice((0.0005, 0.002)), num_blocks=rng.choice((64, 120)), max_in_flight=rng.choice((1, 2)),
        max_model_len=140,
    )  # fmt: skip
    return EngineReplica(f"replica-{number}", executor, max_num_seqs=8, max_num_waiting=40)


async def strike(cluster: FaultCluster, rng: random.Random, number: int) -> None:
    """A replica dies, in one way or another, and a new one comes."""
    alive = [replica for replica in cluster.replicas if not replica.stopped]
    victim = rng.choice(alive)
    match rng.randrange(3):
        case 0:
            await victim.kill()
        case 1:
            await victim.server.drain(0.02)
            await victim.stop()
        case 2:
            victim.executor._fault_in, victim.executor._fault_at_step = "collect", 0
            await until(lambda: victim.faults)
            await victim.stop()
    await cluster.add(create_replica(rng, number))


@pytest.mark.parametrize("seed", SEEDS)
async def test_everything_at_once(create_faults: CreateFaults, seed: int):
    """Cancels, deadlines, kills, drains, dead engines, too much work, too little memory, bad requests, doubles."""
    rng = random.Random(seed)
    cluster = await create_faults(
        *(create_replica(rng, number) for number in range(3)),
        num_gateways=2,
        admission=AdmissionConfig(max_queued_requests=12),
        tenants=(TenantConfig(name="*", max_concurrent_requests=22),),
    )
    clients = [Client(cluster, number, seed) for number in range(NUM_CLIENTS)]
    ended = asyncio.Event()
    tasks = [asyncio.create_task(client.run(ended)) for client in clients]
    for number in range(NUM_KILLS):
        await asyncio.sleep(rng.uniform(0.05, 0.3))
        await strike(cluster, rng, 3 + number)
    ended.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 60)
    ends = sum((client.ends for client in clients), Counter())
    assert ends["OK"] > sum(ends.values()) / 3
    assert {"CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"} <= ends.keys(), ends
    for front in cluster.gateways:
        await front.check_idle()
