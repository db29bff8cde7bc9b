"""Whatever comes in, over either wire, there is a status that makes sense, and the engine lives. CLUSTER_TEST_FULL=1
tries ten times as much.
"""

from __future__ import annotations

import asyncio
import os
import random

import grpc
from fault_setup import SECRET, CreateFaults, EngineReplica, PacedExecutor, ask, expected
from proto_fuzz import damaged, random_message

from cluster.v1 import inference_pb2 as pb
from cluster.v1 import replica_pb2
from cluster.wire import PROTOCOL_VERSION

NUM_CASES = 10_000 if os.environ.get("CLUSTER_TEST_FULL") == "1" else 1000
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
FAILURES = {"INVALID_REQUEST", "OVERLOADED", "DEADLINE_EXCEEDED", "CANCELLED"}


def tiny() -> EngineReplica:
    """So small that preemption and lack of room are met, too."""
    return EngineReplica(executor=PacedExecutor(max_model_len=48, num_blocks=16), max_num_seqs=4, max_num_waiting=64)


def nearly_right(rng: random.Random) -> pb.GenerateRequest:
    """A request that an engine takes, but for a field or two."""
    request = ask([rng.randrange(257) for _ in range(rng.randrange(1, 47))], seed=rng.getrandbits(63))
    request.sampling.max_tokens = rng.choice((1, 4, 40, 2**31 - 1))
    request.sampling.n = rng.choice((1, 1, 2, 4))
    request.priority = rng.randrange(5)
    for _ in range(rng.choice((0, 0, 1, 2))):
        if rng.random() < 0.7:
            request.sampling.MergeFrom(random_message(rng, pb.SamplingParams))
        else:
            request.MergeFrom(random_message(rng, pb.GenerateRequest))
    request.request_id = ""
    return request


async def test_requests_through_the_gateway(create_faults: CreateFaults):
    """Fuzzed protobuf bytes and fields: a status from the allowed set, never INTERNAL, engine alive."""
    cluster, rng = await create_faults(tiny()), random.Random(20261124)
    codes = []

    async def code_of(data: bytes) -> grpc.StatusCode:
        call = cluster.front.channel.unary_stream("/cluster.v1.InferenceService/GenerateStream")(data, timeout=60)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            assert error.code() in ALLOWED, f"{error.code()} {error.details()} for {data.hex()}"
            return error.code()
        return grpc.StatusCode.OK

    for _ in range(NUM_CASES // 80):
        batch = [nearly_right(rng).SerializeToString() for _ in range(20)]
        batch = [damaged(rng, data) if rng.random() < 0.2 else data for data in batch]
        codes += await asyncio.gather(*map(code_of, batch))
    assert 0.1 < codes.count(grpc.StatusCode.OK) / len(codes) < 0.9
    await check_alive(cluster)


async def check_alive(cluster) -> None:
    request = ask()
    answer = await cluster.stub.Generate(request)
    assert list(answer.candidates[0].token_ids) == expected(request)
    cluster.replica.server.check()


def random_submit(rng: random.Random, number: int) -> replica_pb2.Submit:
    request = nearly_right(rng)
    submit = replica_pb2.Submit(
        prompt_token_ids=request.token_ids.ids, sampling=request.sampling, priority=request.priority
    )
    if rng.random() < 0.3:
        submit.MergeFrom(random_message(rng, replica_pb2.Submit))
    if rng.random() < 0.5:
        for index in rng.sample(range(4), rng.randrange(4)):
            tokens = [rng.randrange(260) for _ in range(rng.randrange(6))]
            submit.emitted.add(candidate_index=index, token_ids=tokens)
    submit.id = number
    return submit


async def test_frames_from_a_gateway(create_faults: CreateFaults):
    """Fuzzed submissions, continuations and cancels from a gateway that is let in: each fails alone or ends, engine
    alive."""
    cluster, rng = await create_faults(tiny()), random.Random(20261125)
    options = (("grpc.use_local_subchannel_pool", 1),)
    ended: dict[int, str] = {}
    running: dict[int, set[int]] = {}

    async with grpc.aio.insecure_channel(cluster.replica.address, options=options) as channel:
        call = channel.stream_stream(
            "/cluster.v1.ReplicaService/Connect",
            request_serializer=replica_pb2.GatewayFrame.SerializeToString,
            response_deserializer=replica_pb2.ReplicaFrame.FromString,
        )(metadata=(("cluster-secret", SECRET),))
        await call.write(replica_pb2.GatewayFrame(hello={"gateway_id": "g", "protocol_version": PROTOCOL_VERSION}))

        async def read_until_ended(numbers: set[int]) -> None:
            while numbers - ended.keys():
                frame = await call.read()
                for failure in frame.failures:
                    assert failure.reason in FAILURES, failure
                    assert failure.id not in ended
                    ended[failure.id] = failure.reason
                for delta in frame.deltas:
                    if delta.finish_reason:
                        left = running[delta.id]
                        left.remove(delta.candidate_index)
                        if not left:
                            ended[delta.id] = "OK"

        for start in range(0, NUM_CASES, 10):
            submits = [random_submit(rng, start + index) for index in range(10)]
            for submit in submits:
                begun = {emitted.candidate_index for emitted in submit.emitted}
                running[submit.id] = begun or set(range(min(submit.sampling.n, 16) or 1))
            frame = replica_pb2.GatewayFrame(submits=submits)
            for _ in range(rng.randrange(3)):  # of what never was, or has ended
                frame.cancels.add(
                    id=rng.choice((2**31, 2**63, max(start - 5, 2**31))), candidate_index=rng.randrange(9)
                )
            frame.cancels_by_name.add(id=start, generation_id=rng.choice(("", "nobody", "\0")))
            await call.write(frame)
            await asyncio.wait_for(read_until_ended({submit.id for submit in submits}), 30)
        call.cancel()
    assert list(ended.values()).count("OK") > NUM_CASES / 20
    assert list(ended.values()).count("INVALID_REQUEST") > NUM_CASES / 20
    await check_alive(cluster)


async def test_bytes_that_are_no_frame(create_faults: CreateFaults):
    """Damaged bytes on a replica's port end their own stream; another gateway's goes on."""
    cluster, rng = await create_faults(tiny()), random.Random(20261126)
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(cluster.replica.address, options=options) as channel:
        for _ in range(NUM_CASES // 20):
            call = channel.stream_stream("/cluster.v1.ReplicaService/Connect")(metadata=(("cluster-secret", SECRET),))
            hello = replica_pb2.GatewayFrame(hello={"gateway_id": "g", "protocol_version": PROTOCOL_VERSION})
            frame = replica_pb2.GatewayFrame(submits=[random_submit(rng, 1)])
            try:
                await call.write(hello.SerializeToString())
                await call.write(damaged(rng, frame.SerializeToString()))
                await asyncio.wait_for(call.read(), 10)
            except grpc.aio.AioRpcError:
                pass
            call.cancel()
            if rng.random() < 0.2:
                await check_alive(cluster)
    await check_alive(cluster)
