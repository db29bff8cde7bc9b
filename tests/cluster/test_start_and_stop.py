"""How ``cluster serve`` ends, well or not: with the right exit code, a reason, and nothing left behind."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from serve_process import ServeProcess

from cluster import SamplingParams
from cluster.cli.serve import _SELF_TEST_PROMPT
from cluster.client import Client
from cluster.errors import ClusterError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

Serve = Callable[..., ServeProcess]


def test_ctrl_c_lets_running_requests_finish(serve: Serve, checkpoint: Path):
    process = serve(checkpoint, "--kv-cache", "16MiB").wait_ready()
    with Client(process.address, deadline_s=60) as client:
        stream = client.stream("abc", SamplingParams(max_tokens=300, ignore_eos=True, temperature=0.0))
        tokens = list(next(stream).token_ids)
        process.interrupt(signal.SIGINT)
        for chunk in stream:
            tokens += chunk.token_ids
    assert len(tokens) == 300
    assert process.wait() == 0, process.stderr
    process.assert_no_trace()


def test_what_a_person_reads_and_a_second_ctrl_c(serve: Serve, checkpoint: Path):
    process = serve(checkpoint, "--kv-cache", "16MiB", json=False)
    written = process.wait_stdout("serving; try")
    address = re.search(r"^address +(127\.0\.0\.1:\d+)$", written, re.MULTILINE)[1]
    assert re.search(r"^dashboard +http://127\.0\.0\.1:\d+ +\(it asks for a token: .+\)$", written, re.MULTILINE)
    settings = re.search(r"^config\n((?:  .*\n)+)", written, re.MULTILINE)[1]
    assert yaml.safe_load(settings)["models"][0]["worker"]["kv_cache_bytes"] == 16 * 2**20
    assert "KV cache" in written and f"--address {address}" in written
    completion = written.partition(_SELF_TEST_PROMPT)[2].partition("serving; try")[0]
    assert completion.strip(), "a completion comes after its prompt"
    with Client(address, deadline_s=60) as client:
        stream = client.stream("abc", SamplingParams(max_tokens=15_000, ignore_eos=True))
        next(stream)
        process.interrupt(signal.SIGINT)
        process.wait_stderr("draining")
        process.interrupt(signal.SIGINT)
        with pytest.raises(ClusterError):
            list(stream)
    assert process.wait() == 0, process.stderr
    process.assert_no_trace()


@pytest.mark.parametrize("stage", ["cluster: starting Ray ...", "importing torch ..."])
def test_ctrl_c_while_it_starts(serve: Serve, checkpoint: Path, stage: str):
    process = serve(checkpoint, "--kv-cache", "16MiB", "--no-dashboard")
    process.wait_stderr(stage)
    process.interrupt(signal.SIGINT)
    assert process.wait() == 130, process.stderr
    assert "Traceback" not in process.stderr
    process.assert_no_trace()


def test_a_free_port_is_kept_and_a_dead_ray_ends_it_all(serve: Serve, checkpoint: Path):
    process = serve(checkpoint, "--kv-cache", "16MiB", "--no-dashboard", port=0).wait_ready()
    (gateway,) = process.actors("ServeReplica:cluster:Gateway")
    gateway.kill()
    gateway.wait(10)
    with Client(process.address, deadline_s=60) as client:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert client.generate("a", SamplingParams(max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
                break
            except ClusterError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    (raylet,) = (found for found in process.traces.processes() if found.name() == "raylet")
    raylet.kill()
    assert process.wait() == 1
    assert "Ray has ended" in process.stderr
    assert_one_paragraph(process)


def test_a_checkpoint_that_is_not_there(serve: Serve, tmp_path: Path):
    process = serve(tmp_path / "missing")
    assert process.wait() == 1
    assert f"there is no directory '{tmp_path}/missing'" in process.stderr
    assert_one_paragraph(process)


def test_a_taken_port(serve: Serve, checkpoint: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = serve(checkpoint, port=port)
        assert process.wait() == 1
    assert f"cannot listen on 127.0.0.1:{port}" in process.stderr and "--port" in process.stderr
    assert "starting Ray" not in process.stderr
    assert "Traceback" not in process.stderr


def test_wrong_usage(serve: Serve, checkpoint: Path):
    process = serve(checkpoint, "--kv-cache", "much")
    assert process.wait() == 2
    assert "kv_cache_bytes" in process.stderr
    process.assert_no_trace()


def test_weights_that_a_replica_cannot_load(serve: Serve, checkpoint: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    for weights in broken.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:5000])
    process = serve(broken, "--no-dashboard")
    assert process.wait() == 1
    assert ".safetensors" in process.stderr.splitlines()[-1]
    assert_one_paragraph(process)


def assert_one_paragraph(process: ServeProcess) -> None:
    """A reason without a traceback, and no trace of the attempt."""
    assert process.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in process.stderr
    process.assert_no_trace()
