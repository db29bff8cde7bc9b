"""Two gateways under Serve, and streams that outlive both gateways and replicas."""

from __future__ import annotations

import os
import random
import signal
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
from cluster.errors import ClusterError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

NUM_KILLS = 30 if os.environ.get("CLUSTER_TEST_FULL") else 3
NUM_STREAMS = 6
# What the clients ask for over and over: greedy, seeded with penalties, and two candidates.
REQUESTS = [
    ("def read_lines(path):", SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)),
    (
        "x" * 100,
        SamplingParams(max_tokens=300, seed=7, presence_penalty=0.5, repetition_penalty=1.1, ignore_eos=True),
    ),
    ("a", SamplingParams(max_tokens=200, seed=11, n=2, temperature=0.8, ignore_eos=True)),
]


@pytest.fixture(scope="module")
def cluster(
    checkpoint: Path, serve: Callable[..., ServeProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProcess]:
    worker = {"kv_cache_bytes": 64 * 2**20, "max_model_len": 4096, "dtype": "float32", "device": "cpu"}
    config = tmp_path_factory.mktemp("config") / "cluster.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "models": [{"name": "small", "path": str(checkpoint), "replicas": 2, "worker": worker}],
                "gateway": {"replicas": 2},
                "ray": {"dashboard": False},
            }
        )
    )
    process = serve("--config", config, port=0).wait_ready()
    yield process
    process.interrupt(signal.SIGTERM)
    assert process.wait() == 0, process.stderr
    process.assert_no_trace()


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[list[int]]]:
    """The tokens of each candidate of each request, from one engine that nobody kills."""
    llm = LLM(str(checkpoint), device="cpu", dtype="float32", max_num_seqs=4, max_model_len=4096)
    return [
        [list(candidate.token_ids) for candidate in llm.generate([prompt], sampling)[0].outputs]
        for prompt, sampling in REQUESTS
    ]


def test_each_gateway_has_its_address_and_both_serve(cluster: ServeProcess):
    addresses = cluster.address.split(",")
    assert len(set(addresses)) == 2
    assert len(cluster.actors("ServeReplica:cluster:Gateway")) == 2
    for address in addresses:
        with Client(address, deadline_s=60) as client:
            assert client.generate("a", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3


def test_a_generation_is_cancelled_from_the_other_gateway(cluster: ServeProcess):
    here, there = cluster.address.split(",")
    with Client(here, deadline_s=60) as client, Client(there, deadline_s=60) as other:
        stream = client.stream("a", max_tokens=3000, ignore_eos=True)
        generation_id = next(stream).generation_id
        assert other.cancel(generation_id)
        with pytest.raises(ClusterError, match="cancelled"):
            list(stream)


class Reader(threading.Thread):
    """Reads one stream after the other and compares every token; ``wrong`` says what was not as it should be."""

    def __init__(self, address: str, expected: list[list[list[int]]], offset: int) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.num_read = 0
        self.num_moves = 0
        self.ended = threading.Event()
        self._address = address
        self._expected = expected
        self._offset = offset

    def run(self) -> None:
        with Client(self._address, deadline_s=300) as client:
            while not self.ended.is_set():
                kind = (self._offset + self.num_read) % len(REQUESTS)
                try:
                    self._read(client, kind)
                except ClusterError as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                self.num_read += 1

    def _read(self, client: Client, kind: int) -> None:
        prompt, sampling = REQUESTS[kind]
        tokens: list[list[int]] = [[] for _ in range(sampling.n)]
        stream = client.stream(prompt, sampling)
        for chunk in stream:
            tokens[chunk.candidate_index] += chunk.token_ids
        self.num_moves += stream.num_resumes + (stream.ledger.num_moves if stream.ledger else 0)
        if tokens != self._expected[kind]:
            self.wrong.append(f"other tokens for request {kind}")
        if stream.ledger is None or not stream.ledger.exact:
            self.wrong.append(f"the ledger of request {kind} says {stream.ledger}")


def test_kills_of_replicas_and_gateways_change_no_token(cluster: ServeProcess, expected: list[list[list[int]]]):
    rng = random.Random(5)
    readers = [Reader(cluster.address, expected, offset) for offset in range(NUM_STREAMS)]
    for reader in readers:
        reader.start()
    try:
        for index in range(NUM_KILLS):
            title = "ServeReplica:cluster:Gateway" if index % 3 == 2 else "ServeReplica:cluster:model-small"
            await_actors(cluster, title, 2)
            time.sleep(rng.uniform(0.2, 1.0))
            victim = rng.choice(cluster.actors(title))
            victim.kill()
            before = [reader.num_read for reader in readers]
            victim.wait(30)
            await_all(lambda before=before: all(r.num_read > b for r, b in zip(readers, before, strict=True)))
    finally:
        for reader in readers:
            reader.ended.set()
        for reader in readers:
            reader.join()
    assert [reader.wrong for reader in readers] == [[]] * NUM_STREAMS
    assert sum(reader.num_moves for reader in readers) >= NUM_KILLS / 2, "the kills hit nothing"


def await_actors(cluster: ServeProcess, title: str, count: int) -> list[psutil.Process]:
    """Until as many serve: a replica that starts is known by its title already, so its gateway is asked."""

    def ready() -> bool:
        if len(cluster.actors(title)) != count:
            return False
        try:
            for address in cluster.address.split(","):
                with Client(address, deadline_s=10, max_attempts=1) as client:
                    (model,) = client.models()
                    if [replica.state for replica in model.replicas] != ["ready", "ready"]:
                        return False
        except ClusterError:
            return False
        return True

    await_all(ready)
    return cluster.actors(title)


def await_all(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
