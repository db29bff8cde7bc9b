"""The AdminService of a real cluster: Serve ends a model's replicas and starts them again."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from serve_process import ServeProcess

from cluster.client import Client
from cluster.errors import ModelWarming
from cluster.v1 import admin_pb2, admin_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(checkpoint: Path, serve: Callable[..., ServeProcess], tmp_path: Path) -> Iterator[tuple[ServeProcess, int]]:
    """A cluster of one model, and the port of its AdminService."""
    worker = {"kv_cache_bytes": 2**24, "dtype": "float32", "device": "cpu"}
    admin_port = free_port()
    tree = {
        "models": [{"name": "one", "path": str(checkpoint), "worker": worker}],
        "gateway": {"admin": {"port": admin_port}},
        "ray": {"dashboard": False},
    }
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(tree))
    process = serve("--config", config).wait_ready()
    yield process, admin_port
    process.interrupt(signal.SIGTERM)
    assert process.wait() == 0, process.stderr


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_model_is_unloaded_and_loaded(cluster: tuple[ServeProcess, int]) -> None:
    process, admin_port = cluster
    with grpc.insecure_channel(f"127.0.0.1:{admin_port}") as channel, Client(process.address, deadline_s=60) as client:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        before = client.generate("x", max_tokens=8, seed=1).text
        assert json.loads(admin.GetConfig(admin_pb2.GetConfigRequest()).json)["models"][0]["name"] == "one"
        admin.UnloadModel(admin_pb2.UnloadModelRequest(model="one"))
        until(lambda: not client.model("one").replicas)
        with pytest.raises(ModelWarming, match="unloaded"):
            client.generate("x", max_tokens=8, deadline_s=1)
        admin.LoadModel(admin_pb2.LoadModelRequest(model="one"))
        until(lambda: [replica.state for replica in client.model("one").replicas] == ["ready"])
        assert client.generate("x", max_tokens=8, seed=1).text == before
        assert admin.GetStatus(admin_pb2.GetStatusRequest()).open_generations == 0
