"""OpenAI's API over HTTP, byte by byte as clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from fake_replica import EOS, FakeReplica
from gateway_setup import CreateSetup, Setup

from cluster.errors import ConfigError
from cluster.gateway.config import DEFAULT_HTTP_PORT, GatewayConfig
from cluster.gateway.server import Gateway, ServedModel

HELLO = {"prompt": "hello", "max_tokens": 8, "seed": 7}
MESSAGE = {"role": "user", "content": "hi"}
CHAT = {"messages": [MESSAGE], "max_tokens": 8, "seed": 7}


class Http:
    """A client of one gateway's HTTP port."""

    def __init__(self, session: aiohttp.ClientSession, setup: Setup) -> None:
        self.session = session
        self.setup = setup

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, dict, dict]:
        """Status, body, and headers by their names in lower case."""
        async with self.session.post(path, json=body, headers=headers) as response:
            return response.status, await response.json(), {k.lower(): v for k, v in response.headers.items()}

    async def get(self, path: str) -> tuple[int, dict]:
        async with self.session.get(path) as response:
            return response.status, await response.json()

    async def stream(self, path: str, body: dict) -> list[dict]:
        """Events up to [DONE]; an error event ends the list, too."""
        async with self.session.post(path, json=body | {"stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            events = (await response.text()).split("\n\n")
        assert events.pop() == ""
        assert all(event.startswith("data: ") for event in events)
        parsed = [json.loads(event[6:]) for event in events if event != "data: [DONE]"]
        assert ("error" in parsed[-1]) != (events[-1] == "data: [DONE]")
        return parsed

    async def refusal(self, path: str, body: object, **headers: str) -> tuple[int, dict, dict]:
        status, answer, headers = await self.post(path, body, **headers)
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"], headers


CreateHttp = Callable[..., Awaitable[Http]]


@pytest.fixture
async def create_http(create_setup: CreateSetup) -> AsyncIterator[CreateHttp]:
    sessions = []

    async def create(*replicas: FakeReplica, **config: object) -> Http:
        setup = await create_setup(*replicas, **{"http_port": 0} | config)
        session = aiohttp.ClientSession(f"http://127.0.0.1:{setup.gateway.http_port}")
        sessions.append(session)
        return Http(session, setup)

    yield create
    for session in sessions:
        await session.close()


def says(text: str) -> FakeReplica:
    """A replica whose every completion is this text."""
    return FakeReplica(lambda submit, index: [*text.encode(), EOS])


async def test_a_completion(create_http: CreateHttp) -> None:
    http = await create_http(says("good day"))
    status, answer, headers = await http.post("/v1/completions", HELLO | {"max_tokens": 20})
    assert status == 200
    (submit,) = http.setup.replica.submits
    assert answer.pop("id") == f"cmpl-{headers['x-request-id']}"
    assert answer.pop("created") > 1.7e9
    ledger = answer["choices"][0].pop("ledger")
    assert (ledger["replicas"], ledger["num_moves"], ledger["exact"]) == (["replica-0"], 0, True)
    assert answer == {
        "object": "text_completion",
        "model": "test",
        "choices": [{"index": 0, "text": "good day", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }  # fmt: skip
    assert bytes(submit.prompt_token_ids) == b"hello"


async def test_a_chat(create_http: CreateHttp) -> None:
    http = await create_http(says("good day"))
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    status, answer, _ = await http.post("/v1/chat/completions", CHAT | {"messages": messages, "max_tokens": 20})
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-gen-")
    message = {"role": "assistant", "content": "good day", "refusal": None}
    assert answer["choices"][0].pop("ledger")["prefill_ms"] > 0
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    (submit,) = http.setup.replica.submits
    assert bytes(submit.prompt_token_ids) == b"system: be brief\nuser: hi\nassistant:"
    # An answer may be sent back as it came.
    messages.append(message | {"tool_calls": None, "annotations": []})
    assert (await http.post("/v1/chat/completions", CHAT | {"messages": messages}))[0] == 200


async def test_streams_say_the_same_as_whole_answers(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(tokens_per_step=3))
    for path, body in (("/v1/completions", HELLO), ("/v1/chat/completions", CHAT)):
        body = body | {"n": 3}
        whole = (await http.post(path, body))[1]
        events = await http.stream(path, body | {"stream_options": {"include_usage": True}})
        assert len({event["id"] for event in events}) == 1
        assert all(event["usage"] is None for event in events[:-1])
        assert events[-1]["choices"] == []
        assert events[-1]["usage"] == whole["usage"]
        texts, ends = ["", "", ""], {}
        for event in events[:-1]:
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            if choice["finish_reason"]:
                ends[choice["index"]] = choice["finish_reason"]
        assert ends == dict.fromkeys(range(3), "length")
        assert texts == [c["text"] if "text" in c else c["message"]["content"] for c in whole["choices"]]


async def test_a_chats_stream_begins_with_the_role_and_has_usage_only_if_asked(create_http: CreateHttp) -> None:
    http = await create_http(says("yes"))
    events = await http.stream("/v1/chat/completions", CHAT)
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": ""}, {"content": "y"}, {"content": "e"}, {"content": "s"}, {},
    ]  # fmt: skip
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 4 + ["stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert not any("usage" in event for event in events)
    assert [i for i, event in enumerate(events) if "ledger" in event["choices"][0]] == [len(events) - 1]


async def test_several_prompts_of_both_kinds(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(lambda submit, index: [*bytes(submit.prompt_token_ids).upper(), 48 + index]))
    for prompt in (["one", "two", "three"], [list(b"one"), list(b"two"), list(b"three")]):
        body = HELLO | {"prompt": prompt, "n": 2}
        answer = (await http.post("/v1/completions", body))[1]
        expected = ["ONE0", "ONE1", "TWO0", "TWO1", "THREE0", "THREE1"]
        assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(expected))
        assert answer["usage"]["prompt_tokens"] == 11
        events = await http.stream("/v1/completions", body | {"stream_options": {"include_usage": True}})
        texts = dict.fromkeys(range(6), "")
        for event in events[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert list(texts.values()) == expected
        assert events[-1]["usage"] == answer["usage"]
    assert (await http.post("/v1/completions", HELLO | {"prompt": list(b"flat")}))[1]["choices"][0]["text"] == "FLAT0"


async def test_one_prompt_that_fails_ends_the_others(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(gated=True))
    task = asyncio.create_task(http.refusal("/v1/completions", HELLO | {"prompt": ["good", ""]}))
    status, error, _ = await task
    assert (status, error["param"]) == (400, "prompt")
    await http.setup.replica.until(lambda: not http.setup.replica.running)


async def test_every_parameter_reaches_the_replica(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica())
    given = {
        "temperature": 0.5, "top_p": 0.25, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": -0.5, "top_k": 4,
        "min_p": 0.125, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True, "n": 2,
        "max_tokens": 5,
    }  # fmt: skip
    others = {"logit_bias": {"7": 2.5}, "stop_token_ids": [9], "priority": "P0", "cache_salt": "pepper"}
    assert (await http.post("/v1/chat/completions", CHAT | given | others | {"user": "u", "store": True}))[0] == 200
    (submit,) = http.setup.replica.submits
    assert {name: getattr(submit.sampling, name) for name in given} == given
    assert dict(submit.sampling.logit_bias) == {7: 2.5}
    assert list(submit.sampling.stop_token_ids) == [9]
    assert (submit.priority, submit.cache_salt) == (1, "pepper")
    await http.post("/v1/chat/completions", CHAT | {"max_completion_tokens": 4, "priority": 3, "seed": -1, "top_k": -1})
    submit = http.setup.replica.submits[-1]
    assert (submit.sampling.max_tokens, submit.priority, submit.sampling.seed) == (4, 4, 2**64 - 1)
    await http.post("/v1/completions", {"prompt": "x"})
    assert http.setup.replica.submits[-1].sampling.max_tokens == 16


async def test_stop_strings_are_not_in_the_text(create_http: CreateHttp) -> None:
    http = await create_http(says("one two three"))
    for stop in ("tw", ["nothing", "tw"]):
        answer = (await http.post("/v1/completions", HELLO | {"stop": stop}))[1]
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("one ", "stop")
        events = await http.stream("/v1/completions", HELLO | {"stop": stop})
        assert "".join(event["choices"][0]["text"] for event in events) == "one "


async def test_log_probabilities_of_completions(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(lambda submit, index: "aé!".encode()))
    body = HELLO | {"logprobs": 2}
    logprobs = (await http.post("/v1/completions", body))[1]["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
    streamed: dict[str, list] = {name: [] for name in logprobs}
    for event in await http.stream("/v1/completions", body):
        for name, values in event["choices"][0]["logprobs"].items():
            streamed[name] += values
    assert streamed == logprobs


async def test_log_probabilities_of_chats(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(lambda submit, index: "é".encode()))
    body = CHAT | {"logprobs": True, "top_logprobs": 1}
    content = (await http.post("/v1/chat/completions", body))[1]["choices"][0]["logprobs"]["content"]
    top = {"token": "\\xc3", "logprob": -0.5, "bytes": [0xC3]}
    assert content[0] == top | {"top_logprobs": [top]}
    streamed = []
    for event in await http.stream("/v1/chat/completions", body):
        streamed += (event["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == content
    body = CHAT | {"logprobs": True}
    content = (await http.post("/v1/chat/completions", body))[1]["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in content] == [[], []]


async def test_models_and_health(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(), models=("test",))
    status, models = await http.get("/v1/models")
    assert (status, models["object"]) == (200, "list")
    (model,) = models["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("test", "model", 512)
    assert await http.get("/v1/models/test") == (200, model)
    status, answer = await http.get("/v1/models/org/none")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    async with http.session.get("/health") as response:
        assert response.status == 200
    await http.setup.replica.stop()
    async with asyncio.timeout(10):
        status = 200
        while status == 200:
            async with http.session.get("/health") as response:
                status = response.status
    assert status == 503


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {}, "prompt"),
        ("completions", [], None),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ["a", 1]}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [1, 257]}, "prompt[1]"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", {"prompt": [2**70]}, "prompt"),
        ("completions", {"prompt": "a\0b"}, "prompt"),
        ("completions", {"prompt": ["x"] * 129}, "prompt"),
        ("completions", {"prompt": "x" * 600}, "prompt"),
        ("completions", HELLO | {"max_token": 3}, "max_token"),
        ("completions", HELLO | {"max_tokens": "3"}, "max_tokens"),
        ("completions", HELLO | {"max_tokens": 0}, "max_tokens"),
        ("completions", HELLO | {"max_tokens": 2**40}, "max_tokens"),
        ("completions", HELLO | {"temperature": -1}, "temperature"),
        ("completions", HELLO | {"n": 17}, "n"),
        ("completions", HELLO | {"seed": 2**64}, "seed"),
        ("completions", HELLO | {"seed": -(2**64)}, "seed"),
        ("completions", HELLO | {"stop": ["x"] * 17}, "stop"),
        ("completions", HELLO | {"logprobs": 21}, "logprobs"),
        ("completions", HELLO | {"best_of": 2}, "best_of"),
        ("completions", HELLO | {"echo": True}, "echo"),
        ("completions", HELLO | {"suffix": "end"}, "suffix"),
        ("completions", HELLO | {"logit_bias": {"a": 1}}, "logit_bias"),
        ("completions", HELLO | {"logit_bias": {"999": 1}}, "logit_bias"),
        ("completions", HELLO | {"priority": 4}, "priority"),
        ("completions", HELLO | {"priority": "high"}, "priority"),
        ("completions", HELLO | {"max_ttft_ms": -1}, "max_ttft_ms"),
        ("completions", HELLO | {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", HELLO | {"cache_salt": "x" * 300}, "cache_salt"),
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ("chat/completions", {"messages": [MESSAGE | {"tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ("chat/completions", CHAT | {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", CHAT | {"prompt": "x"}, "prompt"),
    ],
)  # fmt: skip
async def test_a_bad_request_names_the_parameter(
    create_http: CreateHttp, path: str, body: object, param: str | None
) -> None:
    http = await create_http(FakeReplica())
    bodies = [body, body | {"stream": True}] if isinstance(body, dict) and "stream_options" not in body else [body]
    for one in bodies:
        status, error, headers = await http.refusal(f"/v1/{path}", one)
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert headers["x-should-retry"] == "false"
    assert not http.setup.replica.submits


async def test_bodies_that_are_no_json(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(), max_message_bytes=10_000)
    for data in (b"", b"{", b"\xff", b'{"prompt": "\\ud800"}', b'{"user": ' + b"[" * 5000):
        async with http.session.post(
            "/v1/completions", data=data, headers={"content-type": "application/json"}
        ) as response:
            assert response.status == 400, data
            assert (await response.json())["error"]["type"] == "invalid_request_error"
    async with http.session.post("/v1/completions", data=json.dumps(HELLO)) as response:
        assert response.status == 400
        assert "Content-Type" in (await response.json())["error"]["message"]
    status, error, _ = await http.refusal("/v1/completions", {"prompt": "x" * 10_000})
    assert status == 413
    assert "POST /v1/completions" in error["message"]


async def test_paths_and_methods_that_do_not_exist(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica())
    assert (await http.get("/v1/nothing"))[0] == 404
    status, answer = await http.get("/v1/completions")
    assert (status, answer["error"]["param"]) == (405, None)


async def test_a_refusal_says_when_to_come_back(create_http: CreateHttp) -> None:
    http = await create_http()
    for body in (HELLO, HELLO | {"stream": True}):
        status, error, headers = await http.refusal("/v1/completions", body)
        assert (status, error["code"]) == (503, "model_warming")
        assert int(headers["retry-after"]) >= 1
        assert headers["x-should-retry"] == "true"


async def test_overload_is_429(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(gated=True), max_concurrent_streams=1)
    running = asyncio.create_task(http.post("/v1/completions", HELLO))
    await http.setup.replica.until(lambda: http.setup.replica.running)
    status, error, headers = await http.refusal("/v1/completions", HELLO)
    assert (status, error["type"], error["code"]) == (429, "overloaded_error", "overloaded")
    assert int(headers["retry-after-ms"]) > 0
    await http.setup.replica.allow(8)
    assert (await running)[0] == 200


async def test_a_failure_in_a_stream_is_its_last_event(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(gated=True))
    await http.setup.replica.allow(2)
    async with http.session.post("/v1/completions", json=HELLO | {"stream": True}) as response:
        assert b"text_completion" in await response.content.readuntil(b"\n\n")
        await http.setup.replica.fail(http.setup.replica.submits[0].id, "it broke")
        last = (await response.text()).split("\n\n")[-2]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("engine_fault", "it broke")


async def test_a_stream_goes_on_at_another_replica(create_http: CreateHttp) -> None:
    first, second = FakeReplica(gated=True), FakeReplica(replica_id="replica-1", gated=True)
    http = await create_http(first)
    body = HELLO | {"max_tokens": 40}
    task = asyncio.create_task(http.stream("/v1/completions", body))
    await first.until(lambda: first.running)
    http.setup.replicas.append(second)
    http.setup.addresses["replica-1"] = await second.start()
    http.setup.gateway.set_replicas("test", http.setup.replica_addresses(*http.setup.addresses))
    await first.allow(5)
    await first.until(lambda: not first._allowed)
    await first.stop()
    await second.allow(100)
    events = await task
    ledger = events[-1]["choices"][0]["ledger"]
    assert (ledger["replicas"], ledger["num_moves"]) == ([first.replica_id, second.replica_id], 1)
    whole = (await http.post("/v1/completions", body))[1]["choices"][0]["text"]
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    assert len(whole) == 40


async def test_who_hangs_up_ends_its_generation(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(gated=True))  # whose check at the end finds what the gateway has left open
    for body in (HELLO, HELLO | {"prompt": ["a", "b"]}):
        for stream in (False, True):
            task = asyncio.create_task(http.post("/v1/completions", body | {"stream": stream}))
            await http.setup.replica.until(lambda: http.setup.replica.running)
            task.cancel()
            await http.setup.replica.until(lambda: not http.setup.replica.running)


async def test_an_idempotency_key_names_the_request(create_http: CreateHttp) -> None:
    http = await create_http(FakeReplica(gated=True))
    key = {"idempotency-key": "mine"}
    running = [asyncio.create_task(http.post("/v1/completions", HELLO, **key)) for _ in range(2)]
    await http.setup.replica.until(lambda: http.setup.replica.running)
    status, error, headers = await http.refusal("/v1/completions", HELLO | {"prompt": "another"}, **key)
    assert (status, error["code"], headers["x-should-retry"]) == (409, "already_exists", "false")
    await http.setup.replica.allow(8)
    answers = [*await asyncio.gather(*running), await http.post("/v1/completions", HELLO, **key)]
    assert {status for status, _, _ in answers} == {200}
    assert len({answer["choices"][0]["text"] for _, answer, _ in answers}) == 1
    assert len(http.setup.replica.submits) == 1


async def test_http_can_be_turned_off(create_setup: CreateSetup) -> None:
    assert (await create_setup(http_port=None)).gateway.http_port is None


async def test_a_port_that_is_taken_is_an_error_but_for_the_default(checkpoint: Path) -> None:
    gateways = []

    async def start(http_port: int) -> Gateway:
        gateway = Gateway(GatewayConfig(port=0, http_port=http_port), [ServedModel("test", checkpoint)], secret="s")
        gateways.append(gateway)
        await gateway.start()
        return gateway

    first = await start(0)
    with pytest.raises(ConfigError) as refused:
        await start(first.http_port)
    assert refused.value.field == "gateway.http_port"
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # somebody else has it, which will do
            taken.bind(("127.0.0.1", DEFAULT_HTTP_PORT))
            taken.listen()
        second = await start(DEFAULT_HTTP_PORT)
        assert second.http_port not in (0, None, DEFAULT_HTTP_PORT)
    for gateway in gateways:
        await gateway.stop()
