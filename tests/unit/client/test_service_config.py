"""The published service config, with a client that knows nothing else of us."""

import json
from pathlib import Path

import grpc
import pytest
from scripted_server import chunks_of, response_of

from cluster import errors
from cluster.client import retry, retry_budget
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire import SERVICE

FILE = Path(__file__).parents[3] / "protos/cluster/v1/service_config.json"
WARMING = errors.ModelWarming("soon", retry_after_s=0.01)


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address, options=[("grpc.service_config", FILE.read_text())]) as channel:
        yield pb_grpc.InferenceServiceStub(channel)


def test_what_was_not_executed_is_repeated(stub, server):
    server.script("Generate", WARMING, WARMING, response_of("x"))
    server.script("GenerateStream", WARMING, chunks_of("a", "b"))
    assert stub.Generate(pb.GenerateRequest()).candidates[0].text == "x"
    assert [chunk.text_delta for chunk in stub.GenerateStream(pb.GenerateRequest())] == ["a", "b"]


def test_it_is_the_config_that_does_it(server):
    server.script("Generate", WARMING, response_of("x"))
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_refusals_are_not_repeated(stub, server):
    server.script("Generate", errors.Overloaded("full", retry_after_s=0.01))
    with pytest.raises(grpc.RpcError):
        stub.Generate(pb.GenerateRequest())
    assert len(server.requests) == 1


def test_retries_are_throttled(stub, server):
    server.script("Generate", WARMING)
    for _ in range(20):
        with pytest.raises(grpc.RpcError):
            stub.Generate(pb.GenerateRequest())
    assert len(server.requests) < 35  # of 80


def test_its_numbers_are_our_clients():
    config = json.loads(FILE.read_text())
    [method] = config["methodConfig"]
    assert method["name"] == [{"service": SERVICE}]
    assert config["healthCheckConfig"]["serviceName"] == SERVICE
    assert method["retryPolicy"]["maxAttempts"] == retry.MAX_ATTEMPTS
    throttling = config["retryThrottling"]
    assert (throttling["maxTokens"], throttling["tokenRatio"]) == (retry_budget.MAX_TOKENS, retry_budget.TOKEN_RATIO)
