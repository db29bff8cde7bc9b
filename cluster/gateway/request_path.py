"""The one way of a request through the gateway, whatever protocol it came by."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc

from cluster.core.request import Priority, SamplingParams
from cluster.core.routing import Placement
from cluster.errors import ClusterError, Forbidden, InvalidRequest, ModelWarming
from cluster.gateway.caller import Caller, current_caller
from cluster.gateway.catalog import Catalog, CatalogEntry
from cluster.gateway.config import GatewayConfig
from cluster.gateway.convert import check_cache_salt, check_labels, check_request_id, complete_sampling, priority_of
from cluster.gateway.generation import Generation, warming
from cluster.gateway.generation_table import GenerationTable, RequestKey
from cluster.gateway.prompt import check_tokens, tokenize
from cluster.gateway.reader import Reader
from cluster.gateway.resume import check_resume, check_resumed_tokens, fingerprint_of, places_in, resumed_candidates
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
        self,
        request: inference_pb2.GenerateRequest,
        *,
        remaining_s: float | None,
        streams: bool,
        on_ledger: Callable[[inference_pb2.Ledger], None] = lambda ledger: None,
    ) -> AsyncIterator[Reader]:
        """The request at work on a replica; on leaving, ended and counted, whatever happened.

        A call with the request_id of one that runs reads along; of one that ended lately, it gets the same again. What
        runs ends with the last of its calls.

        Args:
            remaining_s: until the caller's deadline; None: it has none.
            streams: whether the reader wants every delta, or only the end.
            on_ledger: told where the time has gone, once, on leaving, if anything was begun.

        Raises:
            ClusterError: it cannot be served. Where progress is asked for, the reader may say so later.
        """
        started_s = time.monotonic()
        outcome, model = "OK", ""
        try:
            sampling, priority = _checked(request, streams)
            entry = self._catalog.serving(request.model)
            model = entry.name
            caller = current_caller()
            _check_allowed(caller, model, priority)
            generation, is_new = self._table.open(_key_of(request, caller.tenant))
            reader = Reader(
                model,
                generation,
                streams=streams,
                progress=request.progress,
                max_unread_tokens=self._config.max_unread_tokens,
                first_sequence=request.resume.sequence,
            )
            generation.attach(reader)
            try:
                self._allow_time(generation, remaining_s)
                if is_new:
                    self._begin(generation, entry, request, sampling, priority)
                if not (is_new and request.progress):
                    await reader.begun()
                if not is_new:
                    resume = request.resume if request.HasField("resume") else None
                    reader.begin(places_in(generation, resume, lambda: _text_stream(entry, sampling)))
                yield reader
            finally:
                if self._table.close(generation, reader):
                    self._metrics.record(PROMPT_TOKENS, generation.num_prompt_tokens, model=model)
                    self._metrics.record(GENERATED_TOKENS, generation.num_new_tokens, model=model)
                on_ledger(reader.ledger())
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

    def _allow_time(self, generation: Generation, remaining_s: float | None) -> None:
        config = self._config
        generation.expire_after(
            min(config.default_deadline_s if remaining_s is None else remaining_s, config.max_deadline_s)
        )

    def _begin(
        self,
        generation: Generation,
        entry: CatalogEntry,
        request: inference_pb2.GenerateRequest,
        sampling: SamplingParams,
        priority: Priority,
    ) -> None:
        """Starts it in a task of its own: it goes on where another call has joined and this one's client leaves."""

        async def start() -> None:
            try:
                await self._start(generation, entry, request, sampling, priority)
            except Exception as error:
                generation.fail(error)

        task = asyncio.create_task(start(), name=f"start-{generation.generation_id}")
        generation.on_end(task.cancel)

    async def _start(
        self,
        generation: Generation,
        entry: CatalogEntry,
        request: inference_pb2.GenerateRequest,
        sampling: SamplingParams,
        priority: Priority,
    ) -> None:
        """Everything between an open entry and work at a replica."""
        token_ids = await tokenize(request, entry.tokenizer, max_prompt_bytes=self._config.max_prompt_bytes)
        hello = await self._hello(generation, entry, waits=request.progress)
        check_tokens(
            token_ids,
            field=request.WhichOneof("input"),
            max_model_len=hello.max_model_len,
            vocab_size=hello.vocab_size,
        )
        sampling.check_vocabulary(hello.vocab_size)
        if request.HasField("resume"):
            sampling = dataclasses.replace(sampling, seed=request.resume.seed)
        sampling = complete_sampling(sampling, max_completion_tokens=hello.max_model_len - len(token_ids))
        check_resumed_tokens(request.resume, max_tokens=sampling.max_tokens, vocab_size=hello.vocab_size)
        generation.start(
            replica_pb2.Submit(
                prompt_token_ids=token_ids,
                # Tokens in, tokens out: stop strings are matched here.
                sampling=sampling_to_proto(dataclasses.replace(sampling, stop=())),
                priority=priority_to_proto(priority),
                generation_id=generation.generation_id,
                cache_salt=request.cache_salt,
            ),
            resumed_candidates(request.resume, sampling, lambda: _text_stream(entry, sampling)),
            model=entry.name,
            balancer=entry.balancer,
            placement=Placement(
                num_prompt_tokens=len(token_ids),
                max_tokens=sampling.max_tokens,
                priority=priority,
                block_hashes=entry.balancer.block_hashes(token_ids, request.cache_salt),
                session_id=request.session_id,
            ),
            fingerprint=fingerprint_of(request.resume),
        )

    async def _hello(self, generation: Generation, entry: CatalogEntry, *, waits: bool) -> replica_pb2.ReplicaHello:
        """What the model's replicas say of it.

        Args:
            waits: for the first of them to be ready, where none ever was.

        Raises:
            ModelWarming: none has ever been met.
        """
        balancer = entry.balancer
        while True:
            try:
                return balancer.hello()
            except ModelWarming:
                if not waits:
                    raise
            generation.report(warming)
            ready = asyncio.Event()
            balancer.wait_ready(ready.set)
            try:
                await ready.wait()
            finally:
                balancer.forget(ready.set)


def _checked(request: inference_pb2.GenerateRequest, streams: bool) -> tuple[SamplingParams, Priority]:
    """Whatever can be said of a request without looking at its input.

    Raises:
        InvalidRequest: it can never be served.
    """
    check_request_id(request.request_id)
    check_labels(request.labels)
    check_cache_salt(request.cache_salt)
    priority = priority_of(request.priority)
    sampling = sampling_from_proto(request.sampling)
    if request.HasField("resume"):
        if not streams:
            raise InvalidRequest("only a stream can be resumed; send the request again as it was", field="resume")
        check_resume(request.resume, sampling)
    return sampling, priority


def _check_allowed(caller: Caller, model: str, priority: Priority) -> None:
    """Raises Forbidden: the model or the class is not for this caller."""
    if caller.models is not None and model not in caller.models:
        raise Forbidden(f"tenant {caller.tenant!r} may not use model {model!r}", field="model")
    if priority < caller.max_priority:
        raise Forbidden(
            f"tenant {caller.tenant!r} may not use class {priority.name}, only {caller.max_priority.name} and below",
            field="priority",
        )


def _key_of(request: inference_pb2.GenerateRequest, tenant: str) -> RequestKey:
    """What makes it the same request: all that it says but what its client has had of the answer."""
    body = request
    if request.HasField("resume"):
        body = inference_pb2.GenerateRequest()
        body.CopyFrom(request)
        body.ClearField("resume")
    return RequestKey(
        tenant=tenant,
        request_id=request.request_id,
        generation_id=request.resume.generation_id,
        digest=hashlib.blake2b(body.SerializeToString(deterministic=True), digest_size=16).digest(),
    )


def _text_stream(entry: CatalogEntry, sampling: SamplingParams) -> TextStream:
    return TextStream(entry.tokenizer, sampling.stop, min_tokens=sampling.min_tokens)
