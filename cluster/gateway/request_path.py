"""The one way of a request through the gateway, whatever protocol it came by."""

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
from cluster.v1 import inference_pb2, replica_pb2
from cluster.wire import priority_to_proto, sampling_from_proto, sampling_to_proto


class RequestPath:
    """Validates a request, hands it to a replica and lets it be read. Protocols translate to and from its messages."""

    def __init__(self, config: GatewayConfig, catalog: Catalog, table: GenerationTable, metrics: MetricSink) -> None:
        self._config = config
        self._catalog = catalog
        self._table = table
        self._metrics = metrics

    @asynccontextmanager
    async def run(
        self, request: inference_pb2.GenerateRequest, *, remaining_s: float | None, streams: bool
    ) -> AsyncIterator[Reader]:
        """The request at work on a replica; on leaving, ended and counted, whatever happened.

        Args:
            remaining_s: until the caller's deadline; None: it has none.
            streams: whether the reader wants every delta, or only the end.

        Raises:
            ClusterError: it cannot be served.
        """
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
                await self._start(generation, entry, request, remaining_s)
                yield Reader(entry.name, generation)
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


class Reader:
    """What the caller reads of a running request: its chunks, or its whole answer."""

    def __init__(self, model: str, generation: Generation) -> None:
        self.model = model
        self._generation = generation

    @property
    def generation_id(self) -> str:
        return self._generation.generation_id

    async def __aiter__(self) -> AsyncIterator[inference_pb2.GenerateChunk]:
        generation = self._generation
        while not generation.done:
            await generation.wait()
            for chunk in generation.take():
                yield chunk

    async def response(self) -> inference_pb2.GenerateResponse:
        """All candidates, whole."""
        generation = self._generation
        await generation.wait()
        chunks = generation.take()
        return inference_pb2.GenerateResponse(
            generation_id=generation.generation_id,
            model=self.model,
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
