"""The blocking client against a real gRPC server with written answers."""

import gc
import socket
import threading

import grpc
import pytest
from scripted_server import DEMO, SERVICE, chunks_of, hanging, response_of

from cluster import errors
from cluster.client import Client
from cluster.core.request import FinishReason, Priority, SamplingParams
from cluster.core.step import SampledToken
from cluster.v1 import inference_pb2 as pb
from cluster.wire import sampling_from_proto

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße"}]


def test_generate_sends_every_argument_and_returns_every_field(client, server):
    server.script("Generate", response_of("one", "two"))
    result = client.generate(
        "def f():",
        SamplingParams(max_tokens=9, temperature=0.5),
        temperature=0.0,
        n=2,
        model="demo",
        priority=Priority.P3,
        request_id="mine",
        labels={"team": "a"},
        cache_salt="a",
    )
    sent = server.requests[0]
    assert (sent.prompt, sent.model, sent.priority, sent.request_id) == ("def f():", "demo", pb.PRIORITY_P3, "mine")
    assert sent.labels == {"team": "a"}
    assert sent.cache_salt == "a"
    assert sampling_from_proto(sent.sampling) == SamplingParams(max_tokens=9, temperature=0.0, n=2)

    assert (result.generation_id, result.model, result.seed) == ("gen-1", "demo", 2**64 - 1)
    assert [candidate.text for candidate in result.candidates] == ["one", "two"]
    assert (result.text, result.token_ids, result.logprobs) == ("one", (7, 8), ())
    assert result.finish_reason is FinishReason.LENGTH
    usage = result.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (3, 2, 4)


def test_candidates_come_by_index_with_their_logprobs(client, server):
    response = response_of("a", "b")
    response.candidates.reverse()
    position = pb.PositionLogprobs(chosen=pb.TokenLogprob(token_id=7, logprob=-0.5))
    position.top.add(token_id=9, logprob=-0.25)
    response.candidates[1].logprobs.append(position)
    server.script("Generate", response)
    result = client.generate("x", n=2, logprobs=1)
    assert [candidate.index for candidate in result.candidates] == [0, 1]
    assert result.logprobs == (SampledToken(token_id=7, logprob=-0.5, top_logprobs=((9, -0.25),)),)


def test_token_ids_go_as_token_ids(client, server):
    server.script("Generate", response_of("x"))
    client.generate([5, 0, 2**32 - 1])
    client.generate([])
    assert list(server.requests[0].token_ids.ids) == [5, 0, 2**32 - 1]
    assert server.requests[1].WhichOneof("input") == "token_ids"


def test_stream_yields_deltas(client, server):
    server.script("GenerateStream", chunks_of("de", "f é", "!"))
    chunks = list(client.stream("x", max_tokens=3))
    assert [(chunk.text, chunk.text_offset, chunk.token_ids) for chunk in chunks] == [
        ("de", 0, (0,)),
        ("f é", 2, (1,)),
        ("!", 5, (2,)),
    ]
    assert [chunk.seed for chunk in chunks] == [17, None, None]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, FinishReason.STOP]
    assert [chunk.usage and chunk.usage.completion_tokens for chunk in chunks] == [None, None, 3]


def test_a_finished_stream_stays_finished(client, server):
    server.script("GenerateStream", chunks_of("a"))
    stream = client.stream("x")
    assert [chunk.text for chunk in stream] == ["a"]
    assert next(stream, None) is None
    stream.close()


def test_chat(client, server):
    server.script("Generate", response_of("hello"))
    server.script("GenerateStream", chunks_of("hel", "lo"))
    assert client.chat(CHAT, max_tokens=5).text == "hello"
    assert "".join(chunk.text for chunk in client.stream_chat(CHAT)) == "hello"
    for sent in server.requests:
        assert [(message.role, message.content[0].text) for message in sent.chat.messages] == [
            ("system", "Be brief."),
            ("user", "Grüße"),
        ]


def test_cancel_count_and_models(client, server):
    server.script("CancelGeneration", pb.CancelGenerationResponse(cancelled=True))
    server.script("CountTokens", pb.CountTokensResponse(tokens=12))
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO]))
    server.script("GetModel", DEMO)
    assert client.cancel("gen-1") is True
    assert client.count_tokens("four words are here", model="demo") == 12
    assert client.count_tokens(messages=CHAT) == 12
    [listed] = client.models()
    assert listed == client.model("demo")
    assert (listed.max_model_len, listed.vocab_size, listed.dtype) == (2048, 4096, "bfloat16")
    first, second = listed.replicas
    assert (first.state, first.running, first.waiting, first.kv_usage) == ("ready", 3, 5, 0.125)
    assert (first.kv_capacity_tokens, first.outstanding_tokens, first.device) == (65536, 99, "cpu")
    assert second.state == "connecting"
    assert [type(sent).__name__ for sent in server.requests] == [
        "CancelGenerationRequest",
        "CountTokensRequest",
        "CountTokensRequest",
        "ListModelsRequest",
        "GetModelRequest",
    ]
    assert server.requests[2].chat.messages[1].content[0].text == "Grüße"


def test_a_state_from_a_newer_server_is_readable(client, server):
    server.script("GetModel", pb.Model(name="m", replicas=[pb.ReplicaStatus(state=77)]))
    assert client.model("m").replicas[0].state == "unspecified"


def test_health(client, server):
    assert client.is_serving() is True
    server.health.enter_graceful_shutdown()
    assert client.is_serving() is False


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.generate("x", temperature=-1),
        lambda client: client.generate("\ud800"),
        lambda client: client.generate(["a", "b"]),
        lambda client: client.stream([-1]),
        lambda client: client.chat([{"role": "user"}]),
        lambda client: client.chat([{"role": "user", "content": ["parts"]}]),
        lambda client: client.chat(["hi"]),
        lambda client: client.count_tokens([1, 2]),
        lambda client: client.generate("x", deadline_s=0),
        lambda client: client.stream("x", deadline_s=float("nan")),
    ],
)
def test_what_can_never_be_right_is_refused_before_it_is_sent(client, server, call):
    with pytest.raises(errors.InvalidRequest) as caught:
        call(client)
    assert caught.value.field
    assert server.requests == []


def test_unknown_keyword_arguments_are_refused(client):
    with pytest.raises(TypeError, match="temprature"):
        client.generate("x", temprature=0.5)
    with pytest.raises(TypeError, match="either"):
        client.count_tokens()


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("top_p is 3", field="sampling.top_p"),
        errors.ModelNotFound("no model 'x'"),
        errors.GenerationNotFound("no generation"),
        errors.AlreadyExists("in use"),
        errors.Overloaded("full", retry_after_s=1.5),
        errors.QuotaExceeded("used up", retry_after_s=0.0),
        errors.SlowReader("unread"),
        errors.ReplicaLost("gone"),
        errors.Unsupported("image parts"),
        errors.EngineFault("a bug"),
        errors.Cancelled("by the server"),
        errors.DeadlineExceeded("at the server"),
        errors.Forbidden("no"),
        errors.Unauthenticated("who"),
    ],
    ids=lambda error: error.reason,
)
def test_errors_come_back_as_they_were(client, server, error):
    server.script("Generate", error)
    server.script("GenerateStream", error)
    stream = client.stream("x")
    for call in (lambda: client.generate("x"), lambda: next(stream)):
        with pytest.raises(errors.ClusterError) as caught:
            call()
        assert type(caught.value) is type(error)
        assert str(caught.value) == str(error)
        assert (caught.value.field, caught.value.retry_after_s) == (error.field, error.retry_after_s)
    assert next(stream, "ended") == "ended"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Unsupported),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.NOT_FOUND, errors.ClusterError),
        (grpc.StatusCode.DATA_LOSS, errors.ClusterError),
    ],
)
def test_a_status_without_our_details_is_still_typed(client, server, code, kind):
    server.script("Generate", lambda request, context: context.abort(code, "from the middle"))
    with pytest.raises(errors.ClusterError, match="from the middle") as caught:
        client.generate("x")
    assert type(caught.value) is kind


def test_a_request_too_large_for_the_server_is_invalid(client):
    with pytest.raises(errors.InvalidRequest, match="too large"):
        client.generate("x" * 100_000)


def test_nothing_listening_names_the_address_and_what_to_do():
    with socket.socket() as held:  # bound, so that the port stays free; not listening
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with Client(address) as client:
            for call in (client.models, lambda: list(client.stream("x"))):
                with pytest.raises(errors.ServerUnreachable) as caught:
                    call()
                assert address in str(caught.value) and "cluster serve" in str(caught.value)
                assert caught.value.retryable


def test_the_deadline_reaches_the_server(client, server):
    server.script("Generate", response_of("x"))
    server.script("GenerateStream", chunks_of("x"))
    client.generate("x")
    list(client.stream("x"))
    client.generate("x", deadline_s=7)
    list(client.stream("x", deadline_s=7))
    with Client(server.address, deadline_s=30) as impatient:
        impatient.generate("x")
    limits = [600, 600, 7, 7, 30]
    for timeout, limit in zip(server.timeouts, limits, strict=True):
        assert limit - 5 < timeout < limit + 2  # the wire format rounds up


def test_a_deadline_that_passes_is_a_deadline(client, server):
    server.script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    chunks = client.stream("x", deadline_s=0.3)
    assert next(chunks).text == "a"
    with pytest.raises(errors.DeadlineExceeded, match=r"0\.3 s"):
        next(chunks)


@pytest.mark.parametrize("error", [errors.ModelWarming("soon", retry_after_s=0.01), errors.Draining("bye")])
def test_what_was_not_executed_is_repeated(client, server, error):
    server.script("Generate", error, error, response_of("third time"))
    server.script("GenerateStream", error, error, chunks_of("third", " time"))
    assert client.generate("x").text == "third time"
    assert "".join(chunk.text for chunk in client.stream("x")) == "third time"
    assert len(server.requests) == 6
    assert server.requests[0] == server.requests[2]


def test_attempts_are_bounded(server):
    server.script("Generate", errors.ModelWarming("soon"))
    server.script("GenerateStream", errors.ModelWarming("soon"))
    with Client(server.address, max_attempts=3) as client:
        with pytest.raises(errors.ModelWarming):
            client.generate("x")
        with pytest.raises(errors.ModelWarming):
            next(client.stream("x"))
    assert len(server.requests) == 6


def test_a_wait_beyond_the_deadline_is_not_begun(client, server):
    server.script("Generate", errors.ModelWarming("soon", retry_after_s=50.0))
    with pytest.raises(errors.ModelWarming) as caught:
        client.generate("x", deadline_s=20)
    assert caught.value.retry_after_s == 50.0
    assert len(server.requests) == 1


def _close(stream):
    stream.close()


def _leave_block(stream):
    with stream:
        pass


def _fail_in_block(stream):
    with pytest.raises(ZeroDivisionError), stream:
        next(stream)
        raise ZeroDivisionError


@pytest.mark.parametrize("end", [_close, _leave_block, _fail_in_block])
def test_closing_cancels_at_the_server(client, server, end):
    server.script("GenerateStream", hanging(*chunks_of("a", "b", "c")[:2]))
    stream = client.stream("x")
    assert next(stream).text == "a"
    end(stream)
    assert server.ended.get(timeout=30) == "GenerateStream"
    assert next(stream, None) is None
    stream.close()


def test_breaking_out_cancels_at_the_server(client, server):
    server.script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    for chunk in client.stream("x"):
        assert chunk.text == "a"
        break
    gc.collect()
    assert server.ended.get(timeout=30) == "GenerateStream"


def test_closing_from_another_thread_wakes_the_reader(client, server):
    server.script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    stream = client.stream("x")
    next(stream)
    rest = []
    reader = threading.Thread(target=lambda: rest.extend([next(stream, "ended")]))
    reader.start()
    stream.close()
    reader.join(timeout=30)
    assert rest == ["ended"]
    assert server.ended.get(timeout=30) == "GenerateStream"


def test_closing_the_client_ends_its_streams_and_threads(server):
    server.script("GenerateStream", hanging(*chunks_of("a", "b")[:1]))
    before = set(threading.enumerate())
    with Client(server.address) as client:
        stream = client.stream("x")
        next(stream)
    assert server.ended.get(timeout=30) == "GenerateStream"
    with pytest.raises(errors.Cancelled):
        next(stream)
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("ThreadPoolExecutor"):  # the server's
            thread.join(timeout=30)
            assert not thread.is_alive()


def test_the_health_service_is_asked_under_its_own_name(client, server):
    server.health.set("", 2)
    assert client.is_serving() is True
    server.health.set(SERVICE, 2)
    assert client.is_serving() is False
