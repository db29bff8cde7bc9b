"""A gateway over cluster.v1."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import grpc

from cluster.bench.serve.target import Answer, TargetFailure, TargetModel
from cluster.client.channel import open_channel
from cluster.client.credentials import Credentials
from cluster.client.status import error_of
from cluster.core.request import Priority
from cluster.errors import ConfigError
from cluster.v1 import inference_pb2, inference_pb2_grpc
from cluster.wire import priority_to_proto

_LEDGER_KEY = "cluster-ledger-bin"


class GrpcTarget:
    """Raw calls without the client's retries: a benchmark wants to see what they would hide.

    Args:
        addresses: ``"host:port"`` of gateways, which take turns.
        model: may be empty where one model is served.

    Raises:
        ConfigError: the credentials do not do for this address.
    """

    def __init__(self, addresses: Sequence[str], model: str, credentials: Credentials) -> None:
        self._address = ", ".join(addresses)
        self._model = model
        self._credentials = credentials
        self._channels = [open_channel(grpc.aio, address, credentials) for address in addresses]
        self._stubs = itertools.cycle([inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels])

    async def model(self) -> TargetModel:
        try:
            models = await next(self._stubs).ListModels(
                inference_pb2.ListModelsRequest(), metadata=self._credentials.metadata(), timeout=30
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error, address=self._address, deadline_s=30) from None
        found = [model for model in models.models if self._model in ("", model.name)]
        if len(found) != 1:
            names = ", ".join(model.name for model in models.models) or "none"
            raise ConfigError(f"name one of the models of {self._address}: {names}", field="model")
        return TargetModel(name=found[0].name, vocab_size=found[0].vocab_size or None)

    async def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        priority: Priority,
        seed: int,
        deadline_s: float,
        on_tokens: Callable[[int], None],
    ) -> Answer:
        call = next(self._stubs).GenerateStream(
            inference_pb2.GenerateRequest(
                model=self._model,
                token_ids=inference_pb2.TokenIds(ids=prompt),
                sampling=inference_pb2.SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True),
                priority=priority_to_proto(priority),
            ),
            metadata=self._credentials.metadata(),
            timeout=deadline_s,
        )
        num_tokens = cached_tokens = 0
        try:
            async for chunk in call:
                count = len(chunk.token_ids)
                if count:
                    num_tokens += count
                    on_tokens(count)
                if chunk.HasField("usage"):
                    cached_tokens = chunk.usage.cached_tokens
            trailer = dict(await call.trailing_metadata() or ())
        except grpc.aio.AioRpcError as error:
            raise self._failure(error, deadline_s) from None
        ledger = inference_pb2.Ledger.FromString(trailer.get(_LEDGER_KEY, b""))
        return Answer(num_new_tokens=num_tokens, cached_tokens=cached_tokens, num_moves=ledger.num_moves)

    def _failure(self, error: grpc.aio.AioRpcError, deadline_s: float) -> TargetFailure:
        cause = error_of(error, address=self._address, deadline_s=deadline_s)
        return TargetFailure(f"{error.code().name} ({cause.reason})", retry_after_s=cause.retry_after_s)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()
