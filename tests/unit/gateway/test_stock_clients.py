"""The clients that people have, unchanged, against a gateway: OpenAI's and Triton's."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from fake_replica import EOS, FakeReplica
from gateway_setup import CreateSetup, Setup

CHAT = {"model": "test", "messages": [{"role": "user", "content": "hi"}], "seed": 7}
# Into a folder of their own: tritonclient pins an older protobuf than the product.
TRITONCLIENT = ("tritonclient==2.73.0", "protobuf==6.33.6", "python-rapidjson==1.25", "ml_dtypes==0.5.4")


@pytest.fixture
async def clients() -> AsyncIterator[list[openai.AsyncOpenAI]]:
    made: list[openai.AsyncOpenAI] = []
    yield made
    for client in made:
        await client.close()


def connect(setup: Setup, clients: list[openai.AsyncOpenAI], **options: object) -> openai.AsyncOpenAI:
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{setup.gateway.http_port}/v1", api_key="none", **{"max_retries": 0} | options
    )
    clients.append(client)
    return client


async def test_openai_chats(create_setup: CreateSetup, clients: list[openai.AsyncOpenAI]) -> None:
    setup = await create_setup(FakeReplica(lambda submit, index: [*b"good day", EOS]), http_port=0)
    client = connect(setup, clients)
    answer = await client.chat.completions.create(
        **CHAT, n=2, logprobs=True, top_logprobs=2, stop=["zz"], extra_body={"ignore_eos": False, "priority": "P2"}
    )
    assert [choice.message.content for choice in answer.choices] == ["good day"] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2
    assert answer.usage.completion_tokens == 18
    assert answer.choices[1].logprobs.content[0].token == "g"
    assert len(answer.choices[1].logprobs.content[0].top_logprobs) == 2
    assert answer._request_id == answer.id.removeprefix("chatcmpl-")
    assert setup.replica.submits[0].priority == 3
    # What came is sent back as it is.
    messages = [*CHAT["messages"], answer.choices[0].message, {"role": "user", "content": "and now?"}]
    await client.chat.completions.create(**CHAT | {"messages": messages}, max_completion_tokens=4)
    assert (
        bytes(setup.replica.submits[-1].prompt_token_ids)
        == b"user: hi\nassistant: good day\nuser: and now?\nassistant:"
    )
    stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "good day"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 9
    async with client.chat.completions.stream(**CHAT) as events:
        final = await events.get_final_completion()
    assert final.choices[0].message.content == "good day"


async def test_openai_completions_and_models(create_setup: CreateSetup, clients: list[openai.AsyncOpenAI]) -> None:
    setup = await create_setup(FakeReplica(), http_port=0)
    client = connect(setup, clients)
    whole = await client.completions.create(
        model="test", prompt=["a", "b"], max_tokens=8, seed=7, logprobs=1, extra_body={"min_tokens": 2}
    )
    texts = ["", ""]
    async for chunk in await client.completions.create(
        model="test", prompt=["a", "b"], max_tokens=8, seed=7, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert len(whole.choices[0].logprobs.tokens) == 8
    assert [model.id async for model in client.models.list()] == ["test"]
    assert (await client.models.retrieve("test")).owned_by == "cluster"


async def test_openai_errors(create_setup: CreateSetup, clients: list[openai.AsyncOpenAI]) -> None:
    setup = await create_setup(FakeReplica(gated=True), http_port=0, max_concurrent_streams=1)
    client = connect(setup, clients)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**CHAT, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(**CHAT | {"model": "none"})
    running = asyncio.create_task(client.chat.completions.create(**CHAT, max_tokens=4))
    await setup.replica.until(lambda: setup.replica.running)
    with pytest.raises(openai.RateLimitError) as refused:
        await client.chat.completions.create(**CHAT, max_tokens=4)
    assert refused.value.type == "overloaded_error"
    # It comes back when it was told to, and then is served.
    patient = connect(setup, clients, max_retries=5)
    waiting = asyncio.create_task(patient.chat.completions.create(**CHAT, max_tokens=4))
    await setup.replica.allow(100)
    assert (await running).choices[0].finish_reason == "length"
    assert (await waiting).choices[0].finish_reason == "length"


async def test_openai_sees_a_stream_that_fails(create_setup: CreateSetup, clients: list[openai.AsyncOpenAI]) -> None:
    setup = await create_setup(FakeReplica(gated=True), http_port=0)
    await setup.replica.allow(2)
    stream = await connect(setup, clients).chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError, match="it broke"):
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                await setup.replica.fail(setup.replica.submits[0].id, "it broke")


@pytest.fixture(scope="module")
def tritonclient() -> Path:
    """A folder with tritonclient: kept in the environment, made by the first run that can reach a package index."""
    folder = Path(sys.prefix) / TRITONCLIENT[0]
    complete = folder / "complete"
    if not complete.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder]
        try:
            done = subprocess.run([*install, *TRITONCLIENT], timeout=120, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip("tritonclient cannot be installed here: no answer from the package index")
        if done.returncode:
            pytest.skip(f"tritonclient cannot be installed here: {done.stderr[-500:]}")
        complete.touch()
    return folder


async def test_tritonclient(create_setup: CreateSetup, tritonclient: Path) -> None:
    setup = await create_setup(FakeReplica(lambda submit, index: [*b"good day", EOS]))
    script = Path(__file__).with_name("tritonclient_session.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        script,
        f"127.0.0.1:{setup.port}",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tritonclient)},
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    said = json.loads(out)
    assert [said[name] for name in ("live", "ready", "model_ready", "no_model")] == [True, True, True, False]
    assert (said["server"], said["index"], said["decoupled"]) == ("cluster", "READY", True)
    assert said["metadata"][0] == "text_input"
    assert said["infer"] == ["one", ["good day"], "length"]
    assert said["refusal"][0] == "StatusCode.INVALID_ARGUMENT"
    assert said["stream"]["texts"] == {"deltas": "good day", "whole": "good day", "bad": ""}
    ((_, message),) = said["stream"]["errors"]
    assert "empty" in message
    assert said["stream_with_status"]["errors"] == [["StatusCode.INVALID_ARGUMENT", message]]
    assert {submit.priority for submit in setup.replica.submits} == {1, 2}
