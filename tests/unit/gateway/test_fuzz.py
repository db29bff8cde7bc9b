"""Whatever comes in, the gateway answers with a status that makes sense, and lives. CLUSTER_TEST_FULL=1 tries ten times
as much.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterable

import grpc
from fake_replica import FakeReplica
from gateway_setup import CreateSetup, Setup, collect, request
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from proto_fuzz import damaged, random_message

from cluster.kserve import open_inference_pb2
from cluster.v1 import admin_pb2
from cluster.v1 import inference_pb2 as pb

NUM_CASES = 10_000 if os.environ.get("CLUSTER_TEST_FULL") == "1" else 1000
BATCH = 50  # at once
OK, INVALID_ARGUMENT = grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT
ALLOWED = {
    OK,
    INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ALREADY_EXISTS,  # two of one batch have drawn the same request_id
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # a max_ttft_ms that nobody can keep
    grpc.StatusCode.CANCELLED,  # one has cancelled another
    grpc.StatusCode.DEADLINE_EXCEEDED,  # a timeout of the Open Inference Protocol's
}
_INT32 = (-(2**31), -1, 0, 1, 2, 5, 16, 17, 20, 2**31 - 1)
_UINT32 = (0, 1, 65, 255, 256, 257, 2**32 - 1)
_DOUBLES = (-1e308, -2.0, -0.0, 0.0, 0.3, 1.0, 1.5, 100.0, 1e308, float("inf"), float("nan"))
_TEXTS = ("", "a", "hello world", "é", "東京\U0001f642", "\0", "\n", "x" * 300, "test", "user", "assistant")


def random_text(rng: random.Random) -> str:
    return rng.choice(_TEXTS) * rng.choice((1, 1, 1, 2))


def random_sampling(rng: random.Random) -> pb.SamplingParams:
    """Each field is mostly unset or sound, sometimes not: only so do requests get past the first check."""
    sampling = pb.SamplingParams(max_tokens=rng.choice((1, 3, 8)))
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        if rng.random() < 0.9:
            continue
        if field.name == "logit_bias":
            sampling.logit_bias[rng.choice(_UINT32)] = rng.choice(_DOUBLES)
        elif field.name == "stop":
            sampling.stop.extend(random_text(rng) for _ in range(rng.randrange(20)))
        elif field.name == "stop_token_ids":
            sampling.stop_token_ids.extend(rng.choice(_UINT32) for _ in range(rng.randrange(4)))
        elif field.name == "ignore_eos":
            sampling.ignore_eos = True
        elif field.name == "seed":
            sampling.seed = rng.choice((0, 1, 2**64 - 1))
        elif field.type == field.TYPE_DOUBLE:
            setattr(sampling, field.name, rng.choice(_DOUBLES))
        else:
            setattr(sampling, field.name, rng.choice(_INT32))
    return sampling


def random_request(rng: random.Random) -> pb.GenerateRequest:
    message = pb.GenerateRequest(model=rng.choice(("", "test", "test", "nope\n")), sampling=random_sampling(rng))
    match rng.randrange(5):
        case 0 | 1:
            message.prompt = random_text(rng)
        case 2:
            message.token_ids.ids.extend(rng.choice(_UINT32) for _ in range(rng.randrange(4)))
        case 3:
            for _ in range(rng.randrange(4)):
                part = pb.ContentPart(text=random_text(rng)) if rng.random() < 0.9 else pb.ContentPart()
                if rng.random() < 0.05:
                    part.image.data = rng.randbytes(9)
                role = "user" if rng.random() < 0.8 else random_text(rng)
                message.chat.messages.append(pb.ChatMessage(role=role, content=[part] * rng.randrange(3)))
    if rng.random() < 0.1:
        message.request_id = random_text(rng) + str(rng.random())
    if rng.random() < 0.1:
        message.priority = rng.choice(_INT32)
    if rng.random() < 0.1:
        message.labels.update({random_text(rng) + str(i): random_text(rng) for i in range(rng.randrange(20))})
    for name in ("cache_salt", "session_id"):
        if rng.random() < 0.1:
            setattr(message, name, random_text(rng))
    message.progress = rng.random() < 0.1
    if rng.random() < 0.1:
        message.max_ttft_ms = rng.choice(_UINT32)
    if rng.random() < 0.1:
        message.resume.CopyFrom(random_message(rng, pb.Resume))
    return message


async def code_of(channel: grpc.aio.Channel, method: str, streams: bool, *messages: bytes) -> grpc.StatusCode:
    """How a call ends.

    Args:
        streams: whether it answers with a stream; with more than one message it also takes one.
    """
    try:
        async with asyncio.timeout(60):  # not the call's own deadline: that would be a status that is allowed
            if len(messages) != 1:
                await collect(channel.stream_stream(method)(iter(messages)))
            elif streams:
                await collect(channel.unary_stream(method)(messages[0]))
            else:
                await channel.unary_unary(method)(messages[0])
    except grpc.aio.AioRpcError as error:
        if (error.details() or "").startswith("Internal error from Core"):
            # This client's own, and no answer: it was about to write when the answer came.
            return await code_of(channel, method, streams, *messages)
        return error.code()
    return OK


async def check(setup: Setup, cases: Iterable[tuple[str, bool, list[bytes]]]) -> list[grpc.StatusCode]:
    """The codes of all cases, each of which is an allowed one."""
    cases, codes = list(cases), []
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        found = await asyncio.gather(
            *(code_of(setup.channel, method, streams, *messages) for method, streams, messages in batch)
        )
        for code, (method, _, messages) in zip(found, batch, strict=True):
            assert code in ALLOWED, f"{code} for {method}: {[message.hex() for message in messages]}"
        codes += found
    assert (await setup.stub.Generate(request())).candidates[0].text
    return codes


async def test_random_requests(create_setup: CreateSetup) -> None:
    """Most are sound enough to get past the first check."""
    setup, rng = await create_setup(FakeReplica()), random.Random(20261121)

    def case() -> tuple[str, bool, list[bytes]]:
        data, streams = random_request(rng).SerializeToString(), rng.random() < 0.5
        method = "GenerateStream" if streams else "Generate"
        return f"/cluster.v1.InferenceService/{method}", streams, [damaged(rng, data) if rng.random() < 0.2 else data]

    codes = await check(setup, (case() for _ in range(NUM_CASES)))
    # The test would be worth little if nearly all went one way.
    assert 0.1 < codes.count(OK) / NUM_CASES < 0.9
    assert not setup.replica.running


def random_call(rng: random.Random, services: list[ServiceDescriptor]) -> tuple[str, bool, list[bytes]]:
    service = rng.choice(services)
    method: MethodDescriptor = rng.choice(service.methods)
    message_class = method.input_type._concrete_class
    count = rng.choice((0, 1, 3)) if method.client_streaming else 1
    messages = [random_message(rng, message_class).SerializeToString() for _ in range(count)]
    if rng.random() < 0.3:
        messages = [damaged(rng, message) for message in messages]
    return f"/{service.full_name}/{method.name}", method.server_streaming, messages


async def test_random_messages_for_every_method(create_setup: CreateSetup) -> None:
    setup, rng = await create_setup(FakeReplica()), random.Random(20261122)
    services = [
        pb.DESCRIPTOR.services_by_name["InferenceService"],
        open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    ]
    codes = await check(setup, (random_call(rng, services) for _ in range(NUM_CASES // 2)))
    assert {OK, INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND} <= set(codes)


async def test_random_messages_for_the_admin_service(create_setup: CreateSetup) -> None:
    setup, rng = await create_setup(FakeReplica()), random.Random(20261123)
    services = [admin_pb2.DESCRIPTOR.services_by_name["AdminService"]]
    address = f"127.0.0.1:{setup.gateway.admin_port}"
    async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        codes = set()
        for _ in range(NUM_CASES // 10):
            method, streams, messages = random_call(rng, services)
            codes.add(await code_of(channel, method, streams, *messages))
        assert codes <= ALLOWED
        assert await code_of(channel, "/cluster.v1.AdminService/Undrain", False, b"") == OK
    assert (await setup.stub.Generate(request())).candidates[0].text
