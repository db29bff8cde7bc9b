"""A gRPC server whose answers a test writes down beforehand. It generates nothing: for tests of clients only."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.errors import ClusterError
from cluster.gateway.status import status_of
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire import SERVICE

Answer = Any  # a message, a list of chunks, an error to raise, or a callable of (request, context)


def chunks_of(*texts: str, finish: int = pb.FINISH_REASON_STOP, seed: int = 17) -> list[pb.GenerateChunk]:
    """One chunk per text, one token per chunk; the first brings the seed and the last the end."""
    chunks, offset = [], 0
    for i, text in enumerate(texts):
        chunks.append(
            pb.GenerateChunk(
                generation_id="gen-1", sequence=i, text_delta=text, text_offset=offset, token_ids=[i], token_offset=i
            )
        )
        offset += len(text)
    chunks[0].seed = seed
    chunks[-1].finish_reason = finish
    chunks[-1].usage.CopyFrom(pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=len(texts)))
    return chunks


class ScriptedServer(pb_grpc.InferenceServiceServicer):
    """Answers each method from its script; the last entry answers for ever.

    Args:
        credentials: of TLS; None: no TLS.

    Attributes:
        requests: what came in, in order.
        timeouts: the deadline that came with each, in seconds.
        ended: puts the method's name when the client's side of a streaming call is gone.
    """

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self._scripts: dict[str, list[Answer]] = {}
        self.requests: list[Any] = []
        self.timeouts: list[float] = []
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.health = health.HealthServicer()
        self.health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=8), options=[("grpc.max_receive_message_length", 64 * 1024)]
        )
        pb_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def script(self, method: str, *answers: Answer) -> None:
        self._scripts[method] = list(answers)

    def stop(self) -> None:
        self._server.stop(grace=None).wait()

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Any:
        return self._answer("Generate", request, context)

    def GenerateStream(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateChunk]:
        context.add_callback(lambda: self.ended.put("GenerateStream"))
        yield from self._answer("GenerateStream", request, context)

    def CancelGeneration(self, request: pb.CancelGenerationRequest, context: grpc.ServicerContext) -> Any:
        return self._answer("CancelGeneration", request, context)

    def CountTokens(self, request: pb.CountTokensRequest, context: grpc.ServicerContext) -> Any:
        return self._answer("CountTokens", request, context)

    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> Any:
        return self._answer("ListModels", request, context)

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> Any:
        return self._answer("GetModel", request, context)

    def _answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.timeouts.append(context.time_remaining())
        script = self._scripts[method]
        answer = script.pop(0) if len(script) > 1 else script[0]
        if callable(answer):
            return answer(request, context)
        if isinstance(answer, ClusterError):
            context.abort_with_status(status_of(answer))
        return answer


def hanging(*chunks: pb.GenerateChunk) -> Callable[..., Iterator[pb.GenerateChunk]]:
    """A stream that sends ``chunks`` and then stays open until the client goes away."""

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateChunk]:
        yield from chunks
        gone = threading.Event()
        if context.add_callback(gone.set):
            gone.wait()

    return answer


def breaking(error: ClusterError, *chunks: pb.GenerateChunk) -> Callable[..., Iterator[pb.GenerateChunk]]:
    """A stream that sends ``chunks`` and then fails."""

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateChunk]:
        yield from chunks
        context.abort_with_status(status_of(error))

    return answer


def response_of(*texts: str) -> pb.GenerateResponse:
    """An answer with one candidate per text."""
    return pb.GenerateResponse(
        generation_id="gen-1",
        model="demo",
        seed=2**64 - 1,
        candidates=[
            pb.Candidate(index=i, text=text, token_ids=[7, 8], finish_reason=pb.FINISH_REASON_LENGTH)
            for i, text in enumerate(texts)
        ],
        usage=pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=2 * len(texts)),
    )


DEMO = pb.Model(
    name="demo",
    architecture="LlamaForCausalLM",
    max_model_len=2048,
    vocab_size=4096,
    dtype="bfloat16",
    replicas=[
        pb.ReplicaStatus(
            replica_id="demo-0",
            state=pb.REPLICA_STATE_READY,
            address="127.0.0.1:1234",
            running=3,
            waiting=5,
            outstanding_tokens=99,
            kv_capacity_tokens=65536,
            kv_usage=0.125,
            device="cpu",
        ),
        pb.ReplicaStatus(replica_id="demo-1", state=pb.REPLICA_STATE_CONNECTING),
    ],
)
