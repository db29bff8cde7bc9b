"""Too much, or nothing but rubbish: refused at once, counters come back to zero, and nobody else notices."""

from __future__ import annotations

import asyncio
import statistics
import time

import grpc
import pytest
from fault_setup import READY, CreateFaults, EngineReplica, FaultCluster, PacedExecutor, Stream, ask, failure, until

from cluster.core.config import AdmissionConfig, TenantConfig
from cluster.core.routing_config import RoutingConfig
from cluster.errors import InvalidRequest
from cluster.text.tokenizer import Tokenizer
from cluster.v1 import inference_pb2 as pb

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


async def fill(cluster: FaultCluster, num_queued: int) -> list[Stream]:
    """A replica that stands still, whose window is full, and a queue at the gateway."""
    streams: list[Stream] = []
    while cluster.front.num_queued() < num_queued:
        known = cluster.front.num_queued() + cluster.replica.num_submissions
        streams.append(Stream(cluster.front, ask([65] * 16, seed=len(streams))))
        await until(lambda known=known: cluster.front.num_queued() + cluster.replica.num_submissions > known)
    return streams


def standing(*, gated: bool = True) -> EngineReplica:
    return EngineReplica(executor=PacedExecutor(gated=gated), max_num_seqs=4, max_num_batched_tokens=4)


async def test_a_burst_past_the_bound_is_refused_at_once(create_faults: CreateFaults, monkeypatch: pytest.MonkeyPatch):
    """Burst past the queue bound: refused in 50 ms, before tokenizing, with RESOURCE_EXHAUSTED and RetryInfo."""
    cluster = await create_faults(standing(), admission=AdmissionConfig(max_queued_requests=4))
    streams = await fill(cluster, 4)
    tokenized: list[str] = []
    encode = Tokenizer.encode_async

    async def counted(tokenizer: Tokenizer, text: str) -> list[int]:
        tokenized.append(text)
        return await encode(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "encode_async", counted)
    burst = await asyncio.gather(*(failure(cluster.stub.Generate(ask("x" * 400))) for _ in range(300)))
    assert {(each.code, each.reason) for each in burst} == {(EXHAUSTED, "OVERLOADED")}
    assert all(each.retry_after_s and each.retry_after_s > 0 for each in burst)
    times_s = []
    for _ in range(50):
        started = time.perf_counter()
        await failure(cluster.stub.Generate(ask("x" * 400)))
        times_s.append(time.perf_counter() - started)
    assert statistics.median(times_s) < 0.05
    assert tokenized == []
    cluster.executor.open()
    for stream in streams:
        await stream.whole()
    assert (await cluster.stub.Generate(ask("x" * 400))).usage.prompt_tokens == 400
    assert tokenized == ["x" * 400]  # this is where it would have shown


async def test_what_is_refused_is_not_counted(create_faults: CreateFaults):
    """Rejected call: counters return to zero, whatever it was refused for, so that nothing is scaled for it."""
    tenant = TenantConfig(name="*", max_concurrent_requests=8)
    cluster = await create_faults(
        standing(), admission=AdmissionConfig(max_queued_requests=3), tenants=(tenant,), max_prompt_bytes=1000
    )
    streams = await fill(cluster, 3)
    refusals: list[grpc.StatusCode] = []
    calls = [
        *(cluster.stub.Generate(ask([65] * 16)) for _ in range(20)),  # too much waits, or too much of one tenant
        *(cluster.stub.Generate(ask("x" * 2000)) for _ in range(5)),
        *(cluster.stub.Generate(ask(n=99)) for _ in range(5)),
        *(cluster.stub.Generate(ask([9999])) for _ in range(5)),
        *(cluster.stub.Generate(ask(model="nope")) for _ in range(5)),
    ]
    for call in calls:
        refusals.append((await failure(call)).code)
    assert set(refusals[:20]) == {EXHAUSTED} and EXHAUSTED not in refusals[25:30]
    assert cluster.front.num_queued() == 3
    assert cluster.front.gateway.num_generations == len(streams)
    model = await cluster.stub.GetModel(pb.GetModelRequest(model="test"))
    assert model.replicas[0].outstanding_tokens == cluster.replica.num_submissions * 24
    cluster.executor.open()
    for stream in streams:
        await stream.whole()
    await cluster.check_idle()
    # Neither the queue nor the tenant has lost a place to them.
    await asyncio.gather(*(cluster.stub.Generate(ask([65] * 16, seed=seed)) for seed in range(3)))


async def test_a_tenant_has_all_its_places_again(create_faults: CreateFaults):
    """Rejected call, by the tenant's own limit: refusals take no places, and ends of all kinds give them back."""
    tenant = TenantConfig(name="*", max_concurrent_requests=2)
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(step_s=0.005)), tenants=(tenant,))
    for attempt in range(5):
        streams = [Stream(cluster.front, ask(max_tokens=300, seed=seed)) for seed in range(2)]
        for stream in streams:
            await stream.has(1)
        for _ in range(3):
            assert (await failure(cluster.stub.Generate(ask()))).reason == "QUOTA_EXCEEDED"
        if attempt % 2:
            cluster.executor.step_s = 0.0
            for stream in streams:
                await stream.whole()
            cluster.executor.step_s = 0.005
        else:
            for stream in streams:
                stream.call.cancel()
        await until(lambda: not cluster.front.gateway.num_generations)


async def test_bad_requests_are_nobody_elses_trouble(create_faults: CreateFaults, monkeypatch: pytest.MonkeyPatch):
    """One client sends only bad requests: nobody else notices, and no breaker opens, though some are only found out by
    the replicas."""
    routing = RoutingConfig(eject_after=3)
    cluster = await create_faults(EngineReplica(), EngineReplica("replica-1"), routing=routing)
    # What gateways refuse themselves never gets as far as a breaker; so let replicas be the ones to find it out.
    for replica in cluster.replicas:
        add = replica.engine.add

        def picky(submission, add=add) -> None:
            if 66 in submission.prompt_token_ids:
                raise InvalidRequest("not for me", field="prompt")
            add(submission)

        monkeypatch.setattr(replica.engine, "add", picky)
    ended = asyncio.Event()
    codes: set[grpc.StatusCode] = set()

    async def be_a_nuisance() -> None:
        while not ended.is_set():
            for request in (ask([65, 66]), ask([9999]), ask(n=99), ask(""), ask([65], temperature=-1.0)):
                codes.add((await failure(cluster.stub.Generate(request))).code)

    nuisances = [asyncio.create_task(be_a_nuisance()) for _ in range(4)]
    for seed in range(60):
        await Stream(cluster.front, ask([67, 68], seed=seed)).whole()
        assert await cluster.front.states() == [READY, READY]
    ended.set()
    await asyncio.gather(*nuisances)
    assert codes == {grpc.StatusCode.INVALID_ARGUMENT}


async def test_engines_that_fail_open_the_breaker(create_faults: CreateFaults):
    """The same breaker, with what it is there for: an engine whose requests fail one after the other."""

    class Failing(PacedExecutor):
        """None of its logits mean anything."""

        def _sample(self, sequence):
            sequence.failed = "the fake logits mean nothing"
            return sequence.failed

    cluster = await create_faults(
        EngineReplica(executor=Failing()), EngineReplica("replica-1"), routing=RoutingConfig(eject_after=3)
    )
    for seed in range(40):
        await Stream(cluster.front, ask([65 + seed] * 9, seed=seed)).whole()  # another replica takes it
    assert (await cluster.front.states())[0] == pb.REPLICA_STATE_EJECTED
