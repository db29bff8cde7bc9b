"""The virtual clock: what happens next."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class EventQueue:
    """Actions in the order of their times; those of one time in the order in which they were put in.

    Attributes:
        now: virtual seconds; the time of the action that runs, or ran last. It never goes back.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Action]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, at_s: float, action: Action) -> None:
        """Has ``action`` run at ``at_s``.

        Raises:
            ValueError: that time has passed.
        """
        if not at_s >= self.now:  # so that NaN is refused too
            raise ValueError(f"an event at {at_s} s was added at {self.now} s")
        heapq.heappush(self._heap, (at_s, self._num_added, action))
        self._num_added += 1

    def run(self) -> None:
        """Runs actions, which may add others, until none is left."""
        while self._heap:
            self.now, _, action = heapq.heappop(self._heap)
            action()
