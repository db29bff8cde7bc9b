"""OpenAI's endpoints: each from its HTTP request to its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from cluster.errors import InvalidRequest
from cluster.gateway.catalog import Catalog, CatalogEntry
from cluster.gateway.openai.answers import Answer, ChatAnswer, CompletionAnswer
from cluster.gateway.openai.convert import chat_request, completion_requests
from cluster.gateway.openai.errors import HttpError
from cluster.gateway.openai.event_stream import EventStream
from cluster.gateway.openai.prompts import read_whole
from cluster.gateway.openai.schema import ChatBody, CompletionBody, SamplingBody, parse_body
from cluster.gateway.reader import Reader
from cluster.gateway.request_path import RequestPath
from cluster.v1 import inference_pb2

_BODY_TIMEOUT_S = 60.0


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
        ]

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
            return await EventStream(request, begin).run(self._path, requests)
        if body.stream_options is not None:
            raise InvalidRequest("stream_options needs stream: true", field="stream_options")
        results = await read_whole(self._path, requests)
        reader = results[0].reader
        return _json(begin(reader).whole(results), headers={"x-request-id": reader.generation_id})


async def _read_json(request: web.Request) -> bytes:
    # A page of another site may send other types without asking first.
    if request.content_type != "application/json":
        raise InvalidRequest("the body must be JSON: send Content-Type: application/json")
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise HttpError(408, f"the body did not come within {_BODY_TIMEOUT_S:g} s") from None


def _request_id(request: web.Request) -> str:
    return request.headers.get("idempotency-key", "")


def _json(body: dict[str, Any], *, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", headers=headers)
