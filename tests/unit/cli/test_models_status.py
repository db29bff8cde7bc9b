import json

from grpc_health.v1 import health_pb2
from scripted_server import DEMO, SERVICE

from cluster.v1 import inference_pb2 as pb


def cells(text):
    return [line.split() for line in text.splitlines()]


def test_models(cli, server):
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO, pb.Model(name="[red]x" + "y" * 90)]))
    header, demo, other = cells(cli("models").stdout)
    assert header == ["MODEL", "ARCHITECTURE", "CONTEXT", "VOCABULARY", "DTYPE", "REPLICAS"]
    assert demo == ["demo", "LlamaForCausalLM", "2,048", "4,096", "bfloat16", "1", "of", "2", "ready"]
    assert other[0] == "[red]x" + "y" * 90  # neither obeyed nor cut


def test_models_as_json(cli, server):
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO]))
    [model] = json.loads(cli("models", "--json").stdout)
    assert (model["name"], model["max_model_len"]) == ("demo", 2048)
    assert [replica["state"] for replica in model["replicas"]] == ["ready", "connecting"]


def test_status(cli, server):
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO]))
    done = cli("status")
    health, header, first, second = done.stdout.splitlines()
    assert done.returncode == 0
    assert health == f"{server.address} is serving"
    assert header.split() == [
        "MODEL",
        "REPLICA",
        "STATE",
        "RUNNING",
        "WAITING",
        "KV",
        "USED",
        "KV",
        "TOKENS",
        "DEVICE",
        "ADDRESS",
    ]
    assert first.split() == ["demo", "demo-0", "ready", "3", "5", "12.5%", "65,536", "cpu", "127.0.0.1:1234"]
    assert second.split() == ["demo", "demo-1", "connecting", "0", "0", "0.0%", "0"]


def test_status_as_json(cli, server):
    server.script("ListModels", pb.ListModelsResponse(models=[DEMO]))
    status = json.loads(cli("status", "--json").stdout)
    assert (status["address"], status["serving"]) == (server.address, True)
    assert status["models"][0]["replicas"][0]["kv_usage"] == 0.125


def test_a_server_that_takes_no_requests_is_1(cli, server):
    server.script("ListModels", pb.ListModelsResponse())
    server.health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
    done = cli("status")
    assert (done.returncode, done.stdout) == (1, f"{server.address} is not serving\n")
    assert json.loads(cli("status", "--json").stdout) == {"address": server.address, "serving": False, "models": []}
