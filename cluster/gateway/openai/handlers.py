"""OpenAI's endpoints: each from its HTTP request to its answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from cluster.errors import InvalidRequest
from cluster.gateway.catalog import Catalog, CatalogEntry
from cluster.gateway.openai.answers import Answer, ChatAnswer, CompletionAnswer
from cluster.gateway.openai.convert import chat_request, completion_requests
from cluster.gateway.openai.errors import error_body
from cluster.gateway.openai.prompts import read_chunks, read_whole
from cluster.gateway.openai.schema import ChatBody, CompletionBody, SamplingBody, parse_body
from cluster.gateway.request_path import Reader, RequestPath
from cluster.v1 import inference_pb2

_STREAM_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # proxies that would collect the events first
}


class OpenAIHandlers:
    """Speaks OpenAI's API. Errors are raised; the server's middleware maps them."""

    def __init__(self, catalog: Catalog, path: RequestPath) -> None:
        self._catalog = catalog
        self._path = path
        self._created = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.list_models),
            web.get("/v1/models/{model:.+}", self.get_model),
            web.post("/v1/completions", self.complete),
            web.post("/v1/chat/completions", self.chat),
            web.get("/health", self.health),
        ]

    async def health(self, request: web.Request) -> web.Response:
        """200 while every model has a replica that takes work, else 503."""
        return web.Response(status=200 if self._catalog.ready else 503)

    async def list_models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model(entry) for entry in self._catalog]})

    async def get_model(self, request: web.Request) -> web.Response:
        return _json(self._model(self._catalog.lookup(request.match_info["model"])))

    def _model(self, entry: CatalogEntry) -> dict[str, Any]:
        described = entry.balancer.describe()
        return {
            "id": entry.name,
            "object": "model",
            "created": self._created,
            "owned_by": "cluster",
            "max_model_len": described.max_model_len or None,
        }

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = parse_body(await _read_json(request), CompletionBody)
        requests = completion_requests(body, request_id=_request_id(request))
        return await self._answer(request, body, requests, CompletionAnswer, logprobs=body.logprobs is not None)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = parse_body(await _read_json(request), ChatBody)
        requests = [chat_request(body, request_id=_request_id(request))]
        return await self._answer(request, body, requests, ChatAnswer, logprobs=bool(body.logprobs))

    async def _answer(
        self,
        request: web.Request,
        body: SamplingBody,
        requests: Sequence[inference_pb2.GenerateRequest],
        kind: type[Answer],
        *,
        logprobs: bool,
    ) -> web.StreamResponse:
        """Runs the prompts and writes what comes of them."""

        def begin(reader: Reader) -> Answer:
            return kind(
                reader.generation_id,
                reader.model,
                self._catalog.lookup(reader.model).tokenizer,
                n=body.n or 1,
                logprobs=logprobs,
                usage_in_stream=body.stream_options is not None and body.stream_options.include_usage,
            )

        if body.stream:
            return await self._stream(request, requests, begin)
        if body.stream_options is not None:
            raise InvalidRequest("stream_options needs stream: true", field="stream_options")
        results = await read_whole(self._path, requests)
        reader = results[0][0]
        answer = begin(reader).whole([response for _, response in results])
        return _json(answer, headers={"x-request-id": reader.generation_id})

    async def _stream(
        self, request: web.Request, requests: Sequence[inference_pb2.GenerateRequest], begin: Any
    ) -> web.StreamResponse:
        """Server-sent events. Nothing is sent before the first chunk, so that what fails until then has its status."""
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        answer: Answer | None = None
        async with aclosing(read_chunks(self._path, requests)) as items:
            try:
                async for prompt, reader, chunk in items:
                    if answer is None:
                        answer = begin(reader)
                        response.headers["x-request-id"] = reader.generation_id
                        await response.prepare(request)
                    if events := answer.events(prompt, chunk):
                        await response.write(b"".join(map(_event, events)))
            except Exception as error:
                if answer is None or not _connected(request):
                    raise
                await response.write(_event(error_body(error)))
            else:
                await response.write(b"".join(map(_event, answer.last_events())) + b"data: [DONE]\n\n")
        await response.write_eof()
        return response


async def _read_json(request: web.Request) -> bytes:
    # A page of another site may send other types without asking first.
    if request.content_type != "application/json":
        raise InvalidRequest("the body must be JSON: send Content-Type: application/json")
    return await request.read()


def _request_id(request: web.Request) -> str:
    return request.headers.get("idempotency-key", "")


def _connected(request: web.Request) -> bool:
    return request.transport is not None and not request.transport.is_closing()


def _json(body: dict[str, Any], *, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", headers=headers)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(body)
