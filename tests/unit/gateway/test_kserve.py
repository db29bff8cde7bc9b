"""The Open Inference Protocol as its clients speak it, over a plain channel."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Sequence

import grpc
import pytest
from fake_replica import EOS, FakeReplica
from gateway_setup import CreateSetup, Setup, failure

from cluster.kserve import open_inference_pb2 as kserve
from cluster.kserve import open_inference_pb2_grpc
from cluster.v1 import inference_pb2 as pb

TOKENS = {"max_tokens": 8, "seed": 7}


def stub(setup: Setup) -> open_inference_pb2_grpc.GRPCInferenceServiceStub:
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(setup.channel)


def infer(
    text: str | bytes = "hello",
    sampling: dict[str, object] | None = None,
    *,
    raw: bool = True,
    id: str = "",
    shape: Sequence[int] = (1,),
    outputs: Sequence[str] = (),
    parameters: dict[str, int | str | bool] | None = None,
    **flags: bool,
) -> kserve.ModelInferRequest:
    """A request as tritonclient makes it; ``raw`` False: with the contents in the tensors."""
    request = kserve.ModelInferRequest(model_name="test", id=id)
    values = {"text_input": text, "sampling_parameters": json.dumps(TOKENS if sampling is None else sampling), **flags}
    for name, value in values.items():
        data = value.encode() if isinstance(value, str) else value
        datatype = "BYTES" if isinstance(data, bytes) else "BOOL"
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
        if raw:
            packed = struct.pack("<I", len(data)) + data if isinstance(data, bytes) else bytes([data])
            request.raw_input_contents.append(packed)
        elif isinstance(data, bytes):
            tensor.contents.bytes_contents.append(data)
        else:
            tensor.contents.bool_contents.append(data)
    for name in outputs:
        request.outputs.add(name=name)
    for name, value in (parameters or {}).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


def outputs_of(response: kserve.ModelInferResponse) -> dict[str, list[str]]:
    found = {}
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        values, position = [], 0
        while position < len(data):
            (length,) = struct.unpack_from("<I", data, position)
            values.append(data[position + 4 : position + 4 + length].decode())
            position += 4 + length
        assert (output.datatype, list(output.shape)) == ("BYTES", [len(values)])
        found[output.name] = values
    return found


def says(text: str) -> FakeReplica:
    return FakeReplica(lambda submit, index: [*text.encode(), EOS])


async def test_one_answer(create_setup: CreateSetup) -> None:
    setup = await create_setup(says("good day"))
    for request in (infer(id="7"), infer(id="7", raw=False), infer(id="7", shape=(1, 1)), infer(id="7", stream=False)):
        response = await stub(setup).ModelInfer(request)
        assert (response.model_name, response.model_version, response.id) == ("test", "1", "7")
        assert outputs_of(response) == {"text_output": ["good day"[:8]], "finish_reason": ["length"]}
    call = stub(setup).ModelInfer(infer(exclude_input_in_output=False, outputs=["text_output"]))
    assert outputs_of(await call) == {"text_output": ["hellogood day"]}
    ledger = pb.Ledger.FromString(dict(await call.trailing_metadata())["cluster-ledger-bin"])
    assert list(ledger.replicas) == ["replica-0"]
    assert bytes(setup.replica.submits[0].prompt_token_ids) == b"hello"


async def test_parameters_reach_the_replica(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    # Clients of other servers write numbers as texts.
    sampling = {"temperature": "0.5", "top_k": 4, "max_tokens": "3", "n": 2, "ignore_eos": "true", "stop": ["@"]}
    parameters = {"priority": 1, "timeout": 5_000_000, "cache_salt": "pepper", "sequence_id": 3, "sequence_start": True}
    response = await stub(setup).ModelInfer(infer(sampling=sampling, parameters=parameters))
    assert len(outputs_of(response)["text_output"]) == 2
    submit = setup.replica.submits[0]
    assert (submit.sampling.temperature, submit.sampling.top_k, submit.sampling.max_tokens) == (0.5, 4, 3)
    assert submit.sampling.ignore_eos
    assert (submit.priority, submit.cache_salt) == (1, "pepper")
    assert 4000 < submit.deadline_ms <= 5000
    await stub(setup).ModelInfer(infer(parameters={"priority": 4, "timeout": 0}))
    assert setup.replica.submits[1].priority == 4
    assert setup.replica.submits[1].deadline_ms > 5000


async def test_a_timeout_ends_the_request(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    refusal = await failure(stub(setup).ModelInfer(infer(parameters={"timeout": 50_000})))
    assert refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_has_deltas_and_ends_each_request(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(tokens_per_step=2))
    whole = outputs_of(await stub(setup).ModelInfer(infer(sampling=TOKENS | {"n": 2})))["text_output"]
    requests = [
        infer(sampling=TOKENS | {"n": 2}, id="deltas", stream=True),
        infer(sampling=TOKENS | {"n": 2}, id="whole", stream=False),
    ]
    texts: dict[str, list[str]] = {"deltas": ["", ""], "whole": ["", ""]}
    ends: dict[str, list[str]] = {"deltas": ["", ""], "whole": ["", ""]}
    num_responses = dict.fromkeys(texts, 0)
    final = []
    async for response in stub(setup).ModelStreamInfer(iter(requests)):
        assert not response.error_message
        name, outputs = response.infer_response.id, outputs_of(response.infer_response)
        num_responses[name] += 1
        assert name not in final
        if response.infer_response.parameters["triton_final_response"].bool_param:
            final.append(name)
            assert json.loads(response.infer_response.parameters["ledger"].string_param)["replicas"] == ["replica-0"]
        for index in range(2):
            texts[name][index] += outputs["text_output"][index]
            ends[name][index] += outputs["finish_reason"][index]
    assert texts == {"deltas": whole, "whole": whole}
    assert ends == {name: ["length", "length"] for name in texts}
    assert sorted(final) == ["deltas", "whole"]
    assert num_responses["deltas"] > 2
    assert num_responses["whole"] == 1


async def test_many_requests_of_one_stream(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    call = stub(setup).ModelStreamInfer(iter([infer(id=str(index), stream=True) for index in range(100)]))
    final = [r.infer_response.id async for r in call if r.infer_response.parameters["triton_final_response"].bool_param]
    assert sorted(final, key=int) == [str(index) for index in range(100)]


async def test_a_stream_goes_on_after_a_failed_request(create_setup: CreateSetup) -> None:
    setup = await create_setup(says("yes"))
    requests = [infer("", id="bad", stream=True), infer(id="good", stream=True)]
    responses = [response async for response in stub(setup).ModelStreamInfer(iter(requests))]
    (bad,) = (response for response in responses if response.error_message)
    assert "empty" in bad.error_message
    assert bad.infer_response.id == "bad"
    assert bad.infer_response.parameters["reason"].string_param == "INVALID_REQUEST"
    assert bad.infer_response.parameters["triton_final_response"].bool_param
    good = [response.infer_response for response in responses if not response.error_message]
    assert "".join(outputs_of(response)["text_output"][0] for response in good) == "yes"


async def test_a_stream_ends_with_a_status_where_that_is_asked_for(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    call = stub(setup).ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
    await call.write(infer(id="runs", stream=True))
    await setup.replica.until(lambda: setup.replica.running)
    await call.write(infer(sampling={"temperature": -1}, id="bad"))
    refusal = await failure(call.read())
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.field == "sampling_parameters.temperature"
    await setup.replica.until(lambda: not setup.replica.running)  # the other one was ended with it


async def test_who_hangs_up_ends_all_requests_of_the_stream(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(gated=True))
    call = stub(setup).ModelStreamInfer(iter([infer(id=name, stream=name == "a") for name in "abc"]))
    reading = asyncio.create_task(call.read())
    await setup.replica.until(lambda: len(setup.replica.running) == 3)
    call.cancel()
    await asyncio.wait([reading])
    await setup.replica.until(lambda: not setup.replica.running)


async def test_a_refusal_in_a_stream_says_when_to_come_back(create_setup: CreateSetup) -> None:
    setup = await create_setup()
    (response,) = [response async for response in stub(setup).ModelStreamInfer(iter([infer(stream=True)]))]
    assert response.infer_response.parameters["reason"].string_param == "MODEL_WARMING"
    assert response.infer_response.parameters["retry_after_ms"].int64_param > 0
    refusal = await failure(stub(setup).ModelInfer(infer()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_WARMING")


def altered(**changes: object) -> kserve.ModelInferRequest:
    """A good request with one input changed."""
    request = infer()
    for name, value in changes.items():
        if name == "raw":
            request.raw_input_contents[:] = value
        elif name == "shape":
            request.inputs[0].shape[:] = value
        else:
            setattr(request.inputs[0], name, value)
    return request


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (kserve.ModelInferRequest(model_name="test"), "inputs"),
        (infer(""), "text_input"),
        (infer(b"a\xff"), "text_input"),
        (infer("a\0b"), "text_input"),
        (infer("x" * 600), "text_input"),
        (infer(shape=(2,)), "inputs[0].shape"),
        (infer(shape=(1, 2)), "inputs[0].shape"),
        (infer(shape=()), "inputs[0].shape"),
        (infer(shape=(-1,)), "inputs[0].shape"),
        (infer(nothing=True), "inputs[2].name"),
        (infer(stream=True), "stream"),
        (infer(stream=True, exclude_input_in_output=False), "inputs"),
        (infer(outputs=["text_output", "embedding"]), "outputs[1].name"),
        (infer(outputs=["text_output", "text_output"]), "outputs[1].name"),
        (infer(parameters={"priority": 5}), "parameters[priority]"),
        (infer(parameters={"priority": "high"}), "parameters[priority]"),
        (infer(parameters={"timeout": -1}), "parameters[timeout]"),
        (infer(parameters={"colour": 1}), "parameters[colour]"),
        (infer(parameters={"max_ttft_ms": 2**40}), "parameters[max_ttft_ms]"),
        (infer(sampling={"temperature": -1}), "sampling_parameters.temperature"),
        (infer(sampling={"temperature": "warm"}), "sampling_parameters.temperature"),
        (infer(sampling={"beams": 2}), "sampling_parameters.beams"),
        (infer(sampling={"n": 17}), "sampling_parameters.n"),
        (altered(name="prompt"), "inputs[0].name"),
        (altered(name="sampling_parameters", datatype="BYTES"), "inputs[1].name"),
        (altered(datatype="FP32"), "inputs[0].datatype"),
        (altered(raw=[b"\x05\0\0\0hello"]), "raw_input_contents"),
        (altered(raw=[b"\x06\0\0\0hello", b"\2\0\0\0{}"]), "raw_input_contents"),
        (altered(raw=[b"\x05\0\0\0hello\0\0\0\0", b"\2\0\0\0{}"]), "inputs[0]"),
        (altered(raw=[b"", b"\2\0\0\0{}"]), "inputs[0]"),
        (altered(raw=[b"\x05\0\0\0hello", b"\1\0\0\0["]), "sampling_parameters"),
    ],
)  # fmt: skip
async def test_invalid_argument_names_the_field(
    create_setup: CreateSetup, request_: kserve.ModelInferRequest, field: str
) -> None:
    setup = await create_setup(FakeReplica())
    refusal = await failure(stub(setup).ModelInfer(request_))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert not setup.replica.submits


async def test_shared_memory_is_unimplemented(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    request = infer()
    request.inputs[0].parameters["shared_memory_region"].string_param = "mine"
    assert (await failure(stub(setup).ModelInfer(request))).code == grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_are_no_message(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica())
    call = setup.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff\xff")
    assert (await failure(call)).code == grpc.StatusCode.INVALID_ARGUMENT
    stream = setup.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([b"\xff\xff"]))
    assert (await failure(stream.read())).code == grpc.StatusCode.INVALID_ARGUMENT


async def test_health_and_metadata(create_setup: CreateSetup) -> None:
    setup = await create_setup(FakeReplica(), models=("test", "cold"), ready=False)
    server = stub(setup)
    await setup.wait_states("test", 2)
    assert (await server.ServerLive(kserve.ServerLiveRequest())).live
    assert not (await server.ServerReady(kserve.ServerReadyRequest())).ready
    assert (await server.ModelReady(kserve.ModelReadyRequest(name="test", version="1"))).ready
    for name, version in (("cold", ""), ("unknown", ""), ("test", "2")):
        assert not (await server.ModelReady(kserve.ModelReadyRequest(name=name, version=version))).ready
    assert (await server.ServerMetadata(kserve.ServerMetadataRequest())).name == "cluster"
    metadata = await server.ModelMetadata(kserve.ModelMetadataRequest(name="test"))
    assert [tensor.name for tensor in metadata.outputs] == ["text_output", "finish_reason"]
    assert {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs}["stream"] == ("BOOL", [1])
    config = (await server.ModelConfig(kserve.ModelConfigRequest(name="test"))).config
    assert config.model_transaction_policy.decoupled
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
    index = await server.RepositoryIndex(kserve.RepositoryIndexRequest())
    assert {model.name: model.state for model in index.models} == {"test": "READY", "cold": "UNAVAILABLE"}
    index = await server.RepositoryIndex(kserve.RepositoryIndexRequest(ready=True))
    assert [model.name for model in index.models] == ["test"]
    refusal = await failure(server.ModelMetadata(kserve.ModelMetadataRequest(name="unknown")))
    assert refusal.code == grpc.StatusCode.NOT_FOUND
