"""InferenceService over gRPC: each method from its request to its answer."""

from __future__ import annotations

import grpc

from cluster.gateway.catalog import Catalog
from cluster.gateway.config import GatewayConfig
from cluster.gateway.generation_table import GenerationTable
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
        async with self._path.run(request, remaining_s=context.time_remaining(), streams=False) as reader:
            return await reader.response()

    async def GenerateStream(self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with self._path.run(request, remaining_s=context.time_remaining(), streams=True) as reader:
            async for chunk in reader:
                await context.write(chunk)

    async def CancelGeneration(
        self, request: inference_pb2.CancelGenerationRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.CancelGenerationResponse:
        return inference_pb2.CancelGenerationResponse(cancelled=self._table.cancel(request.generation_id))

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
