"""Operations that were handed to a device and are not known to have finished."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.distributed.nccl_cuda import CudaDevice, Event

_MAX_MARKS = 256  # beyond it, the newest mark moves on: the oldest is what deadlines are about


class InFlight:
    """Marks behind operations on a device's streams. One thread queues and marks, another one asks.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, cuda: CudaDevice, clock: Callable[[], float]) -> None:
        self._cuda, self._clock = cuda, clock
        self._lock = threading.Lock()
        self._marks: deque[tuple[Event, float]] = deque()  # (event, when it was queued), oldest first
        self._free: list[Event] = []
        self._progress_at = 0.0
        self._queueing_since: float | None = None

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """Around the call that queues an operation: it may itself wait for peers, to connect to them."""
        self._queueing_since = self._clock()
        try:
            yield
        finally:
            self._queueing_since = None

    def mark(self) -> None:
        """Marks the current stream's end; it must not be capturing."""
        with self._lock:
            if len(self._marks) < _MAX_MARKS:
                event = self._cuda.record(self._free.pop() if self._free else None)
                self._marks.append((event, self._clock()))
            else:
                event, queued_at = self._marks[-1]
                self._marks[-1] = (self._cuda.record(event), queued_at)

    def waited_s(self) -> float:
        """For how long nothing has finished, in seconds; 0 where nothing is in flight."""
        now, since = self._clock(), self._queueing_since
        with self._lock:
            while self._marks and self._marks[0][0].query():
                self._free.append(self._marks.popleft()[0])
                self._progress_at = now
            if self._marks:
                marked = max(self._marks[0][1], self._progress_at)
                since = marked if since is None else min(since, marked)
        return 0.0 if since is None else now - since
