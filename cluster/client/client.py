"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.addresses import AddressBook, Outcomes, parse_addresses
from cluster.client.channel import DEFAULT_ADDRESS, DEFAULT_DEADLINE_S, ConnectionWatch, open_channel
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
from cluster.client.stream import ChunkStream
from cluster.core.request import SamplingParams
from cluster.errors import Cancelled, Draining, GenerationNotFound, ServerUnreachable
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire import SERVICE


class Client:
    """Talks to one or several gateways over gRPC; safe to share between threads.

    Every call has a deadline, is made again where that is safe, and raises the classes of ``cluster.errors``:
    ServerUnreachable where nothing answers, DeadlineExceeded, InvalidRequest with the field, and so on. A stream whose
    gateway dies goes on at another one.

    Args:
        address: ``"host:port"``, or several with commas or in a list: gateways of one cluster.
        credentials: TLS and the token; by default neither.
        deadline_s: for calls that bring none, retries included.
        max_attempts: how often each gateway is asked at most, before a call's first chunk.
        reconnect_s: for how long a call waits for gateways that have answered before and do not now.
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
        self._channels = {address: open_channel(grpc, address, self._credentials) for address in addresses}
        self._stubs = {address: pb_grpc.InferenceServiceStub(channel) for address, channel in self._channels.items()}
        self._healths = {address: health_pb2_grpc.HealthStub(channel) for address, channel in self._channels.items()}
        self._watches = {address: ConnectionWatch(channel) for address, channel in self._channels.items()}
        self._gateways = AddressBook(addresses, connected=lambda address: self._watches[address].connected())
        self._budget = RetryBudget()

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
        outcomes = Outcomes()
        # A stream may have moved on from the gateway that its name points to.
        for address in self._gateways.ranked(generation_id):
            try:
                if self._unary(self._stubs, "CancelGeneration", request, only=address)[0].cancelled:
                    return True
                outcomes.answered = True
            except (GenerationNotFound, ServerUnreachable, Draining) as error:
                outcomes.add(error)
        return outcomes.false()

    def count_tokens(self, prompt: str | None = None, *, messages: Messages | None = None, model: str = "") -> int:
        """How many tokens a prompt or a conversation takes, special tokens and chat template included."""
        return self._unary(self._stubs, "CountTokens", count_request(prompt, messages, model))[0].tokens

    def models(self) -> list[Model]:
        """The models served, each with its replicas."""
        return models_from_proto(self._unary(self._stubs, "ListModels", pb.ListModelsRequest())[0].models)

    def model(self, name: str) -> Model:
        """One model.

        Raises:
            ModelNotFound: no such model here.
        """
        return model_from_proto(self._unary(self._stubs, "GetModel", pb.GetModelRequest(model=name))[0])

    def is_serving(self) -> bool:
        """Whether the server's own health check says that it takes requests; of several gateways, any."""
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        outcomes = Outcomes()
        for address in self._gateways.addresses:
            try:
                response = self._unary(self._healths, "Check", request, only=address)[0]
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return True
                outcomes.answered = True
            except ServerUnreachable as error:
                outcomes.add(error)
        return outcomes.false()

    def close(self) -> None:
        """Cancels what runs and closes the channels."""
        self._gateways.closed = True
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

    def _generate(self, request: pb.GenerateRequest, options: GenerateOptions) -> GenerationResult:
        deadline_s = options.get("deadline_s", self.deadline_s)
        response, trailer = self._unary(self._stubs, "Generate", request, request.request_id, deadline_s)
        return result_from_proto(response, ledger_from_trailer(trailer))

    def _stream(self, request: pb.GenerateRequest, options: GenerateOptions) -> ChunkStream:
        def start(request: pb.GenerateRequest, address: str, timeout_s: float) -> grpc.Call:
            method = self._stubs[address].GenerateStream
            return method(request, timeout=timeout_s, metadata=self._credentials.metadata())

        deadline_s = options.get("deadline_s", self.deadline_s)
        return ChunkStream(request, start, self._attempts(request.request_id, deadline_s))

    def _unary(
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
            # A future, because it can be cancelled: Ctrl-C must end the work at the server too.
            call = getattr(stubs[attempts.address], method).future(
                request, timeout=attempts.remaining_s(), metadata=self._credentials.metadata()
            )
            try:
                response = call.result()
                attempts.succeeded()
                return response, call.trailing_metadata()
            except grpc.FutureCancelledError:
                raise Cancelled("the call was cancelled here") from None
            except grpc.RpcError as failure:
                wait_s = attempts.backoff_s(failure)
            finally:
                call.cancel()
            time.sleep(wait_s)
