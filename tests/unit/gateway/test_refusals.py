"""Every way in which the gateway says no: its code, its reason, the field, and when to come back."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from fake_replica import FakeReplica
from gateway_setup import CreateSetup, collect, failure, request
from grpc_status import rpc_status

from cluster import errors
from cluster.core.request import FinishReason
from cluster.gateway.status import status_of
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import replica_pb2

IMAGE = pb.ContentPart(image=pb.ImagePart(uri="https://example.org/cat.png"))
TEXT = pb.ContentPart(text="hi")


def chat(role: str, *parts: pb.ContentPart) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role=role, content=parts)])


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (request(""), "prompt"),
        (request(token_ids=pb.TokenIds()), "token_ids"),
        (request(token_ids=pb.TokenIds(ids=[1, 257, 2])), "token_ids.ids[1]"),
        (request(token_ids=pb.TokenIds(ids=[2**32 - 1])), "token_ids.ids[0]"),
        (request("x" * 64), "prompt"),
        (request(token_ids=pb.TokenIds(ids=[1] * 64)), "token_ids"),
        (request(chat=chat("user", pb.ContentPart(text="x" * 64))), "chat"),
        (request("x" * 101), "prompt"),
        (request("é" * 51), "prompt"),
        (request(chat=pb.ChatMessages()), "chat.messages"),
        (request(chat=chat("robot", TEXT)), "chat.messages[0].role"),
        (request(chat=chat("user", TEXT, pb.ContentPart())), "chat.messages[0].content[1]"),
        (request(chat=chat("user", TEXT, pb.ContentPart(text="x" * 100))), "chat"),
        (request(temperature=-0.1), "sampling.temperature"),
        (request(temperature=float("nan")), "sampling.temperature"),
        (request(top_p=0.0), "sampling.top_p"),
        (request(max_tokens=0), "sampling.max_tokens"),
        (request(max_tokens=4, min_tokens=5), "sampling.min_tokens"),
        (request(max_tokens=None, min_tokens=60), "sampling.min_tokens"),
        (request(n=17), "sampling.n"),
        (request(stop=[""]), "sampling.stop"),
        (request(stop_token_ids=[257]), "sampling.stop_token_ids"),
        (request(logit_bias={999: 1.0}), "sampling.logit_bias"),
        (request(priority=9), "priority"),
        (request(request_id="x" * 129), "request_id"),
        (request(request_id="a\nb"), "request_id"),
        (request(labels={str(i): "" for i in range(17)}), "labels"),
        (request(labels={"key": "x" * 129}), "labels"),
        (request(cache_salt="é" * 129), "cache_salt"),
    ],
)  # fmt: skip
async def test_invalid_argument_names_the_field(
    create_setup: CreateSetup, message: pb.GenerateRequest, field: str
) -> None:
    setup = await create_setup(FakeReplica(max_model_len=64), max_prompt_bytes=100)
    for call in (setup.stub.Generate(message), collect(setup.stub.GenerateStream(message))):
        refusal = await failure(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert refusal.field == field
        assert refusal.retry_after_s is None
    assert not setup.replica.submits


async def test_a_prompt_longer_than_the_context_is_told_both_numbers(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(max_model_len=64))
    refusal = await failure(setup.stub.Generate(request("x" * 77)))
    assert "77" in refusal.message
    assert "64" in refusal.message
    # One token shorter than the context is the longest that can be completed.
    assert (await setup.stub.Generate(request("x" * 63))).usage.completion_tokens == 1


async def test_images_are_unimplemented(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    for call in (
        setup.stub.Generate(request(chat=chat("user", TEXT, IMAGE))),
        setup.stub.CountTokens(pb.CountTokensRequest(chat=chat("user", IMAGE))),
    ):
        refusal = await failure(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED")


async def test_unknown_model(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    for call in (
        setup.stub.Generate(request(model="nope")),
        setup.stub.GetModel(pb.GetModelRequest(model="nope")),
        setup.stub.CountTokens(pb.CountTokensRequest(model="nope", prompt="x")),
    ):
        refusal = await failure(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "'nope'" in refusal.message
        assert "test" in refusal.message


async def test_several_models_must_be_named(create_setup: CreateSetup) -> None:
    setup = await create_setup(models=("one", "two", "test"))
    refusal = await failure(setup.stub.Generate(request()))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "model")


async def test_no_replica_is_unavailable_with_a_time_to_retry(create_setup: CreateSetup) -> None:
    setup = await create_setup()
    refusal = await failure(setup.stub.Generate(request()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_WARMING")
    assert refusal.retry_after_s > 0
    # What can never succeed is said even so.
    assert (await failure(setup.stub.Generate(request(n=0)))).code == grpc.StatusCode.INVALID_ARGUMENT
    assert (await setup.stub.CountTokens(pb.CountTokensRequest(prompt="four"))).tokens == 4


async def test_too_many_streams(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True), max_concurrent_streams=2)
    running = [asyncio.create_task(collect(setup.stub.GenerateStream(request(n=2)))) for _ in range(2)]
    await setup.replica.until(lambda: len(setup.replica.running) == 4)
    refusal = await failure(setup.stub.Generate(request()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refusal.retry_after_s > 0
    await setup.replica.allow(8)
    await asyncio.gather(*running)
    assert setup.gateway.num_generations == 0


async def test_a_message_that_is_too_large(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(), max_message_bytes=10_000)
    assert (await failure(setup.stub.Generate(request("x" * 20_000)))).code == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_bytes_that_are_no_message(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    for method in ("Generate", "GenerateStream"):
        make = setup.channel.unary_unary if method == "Generate" else setup.channel.unary_stream
        call = make(f"/cluster.v1.InferenceService/{method}")(b"\xff\xff\xff")
        refusal = await failure(collect(call) if method == "GenerateStream" else call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("INVALID_REQUEST", grpc.StatusCode.INVALID_ARGUMENT),
        ("OVERLOADED", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("DEADLINE_EXCEEDED", grpc.StatusCode.DEADLINE_EXCEEDED),
        ("ENGINE_FAULT", grpc.StatusCode.INTERNAL),
    ],
)
async def test_what_a_replica_refuses(create_setup: CreateSetup, reason: str, code: grpc.StatusCode) -> None:
    setup = await create_setup(FakeReplica())
    setup.replica.refusal = replica_pb2.Failure(reason=reason, message="because", field="sampling.n")
    refusal = await failure(setup.stub.Generate(request()))
    assert (refusal.code, refusal.reason, refusal.message) == (code, reason, "because")
    assert refusal.field == "sampling.n"
    assert (refusal.retry_after_s is not None) == (reason == "OVERLOADED")


# Classes that declare a reason: those below them cross the wire as one of these.
TAXONOMY = [cls for cls in errors._subclasses(errors.ClusterError) if "reason" in vars(cls)]


@pytest.mark.parametrize("error_class", TAXONOMY)
def test_every_error_has_a_status(error_class: type[errors.ClusterError]) -> None:
    error = error_class("what and why", field="some.field", retry_after_s=1.5)
    status = status_of(error)
    internal = error_class in (
        errors.ClusterError, errors.EngineFault,  # a bug of ours
        errors.ConfigError, errors.CheckpointError, errors.ServerUnreachable,  # never raised while serving
    )  # fmt: skip
    assert (status.code is grpc.StatusCode.INTERNAL) == internal
    assert status.code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
    # UNAVAILABLE promises that nothing was executed.
    assert (status.code is grpc.StatusCode.UNAVAILABLE) == (error_class in (errors.ModelWarming, errors.Draining))
    assert status.details == "what and why"
    assert dict(status.trailing_metadata)[rpc_status.GRPC_DETAILS_METADATA_KEY]


def test_a_bug_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    try:
        FinishReason("a secret prompt")
    except ValueError as error:
        with caplog.at_level(logging.ERROR):
            status = status_of(error)
    assert status.code is grpc.StatusCode.INTERNAL
    assert "secret" not in status.details + str(status.trailing_metadata)
    assert "ValueError" in caplog.text
    assert "test_refusals.py" in caplog.text
    assert "secret" not in caplog.text.replace('FinishReason("a secret prompt")', "")  # the source line itself
