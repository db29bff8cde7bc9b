"""The chunks of one generation, as an asynchronous iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType

import grpc

from cluster.client.results import Chunk, chunk_from_proto
from cluster.client.retry import Attempts


class AsyncChunkStream(AsyncIterator[Chunk]):
    """Iterates over a generation's chunks; made by ``AsyncClient.stream``, which has sent the request by then.

    Closing it cancels the generation: by ``aclose()``, at the end of an ``async with`` block, when the task that
    waits for a chunk is cancelled, or when nothing refers to it any more.

    Raises:
        ClusterError: while iterating; after that the stream is at its end.
    """

    def __init__(self, start: Callable[[float], grpc.aio.UnaryStreamCall], attempts: Attempts) -> None:
        self._closed = False
        self._received = False
        self._start = start
        self._attempts = attempts
        self._open()

    def _open(self) -> None:
        self._call = self._start(self._attempts.remaining_s())
        self._messages = aiter(self._call)

    async def __anext__(self) -> Chunk:
        while not self._closed:
            try:
                message = await anext(self._messages)
            except grpc.RpcError as failure:
                if self._closed:
                    break
                await self._retry(failure)
            except asyncio.CancelledError:
                # gRPC raises this where the call was cancelled, too: by aclose() in another task.
                task = asyncio.current_task()
                if self._closed and not (task and task.cancelling()):
                    break
                self._cancel()
                raise
            except StopAsyncIteration:
                self._cancel()
                raise
            else:
                self._received = True
                return chunk_from_proto(message)
        raise StopAsyncIteration

    async def _retry(self, failure: grpc.RpcError) -> None:
        try:
            await asyncio.sleep(self._attempts.backoff_s(failure, received=self._received))
        except BaseException:
            self._cancel()
            raise
        if not self._closed:
            self._open()

    def _cancel(self) -> None:
        self._closed = True
        self._call.cancel()

    async def aclose(self) -> None:
        """Cancels the generation if it still runs; the iterator is then at its end."""
        self._cancel()

    async def __aenter__(self) -> AsyncChunkStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # not if the request could not even be started
            self._cancel()
