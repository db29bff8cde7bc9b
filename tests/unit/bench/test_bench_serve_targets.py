"""Both protocols that a load can speak, against servers with written answers."""

import json

import pytest
from aiohttp import web
from scripted_server import DEMO, ScriptedServer, breaking, chunks_of

from cluster.bench.serve.grpc_target import GrpcTarget
from cluster.bench.serve.openai_target import OpenAITarget
from cluster.bench.serve.target import TargetFailure
from cluster.client.credentials import Credentials
from cluster.core.request import Priority
from cluster.errors import ConfigError, EngineFault, Overloaded, ServerUnreachable
from cluster.v1 import inference_pb2 as pb


async def generate(target, *, deadline_s=10.0):
    counts = []
    answer = await target.generate(
        [1, 2, 3], max_tokens=2, priority=Priority.P2, seed=9, deadline_s=deadline_s, on_tokens=counts.append
    )
    return counts, answer


@pytest.fixture
def server():
    server = ScriptedServer()
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO]))
    yield server
    server.stop()


@pytest.fixture
async def grpc_target(server):
    target = GrpcTarget([server.address], "", Credentials())
    yield target
    await target.close()


async def test_grpc_streams_a_completion(server, grpc_target):
    server.script("GenerateStream", chunks_of("a", "b"))
    model = await grpc_target.model()
    assert (model.name, model.vocab_size) == ("demo", 4096)
    counts, answer = await generate(grpc_target)
    assert (counts, answer.num_new_tokens, answer.cached_tokens) == ([1, 1], 2, 2)
    request = server.requests[-1]
    assert (list(request.token_ids.ids), request.priority) == ([1, 2, 3], pb.PRIORITY_P2)
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.ignore_eos) == (2, 9, True)


async def test_grpc_tells_a_move_from_the_ledger(server, grpc_target):
    def answer(request, context):
        context.set_trailing_metadata((("cluster-ledger-bin", pb.Ledger(num_moves=2).SerializeToString()),))
        yield from chunks_of("a", "b")

    server.script("GenerateStream", answer)
    _, answer = await generate(grpc_target)
    assert answer.num_moves == 2


async def test_grpc_failures_have_a_code_a_reason_and_are_not_tried_again(server, grpc_target):
    server.script("GenerateStream", Overloaded("busy", retry_after_s=3.0))
    with pytest.raises(TargetFailure) as caught:
        await generate(grpc_target)
    assert (caught.value.status, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED (OVERLOADED)", 3.0)
    assert len(server.requests) == 1
    server.script("GenerateStream", breaking(EngineFault("oops"), *chunks_of("a", "b")[:1]))
    with pytest.raises(TargetFailure, match=r"INTERNAL \(ENGINE_FAULT\)"):
        await generate(grpc_target)


async def test_grpc_wants_one_model(server, grpc_target):
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO, pb.Model(name="other")]))
    with pytest.raises(ConfigError, match="demo, other"):
        await grpc_target.model()


async def test_grpc_nobody_answers():
    target = GrpcTarget(["127.0.0.1:1"], "", Credentials())
    with pytest.raises(ServerUnreachable):
        await target.model()
    await target.close()


class OpenAIServer:
    """``events`` are sent as they are; ``status`` other than 200 answers with an error."""

    def __init__(self):
        self.events, self.status, self.bodies = [], 200, []
        self.address = ""

    async def models(self, request):
        return web.json_response({"data": [{"id": "demo"}]})

    async def completions(self, request):
        self.bodies.append(await request.json())
        if self.status != 200:
            error = {"error": {"code": "overloaded", "message": "busy"}}
            return web.json_response(error, status=self.status, headers={"retry-after": "4"})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in self.events:
            await response.write(b"data: " + event + b"\n\n")
        return response


@pytest.fixture
async def openai_server():
    server, app = OpenAIServer(), web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.completions)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


@pytest.fixture
async def openai_target(openai_server):
    target = OpenAITarget(openai_server.address, "", Credentials())
    yield target
    await target.close()


def event(text):
    return json.dumps({"choices": [{"index": 0, "text": text}]}).encode()


USAGE = json.dumps(
    {
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}},
    }
).encode()


async def test_openai_streams_a_completion(openai_server, openai_target):
    openai_server.events = [event("a"), event("b"), USAGE, b"[DONE]"]
    assert (await openai_target.model()).name == "demo"
    counts, answer = await generate(openai_target)
    assert (counts, answer.num_new_tokens, answer.cached_tokens) == ([1, 1], 5, 2)
    (body,) = openai_server.bodies
    assert (body["model"], body["prompt"], body["priority"], body["stream"]) == ("demo", [1, 2, 3], 2, True)
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (2, 2, True)


async def test_openai_failures_have_a_status(openai_server, openai_target):
    openai_server.status = 429
    with pytest.raises(TargetFailure) as caught:
        await generate(openai_target)
    assert (caught.value.status, caught.value.retry_after_s) == ("HTTP 429 (overloaded)", 4.0)


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([event("a")], "broke off"),
        ([event("a"), b'{"error": {"code": "engine_fault"}}'], "engine_fault"),
        ([b"{"], "JSONDecodeError"),
    ],
)
async def test_openai_streams_that_end_badly_are_failures(openai_server, openai_target, events, status):
    openai_server.events = events
    with pytest.raises(TargetFailure, match=status):
        await generate(openai_target)


async def test_openai_nobody_answers():
    target = OpenAITarget("http://127.0.0.1:1", "", Credentials())
    with pytest.raises(ServerUnreachable):
        await target.model()
    with pytest.raises(TargetFailure, match="connection"):
        await generate(target)
    await target.close()
