import json

import pytest
from scripted_server import chunks_of, hanging, response_of

from cluster.core.request import SamplingParams
from cluster.v1 import inference_pb2 as pb
from cluster.wire import sampling_from_proto


def test_text_streams_as_it_comes(spawn, server):
    """The first text is out while the generation still runs."""
    server.script("GenerateStream", hanging(*chunks_of("def", " é")))
    process = spawn("generate", "x")
    assert process.stdout.read(len("def é".encode())).decode() == "def é"
    assert process.poll() is None


def test_the_completion_ends_with_a_newline(cli, server):
    server.script("GenerateStream", chunks_of("a", "\n b"))
    done = cli("generate", "x")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\n b\n", "")


def test_every_option_reaches_the_server(cli, server):
    server.script("GenerateStream", chunks_of("a"))
    done = cli(
        *["generate", "the prompt", "--model", "demo", "--max-tokens", "9", "--temperature", "0.5", "--top-p", "0.9"],
        *["--top-k", "40", "--seed", "18446744073709551615", "--stop", "\n\n", "--stop", "é", "--n", "2"],
        *["--logprobs", "3", "--priority", "P3", "--deadline", "20", "--json"],
    )
    assert done.returncode == 0
    [sent] = server.requests
    assert (sent.prompt, sent.model, sent.priority) == ("the prompt", "demo", pb.PRIORITY_P3)
    assert sampling_from_proto(sent.sampling) == SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=40, seed=2**64 - 1, stop=("\n\n", "é"), n=2, logprobs=3
    )
    assert 10 < server.timeouts[0] < 22


def test_a_prompt_from_standard_input(cli, server):
    server.script("GenerateStream", chunks_of("a"))
    assert cli("generate", "-", stdin="line 1\nliné 2\n").returncode == 0
    assert server.requests[0].prompt == "line 1\nliné 2\n"


def test_json_is_one_object_per_chunk(cli, server):
    chunks = chunks_of("é", "b\n")
    chunks[0].logprobs.add(chosen=pb.TokenLogprob(token_id=7, logprob=-0.5))
    server.script("GenerateStream", chunks)
    first, last = map(json.loads, cli("generate", "x", "--json", "--logprobs", "0").stdout.splitlines())
    assert first == {
        "generation_id": "gen-1",
        "sequence": 0,
        "candidate_index": 0,
        "text": "é",
        "text_offset": 0,
        "token_ids": [0],
        "token_offset": 0,
        "logprobs": [{"token_id": 7, "logprob": -0.5, "top_logprobs": []}],
        "seed": 17,
        "finish_reason": None,
        "usage": None,
        "progress": None,
    }
    assert (last["text"], last["finish_reason"]) == ("b\n", "stop")
    assert last["usage"] == {"prompt_tokens": 3, "cached_tokens": 2, "completion_tokens": 2}


def test_no_stream(cli, server):
    server.script("Generate", response_of("whole"))
    assert cli("generate", "x", "--no-stream").stdout == "whole\n"
    answer = json.loads(cli("generate", "x", "--no-stream", "--json").stdout)
    assert (answer["model"], answer["seed"]) == ("demo", 2**64 - 1)
    assert answer["candidates"][0]["text"] == "whole"
    assert answer["candidates"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_candidates_are_told_apart(cli, server, flags):
    server.script("Generate", response_of("one", "two"))
    assert cli("generate", "x", "-n", "2", *flags).stdout == "--- candidate 0\none\n--- candidate 1\ntwo\n"


def test_progress_goes_to_standard_error(cli, server):
    queued = pb.GenerateChunk(progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED, position=3, eta_ms=2500))
    server.script("GenerateStream", [queued, *chunks_of("a", "b")])
    done = cli("generate", "x", "--progress", "--max-ttft-ms", "900")
    assert (done.stdout, done.stderr) == ("ab\n", "(queued behind 3, 2.5 s to go)\n")
    assert (server.requests[0].progress, server.requests[0].max_ttft_ms) == (True, 900)


def test_the_token_of_the_environment_goes_along(cli, server, monkeypatch):
    shown = []

    def answer(request, context):
        shown.append(dict(context.invocation_metadata()).get("authorization"))
        return response_of("x")

    server.script("Generate", answer)
    monkeypatch.setenv("CLUSTER_TOKEN", "secret")
    assert cli("generate", "x", "--no-stream").returncode == 0
    assert shown == ["Bearer secret"]
    away = cli("generate", "x", address="192.0.2.1:50051")
    assert away.returncode == 1
    assert "unencrypted" in away.stderr and "secret" not in away.stderr


def test_a_certificate_that_cannot_be_read_is_told(cli):
    done = cli("models", "--ca-file", "/nowhere/ca.pem")
    assert (done.returncode, done.stderr) == (1, "error: cannot read /nowhere/ca.pem: No such file or directory\n")
