"""The blocking client."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.channel import CHANNEL_OPTIONS, DEFAULT_ADDRESS, DEFAULT_DEADLINE_S
from cluster.client.requests import GenerateOptions, Messages, Prompt, chat_request, count_request, prompt_request
from cluster.client.results import GenerationResult, Model, model_from_proto, models_from_proto, result_from_proto
from cluster.client.retry import MAX_ATTEMPTS, Attempts
from cluster.client.stream import ChunkStream
from cluster.core.request import SamplingParams
from cluster.errors import Cancelled
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire import SERVICE


class Client:
    """Talks to a gateway over gRPC; safe to share between threads.

    Every call has a deadline, is repeated a few times where the server did not execute it, and raises the classes of
    ``cluster.errors``: ServerUnreachable where nothing answers, DeadlineExceeded, InvalidRequest with the field, and
    so on.

    Args:
        address: ``"host:port"``.
        deadline_s: for calls that bring none, retries included.
        max_attempts: how often a call is tried in all, where it fails before anything was executed.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self.address = address
        self.deadline_s = deadline_s
        self._max_attempts = max_attempts
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.InferenceServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerationResult:
        """Continues a text or token ids, and returns when every candidate is finished."""
        return self._generate(prompt_request(prompt, sampling, options), options)

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> ChunkStream:
        """Continues a text or token ids, chunk by chunk. Closing the iterator cancels."""
        return self._stream(prompt_request(prompt, sampling, options), options)

    def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerationResult:
        """Answers a conversation of ``{"role": ..., "content": ...}``, for models with a chat template."""
        return self._generate(chat_request(messages, sampling, options), options)

    def stream_chat(
        self, messages: Messages, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> ChunkStream:
        """Answers a conversation, chunk by chunk. Closing the iterator cancels."""
        return self._stream(chat_request(messages, sampling, options), options)

    def cancel(self, generation_id: str) -> bool:
        """Ends a running generation, named by its generation id or its request id.

        Returns:
            False where it had already ended.

        Raises:
            GenerationNotFound: no such generation.
        """
        request = pb.CancelGenerationRequest(generation_id=generation_id)
        return self._unary(self._stub.CancelGeneration, request).cancelled

    def count_tokens(self, prompt: str | None = None, *, messages: Messages | None = None, model: str = "") -> int:
        """How many tokens a prompt or a conversation takes, special tokens and chat template included."""
        return self._unary(self._stub.CountTokens, count_request(prompt, messages, model)).tokens

    def models(self) -> list[Model]:
        """The models served, each with its replicas."""
        return models_from_proto(self._unary(self._stub.ListModels, pb.ListModelsRequest()).models)

    def model(self, name: str) -> Model:
        """One model.

        Raises:
            ModelNotFound: no such model here.
        """
        return model_from_proto(self._unary(self._stub.GetModel, pb.GetModelRequest(model=name)))

    def is_serving(self) -> bool:
        """Whether the server's own health check says that it takes requests."""
        response = self._unary(self._health.Check, health_pb2.HealthCheckRequest(service=SERVICE))
        return response.status == health_pb2.HealthCheckResponse.SERVING

    def close(self) -> None:
        """Cancels what runs and closes the channel."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attempts(self, deadline_s: float) -> Attempts:
        return Attempts(address=self.address, deadline_s=deadline_s, max_attempts=self._max_attempts)

    def _generate(self, request: pb.GenerateRequest, options: GenerateOptions) -> GenerationResult:
        deadline_s = options.get("deadline_s", self.deadline_s)
        return result_from_proto(self._unary(self._stub.Generate, request, deadline_s))

    def _stream(self, request: pb.GenerateRequest, options: GenerateOptions) -> ChunkStream:
        attempts = self._attempts(options.get("deadline_s", self.deadline_s))
        return ChunkStream(lambda timeout_s: self._stub.GenerateStream(request, timeout=timeout_s), attempts)

    def _unary(self, method: grpc.UnaryUnaryMultiCallable, request: Any, deadline_s: float | None = None) -> Any:
        attempts = self._attempts(self.deadline_s if deadline_s is None else deadline_s)
        while True:
            # A future, because it can be cancelled: Ctrl-C must end the work at the server too.
            call = method.future(request, timeout=attempts.remaining_s())
            try:
                return call.result()
            except grpc.FutureCancelledError:
                raise Cancelled("the call was cancelled here") from None
            except grpc.RpcError as failure:
                wait_s = attempts.backoff_s(failure)
            finally:
                call.cancel()
            time.sleep(wait_s)
