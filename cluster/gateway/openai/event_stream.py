"""An answer as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from cluster.errors import Cancelled
from cluster.gateway.openai.answers import Answer
from cluster.gateway.openai.errors import error_body
from cluster.gateway.openai.prompts import read_chunks
from cluster.gateway.reader import Reader
from cluster.gateway.request_path import RequestPath
from cluster.v1 import inference_pb2

_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # proxies that would collect the events first
}
_STALLED_BYTES = 2**15  # below what makes a write wait
_STALL_S = 60.0


class EventStream:
    """The answer to one request, event by event.

    Nothing is sent before the first event, so that what fails until then has its status. What fails later is the last
    event.

    Args:
        begin: makes the answer, once its first prompt has begun.
    """

    def __init__(self, request: web.Request, begin: Callable[[Reader], Answer]) -> None:
        self._request = request
        self._begin = begin
        self._response = web.StreamResponse(headers=_HEADERS)
        self._answer: Answer | None = None

    async def run(self, path: RequestPath, requests: Sequence[inference_pb2.GenerateRequest]) -> web.StreamResponse:
        """Runs the prompts and writes what comes of them.

        Raises:
            Exception: why there is no answer, where none has begun.
        """
        try:
            await read_chunks(path, requests, self._write_chunk)
            await self._write(self._answer.last_events() if self._answer else (), end=b"data: [DONE]\n\n")
        except _ClientGone:
            pass
        except Exception as error:
            if self._answer is None:
                raise
            with contextlib.suppress(_ClientGone):
                await self._write([error_body(error)])
        return self._response

    async def _write_chunk(self, prompt: int, reader: Reader, chunk: inference_pb2.GenerateChunk) -> None:
        if self._answer is None:
            self._answer = self._begin(reader)
            self._response.headers["x-request-id"] = reader.generation_id
            await self._response.prepare(self._request)
        if events := self._answer.events(prompt, chunk, reader):
            await self._write(events)

    async def _write(self, events: Iterable[dict[str, Any]], *, end: bytes = b"") -> None:
        """Raises _ClientGone, also where it has taken nothing for long while much waits for it."""
        data = b"".join([b"data: %b\n\n" % msgspec.json.encode(event) for event in events]) + end
        transport = self._request.transport
        try:
            if transport is None:
                raise _ClientGone("the client is gone")
            if transport.get_write_buffer_size() < _STALLED_BYTES:
                await self._response.write(data)
                return
            async with asyncio.timeout(_STALL_S):
                await self._response.write(data)
        except ConnectionError:
            raise _ClientGone("the client is gone") from None
        except TimeoutError:
            transport.abort()
            raise _ClientGone("the client takes nothing") from None


class _ClientGone(Cancelled):
    """Nobody is left to tell."""
