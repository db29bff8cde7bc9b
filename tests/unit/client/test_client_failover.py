"""Both clients against several gateways with written answers, some of which die."""

import asyncio
import socket
import threading

import pytest
from scripted_server import ScriptedServer, breaking, chunks_of, hanging, response_of

from cluster import errors
from cluster.client import AsyncClient, Client
from cluster.client.addresses import AddressBook
from cluster.client.results import Ledger
from cluster.v1 import inference_pb2 as pb
from cluster.wire import LEDGER_KEY

LEDGER = pb.Ledger(gateway_queue_ms=3, prefill_ms=5, decode_ms=7, num_moves=1, replicas=["a", "b"], exact=True)


@pytest.fixture
def servers():
    """The first is the one that the request "mine" goes to."""
    started = [ScriptedServer(), ScriptedServer()]
    ranked = AddressBook([server.address for server in started], connected=lambda _: True).ranked("mine")
    yield sorted(started, key=lambda server: ranked.index(server.address))
    for server in started:
        server.stop()


def addresses_of(servers):
    return ",".join(server.address for server in servers)


def _read_blocking(addresses, on_chunk, **options):
    with Client(addresses, deadline_s=30, reconnect_s=1.0) as client:
        stream = client.stream("x", request_id="mine", **options)
        chunks = []
        try:
            for chunk in stream:
                chunks.append(chunk)
                on_chunk(len(chunks))
        except errors.ClusterError as error:
            return chunks, stream, error
        return chunks, stream, None


def _read_async(addresses, on_chunk, **options):
    async def read():
        async with AsyncClient(addresses, deadline_s=30, reconnect_s=1.0) as client:
            stream = client.stream("x", request_id="mine", **options)
            chunks = []
            try:
                async for chunk in stream:
                    chunks.append(chunk)
                    await asyncio.to_thread(on_chunk, len(chunks))
            except errors.ClusterError as error:
                return chunks, stream, error
            return chunks, stream, None

    return asyncio.run(read())


@pytest.fixture(params=[_read_blocking, _read_async], ids=["blocking", "async"])
def read(request):
    """Reads the stream "mine": its chunks, the stream, and the error that ended it. Calls back after each chunk."""

    def read(servers, on_chunk=lambda count: None, **options):
        return request.param(addresses_of(servers), on_chunk, **options)

    return read


def text_of(chunks):
    return "".join(chunk.text for chunk in chunks)


def with_trailer(answer, ledger=LEDGER):
    """The answer, with a ledger behind it."""

    def wrapped(request, context):
        context.set_trailing_metadata(((LEDGER_KEY, ledger.SerializeToString()),))
        return answer(request, context) if callable(answer) else answer

    return wrapped


def test_a_stream_goes_on_at_another_gateway(read, servers):
    first, second = servers
    chunks = chunks_of(*"abcd")
    first.script("GenerateStream", hanging(*chunks[:2]))
    second.script("GenerateStream", with_trailer(chunks[2:]))
    received, stream, error = read(servers, lambda count: first.stop() if count == 2 else None)
    assert error is None
    assert [chunk.token_ids for chunk in received] == [(0,), (1,), (2,), (3,)]
    assert (text_of(received), stream.num_resumes) == ("abcd", 1)
    assert (stream.ledger.num_moves, stream.ledger.replicas, stream.ledger.exact) == (1, ("a", "b"), True)
    [resumed] = second.requests
    assert resumed.resume == pb.Resume(
        generation_id="gen-1", seed=17, sequence=2, candidates=[pb.ResumedCandidate(index=0, token_ids=[0, 1])]
    )
    resumed.ClearField("resume")
    assert resumed == first.requests[0]


@pytest.mark.parametrize(
    "why",
    [
        errors.Draining("bye", retry_after_s=0.01),
        errors.ModelWarming("not yet", retry_after_s=0.01),
        errors.Overloaded("full", retry_after_s=0.01),
    ],
    ids=lambda error: error.reason,
)
def test_a_stream_that_its_gateway_gives_up_goes_on_elsewhere(read, servers, why):
    first, second = servers
    chunks = chunks_of(*"abc")
    first.script("GenerateStream", breaking(why, *chunks[:1]), why)
    second.script("GenerateStream", why, chunks[1:])
    received, _, error = read(servers)
    assert (error, text_of(received)) == (None, "abc")


def test_with_one_gateway_it_goes_on_there(read, servers):
    chunks = chunks_of(*"abc")
    servers[0].script("GenerateStream", breaking(errors.Draining("bye"), *chunks[:1]), chunks[1:])
    received, stream, error = read(servers[:1])
    assert (error, text_of(received), stream.num_resumes) == (None, "abc", 1)


def test_where_no_gateway_is_left_it_says_so(read, servers):
    servers[0].script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    received, _, error = read(servers[:1], lambda count: servers[0].stop())
    assert text_of(received) == "a"
    assert isinstance(error, errors.ServerUnreachable)
    assert "no gateway could be reached for 1 s" in str(error)


@pytest.mark.parametrize("why", [errors.ReplicaLost("gone"), errors.EngineFault("a bug"), errors.Cancelled("by name")])
def test_what_failed_for_good_is_told_with_its_ledger(read, servers, why):
    servers[0].script("GenerateStream", with_trailer(breaking(why, *chunks_of("a", "b")[:1])))
    received, stream, error = read(servers)
    assert text_of(received) == "a"
    assert type(error) is type(why)
    assert servers[1].requests == []
    assert stream.num_resumes == 0


def test_a_stream_that_breaks_after_its_last_chunk_is_whole(read, servers):
    servers[0].script("GenerateStream", hanging(*chunks_of("a", "b")))
    received, stream, error = read(servers, lambda count: servers[0].stop() if count == 2 else None)
    assert (error, text_of(received), stream.num_resumes) == (None, "ab", 0)
    assert servers[1].requests == []


def test_a_gateway_that_repeats_a_token_is_found_out(read, servers):
    first, second = servers
    chunks = chunks_of(*"abc")
    first.script("GenerateStream", breaking(errors.Draining("bye"), *chunks[:2]))
    second.script("GenerateStream", chunks[1:])
    received, _, error = read(servers)
    assert text_of(received) == "ab"
    assert isinstance(error, errors.EngineFault)


def test_before_the_first_chunk_it_begins_anew_under_its_name(read, servers):
    first, second = servers
    queued = pb.GenerateChunk(progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED, position=4, eta_ms=90))
    first.script("GenerateStream", breaking(errors.Draining("bye"), queued))
    second.script("GenerateStream", chunks_of("a"))
    received, stream, error = read(servers, progress=True)
    assert (error, text_of(received), stream.num_resumes) == (None, "a", 0)
    told = received[0].progress
    assert (told.stage, told.position, told.eta_ms) == ("queued", 4, 90)
    assert received[1].progress is None
    assert first.requests[0] == second.requests[0]
    assert (second.requests[0].request_id, second.requests[0].progress) == ("mine", True)


def test_two_gateways_one_of_which_never_answers(read, servers):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        for server in servers:
            server.script("GenerateStream", chunks_of("a"))
        names = [address, *(server.address for server in servers)]
        with Client(names) as client:
            for i in range(30):
                assert text_of(client.stream("x", request_id=f"req-{i}")) == "a"


def test_a_call_whose_gateway_dies_is_made_at_another_under_its_name(servers):
    first, second = servers

    def die(request, context):
        threading.Thread(target=first.stop).start()
        gone = threading.Event()
        if context.add_callback(gone.set):
            gone.wait()

    first.script("Generate", die)
    second.script("Generate", with_trailer(response_of("x")))
    with Client(addresses_of(servers)) as client:
        result = client.generate("x", request_id="mine")
    assert result.text == "x"
    assert result.ledger == Ledger(
        gateway_queue_ms=3,
        queue_ms=0,
        prefill_ms=5,
        decode_ms=7,
        preempted_ms=0,
        num_preemptions=0,
        num_moves=1,
        cached_tokens=0,
        replicas=("a", "b"),
        exact=True,
    )
    assert first.requests == second.requests


async def test_the_same_with_the_asynchronous_client(servers):
    servers[0].script("Generate", errors.Draining("bye"))
    servers[1].script("Generate", with_trailer(response_of("x")))
    async with AsyncClient(addresses_of(servers)) as client:
        for _ in range(3):  # the one that drains is asked once only
            result = await client.generate("x", request_id="mine")
            assert (result.text, result.ledger.num_moves) == ("x", 1)
    assert (len(servers[0].requests), len(servers[1].requests)) == (1, 3)


NOT_FOUND = errors.GenerationNotFound("no generation 'mine'")


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ((True, NOT_FOUND), True),
        ((NOT_FOUND, True), True),
        ((False, True), True),
        ((False, NOT_FOUND), False),
        ((errors.Draining("bye"), False), False),
        ((NOT_FOUND, NOT_FOUND), None),
    ],
)
async def test_cancelling_asks_every_gateway_until_one_knows(servers, answers, found):
    for server, answer in zip(servers, answers, strict=True):
        known = isinstance(answer, bool)
        server.script("CancelGeneration", pb.CancelGenerationResponse(cancelled=answer) if known else answer)
    async with AsyncClient(addresses_of(servers), max_attempts=1) as other:
        with Client(addresses_of(servers), max_attempts=1) as client:
            if found is None:
                with pytest.raises(errors.GenerationNotFound):
                    await other.cancel("mine")
                with pytest.raises(errors.GenerationNotFound):
                    await asyncio.to_thread(client.cancel, "mine")
            else:
                assert await other.cancel("mine") is found
                assert await asyncio.to_thread(client.cancel, "mine") is found


async def test_a_cluster_serves_while_any_of_its_gateways_does(servers):
    async with AsyncClient(addresses_of(servers)) as other:
        with Client(addresses_of(servers)) as client:
            servers[0].health.enter_graceful_shutdown()
            assert await other.is_serving() and await asyncio.to_thread(client.is_serving)
            servers[1].health.enter_graceful_shutdown()
            assert not await other.is_serving()
            assert not await asyncio.to_thread(client.is_serving)
            await asyncio.to_thread(servers[0].stop)
            assert not await other.is_serving()
            await asyncio.to_thread(servers[1].stop)
            with pytest.raises(errors.ServerUnreachable):
                await other.is_serving()


def test_a_stream_of_a_closed_client_is_cancelled(servers):
    warming = errors.ModelWarming("not yet", retry_after_s=0.2)
    servers[0].script("GenerateStream", breaking(warming, *chunks_of("a", "b")[:1]), warming)
    client = Client(servers[0].address)
    stream = client.stream("x")
    next(stream)
    threading.Timer(0.1, client.close).start()
    with pytest.raises(errors.Cancelled):
        next(stream)
    assert next(stream, None) is None
