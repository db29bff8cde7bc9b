"""InferenceService: each method from its request to its answer."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from cluster.errors import ClusterError
from cluster.gateway.candidate import Candidate
from cluster.gateway.catalog import Catalog, CatalogEntry
from cluster.gateway.config import GatewayConfig
from cluster.gateway.convert import check_cache_salt, check_labels, check_request_id, complete_sampling, priority_of
from cluster.gateway.generation import Generation
from cluster.gateway.generation_table import GenerationTable
from cluster.gateway.prompt import check_tokens, tokenize
from cluster.observability.metrics import E2E_S, GENERATED_TOKENS, PROMPT_TOKENS, REQUESTS, MetricSink
from cluster.text.text_stream import TextStream
from cluster.v1 import inference_pb2, inference_pb2_grpc, replica_pb2
from cluster.wire import priority_to_proto, sampling_from_proto, sampling_to_proto


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Validates, hands the work to a replica, writes what comes back. Errors are raised; the interceptor maps them."""

    def __init__(self, config: GatewayConfig, catalog: Catalog, table: GenerationTable, metrics: MetricSink) -> None:
        self._config = config
        self._catalog = catalog
        self._table = table
        self._metrics = metrics

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GenerateResponse:
        async with self._running(request, context, streams=False) as (entry, generation):
            await generation.wait()
            chunks = generation.take()
        return inference_pb2.GenerateResponse(
            generation_id=generation.generation_id,
            model=entry.name,
            seed=generation.seed,
            candidates=[
                inference_pb2.Candidate(
                    index=chunk.candidate_index,
                    text=chunk.text_delta,
                    token_ids=chunk.token_ids,
                    logprobs=chunk.logprobs,
                    finish_reason=chunk.finish_reason,
                )
                for chunk in chunks
            ],
            usage=inference_pb2.Usage(
                prompt_tokens=generation.num_prompt_tokens,
                cached_tokens=max(chunk.usage.cached_tokens for chunk in chunks),
                completion_tokens=generation.num_tokens,
            ),
        )

    async def GenerateStream(self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with self._running(request, context, streams=True) as (_, generation):
            while not generation.done:
                await generation.wait()
                for chunk in generation.take():
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

    @asynccontextmanager
    async def _running(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext, *, streams: bool
    ) -> AsyncIterator[tuple[CatalogEntry, Generation]]:
        """The request's generation, at work on a replica; on leaving, ended and counted, whatever happened."""
        started_s = time.monotonic()
        outcome, model = "OK", ""
        try:
            check_request_id(request.request_id)
            check_labels(request.labels)
            check_cache_salt(request.cache_salt)
            entry = self._catalog.lookup(request.model)
            model = entry.name
            generation = self._table.open(request.request_id, streams=streams)
            try:
                await self._start(generation, entry, request, context.time_remaining())
                yield entry, generation
            finally:
                self._table.close(generation)
                self._metrics.record(PROMPT_TOKENS, generation.num_prompt_tokens, model=model)
                self._metrics.record(GENERATED_TOKENS, generation.num_tokens, model=model)
            self._metrics.record(E2E_S, time.monotonic() - started_s, model=model)
        except ClusterError as error:
            outcome = error.reason
            raise
        except (asyncio.CancelledError, grpc.aio.BaseError):
            outcome = "CANCELLED"  # the client is gone
            raise
        except Exception:
            outcome = "ENGINE_FAULT"
            raise
        finally:
            self._metrics.record(REQUESTS, 1, model=model, outcome=outcome)

    async def _start(
        self,
        generation: Generation,
        entry: CatalogEntry,
        request: inference_pb2.GenerateRequest,
        remaining_s: float | None,
    ) -> None:
        """Everything between an open entry and work at a replica."""
        deadline_s = time.monotonic() + (self._config.default_deadline_s if remaining_s is None else remaining_s)
        generation.expire_after(deadline_s - time.monotonic())
        priority = priority_of(request.priority)
        sampling = sampling_from_proto(request.sampling)
        token_ids = await tokenize(request, entry.tokenizer, max_prompt_bytes=self._config.max_prompt_bytes)
        hello = entry.balancer.hello()
        check_tokens(
            token_ids,
            field=request.WhichOneof("input"),
            max_model_len=hello.max_model_len,
            vocab_size=hello.vocab_size,
        )
        sampling.check_vocabulary(hello.vocab_size)
        sampling = complete_sampling(sampling, max_completion_tokens=hello.max_model_len - len(token_ids))
        generation.start(
            replica_pb2.Submit(
                prompt_token_ids=token_ids,
                # Tokens in, tokens out: stop strings are matched here.
                sampling=sampling_to_proto(dataclasses.replace(sampling, stop=())),
                priority=priority_to_proto(priority),
                generation_id=generation.generation_id,
                cache_salt=request.cache_salt,
            ),
            lambda index: Candidate(
                generation.generation_id,
                index,
                len(token_ids),
                TextStream(entry.tokenizer, sampling.stop, min_tokens=sampling.min_tokens),
            ),
            model=entry.name,
            balancer=entry.balancer,
        )
