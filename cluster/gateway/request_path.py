"""The one way of a request through the gateway, whatever protocol it came by."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc

from cluster.core.request import Priority, SamplingParams
from cluster.errors import ClusterError, InvalidRequest
from cluster.gateway.caller import current_caller
from cluster.gateway.catalog import Catalog, CatalogEntry
from cluster.gateway.config import GatewayConfig
from cluster.gateway.convert import check_cache_salt, check_labels, check_request_id, priority_of
from cluster.gateway.generation_table import GenerationTable, RequestKey
from cluster.gateway.reader import Reader
from cluster.gateway.resume import check_resume, places_in
from cluster.gateway.starter import Starter
from cluster.gateway.write_pacer import WritePacer
from cluster.observability.metrics import E2E_S, GENERATED_TOKENS, PROMPT_TOKENS, REQUESTS, MetricSink
from cluster.text.text_stream import TextStream
from cluster.v1 import inference_pb2
from cluster.wire import sampling_from_proto


class RequestPath:
    """Validates a request, hands it to a replica and lets it be read. Protocols translate to and from its messages."""

    def __init__(self, config: GatewayConfig, catalog: Catalog, table: GenerationTable, metrics: MetricSink) -> None:
        self._config = config
        self._catalog = catalog
        self._table = table
        self._metrics = metrics
        self._pacer = WritePacer()

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
            sampling, asked = _checked(request, streams)
            entry = self._catalog.serving(request.model)
            model = entry.name
            caller = current_caller()
            priority = entry.admission.allow(caller, asked)
            deadline_s = min(
                self._config.default_deadline_s if remaining_s is None else remaining_s,
                self._config.max_deadline_s,
                entry.admission.max_e2e_s(priority),
            )
            generation, is_new = self._table.open(_key_of(request, caller.tenant))
            reader = Reader(
                model,
                generation,
                streams=streams,
                progress=request.progress,
                max_unread_tokens=self._config.max_unread_tokens,
                pacer=self._pacer,
                first_sequence=request.resume.sequence,
                find_places=(
                    None
                    if is_new
                    else lambda: places_in(generation, request.resume, lambda: _text_stream(entry, sampling))
                ),
            )
            generation.attach(reader)
            try:
                generation.expire_after(deadline_s)
                if is_new:
                    Starter(
                        generation,
                        entry,
                        request,
                        caller=caller,
                        sampling=sampling,
                        priority=priority,
                        deadline_s=deadline_s,
                        max_prompt_bytes=self._config.max_prompt_bytes,
                    ).begin()
                if not request.progress:
                    await reader.begun()
                yield reader
            finally:
                reader.close()
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


def _checked(request: inference_pb2.GenerateRequest, streams: bool) -> tuple[SamplingParams, Priority | None]:
    """Whatever can be said of a request without looking at its input.

    Raises:
        InvalidRequest: it can never be served.
    """
    check_request_id(request.request_id)
    check_labels(request.labels)
    check_cache_salt(request.cache_salt)
    priority = priority_of(request.priority) if request.priority else None
    sampling = sampling_from_proto(request.sampling)
    if request.HasField("resume"):
        if not streams:
            raise InvalidRequest("only a stream can be resumed; send the request again as it was", field="resume")
        check_resume(request.resume, sampling)
    return sampling, priority


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
