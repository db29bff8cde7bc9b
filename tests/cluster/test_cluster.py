"""A cluster end to end: two models, one of them on two replicas, over real gRPC and real Ray."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from serve_process import ServeProcess

from cluster import LLM, SamplingParams
from cluster.client import Client
from cluster.client.results import Model
from cluster.errors import ClusterError
from cluster.serve.local_ray import token_path

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PROMPTS = ["a", "def read_lines(path):", "x" * 200]
KV_CACHE_BYTES = 64 * 2**20
# Too many to be over before a test has looked at them.
LONG = SamplingParams(max_tokens=15_000, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def cluster(
    checkpoint: Path, serve: Callable[..., ServeProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProcess]:
    worker = {"kv_cache_bytes": KV_CACHE_BYTES, "max_model_len": 16_000, "dtype": "float32", "device": "cpu"}
    config = tmp_path_factory.mktemp("config") / "cluster.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "models": [
                    {"name": "twin", "path": str(checkpoint), "replicas": 2, "worker": worker},
                    {"name": "single", "path": str(checkpoint), "worker": worker},
                ],
                "ray": {"dashboard_port": 0},
            }
        )
    )
    process = serve("--config", config).wait_ready()
    yield process
    process.interrupt(signal.SIGTERM)
    assert process.wait() == 0, process.stderr
    process.assert_no_trace()


@pytest.fixture
def client(cluster: ServeProcess) -> Iterator[Client]:
    with Client(cluster.address, deadline_s=60) as client:
        yield client


def model_of(client: Client, name: str) -> Model:
    return next(model for model in client.models() if model.name == name)


def await_model(client: Client, name: str, wanted: Callable[[Model], bool], timeout_s: float = 60) -> Model:
    deadline = time.monotonic() + timeout_s
    while not wanted(model := model_of(client, name)):
        assert time.monotonic() < deadline, model
        time.sleep(0.05)
    return model


def ready_ids(model: Model) -> set[str]:
    return {replica.replica_id for replica in model.replicas if replica.state == "ready"}


def test_start_tells_what_is_served_and_how(cluster: ServeProcess):
    assert [facts["model"] for facts in cluster.ready["replicas"]].count("twin") == 2
    assert all(facts["kv_capacity_tokens"] > 0 for facts in cluster.ready["replicas"])
    assert cluster.ready["config"]["models"][0]["worker"]["kv_cache_bytes"] == KV_CACHE_BYTES
    assert cluster.self_test["completion"]
    for stage in ("starting Ray", "starting Serve", "importing torch", "loading weights", "warming up"):
        assert f"{stage}: " in cluster.stderr, "each stage is told with its time"


def test_models_are_listed_with_capacity(client: Client):
    for name, num_replicas in (("twin", 2), ("single", 1)):
        model = await_model(client, name, lambda model, n=num_replicas: len(ready_ids(model)) == n)
        assert model.architecture == "LlamaForCausalLM" and model.max_model_len == 16_000
        assert {replica.kv_capacity_tokens for replica in model.replicas} == {
            # float32 keys and values of 2 heads of 16 in 3 layers: 768 bytes a token, whole blocks of 16
            KV_CACHE_BYTES // (768 * 16) * 16
        }


@pytest.mark.parametrize("name", ["twin", "single"])
def test_tokens_are_those_of_the_model_in_process(client: Client, checkpoint: Path, name: str):
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    expected = LLM(str(checkpoint), device="cpu", dtype="float32", max_num_seqs=4).generate(PROMPTS, sampling)
    for prompt, output in zip(PROMPTS, expected, strict=True):
        chunks = list(client.stream(prompt, sampling, model=name))
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert tokens == list(output.token_ids)
        assert "".join(chunk.text for chunk in chunks) == output.text


def complete_over_http(cluster: ServeProcess, prompt: str) -> dict:
    (url,) = cluster.ready["http_urls"]
    body = {"model": "single", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]


def test_openais_api_gives_the_same_tokens(cluster: ServeProcess, client: Client):
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    expected = client.generate(PROMPTS[1], sampling, model="single").text
    assert complete_over_http(cluster, PROMPTS[1])["text"] == expected


def test_a_repeated_prompt_is_found_and_says_so(client: Client):
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompt = "what comes again is computed once: " * 6
    first, again, apart = (
        client.generate(prompt, sampling, model="single", cache_salt=salt) for salt in ("tenant", "tenant", "other")
    )
    assert first.token_ids == again.token_ids == apart.token_ids
    # All whole blocks of 16 but for the prompt's last token.
    assert again.usage.cached_tokens == (first.usage.prompt_tokens - 1) // 16 * 16 > 0
    assert first.usage.cached_tokens == apart.usage.cached_tokens == 0


def test_two_replicas_share_the_load(client: Client):
    streams = [client.stream("abc", LONG, model="twin") for _ in range(6)]
    for stream in streams:
        next(stream)
    model = await_model(client, "twin", lambda model: all(replica.outstanding_tokens for replica in model.replicas))
    outstanding = [replica.outstanding_tokens for replica in model.replicas]
    for stream in streams:
        stream.close()
    assert len(outstanding) == 2 and min(outstanding) > 0


def test_an_abandoned_stream_frees_its_place(client: Client):
    with client.stream("abc", LONG, model="single") as stream:
        next(stream)
    await_model(client, "single", lambda model: sum(replica.running for replica in model.replicas) == 0)


def test_the_gateway_loads_no_torch_and_the_replicas_do(cluster: ServeProcess):
    (gateway,) = cluster.actors("ServeReplica:cluster:Gateway")
    replicas = cluster.actors("ServeReplica:cluster:model-")
    assert not any("libtorch" in entry.path for entry in gateway.memory_maps())
    assert len(replicas) == 3
    assert all(any("libtorch" in entry.path for entry in replica.memory_maps()) for replica in replicas)


def test_the_dashboard_asks_for_rays_token(cluster: ServeProcess):
    url = cluster.ready["dashboard_url"] + "/api/cluster_status"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=30)
    assert refused.value.code == 401
    path = token_path()
    token = path.read_text().strip() if path else ""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200


def test_metrics_are_exported(cluster: ServeProcess, client: Client):
    client.generate("a", SamplingParams(max_tokens=3, ignore_eos=True), model="single")
    wanted = [
        r'ray_cluster_requests_running\{[^}]*model="single"[^}]*\} ',
        r'ray_cluster_requests_running\{[^}]*model="twin"[^}]*\} ',
        r'ray_cluster_ttft_seconds_count\{[^}]*model="single"[^}]*\} [1-9]',
    ]
    deadline = time.monotonic() + 60  # Ray collects every few seconds
    while True:
        text = scrape(Path(cluster.traces.temp_dir))
        missing = [pattern for pattern in wanted if not re.search(pattern, text)]
        if not missing:
            break
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)


def scrape(temp_dir: Path) -> str:
    """What the metrics agents of a local Ray tell, as far as they are up."""
    text = ""
    for found in temp_dir.glob("llm-cluster-*/session_2*/prom_metrics_service_discovery.json"):
        for target in (target for group in json.loads(found.read_text()) for target in group["targets"]):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                text += answer.read().decode()
    return text


def test_a_killed_replica_is_rebuilt_and_requests_go_on(cluster: ServeProcess, client: Client):
    before = ready_ids(await_model(client, "single", ready_ids))
    (replica,) = cluster.actors("ServeReplica:cluster:model-single")
    replica.kill()
    model = await_model(client, "single", lambda model: ready_ids(model) and not ready_ids(model) & before, 90)
    assert len(model.replicas) == 1
    assert (
        client.generate("a", SamplingParams(max_tokens=3, ignore_eos=True), model="single").usage.completion_tokens == 3
    )


def test_a_killed_gateway_comes_back_on_its_ports_and_finds_the_replicas(cluster: ServeProcess, client: Client):
    (gateway,) = cluster.actors("ServeReplica:cluster:Gateway")
    gateway.kill()
    gateway.wait(10)
    deadline = time.monotonic() + 60
    while True:
        try:
            ids = {name: ready_ids(model_of(client, name)) for name in ("twin", "single")}
            if len(ids["twin"]) == 2 and len(ids["single"]) == 1:
                break
        except ClusterError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)
    result = client.generate("a", SamplingParams(max_tokens=3, ignore_eos=True), model="twin")
    assert result.usage.completion_tokens == 3
    assert complete_over_http(cluster, "a")["finish_reason"] == "length"
