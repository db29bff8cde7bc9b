"""GRPCInferenceService: the Open Inference Protocol, each method from its request to its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version

import grpc

from cluster.errors import ClusterError, InvalidRequest, ModelNotFound
from cluster.gateway.catalog import Catalog, CatalogEntry
from cluster.gateway.generation_table import GenerationTable
from cluster.gateway.kserve import tensors
from cluster.gateway.kserve.answers import Answer, error_response, streamed
from cluster.gateway.kserve.convert import MODEL_VERSION, check_version, in_these_terms, inference_of
from cluster.gateway.request_path import RequestPath
from cluster.gateway.servicer import trailer_of
from cluster.kserve import open_inference_pb2 as kserve
from cluster.kserve import open_inference_pb2_grpc

SERVICE = kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_PLATFORM = "cluster"
_EXTENSIONS = ("binary_tensor_data", "model_configuration", "schedule_policy")
# A stream's requests beyond this are read when one of them has ended.
_MAX_PER_STREAM = 1024
_ERROR_MODE = "triton_grpc_error"
_DATA_TYPES = {"BYTES": kserve.TYPE_STRING, "BOOL": kserve.TYPE_BOOL}

_Write = Callable[[kserve.ModelStreamInferResponse], Awaitable[None]]


class KServeServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Speaks the Open Inference Protocol. Errors are raised; the interceptor maps them."""

    def __init__(self, catalog: Catalog, table: GenerationTable, path: RequestPath) -> None:
        self._catalog = catalog
        self._table = table
        self._path = path

    async def ServerLive(
        self, request: kserve.ServerLiveRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ServerLiveResponse:
        return kserve.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: kserve.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ServerReadyResponse:
        return kserve.ServerReadyResponse(ready=self._catalog.ready and not self._table.draining)

    async def ModelReady(
        self, request: kserve.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ModelReadyResponse:
        try:
            entry = self._lookup(request.name, request.version)
        except ModelNotFound:
            return kserve.ModelReadyResponse(ready=False)
        return kserve.ModelReadyResponse(ready=entry.balancer.ready)

    async def ServerMetadata(
        self, request: kserve.ServerMetadataRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ServerMetadataResponse:
        return kserve.ServerMetadataResponse(name=_PLATFORM, version=version("llm-cluster"), extensions=_EXTENSIONS)

    async def ModelMetadata(
        self, request: kserve.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ModelMetadataResponse:
        entry = self._lookup(request.name, request.version)
        response = kserve.ModelMetadataResponse(name=entry.name, versions=[MODEL_VERSION], platform=_PLATFORM)
        for tensor in tensors.INPUTS:
            response.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        for tensor in tensors.OUTPUTS:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        return response

    async def ModelConfig(
        self, request: kserve.ModelConfigRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ModelConfigResponse:
        entry = self._lookup(request.name, request.version)
        config = kserve.ModelConfig(name=entry.name, platform=_PLATFORM, backend=_PLATFORM)
        config.model_transaction_policy.decoupled = True
        for tensor in tensors.INPUTS:
            data_type = _DATA_TYPES[tensor.datatype]
            config.input.add(name=tensor.name, data_type=data_type, dims=tensor.shape, optional=tensor.optional)
        for tensor in tensors.OUTPUTS:
            config.output.add(name=tensor.name, data_type=_DATA_TYPES[tensor.datatype], dims=tensor.shape)
        return kserve.ModelConfigResponse(config=config)

    async def RepositoryIndex(
        self, request: kserve.RepositoryIndexRequest, context: grpc.aio.ServicerContext
    ) -> kserve.RepositoryIndexResponse:
        response = kserve.RepositoryIndexResponse()
        for entry in self._catalog:
            ready = entry.balancer.ready
            if ready or not request.ready:
                response.models.add(
                    name=entry.name,
                    version=MODEL_VERSION,
                    state="READY" if ready else "UNAVAILABLE",
                    reason="" if ready else "no replica is ready",
                )
        return response

    async def ModelInfer(
        self, request: kserve.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ModelInferResponse:
        try:
            inference = inference_of(request)
            if inference.streams:
                raise InvalidRequest("stream: true needs ModelStreamInfer", field=tensors.STREAM.name)
            remaining_s = _earlier(context.time_remaining(), inference.timeout_s)
            async with self._path.run(
                inference.request, remaining_s=remaining_s, streams=False, on_ledger=trailer_of(context)
            ) as reader:
                answer = Answer(inference, model=reader.model, request_id=request.id)
                return answer.whole(await reader.response())
        except ClusterError as error:
            raise in_these_terms(error) from None

    async def ModelStreamInfer(
        self, requests: AsyncIterator[kserve.ModelInferRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Each request in a task of its own. The stream ends when the client has closed its side and all have ended."""
        ends_on_error = dict(context.invocation_metadata()).get(_ERROR_MODE, "").lower() == "true"
        slots = asyncio.Semaphore(_MAX_PER_STREAM)
        writing = asyncio.Lock()
        under_way: asyncio.Future[None] | None = None

        async def write(response: kserve.ModelStreamInferResponse) -> None:
            nonlocal under_way
            async with writing:  # gRPC takes one message of a call at a time
                under_way = asyncio.ensure_future(context.write(response))
                await asyncio.shield(under_way)

        async def serve(request: kserve.ModelInferRequest) -> None:
            try:
                await self._infer(request, write, context.time_remaining())
            except grpc.aio.BaseError:
                raise  # the stream itself is over
            except Exception as error:
                if isinstance(error, ClusterError):
                    error = in_these_terms(error)
                if ends_on_error:
                    raise error from None
                await write(error_response(error, request))
            finally:
                slots.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await slots.acquire()
                    tasks.create_task(serve(request))
        except ExceptionGroup as group:
            # The others were cancelled, but what gRPC has begun to write it writes; a status can only follow that.
            if under_way is not None:
                await asyncio.wait([under_way])
            raise group.exceptions[0] from None

    async def _infer(self, request: kserve.ModelInferRequest, write: _Write, remaining_s: float | None) -> None:
        """One of a stream's requests, whole or in deltas."""
        inference = inference_of(request)
        remaining_s = _earlier(remaining_s, inference.timeout_s)
        async with self._path.run(inference.request, remaining_s=remaining_s, streams=inference.streams) as reader:
            answer = Answer(inference, model=reader.model, request_id=request.id)
            if inference.streams:
                async for chunk in reader:
                    response = answer.delta(chunk)
                    await write(streamed(response, reader.ledger() if answer.is_complete else None))
            else:
                response = answer.whole(await reader.response())
                await write(streamed(response, reader.ledger()))

    def _lookup(self, name: str, model_version: str) -> CatalogEntry:
        check_version(name, model_version)
        return self._catalog.lookup(name)


def _earlier(one_s: float | None, other_s: float | None) -> float | None:
    return min((value for value in (one_s, other_s) if value is not None), default=None)
