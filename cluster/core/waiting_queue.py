"""Who waits for a place in the batch."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from cluster.core.request import Priority
from cluster.core.tracked_request import TrackedRequest

_AGE_KEY = attrgetter("age_key")


class WaitingQueue:
    """Requests that wait, by class. A class has one target for all of its requests, so the earliest deadline is that of
    the oldest; who comes back, preempted, has its old place."""

    def __init__(self) -> None:
        # A sorted list per class: arrivals are nearly in order, so insertion is at the end, and a cancelled request
        # leaves nothing behind.
        self._classes: tuple[list[TrackedRequest], ...] = tuple([] for _ in Priority)

    def push(self, tracked: TrackedRequest) -> None:
        bisect.insort(self._classes[tracked.request.priority], tracked, key=_AGE_KEY)

    def head(self, priority: Priority) -> TrackedRequest | None:
        """The oldest of its class."""
        waiting = self._classes[priority]
        return waiting[0] if waiting else None

    def __iter__(self) -> Iterator[TrackedRequest]:
        """The most urgent class first, and the oldest of each."""
        return chain.from_iterable(self._classes)

    def remove(self, tracked: TrackedRequest) -> bool:
        """False where it does not wait here."""
        waiting = self._classes[tracked.request.priority]
        index = bisect.bisect_left(waiting, tracked.age_key, key=_AGE_KEY)
        if index == len(waiting) or waiting[index] is not tracked:
            return False
        del waiting[index]
        return True
