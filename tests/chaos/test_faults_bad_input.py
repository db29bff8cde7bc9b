"""Input that no model can take: refused with the field that is wrong, and the engine lives."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

import aiohttp
import grpc
from fault_setup import SECRET, CreateFaults, EngineReplica, FaultCluster, PacedExecutor, ask, expected, failure

from cluster.kserve import open_inference_pb2 as kserve
from cluster.kserve import open_inference_pb2_grpc as kserve_grpc
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import replica_pb2, replica_pb2_grpc
from cluster.wire import PROTOCOL_VERSION

INVALID = grpc.StatusCode.INVALID_ARGUMENT
HUGE = 2**31 - 1


async def check_alive(cluster: FaultCluster) -> None:
    """The engine has not seen any of it, and serves."""
    assert not cluster.executor.steps
    request = ask()
    answer = await cluster.stub.Generate(request)
    assert list(answer.candidates[0].token_ids) == expected(request)
    cluster.replica.server.check()


OUTSIDE = [
    (ask([65, 257]), "token_ids.ids[1]"),
    (ask([2**32 - 1]), "token_ids.ids[0]"),
    (ask(logit_bias={257: 1.0}), "sampling.logit_bias"),
    (ask(logit_bias={2**32 - 1: 1.0}), "sampling.logit_bias"),
    (ask(stop_token_ids=[257]), "sampling.stop_token_ids"),
]


async def test_token_ids_outside_of_the_vocabulary(create_faults: CreateFaults):
    """Token id or logit_bias out of vocabulary: INVALID_ARGUMENT with the field, and the engine lives."""
    cluster = await create_faults()
    for request, field in OUTSIDE:
        refusal = await failure(cluster.stub.Generate(request))
        assert (refusal.code, refusal.field) == (INVALID, field)
        assert "257" in refusal.message
    await check_alive(cluster)


async def test_prompts_that_fit_nowhere(create_faults: CreateFaults):
    """Prompt longer than the context, or than all KV: INVALID_ARGUMENT with both numbers."""
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(max_model_len=512, num_blocks=16)))
    for prompt, limit in (([65] * 600, "64"), ([65] * 64, "64"), ("x" * 77, "64")):
        refusal = await failure(cluster.stub.Generate(ask(prompt)))
        assert refusal.code == INVALID and refusal.field in ("token_ids", "prompt")
        assert f"{len(prompt)} tokens" in refusal.message and limit in refusal.message
    await check_alive(cluster)


BEYOND: list[tuple[dict[str, object], str]] = [
    ({"n": HUGE}, "n"),
    ({"n": -1}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -(2**31)}, "max_tokens"),
    ({"min_tokens": HUGE}, "min_tokens"),
    ({"stop": ["x"] * 100_000}, "stop"),
    ({"stop": ["x" * 1_000_000]}, "stop"),
    ({"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
    ({"logit_bias": dict.fromkeys(range(2000), 1.0)}, "logit_bias"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": float("nan")}, "top_p"),
    ({"logprobs": HUGE}, "logprobs"),
    ({"repetition_penalty": float("-inf")}, "repetition_penalty"),
]


async def test_sampling_beyond_its_bounds(create_faults: CreateFaults):
    """Huge n, max_tokens, stop list, negative or NaN temperature: INVALID_ARGUMENT with the field."""
    cluster = await create_faults()
    for sampling, field in BEYOND:
        for call in (cluster.stub.Generate(ask(**sampling)), cluster.stub.GenerateStream(ask(**sampling)).read()):
            refusal = await failure(call)
            assert (refusal.code, refusal.field) == (INVALID, f"sampling.{field}")
            assert len(refusal.message) < 1000
    await check_alive(cluster)


async def test_max_tokens_beyond_the_context_cost_nothing(create_faults: CreateFaults):
    """Huge max_tokens, over the wire's largest: it ends where the context does, and reserves no more than that."""
    cluster = await create_faults(EngineReplica(executor=PacedExecutor(max_model_len=40)))
    answer = await cluster.stub.Generate(ask(max_tokens=HUGE))
    assert answer.usage.completion_tokens == 40 - 3
    assert answer.candidates[0].finish_reason == pb.FINISH_REASON_LENGTH


async def test_bytes_that_are_no_text(create_faults: CreateFaults):
    """Invalid UTF-8 in a prompt: INVALID_ARGUMENT."""
    cluster = await create_faults()
    channel, service = cluster.front.channel, "/cluster.v1.InferenceService"
    for text in (b"a\xffb", b"\xc3", b"\xed\xa0\x80"):
        request = b"\x1a" + bytes([len(text)]) + text  # field 3, the prompt
        for call in (
            channel.unary_unary(f"{service}/Generate")(request),
            channel.unary_stream(f"{service}/GenerateStream")(request).read(),
            channel.unary_unary(f"{service}/CountTokens")(b"\x12" + request[1:]),
        ):
            assert (await failure(call)).code == INVALID
    await check_alive(cluster)


async def test_empty_prompts_and_nul_bytes(create_faults: CreateFaults):
    """Empty prompt, NUL bytes in a prompt or a chat: INVALID_ARGUMENT with the field."""
    cluster = await create_faults()
    for prompt in ("", "a\0b", "\0"):
        part = pb.ContentPart(text=prompt)
        chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=[part])])
        for request in (ask(prompt), *[pb.GenerateRequest(chat=chat)][: len(prompt)]):
            refusal = await failure(cluster.stub.Generate(request))
            assert (refusal.code, refusal.field) == (INVALID, request.WhichOneof("input"))
    await check_alive(cluster)


TENSORS: list[tuple[Sequence[bytes], Sequence[int], str]] = [
    ([b"a\xff"], (1,), "text_input"),
    ([b"a\0b"], (1,), "text_input"),
    ([b""], (1,), "text_input"),
    ([b"hello"], (2,), "inputs[0].shape"),
    ([b"hello"], (1, 2), "inputs[0].shape"),
    ([b"hello"], (-1,), "inputs[0].shape"),
    ([b"hello"], (2**62, 2**62), "inputs[0].shape"),
    ([b"hello", b"world"], (1,), "inputs[0]"),
    ([], (1,), "inputs[0]"),
]


async def test_tensors_that_are_no_prompt(create_faults: CreateFaults):
    """NUL bytes, invalid UTF-8, empty prompt, wrong tensor shape, as KServe sends them: INVALID_ARGUMENT."""
    cluster = await create_faults()
    stub = kserve_grpc.GRPCInferenceServiceStub(cluster.front.channel)
    for texts, shape, field in TENSORS:
        request = kserve.ModelInferRequest(model_name="test")
        request.inputs.add(name="text_input", datatype="BYTES", shape=shape)
        request.raw_input_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
        refusal = await failure(stub.ModelInfer(request))
        assert (refusal.code, refusal.field) == (INVALID, field)
    await check_alive(cluster)


BODIES: list[dict[str, object]] = [
    {"prompt": "a\0b"},
    {"prompt": ""},
    {"prompt": [65, 257]},
    {"prompt": "a", "n": 10**12},
    {"prompt": "a", "max_tokens": 10**12},
    {"prompt": "a", "temperature": float("nan")},
    {"prompt": "a", "stop": ["x"] * 100_000},
    {"prompt": "a", "logit_bias": {"257": 1}},
]


async def test_the_same_over_http(create_faults: CreateFaults):
    """Bad input as OpenAI's clients send it: 400, and the parameter's name."""
    cluster = await create_faults(http_port=0)
    url = f"http://127.0.0.1:{cluster.front.gateway.http_port}/v1/completions"
    async with aiohttp.ClientSession() as session:
        for body in BODIES:
            headers = {"content-type": "application/json"}
            async with session.post(url, data=json.dumps(body), headers=headers) as response:
                assert response.status == 400, await response.text()
                param = (await response.json())["error"]["param"]
            # NaN is no JSON at all.
            assert param is None if "temperature" in body else param.startswith([*body][-1])
    await check_alive(cluster)


CARELESS: list[tuple[dict[str, object], str]] = [
    ({"prompt_token_ids": [65, 257]}, "token_ids"),
    ({"prompt_token_ids": [2**32 - 1]}, "token_ids"),
    ({"prompt_token_ids": []}, "prompt"),
    ({"prompt_token_ids": [65] * 512}, "prompt"),
    ({"sampling": {"logit_bias": {257: 1.0}}}, "sampling.logit_bias"),
    ({"sampling": {"n": HUGE}}, "sampling.n"),
    ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
    ({"priority": 77}, "priority"),
    ({"emitted": [replica_pb2.EmittedTokens(candidate_index=0, token_ids=[257])]}, "emitted"),
    ({"emitted": [replica_pb2.EmittedTokens(candidate_index=77, token_ids=[1])]}, "emitted"),
]


async def test_an_engine_does_not_rely_on_its_gateways(create_faults: CreateFaults):
    """Token ids, lengths and sampling that a gateway should have refused: they fail alone, and the engine lives."""
    cluster = await create_faults()
    submits = [
        replica_pb2.Submit(
            **{"id": index, "prompt_token_ids": [65]}
            | changes
            | {"sampling": {"max_tokens": 3, "seed": 1, **changes.get("sampling", {})}}
        )
        for index, (changes, _) in enumerate(CARELESS)
    ]
    async with grpc.aio.insecure_channel(
        cluster.replica.address, options=(("grpc.use_local_subchannel_pool", 1),)
    ) as channel:
        call = replica_pb2_grpc.ReplicaServiceStub(channel).Connect(metadata=(("cluster-secret", SECRET),))
        hello = replica_pb2.GatewayHello(gateway_id="careless", protocol_version=PROTOCOL_VERSION)
        await call.write(replica_pb2.GatewayFrame(hello=hello, submits=submits))
        found = {}
        while len(found) < len(submits):
            frame = await call.read()
            assert not frame.deltas
            found |= {failure.id: (failure.reason, failure.field) for failure in frame.failures}
        assert found == {index: ("INVALID_REQUEST", field) for index, (_, field) in enumerate(CARELESS)}
        call.cancel()
    await check_alive(cluster)
