"""The chunks of one generation, as an iterator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType

import grpc

from cluster.client.received import Received
from cluster.client.results import Chunk, Ledger, chunk_from_proto, ledger_from_trailer
from cluster.client.retry import Attempts
from cluster.errors import Cancelled
from cluster.v1 import inference_pb2 as pb

# Starts a call: what to send, the address to send it to, and its timeout in seconds.
Start = Callable[[pb.GenerateRequest, str, float], grpc.Call]


class ChunkStream(Iterator[Chunk]):
    """Iterates over a generation's chunks; made by ``Client.stream``, which has sent the request by then.

    A stream whose gateway dies goes on at another one, or at the same when it is back, from what came of it: the reader
    sees each token once and no error.

    Closing it cancels the generation: by ``close()``, at the end of a ``with`` block, or when nothing refers to it any
    more (as after ``break`` in ``for chunk in client.stream(...)``). ``close`` may be called from another thread.

    Attributes:
        request_id: the call's name, by which ``Client.cancel`` finds it.
        ledger: where the request's time went at the last gateway; None until the end, and where it did not say.
        num_resumes: how often the stream was cut off and went on.

    Raises:
        ClusterError: from ``next``; after that the stream is at its end.
    """

    def __init__(self, request: pb.GenerateRequest, start: Start, attempts: Attempts) -> None:
        self.request_id = request.request_id
        self.ledger: Ledger | None = None
        self.num_resumes = 0
        self._closed = threading.Event()
        self._received = Received(request)
        self._start = start
        self._attempts = attempts
        self._open()

    def _open(self) -> None:
        request, attempts = self._received.next_request(), self._attempts
        try:
            self._call = self._start(request, attempts.address, attempts.remaining_s())
        except ValueError:  # gRPC's word for a channel that was closed meanwhile
            raise Cancelled("the client was closed") from None
        if self._closed.is_set():
            self._call.cancel()

    def __next__(self) -> Chunk:
        while not self._closed.is_set():
            try:
                message = next(self._call)
            except grpc.RpcError as failure:
                self.ledger = ledger_from_trailer(failure.trailing_metadata())
                if self._closed.is_set() or self._received.complete:
                    break
                self._go_on(failure)
            except StopIteration:
                self.ledger = ledger_from_trailer(self._call.trailing_metadata())
                break
            except BaseException:  # Ctrl-C
                self.close()
                raise
            else:
                return self._taken(message)
        self.close()
        raise StopIteration

    def _taken(self, message: pb.GenerateChunk) -> Chunk:
        fresh = not self._received.started
        try:
            self._received.add(message)
        except BaseException:
            self.close()
            raise
        if fresh and self._received.started:
            self._attempts.succeeded()
        self._attempts.progressed()
        return chunk_from_proto(message)

    def _go_on(self, failure: grpc.RpcError) -> None:
        try:
            wait_s = self._attempts.backoff_s(failure, received=self._received.started)
            if not self._closed.wait(wait_s):
                self._open()
        except BaseException:
            self.close()
            raise
        self.num_resumes += self._received.started

    def close(self) -> None:
        """Cancels the generation if it still runs; the iterator is then at its end."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> ChunkStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # not if the request could not even be started
            self.close()
