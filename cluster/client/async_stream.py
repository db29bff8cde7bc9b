"""The chunks of one generation, as an asynchronous iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType

import grpc

from cluster.client.received import Received
from cluster.client.results import Chunk, Ledger, chunk_from_proto, ledger_from_trailer
from cluster.client.retry import Attempts
from cluster.errors import Cancelled
from cluster.v1 import inference_pb2 as pb

# Starts a call: what to send, the address to send it to, and its timeout in seconds.
Start = Callable[[pb.GenerateRequest, str, float], grpc.aio.UnaryStreamCall]


class AsyncChunkStream(AsyncIterator[Chunk]):
    """Iterates over a generation's chunks; made by ``AsyncClient.stream``, which has sent the request by then.

    It goes on at another gateway, and has the attributes, as ``ChunkStream``.

    Closing it cancels the generation: by ``aclose()``, at the end of an ``async with`` block, when the task that
    waits for a chunk is cancelled, or when nothing refers to it any more.

    Raises:
        ClusterError: while iterating; after that the stream is at its end.
    """

    def __init__(self, request: pb.GenerateRequest, start: Start, attempts: Attempts) -> None:
        self.request_id = request.request_id
        self.ledger: Ledger | None = None
        self.num_resumes = 0
        self._closed = False
        self._received = Received(request)
        self._start = start
        self._attempts = attempts
        self._open()

    def _open(self) -> None:
        request, attempts = self._received.next_request(), self._attempts
        try:
            self._call = self._start(request, attempts.address, attempts.remaining_s())
        except grpc.aio.UsageError:  # the channel was closed meanwhile
            raise Cancelled("the client was closed") from None
        self._messages = aiter(self._call)

    async def __anext__(self) -> Chunk:
        while not self._closed:
            try:
                message = await anext(self._messages)
            except grpc.RpcError as failure:
                self.ledger = ledger_from_trailer(failure.trailing_metadata())
                if self._closed or self._received.complete:
                    break
                await self._go_on(failure)
            except asyncio.CancelledError:
                # gRPC raises this where the call was cancelled, too: by aclose() in another task.
                task = asyncio.current_task()
                if self._closed and not (task and task.cancelling()):
                    break
                self._cancel()
                raise
            except StopAsyncIteration:
                self.ledger = ledger_from_trailer(await self._call.trailing_metadata())
                break
            else:
                return self._taken(message)
        self._cancel()
        raise StopAsyncIteration

    def _taken(self, message: pb.GenerateChunk) -> Chunk:
        fresh = not self._received.started
        try:
            self._received.add(message)
        except BaseException:
            self._cancel()
            raise
        if fresh and self._received.started:
            self._attempts.succeeded()
        self._attempts.progressed()
        return chunk_from_proto(message)

    async def _go_on(self, failure: grpc.RpcError) -> None:
        try:
            await asyncio.sleep(self._attempts.backoff_s(failure, received=self._received.started))
            if not self._closed:
                self._open()
        except BaseException:
            self._cancel()
            raise
        self.num_resumes += self._received.started

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
