"""The asynchronous client against a real gRPC server with written answers."""

import asyncio
import gc
import socket
import threading

import pytest
from scripted_server import DEMO, chunks_of, hanging, response_of

from cluster import errors
from cluster.client import AsyncClient, Client
from cluster.core.request import FinishReason
from cluster.v1 import inference_pb2 as pb

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def aclient(server):
    async with AsyncClient(server.address) as client:
        yield client


async def ended(server):
    return await asyncio.to_thread(server.ended.get, timeout=30)


def test_it_has_the_blocking_clients_methods():
    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(AsyncClient) == public(Client)


async def test_every_method(aclient, server):
    server.script("Generate", response_of("one", "two"))
    server.script("GenerateStream", chunks_of("a", "b"))
    server.script("CancelGeneration", pb.CancelGenerationResponse(cancelled=False))
    server.script("CountTokens", pb.CountTokensResponse(tokens=12))
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO]))
    server.script("GetModel", DEMO)
    result = await aclient.generate("x", n=2)
    assert [candidate.text for candidate in result.candidates] == ["one", "two"]
    assert (await aclient.chat(CHAT)).text == "one"
    chunks = [chunk async for chunk in aclient.stream([1, 2], max_tokens=3)]
    assert [chunk.text for chunk in chunks] == ["a", "b"]
    assert (chunks[0].seed, chunks[1].finish_reason) == (17, FinishReason.STOP)
    assert [chunk.text async for chunk in aclient.stream_chat(CHAT)] == ["a", "b"]
    assert await aclient.cancel("gen-1") is False
    assert await aclient.count_tokens("x") == await aclient.count_tokens(messages=CHAT) == 12
    assert await aclient.models() == [await aclient.model("demo")]
    assert await aclient.is_serving() is True
    assert server.requests[1].chat == server.requests[3].chat
    assert all(595 < timeout < 602 for timeout in server.timeouts)


async def test_many_streams_at_once(aclient, server):
    server.script("GenerateStream", chunks_of(*"abcdefg"))

    async def text():
        return "".join([chunk.text async for chunk in aclient.stream("x")])

    assert await asyncio.gather(*(text() for _ in range(20))) == ["abcdefg"] * 20


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("top_p is 3", field="sampling.top_p"),
        errors.Overloaded("full", retry_after_s=1.5),
        errors.Cancelled("by the server"),
        errors.DeadlineExceeded("at the server"),
        errors.EngineFault("a bug"),
    ],
    ids=lambda error: error.reason,
)
async def test_errors_come_back_as_they_were(aclient, server, error):
    server.script("Generate", error)
    server.script("GenerateStream", error)
    stream = aclient.stream("x")
    for call in (aclient.generate("x"), anext(stream)):
        with pytest.raises(errors.ClusterError, match=str(error)) as caught:
            await call
        assert type(caught.value) is type(error)
        assert (caught.value.field, caught.value.retry_after_s) == (error.field, error.retry_after_s)
    assert await anext(stream, "ended") == "ended"


async def test_nothing_listening():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        async with AsyncClient(f"127.0.0.1:{held.getsockname()[1]}") as client:
            with pytest.raises(errors.ServerUnreachable, match="cluster serve"):
                await client.models()
            with pytest.raises(errors.ServerUnreachable, match="cluster serve"):
                await anext(client.stream("x"))


async def test_what_was_not_executed_is_repeated_and_bounded(aclient, server):
    warming = errors.ModelWarming("soon")
    server.script("Generate", warming, response_of("x"))
    server.script("GenerateStream", warming, warming, chunks_of("a"))
    assert (await aclient.generate("x")).text == "x"
    assert [chunk.text async for chunk in aclient.stream("x")] == ["a"]
    assert len(server.requests) == 5
    server.script("GenerateStream", warming)
    with pytest.raises(errors.ModelWarming):
        await anext(aclient.stream("x"))
    assert len(server.requests) == 9


async def test_a_deadline_that_passes_is_a_deadline(aclient, server):
    server.script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    stream = aclient.stream("x", deadline_s=0.3)
    assert (await anext(stream)).text == "a"
    with pytest.raises(errors.DeadlineExceeded, match=r"0\.3 s"):
        await anext(stream)


async def _aclose(stream):
    await stream.aclose()


async def _leave_block(stream):
    async with stream:
        pass


async def _cancel_the_reader(stream):
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


@pytest.mark.parametrize("end", [_aclose, _leave_block, _cancel_the_reader])
async def test_ending_it_cancels_at_the_server(aclient, server, end):
    server.script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    stream = aclient.stream("x")
    assert (await anext(stream)).text == "a"
    await end(stream)
    assert await ended(server) == "GenerateStream"
    assert await anext(stream, None) is None
    await stream.aclose()


async def test_breaking_out_cancels_at_the_server(aclient, server):
    server.script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    async for chunk in aclient.stream("x"):
        assert chunk.text == "a"
        break
    gc.collect()
    assert await ended(server) == "GenerateStream"


async def test_closing_while_another_task_reads_ends_that_tasks_stream(aclient, server):
    server.script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    stream = aclient.stream("x")
    await anext(stream)
    reader = asyncio.ensure_future(anext(stream, "ended"))
    await asyncio.sleep(0)
    await stream.aclose()
    assert await asyncio.wait_for(reader, 30) == "ended"


async def test_cancelling_a_task_that_generates_cancels_at_the_server(aclient, server):
    cancelled = asyncio.Event()
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang(request, context):
        gone = threading.Event()
        context.add_callback(gone.set)
        loop.call_soon_threadsafe(started.set)
        gone.wait(60)
        loop.call_soon_threadsafe(cancelled.set)
        return response_of("late")

    server.script("Generate", hang)
    task = asyncio.ensure_future(aclient.generate("x"))
    await asyncio.wait_for(started.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(cancelled.wait(), 30)


def test_a_stream_left_open_at_the_loops_end_is_quiet(server, recwarn):
    server.script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    kept = []

    async def leave_open():
        client = AsyncClient(server.address)
        kept.append(client.stream("x"))
        await anext(kept[0])

    asyncio.run(leave_open())
    kept.clear()
    gc.collect()
    assert server.ended.get(timeout=30) == "GenerateStream"
    assert [str(warning.message) for warning in recwarn] == []
