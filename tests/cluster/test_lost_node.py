"""A replica over two nodes of a Ray cluster, one of which is lost: it comes back on the nodes that are left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from serve_process import ServeProcess

from cluster import LLM, SamplingParams
from cluster.client import Client

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PROMPT = "def f("
SAMPLING = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
TIMEOUT_S = 60.0  # for what takes seconds on an idle machine

# One node that holds a gateway and no more, and three that hold one stage of a pipeline each, but not two.
NODES = """
import os, sys
from ray.cluster_utils import Cluster

os.mkdir(os.environ["RAY_TMPDIR"] + "/ray")
options = {"object_store_memory": 2**27, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=options | {"num_cpus": 1})
nodes = [cluster.add_node(num_cpus=2, **options) for _ in range(3)]
print(cluster.address, *(node.all_processes["raylet"][0].process.pid for node in nodes), flush=True)
sys.stdin.read()
cluster.shutdown()
"""
STAGE_CPUS = 0.9  # and as much for the engine, with the first stage


class Nodes:
    """Several nodes on this machine."""

    def __init__(self, temp_dir: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NODES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"RAY_TMPDIR": temp_dir},
        )
        self.address, *raylets = self._process.stdout.readline().split()
        self._raylets = [psutil.Process(int(pid)) for pid in raylets]

    def processes(self, title: str) -> list[psutil.Process]:
        """Of all nodes but the first, whose title contains it."""
        return [process for raylet in self._raylets for process in raylet.children(True) if title in _title(process)]

    def node_of(self, process: psutil.Process) -> psutil.Process | None:
        """The raylet that it runs under; None: the first node's, or none that is left."""
        return next((raylet for raylet in self._raylets if process in raylet.children(True)), None)

    def lose(self, raylet: psutil.Process) -> None:
        """Kills a node and all that runs there."""
        self._raylets.remove(raylet)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()

    def stop(self) -> None:
        processes = psutil.Process(self._process.pid).children(recursive=True)
        self._process.communicate(timeout=TIMEOUT_S)
        _, alive = psutil.wait_procs(processes, timeout=10)
        for process in alive:
            process.kill()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with (
        tempfile.TemporaryDirectory(prefix="nray", dir="/tmp", ignore_cleanup_errors=True) as temp_dir,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")  # of Ray and of all that joins it
        patch.setenv("RAY_health_check_initial_delay_ms", "1000")
        patch.setenv("RAY_health_check_period_ms", "1000")
        patch.setenv("RAY_health_check_timeout_ms", "1000")
        patch.setenv("RAY_health_check_failure_threshold", "2")
        nodes = Nodes(temp_dir)
        yield nodes
        nodes.stop()


def test_a_pipeline_over_two_nodes_outlives_one_of_them(
    nodes: Nodes, serve: Callable[..., ServeProcess], tmp_path: Path
):
    config = tmp_path / "cluster.yaml"
    model = {"path": "demo", "parallel": {"pp": 2}, "num_cpus": STAGE_CPUS, "worker": {"device": "cpu"}}
    tree = {"models": [model], "gateway": {"host": "0.0.0.0", "insecure": True}, "ray": {"address": nodes.address}}
    config.write_text(yaml.safe_dump(tree))
    with LLM("demo", device="cpu", max_num_seqs=1) as llm:
        expected = list(llm.generate(PROMPT, SAMPLING)[0].token_ids)
    process = serve("--config", config).wait_ready()
    with Client(process.address, deadline_s=120) as client:
        assert list(client.generate(PROMPT, SAMPLING).token_ids) == expected
        (engine,) = nodes.processes("ServeReplica:cluster:model-demo")
        (first,), (last,) = (nodes.processes(f"Shard:demo:rank-{rank}") for rank in range(2))
        results: list[list[int]] = []
        call = threading.Thread(target=lambda: results.append(list(client.generate(PROMPT, SAMPLING).token_ids)))
        call.start()
        time.sleep(0.2)  # into the call
        # The last stage may share its node with the gateway; the first one, with the engine, leaves no room for it.
        gateways = [nodes.node_of(gateway) for gateway in nodes.processes("ServeReplica:cluster:Gateway")]
        node = nodes.node_of(first if nodes.node_of(last) in gateways else last)
        assert nodes.node_of(first) != nodes.node_of(last)
        began = time.monotonic()
        nodes.lose(node)
        _, alive = psutil.wait_procs([engine, first, last], timeout=TIMEOUT_S)
        assert not alive
        call.join(TIMEOUT_S)
        assert results == [expected], "the call outlives the node"
        print(f"served again after {time.monotonic() - began:.1f} s")
        assert nodes.processes("ServeReplica:cluster:model-demo") != [engine]
    process.interrupt(signal.SIGINT)
    assert process.wait() == 0, process.stderr
