"""What a client of a busy gateway meets: its turn, a number, or somebody else's place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc
import pytest
from fake_replica import FakeReplica, letters
from gateway_setup import CreateSetup, Setup, collect, failure, request

from cluster.core.config import AdmissionConfig, ClassConfig, ClassesConfig, TenantConfig
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import replica_pb2

P0, P1, P3 = pb.PRIORITY_P0, pb.PRIORITY_P1, pb.PRIORITY_P3
PROMPT = pb.TokenIds(ids=[97] * 16)


def busy_replica() -> FakeReplica:
    """Takes one prompt that fills its window and does nothing until it is allowed to."""
    return FakeReplica(gated=True, tokens_per_step=8, max_num_batched_tokens=4)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - of another object's state, which nobody announces
            await asyncio.sleep(0.001)


class Calls:
    """Calls under way at a gateway whose replica is busy."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.tasks: list[asyncio.Task[pb.GenerateResponse]] = []

    async def send(self, priority: pb.Priority = P1, **fields: object) -> asyncio.Task[pb.GenerateResponse]:
        """Returns when it is at the replica, or waits at the gateway."""
        known = self.num_known()
        task = asyncio.ensure_future(
            self.setup.stub.Generate(request(token_ids=PROMPT, priority=priority, **fields), timeout=60)
        )
        self.tasks.append(task)
        await until(lambda: self.num_known() > known or task.done())
        return task

    def num_known(self) -> int:
        return len(self.setup.replica.submits) + self.queued()

    def queued(self) -> int:
        (entry,) = self.setup.gateway._catalog
        return sum(each.requests for each in entry.admission.backlog().values())

    async def settled(self, *, at_replica: int, queued: int) -> None:
        """Until so many are at the replica and so many wait."""
        await until(lambda: (len(self.setup.replica.submits), self.queued()) == (at_replica, queued))

    async def finish(self) -> None:
        await self.setup.replica.allow(1000)
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def create_calls(create_setup: CreateSetup, **config: object) -> Calls:
    calls = Calls(await create_setup(busy_replica(), **config))
    await calls.send(P1)  # has the window
    await calls.settled(at_replica=1, queued=0)
    return calls


async def test_the_most_urgent_go_first_and_each_class_has_something_at_the_replica(create_setup: CreateSetup):
    calls = await create_calls(create_setup)
    for priority in (P3, P3, P1, P3, P0, P0):
        await calls.send(priority)
    await calls.settled(at_replica=3, queued=4)
    assert [submit.priority for submit in calls.setup.replica.submits] == [P1, P3, P0]
    await calls.finish()
    assert [submit.priority for submit in calls.setup.replica.submits][3] == P0
    assert len([task.result() for task in calls.tasks]) == 7


async def test_a_burst_beyond_the_bound_is_refused_at_once_with_a_time(create_setup: CreateSetup):
    calls = await create_calls(create_setup, admission=AdmissionConfig(max_queued_requests=5))
    for _ in range(5):
        await calls.send(P1)
    await calls.settled(at_replica=1, queued=5)
    started = time.monotonic()
    more = [calls.setup.stub.Generate(request(token_ids=PROMPT)) for _ in range(100)]
    failures = await asyncio.gather(*map(failure, more))
    assert time.monotonic() - started < 5.0
    assert {each.code for each in failures} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert {each.reason for each in failures} == {"OVERLOADED"}
    assert all(each.retry_after_s > 0 for each in failures)
    assert calls.queued() == 5
    await calls.finish()
    assert len(calls.setup.replica.submits) == 6


async def test_a_p0_takes_the_place_of_the_newest_p3(create_setup: CreateSetup):
    calls = await create_calls(create_setup, admission=AdmissionConfig(max_queued_requests=3))
    await calls.send(P3), await calls.send(P0)
    await calls.settled(at_replica=3, queued=0)  # one of each class
    first, second, third = [await calls.send(P3) for _ in range(3)]
    await calls.settled(at_replica=3, queued=3)
    urgent = asyncio.ensure_future(calls.setup.stub.Generate(request(token_ids=PROMPT, priority=P0)))
    refused = await failure(third)
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refused.retry_after_s > 0
    assert calls.queued() == 3
    await calls.finish()
    assert all(task.result() for task in (first, second)) and await urgent


async def test_who_cancels_while_it_waits_leaves_the_queue(create_setup: CreateSetup):
    calls = await create_calls(create_setup)
    task = await calls.send(P1)
    named = await calls.send(P1, request_id="mine")
    await calls.settled(at_replica=1, queued=2)
    task.cancel()
    await calls.setup.stub.CancelGeneration(pb.CancelGenerationRequest(generation_id="mine"))
    assert (await failure(named)).code is grpc.StatusCode.CANCELLED
    await until(lambda: calls.queued() == 0)
    await calls.finish()
    assert len(calls.setup.replica.submits) == 1


async def test_a_deadline_that_passes_in_the_queue_is_never_sent(create_setup: CreateSetup):
    calls = await create_calls(create_setup)
    late = await failure(calls.setup.stub.Generate(request(token_ids=PROMPT), timeout=0.3))
    assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: calls.queued() == 0)
    await calls.finish()
    assert len(calls.setup.replica.submits) == 1


async def test_progress_says_how_many_go_first(create_setup: CreateSetup):
    calls = await create_calls(create_setup)
    await calls.send(P1), await calls.send(P1)
    await calls.settled(at_replica=1, queued=2)
    stream = calls.setup.stub.GenerateStream(request(token_ids=PROMPT, priority=P1, progress=True))
    chunks = aiter(stream)
    chunk = await anext(chunks)
    assert chunk.progress.stage == pb.Progress.STAGE_QUEUED
    assert chunk.progress.position == 2
    await calls.finish()
    assert sum(len(chunk.token_ids) for chunk in await collect(chunks)) == 8


async def test_a_first_token_that_cannot_come_in_time_is_refused(create_setup: CreateSetup):
    calls = await create_calls(create_setup)
    for _ in range(8):
        await calls.send(P1)
    await asyncio.sleep(0.1)
    await calls.setup.replica.allow(4)
    await until(lambda: len(calls.setup.replica.submits) == 5)  # now it is known how fast the queue is served
    refused = await failure(calls.setup.stub.Generate(request(token_ids=PROMPT, max_ttft_ms=1), timeout=10))
    assert (refused.code, refused.field) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "max_ttft_ms")
    assert "predicted" in refused.message and refused.retry_after_s > 0
    await calls.finish()


@pytest.mark.parametrize(
    ("tenant", "fields", "code", "reason"),
    [
        (TenantConfig(name="*", max_concurrent_requests=1), {}, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
        (TenantConfig(name="*", requests_per_s=0.01), {}, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
        (TenantConfig(name="*", tokens_per_min=30), {}, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
        (TenantConfig(name="*", max_priority="P1"), {"priority": P0}, grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN"),
    ],
    ids=["at once", "per second", "tokens", "class"],
)
async def test_a_tenant_beyond_its_quota_is_refused(
    create_setup: CreateSetup, tenant: TenantConfig, fields: dict[str, object], code: grpc.StatusCode, reason: str
):
    calls = await create_calls(create_setup, tenants=(tenant,))
    refused = await failure(calls.setup.stub.Generate(request(token_ids=PROMPT, **fields)))
    assert (refused.code, refused.reason) == (code, reason)
    assert (refused.retry_after_s is not None) == (reason == "QUOTA_EXCEEDED")
    await calls.finish()


async def test_a_model_that_is_not_the_tenants_is_refused(create_setup: CreateSetup):
    setup = await create_setup(FakeReplica(), tenants=(TenantConfig(name="*", models=("other",)),))
    refused = await failure(setup.stub.Generate(request(token_ids=PROMPT)))
    assert (refused.code, refused.field) == (grpc.StatusCode.PERMISSION_DENIED, "model")


async def test_a_class_limits_how_long_a_request_may_take(create_setup: CreateSetup):
    classes = ClassesConfig(p1=ClassConfig(share=0.3, max_e2e_ms=300))
    setup = await create_setup(FakeReplica(gated=True), classes=classes)
    late = await failure(setup.stub.Generate(request(), timeout=20))
    assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
    patient = asyncio.ensure_future(setup.stub.Generate(request(priority=P3), timeout=20))
    await asyncio.sleep(0.4)
    await setup.replica.allow(100)
    await patient


async def test_a_resumed_stream_waits_where_others_are_refused(create_setup: CreateSetup):
    calls = await create_calls(create_setup, admission=AdmissionConfig(max_queued_requests=1))
    await calls.send(P1)
    await calls.settled(at_replica=1, queued=1)
    assert (await failure(calls.setup.stub.Generate(request(token_ids=PROMPT)))).reason == "OVERLOADED"
    emitted = letters(replica_pb2.Submit(sampling=pb.SamplingParams(seed=7, max_tokens=8)), 0)[:3]
    resume = pb.Resume(
        generation_id="gen-1", seed=7, sequence=3, candidates=[pb.ResumedCandidate(index=0, token_ids=emitted)]
    )
    stream = asyncio.ensure_future(
        collect(calls.setup.stub.GenerateStream(request(token_ids=PROMPT, resume=resume), timeout=20))
    )
    await asyncio.sleep(0.1)
    await calls.finish()
    assert sum(len(chunk.token_ids) for chunk in await stream) == 5
