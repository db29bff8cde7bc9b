"""The asynchronous client: the same methods as the blocking one, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.addresses import AddressBook, Outcomes, parse_addresses
from cluster.client.async_stream import AsyncChunkStream
from cluster.client.channel import DEFAULT_ADDRESS, DEFAULT_DEADLINE_S, open_channel
from cluster.client.credentials import Credentials
from cluster.client.requests import (
    GenerateOptions,
    Messages,
    Prompt,
    chat_request,
    count_request,
    draw_name,
    prompt_request,
)
from cluster.client.results import (
    GenerationResult,
    Model,
    ledger_from_trailer,
    model_from_proto,
    models_from_proto,
    result_from_proto,
)
from cluster.client.retry import MAX_ATTEMPTS, RECONNECT_S, Attempts
from cluster.client.retry_budget import RetryBudget
from cluster.core.request import SamplingParams
from cluster.errors import Draining, GenerationNotFound, ServerUnreachable
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire import SERVICE


class AsyncClient:
    """Talks to one or several gateways over gRPC from one event loop; arguments and errors are those of ``Client``.

    Make it inside the running event loop. Cancelling the task that awaits a call cancels the call at the server.
    """

    def __init__(
        self,
        address: str | Iterable[str] = DEFAULT_ADDRESS,
        *,
        credentials: Credentials | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
        max_attempts: int = MAX_ATTEMPTS,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        addresses = parse_addresses(address)
        self.address = ",".join(addresses)
        self.deadline_s = deadline_s
        self._credentials = credentials or Credentials()
        self._max_attempts = max_attempts
        self._reconnect_s = reconnect_s
        self._channels = {address: open_channel(grpc.aio, address, self._credentials) for address in addresses}
        self._stubs = {address: pb_grpc.InferenceServiceStub(channel) for address, channel in self._channels.items()}
        self._healths = {address: health_pb2_grpc.HealthStub(channel) for address, channel in self._channels.items()}
        self._gateways = AddressBook(addresses, connected=self._connected)
        self._budget = RetryBudget()

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
        outcomes = Outcomes()
        for address in self._gateways.ranked(generation_id):
            try:
                response, _ = await self._unary(self._stubs, "CancelGeneration", request, only=address)
                if response.cancelled:
                    return True
                outcomes.answered = True
            except (GenerationNotFound, ServerUnreachable, Draining) as error:
                outcomes.add(error)
        return outcomes.false()

    async def count_tokens(
        self, prompt: str | None = None, *, messages: Messages | None = None, model: str = ""
    ) -> int:
        """How many tokens a prompt or a conversation takes, special tokens and chat template included."""
        return (await self._unary(self._stubs, "CountTokens", count_request(prompt, messages, model)))[0].tokens

    async def models(self) -> list[Model]:
        """The models served, each with its replicas."""
        return models_from_proto((await self._unary(self._stubs, "ListModels", pb.ListModelsRequest()))[0].models)

    async def model(self, name: str) -> Model:
        """As ``Client.model``."""
        response, _ = await self._unary(self._stubs, "GetModel", pb.GetModelRequest(model=name))
        return model_from_proto(response)

    async def is_serving(self) -> bool:
        """As ``Client.is_serving``."""
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        outcomes = Outcomes()
        for address in self._gateways.addresses:
            try:
                response, _ = await self._unary(self._healths, "Check", request, only=address)
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return True
                outcomes.answered = True
            except ServerUnreachable as error:
                outcomes.add(error)
        return outcomes.false()

    async def close(self) -> None:
        """Cancels what runs and closes the channels."""
        self._gateways.closed = True
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _connected(self, address: str) -> bool:
        return self._channels[address].get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY

    def _attempts(self, name: str, deadline_s: float, only: str | None = None) -> Attempts:
        return Attempts(
            self._gateways,
            self._budget,
            name=name,
            deadline_s=deadline_s,
            max_attempts=self._max_attempts,
            reconnect_s=self._reconnect_s,
            only=only,
        )

    async def _generate(self, request: pb.GenerateRequest, options: GenerateOptions) -> GenerationResult:
        deadline_s = options.get("deadline_s", self.deadline_s)
        response, trailer = await self._unary(self._stubs, "Generate", request, request.request_id, deadline_s)
        return result_from_proto(response, ledger_from_trailer(trailer))

    def _stream(self, request: pb.GenerateRequest, options: GenerateOptions) -> AsyncChunkStream:
        def start(request: pb.GenerateRequest, address: str, timeout_s: float) -> grpc.aio.UnaryStreamCall:
            method = self._stubs[address].GenerateStream
            return method(request, timeout=timeout_s, metadata=self._credentials.metadata())

        deadline_s = options.get("deadline_s", self.deadline_s)
        return AsyncChunkStream(request, start, self._attempts(request.request_id, deadline_s))

    async def _unary(
        self,
        stubs: Mapping[str, Any],
        method: str,
        request: Any,
        name: str = "",
        deadline_s: float | None = None,
        only: str | None = None,
    ) -> tuple[Any, Any]:
        """The response and its trailing metadata."""
        attempts = self._attempts(name or draw_name(), self.deadline_s if deadline_s is None else deadline_s, only)
        while True:
            call = getattr(stubs[attempts.address], method)(
                request, timeout=attempts.remaining_s(), metadata=self._credentials.metadata()
            )
            try:
                response = await call
                attempts.succeeded()
                return response, await call.trailing_metadata()
            except grpc.RpcError as failure:
                wait_s = attempts.backoff_s(failure)
            await asyncio.sleep(wait_s)
