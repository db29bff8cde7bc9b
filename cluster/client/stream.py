"""The chunks of one generation, as an iterator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType

import grpc

from cluster.client.results import Chunk, chunk_from_proto
from cluster.client.retry import Attempts


class ChunkStream(Iterator[Chunk]):
    """Iterates over a generation's chunks; made by ``Client.stream``, which has sent the request by then.

    Closing it cancels the generation: by ``close()``, at the end of a ``with`` block, or when nothing refers to it any
    more (as after ``break`` in ``for chunk in client.stream(...)``). ``close`` may be called from another thread.

    Raises:
        ClusterError: from ``next``; after that the stream is at its end.
    """

    def __init__(self, start: Callable[[float], grpc.Call], attempts: Attempts) -> None:
        self._closed = False
        self._received = False
        self._start = start
        self._attempts = attempts
        self._call = start(attempts.remaining_s())

    def __next__(self) -> Chunk:
        while not self._closed:
            try:
                message = next(self._call)
            except grpc.RpcError as failure:
                if self._closed:
                    break
                self._retry(failure)
            except BaseException:  # the end of the stream; Ctrl-C
                self.close()
                raise
            else:
                self._received = True
                return chunk_from_proto(message)
        raise StopIteration

    def _retry(self, failure: grpc.RpcError) -> None:
        try:
            time.sleep(self._attempts.backoff_s(failure, received=self._received))
        except BaseException:
            self.close()
            raise
        self._call = self._start(self._attempts.remaining_s())
        if self._closed:
            self._call.cancel()

    def close(self) -> None:
        """Cancels the generation if it still runs; the iterator is then at its end."""
        self._closed = True
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
