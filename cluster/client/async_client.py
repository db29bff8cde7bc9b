"""The asynchronous client: the same methods as the blocking one, awaited."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.async_stream import AsyncChunkStream
from cluster.client.channel import CHANNEL_OPTIONS, DEFAULT_ADDRESS, DEFAULT_DEADLINE_S
from cluster.client.requests import GenerateOptions, Messages, Prompt, chat_request, count_request, prompt_request
from cluster.client.results import GenerationResult, Model, model_from_proto, models_from_proto, result_from_proto
from cluster.client.retry import MAX_ATTEMPTS, Attempts
from cluster.core.request import SamplingParams
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire import SERVICE


class AsyncClient:
    """Talks to a gateway over gRPC from one event loop; arguments and errors are those of ``Client``.

    Make it inside the running event loop. Cancelling the task that awaits a call cancels the call at the server.

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
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.InferenceServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerationResult:
        """Continues a text or token ids, and returns when every candidate is finished."""
        return await self._generate(prompt_request(prompt, sampling, options), options)

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncChunkStream:
        """Continues a text or token ids, chunk by chunk: ``async for chunk in client.stream(...)``."""
        return self._stream(prompt_request(prompt, sampling, options), options)

    async def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> GenerationResult:
        """Answers a conversation of ``{"role": ..., "content": ...}``, for models with a chat template."""
        return await self._generate(chat_request(messages, sampling, options), options)

    def stream_chat(
        self, messages: Messages, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncChunkStream:
        """Answers a conversation, chunk by chunk. Closing the iterator cancels."""
        return self._stream(chat_request(messages, sampling, options), options)

    async def cancel(self, generation_id: str) -> bool:
        """As ``Client.cancel``."""
        request = pb.CancelGenerationRequest(generation_id=generation_id)
        return (await self._unary(self._stub.CancelGeneration, request)).cancelled

    async def count_tokens(
        self, prompt: str | None = None, *, messages: Messages | None = None, model: str = ""
    ) -> int:
        """How many tokens a prompt or a conversation takes, special tokens and chat template included."""
        return (await self._unary(self._stub.CountTokens, count_request(prompt, messages, model))).tokens

    async def models(self) -> list[Model]:
        """The models served, each with its replicas."""
        return models_from_proto((await self._unary(self._stub.ListModels, pb.ListModelsRequest())).models)

    async def model(self, name: str) -> Model:
        """As ``Client.model``."""
        return model_from_proto(await self._unary(self._stub.GetModel, pb.GetModelRequest(model=name)))

    async def is_serving(self) -> bool:
        """Whether the server's own health check says that it takes requests."""
        response = await self._unary(self._health.Check, health_pb2.HealthCheckRequest(service=SERVICE))
        return response.status == health_pb2.HealthCheckResponse.SERVING

    async def close(self) -> None:
        """Cancels what runs and closes the channel."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _attempts(self, deadline_s: float) -> Attempts:
        return Attempts(address=self.address, deadline_s=deadline_s, max_attempts=self._max_attempts)

    async def _generate(self, request: pb.GenerateRequest, options: GenerateOptions) -> GenerationResult:
        deadline_s = options.get("deadline_s", self.deadline_s)
        return result_from_proto(await self._unary(self._stub.Generate, request, deadline_s))

    def _stream(self, request: pb.GenerateRequest, options: GenerateOptions) -> AsyncChunkStream:
        attempts = self._attempts(options.get("deadline_s", self.deadline_s))
        return AsyncChunkStream(lambda timeout_s: self._stub.GenerateStream(request, timeout=timeout_s), attempts)

    async def _unary(
        self, method: grpc.aio.UnaryUnaryMultiCallable, request: Any, deadline_s: float | None = None
    ) -> Any:
        attempts = self._attempts(self.deadline_s if deadline_s is None else deadline_s)
        while True:
            try:
                return await method(request, timeout=attempts.remaining_s())
            except grpc.RpcError as failure:
                wait_s = attempts.backoff_s(failure)
            await asyncio.sleep(wait_s)
