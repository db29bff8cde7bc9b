"""The Python clients and the command line against the gateway itself."""

import asyncio
import json
import sys

import pytest
from fake_replica import FakeReplica

from cluster import errors
from cluster.client import AsyncClient, Client
from cluster.core.request import FinishReason

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def create_client(create_setup):
    clients = []

    async def create(*replicas, **config):
        setup = await create_setup(*replicas, **config)
        clients.append(AsyncClient(f"127.0.0.1:{setup.port}", deadline_s=30))
        return setup, clients[-1]

    yield create
    for client in clients:
        await client.close()


async def test_every_method(create_client):
    _, client = await create_client(FakeReplica())
    whole = await client.generate("hello", max_tokens=9, seed=2**64 - 1, n=2, logprobs=1)
    assert (whole.model, whole.seed) == ("test", 2**64 - 1)
    assert [len(candidate.text) for candidate in whole.candidates] == [9, 9]
    assert (len(whole.logprobs), whole.finish_reason) == (9, FinishReason.LENGTH)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 18)

    chunks = [chunk async for chunk in client.stream(list(b"hello"), max_tokens=9, seed=2**64 - 1)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[0].seed == 2**64 - 1
    assert (chunks[-1].finish_reason, chunks[-1].usage.completion_tokens) == (FinishReason.LENGTH, 9)

    answer = await client.chat(CHAT, max_tokens=4, seed=1)
    streamed = [chunk.text async for chunk in client.stream_chat(CHAT, max_tokens=4, seed=1)]
    assert "".join(streamed) == answer.text
    assert await client.count_tokens("hello") == 5
    assert await client.count_tokens(messages=CHAT) == answer.usage.prompt_tokens == len("user: hi\nassistant:")
    [model] = await client.models()
    assert model.name == (await client.model("test")).name == "test"
    assert model.replicas[0].state == "ready"
    assert await client.is_serving()


async def test_refusals_are_typed_and_name_the_field(create_client):
    _, client = await create_client(FakeReplica(), models=("test", "other"), ready=False)
    with pytest.raises(errors.ModelNotFound):
        await client.generate("x", model="nobody")
    with pytest.raises(errors.GenerationNotFound):
        await client.cancel("nobody")
    for call in (client.generate("", model="test"), client.generate([], model="test"), client.generate("x")):
        with pytest.raises(errors.InvalidRequest) as caught:
            await call
        assert caught.value.field


async def test_closing_a_stream_frees_the_replica(create_client):
    setup, client = await create_client(FakeReplica(gated=True))
    stream = client.stream("x", max_tokens=50, request_id="mine")
    await setup.replica.allow(1)
    await anext(stream)
    await stream.aclose()
    await setup.replica.until(lambda: not setup.replica.running)


async def test_cancelling_by_name_ends_the_stream_with_an_error(create_client):
    setup, client = await create_client(FakeReplica(gated=True))
    stream = client.stream("x", max_tokens=50, request_id="mine")
    await setup.replica.allow(1)
    await anext(stream)
    assert await client.cancel("mine") is True
    with pytest.raises(errors.Cancelled):
        while True:
            await anext(stream)


async def test_a_model_that_warms_is_waited_for(create_client):
    """The first attempts are refused, as no replica is there; one that comes meanwhile is used."""
    replica = FakeReplica()
    setup, client = await create_client(replica, ready=False)
    setup.gateway.set_replicas("test", [])
    await setup.wait_states("test")
    with pytest.raises(errors.ModelWarming) as caught:
        await client.generate("x", deadline_s=0.05)
    assert caught.value.retryable
    call = asyncio.ensure_future(client.generate("x", max_tokens=3))
    setup.gateway.set_replicas("test", setup.replica_addresses(*setup.addresses))
    assert len((await call).text) == 3


async def test_the_blocking_client_from_a_thread(create_client):
    setup, _ = await create_client(FakeReplica())

    def work():
        with Client(f"127.0.0.1:{setup.port}") as client:
            whole = client.generate("x", max_tokens=7, seed=3)
            return whole.text, "".join(chunk.text for chunk in client.stream("x", max_tokens=7, seed=3))

    whole, streamed = await asyncio.to_thread(work)
    assert len(whole) == 7
    assert whole == streamed


async def cluster(setup, *args, stdin=b""):
    """Runs the command; its exit code, output and errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from cluster.cli.main import main; main()",
        *args,
        "--address",
        f"127.0.0.1:{setup.port}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(stdin), 60)
    return process.returncode, stdout.decode(), stderr.decode()


async def test_the_command_line(create_client):
    setup, client = await create_client(FakeReplica())
    expected = (await client.generate("x", max_tokens=12, seed=5)).text
    assert await cluster(setup, "generate", "x", "--max-tokens", "12", "--seed", "5") == (0, expected + "\n", "")
    code, out, _ = await cluster(setup, "generate", "-", "--max-tokens", "12", "--seed", "5", "--json", stdin=b"x")
    assert code == 0
    assert "".join(json.loads(line)["text"] for line in out.splitlines()) == expected
    code, out, err = await cluster(setup, "chat", "--max-tokens", "4", stdin=b"one\ntwo\n")
    assert (code, len(out.splitlines()), err) == (0, 2, "")
    code, out, _ = await cluster(setup, "models")
    assert (code, "1 of 1 ready" in out) == (0, True)
    code, out, _ = await cluster(setup, "status")
    assert (code, out.splitlines()[0]) == (0, f"127.0.0.1:{setup.port} is serving")
    code, out, err = await cluster(setup, "generate", "x", "--model", "nobody")
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and "nobody" in err and err.count("\n") == 1
