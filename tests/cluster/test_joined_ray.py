"""A cluster inside a Ray that was there before and stays."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from serve_process import ServeProcess

from cluster import SamplingParams
from cluster.client import Client

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

Serve = Callable[..., ServeProcess]

# Starts a Ray, tells its address, and answers each line with what of ours is there.
RAY = """
import sys, ray
from ray.experimental.internal_kv import _internal_kv_list

context = ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False,
                   object_store_memory=2**27, _temp_dir=sys.argv[1])
print(context.address_info["gcs_address"], flush=True)
own = ("ray_cluster_id", "CLUSTER_METADATA")
for line in sys.stdin:
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    keys = [key.decode() for key in _internal_kv_list(b"", namespace=b"cluster") if key.decode() not in own]
    print([*named, *keys], flush=True)
"""


class OtherRay:
    def __init__(self, temp_dir: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", RAY, temp_dir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self._process.stdout.readline().strip()
        assert self.address

    def ours(self) -> str:
        """Named actors and keys that are there, as a printed list."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def stop(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def ray() -> Iterator[OtherRay]:
    with (
        tempfile.TemporaryDirectory(prefix="oray", dir="/tmp", ignore_cleanup_errors=True) as temp_dir,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")  # of Ray and of all that joins it
        ray = OtherRay(temp_dir)
        yield ray
        ray.stop()


@pytest.fixture
def config(ray: OtherRay, checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(path: Path = checkpoint, host: str = "0.0.0.0") -> Path:
        file = tmp_path / "cluster.yaml"
        model = {"path": str(path), "worker": {"device": "cpu", "kv_cache_bytes": 2**24}}
        tree = {"models": [model], "gateway": {"host": host, "insecure": True}, "ray": {"address": ray.address}}
        file.write_text(yaml.safe_dump(tree))
        return file

    return write


def test_a_failed_start_leaves_nothing_there(ray: OtherRay, serve: Serve, config: Callable[..., Path], tmp_path: Path):
    process = serve("--config", config(path=tmp_path / "missing"))
    assert process.wait() == 1
    assert "there is no directory" in process.stderr.splitlines()[-1]
    assert ray.ours() == "[]"


def test_a_running_cluster_is_not_replaced_and_a_stopped_one_leaves_nothing(
    ray: OtherRay, serve: Serve, config: Callable[..., Path]
):
    first = serve("--config", config()).wait_ready()
    host = first.address.rpartition(":")[0]
    assert host == ray.address.rpartition(":")[0], "bound to all addresses, it is told by its node's"
    second = serve("--config", config())
    assert second.wait() == 1
    assert "a cluster runs on that Ray already" in second.stderr.splitlines()[-1]
    with Client(first.address, deadline_s=60) as client:
        assert client.generate("a", SamplingParams(max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
    assert "SERVE_CONTROLLER_ACTOR" in ray.ours()
    first.interrupt(signal.SIGINT)
    assert first.wait() == 0, first.stderr
    assert ray.ours() == "[]"
