"""InferenceService over gRPC: each method from its request to its answer."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from cluster.errors import GenerationNotFound, InvalidRequest
from cluster.gateway.caller import current_caller
from cluster.gateway.catalog import Catalog
from cluster.gateway.config import GatewayConfig
from cluster.gateway.generation_table import GenerationTable
from cluster.gateway.ledger import LEDGER_KEY
from cluster.gateway.prompt import tokenize
from cluster.gateway.request_path import RequestPath
from cluster.v1 import inference_pb2, inference_pb2_grpc


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Speaks cluster.v1. Errors are raised; the interceptor maps them."""

    def __init__(self, config: GatewayConfig, catalog: Catalog, table: GenerationTable, path: RequestPath) -> None:
        self._config = config
        self._catalog = catalog
        self._table = table
        self._path = path

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GenerateResponse:
        async with self._path.run(
            request, remaining_s=context.time_remaining(), streams=False, on_ledger=trailer_of(context)
        ) as reader:
            return await reader.response()

    async def GenerateStream(self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with self._path.run(
            request, remaining_s=context.time_remaining(), streams=True, on_ledger=trailer_of(context)
        ) as reader:
            while not reader.done:
                await reader.wait()
                for chunk in reader.take():
                    await context.write(chunk)

    async def ResumeGeneration(
        self, request: inference_pb2.ResumeGenerationRequest, context: grpc.aio.ServicerContext
    ) -> None:
        if not request.HasField("resume"):
            raise InvalidRequest("resume is not set: it says what there has been of the stream", field="resume")
        request.request.resume.CopyFrom(request.resume)
        await self.GenerateStream(request.request, context)

    async def CancelGeneration(
        self, request: inference_pb2.CancelGenerationRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.CancelGenerationResponse:
        name = request.generation_id
        try:
            cancelled = self._table.cancel(name, current_caller().tenant)
        except GenerationNotFound:
            # Another gateway's, perhaps. Replicas know generation ids, which nobody can guess.
            cancelled = False
            for entry in self._catalog:
                cancelled = cancelled or await entry.balancer.cancel_by_name(name)
            if not cancelled:
                raise
        return inference_pb2.CancelGenerationResponse(cancelled=cancelled)

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.CountTokensResponse:
        tokenizer = self._catalog.lookup(request.model).tokenizer
        token_ids = await tokenize(request, tokenizer, max_prompt_bytes=self._config.max_prompt_bytes)
        return inference_pb2.CountTokensResponse(tokens=len(token_ids))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[entry.balancer.describe() for entry in self._catalog])

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.Model:
        return self._catalog.lookup(request.model).balancer.describe()


def trailer_of(context: grpc.aio.ServicerContext) -> Callable[[inference_pb2.Ledger], None]:
    """Sends a ledger with the end of the call."""

    def send(ledger: inference_pb2.Ledger) -> None:
        if not context.done():
            context.set_trailing_metadata(((LEDGER_KEY, ledger.SerializeToString()),))

    return send
