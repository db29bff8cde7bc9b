"""Gateways that share replicas and do not talk to each other."""

from __future__ import annotations

import asyncio

import grpc
from fake_replica import FakeReplica
from gateway_setup import CreateSetup, collect, failure, request

from cluster.v1 import inference_pb2 as pb


async def test_a_cancel_finds_what_another_gateway_runs(create_setup: CreateSetup) -> None:
    replica, idle = FakeReplica(gated=True), FakeReplica(replica_id="replica-1")
    first = await create_setup(replica)
    second = await create_setup(idle)
    second.addresses |= first.addresses
    second.gateway.set_replicas("test", second.replica_addresses("replica-0", "replica-1"))
    await replica.until(lambda: replica.num_connections == 2)
    stream = first.stub.GenerateStream(request())
    other = asyncio.create_task(collect(first.stub.GenerateStream(request())))
    await replica.until(lambda: len(replica.running) == 2)
    await replica.allow(1)
    chunk = await anext(aiter(stream))
    cancel = pb.CancelGenerationRequest(generation_id=chunk.generation_id)
    async with asyncio.timeout(10):
        while True:  # until the second gateway has met the replica
            try:
                assert (await second.stub.CancelGeneration(cancel)).cancelled
                break
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.NOT_FOUND
    end = await failure(collect(stream))
    assert (end.code, end.reason) == (grpc.StatusCode.CANCELLED, "CANCELLED")
    unknown = await failure(second.stub.CancelGeneration(cancel))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "GENERATION_NOT_FOUND")
    assert not (await first.stub.CancelGeneration(cancel)).cancelled  # it knows that it has ended
    assert replica.num_connections == 2
    await replica.allow(8)
    await other
