"""Replicas made of shards: what they serve, and how they end and come back as one."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import yaml
from serve_process import ServeProcess

from cluster import LLM, SamplingParams
from cluster.client import Client
from cluster.errors import ClusterError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

MODELS = ("wide", "deep")
PROMPTS = ["def read_lines(path):\n", "import ", "x" * 200]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
LONG_PROMPT = "def f("
STEP_TIMEOUT_S = 3.0
TIMEOUT_S = 60.0  # for what takes seconds on an idle machine


@pytest.fixture(scope="module")
def cluster(serve: Callable[..., ServeProcess], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """A model of two tensor parallel shards and one of two pipeline stages, on however many cores there are."""
    models = [
        {"name": name, "path": "demo", "parallel": sizes | {"step_timeout_s": STEP_TIMEOUT_S}}
        for name, sizes in zip(MODELS, ({"tp": 2}, {"pp": 2}), strict=True)
    ]
    config = tmp_path_factory.mktemp("config") / "cluster.yaml"
    config.write_text(yaml.safe_dump({"models": models, "ray": {"dashboard": False}}))
    process = serve("--config", config).wait_ready()
    yield process
    process.interrupt(signal.SIGINT)
    assert process.wait() == 0, process.stderr
    process.assert_no_trace()
    assert process.read_rest() == "", "the deaths of processes are no result of the command"


@pytest.fixture
def client(cluster: ServeProcess) -> Iterator[Client]:
    with Client(cluster.address, deadline_s=120) as client:
        yield client


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What one shard says."""
    with LLM("demo", device="cpu", max_num_seqs=4) as llm:
        outputs = llm.generate([*PROMPTS, LONG_PROMPT], [*[GREEDY] * len(PROMPTS), LONG])
    return {output.prompt: list(output.token_ids) for output in outputs}


def group_of(cluster: ServeProcess, model: str) -> list[psutil.Process]:
    """Its shards by rank, then its engine."""
    shards = [cluster.actors(f"Shard:{model}:rank-{rank}") for rank in range(2)]
    return [process for found in (*shards, cluster.actors(f"ServeReplica:cluster:model-{model}")) for process in found]


def await_group(cluster: ServeProcess, model: str) -> list[psutil.Process]:
    deadline = time.monotonic() + TIMEOUT_S
    while len(group := group_of(cluster, model)) < 3:
        assert time.monotonic() < deadline, group
        time.sleep(0.05)
    return group


def await_gone(group: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(group, timeout=TIMEOUT_S)
    assert not alive


class Load:
    """Two requests under way: a stream, of which the client has begun to read, and a call, which has got nothing."""

    def __init__(self, client: Client, model: str) -> None:
        self.stream_tokens: list[int] = []
        self.stream_error: ClusterError | None = None
        self.call_tokens: list[int] = []
        self.num_moves = 0
        self._client, self._model = client, model
        self._begun = threading.Event()
        self._threads = [threading.Thread(target=self._call), threading.Thread(target=self._stream)]
        for thread in self._threads:
            thread.start()
        assert self._begun.wait(TIMEOUT_S)

    def _stream(self) -> None:
        try:
            stream = self._client.stream(LONG_PROMPT, LONG, model=self._model)
            for chunk in stream:
                self.stream_tokens += chunk.token_ids
                self._begun.set()
            self.num_moves = stream.ledger.num_moves
        except ClusterError as error:
            self.stream_error = error

    def _call(self) -> None:
        self.call_tokens = list(self._client.generate(LONG_PROMPT, LONG, model=self._model).token_ids)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(TIMEOUT_S)


@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_those_of_one_shard(client: Client, expected: dict[str, list[int]], model: str):
    for prompt in PROMPTS:
        assert list(client.generate(prompt, GREEDY, model=model).token_ids) == expected[prompt]


def test_the_start_is_told_with_the_stages_of_every_rank(cluster: ServeProcess):
    for model in ("wide", "deep"):
        for rank in range(2):
            for stage in ("joining", "loading weights", "warming up"):
                assert re.search(rf"^{model} \w+ rank {rank} on .+: {stage}: \d", cluster.stderr, re.MULTILINE)


@pytest.mark.parametrize(("strike", "first_rank"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_struck_rank_ends_its_group_and_another_takes_its_place(
    cluster: ServeProcess, client: Client, expected: dict[str, list[int]], strike: signal.Signals, first_rank: int
):
    """Killed, or stopped, which shows when a step takes too long. Both models at once, a different rank of each. Their
    requests go on where the group is built again."""
    groups = {model: await_group(cluster, model) for model in MODELS}
    loads = {model: Load(client, model) for model in MODELS}
    for index, model in enumerate(MODELS):
        groups[model][first_rank ^ index].send_signal(strike)
    for model in MODELS:
        await_gone(groups[model])
    for model, load in loads.items():
        load.join()
        # Neither who had got nothing nor who had got tokens notices anything, though there was no other replica.
        assert load.call_tokens == expected[LONG_PROMPT]
        assert load.stream_error is None
        assert load.stream_tokens == expected[LONG_PROMPT]
        assert load.num_moves >= 1
        assert not set(await_group(cluster, model)) & set(groups[model])


def test_without_work_a_killed_rank_or_engine_ends_its_group_too(cluster: ServeProcess, client: Client):
    groups = {model: await_group(cluster, model) for model in MODELS}
    engine, rank = groups["wide"][-1], groups["deep"][0]
    for process in (engine, rank):
        process.kill()
    for model in MODELS:
        await_gone(groups[model])
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            with contextlib.suppress(ClusterError):
                assert client.generate("a", GREEDY, model=model).usage.completion_tokens == GREEDY.max_tokens
                break
            assert time.monotonic() < deadline
