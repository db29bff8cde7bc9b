"""Whatever comes in, the gateway answers with a status that makes sense, and lives."""

from __future__ import annotations

import asyncio
import random

import grpc
from fake_replica import FakeReplica
from gateway_setup import CreateSetup, collect, request

from cluster.v1 import inference_pb2 as pb

ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
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
    return message


async def test_random_requests(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    rng = random.Random(20261121)
    unary = setup.channel.unary_unary("/cluster.v1.InferenceService/Generate")
    stream = setup.channel.unary_stream("/cluster.v1.InferenceService/GenerateStream")

    async def code_of(data: bytes, streams: bool) -> grpc.StatusCode:
        call = (stream if streams else unary)(data, timeout=30)
        try:
            await (collect(call) if streams else call)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def some_bytes() -> bytes:
        data = random_request(rng).SerializeToString()
        if rng.random() < 0.8:
            return data
        if rng.random() < 0.5:
            return rng.randbytes(rng.randrange(40))
        flipped = bytearray(data)
        for _ in range(3):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)

    codes: list[grpc.StatusCode] = []
    for _ in range(20):
        batch = [(some_bytes(), rng.random() < 0.5) for _ in range(50)]
        codes += await asyncio.gather(*(code_of(data, streams) for data, streams in batch))
    assert len(codes) == 1000
    assert set(codes) <= ALLOWED
    # The test would be worth little if nearly all went one way.
    assert 100 < codes.count(grpc.StatusCode.OK) < 900
    assert (await setup.stub.Generate(request())).candidates[0].text
