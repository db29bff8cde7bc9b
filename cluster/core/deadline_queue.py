"""Whose time is up."""

from __future__ import annotations

import heapq


class DeadlineQueue:
    """Deadlines of live requests. Every operation costs O(log n), spread over the calls.

    Most requests end long before their deadline. What they leave in the heap is swept out when it outweighs the rest.
    """

    def __init__(self) -> None:
        self._deadlines: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._deadlines)

    def add(self, request_id: int, deadline: float) -> None:
        self._deadlines[request_id] = deadline
        heapq.heappush(self._heap, (deadline, request_id))

    def discard(self, request_id: int) -> None:
        """Forgets a request; one without a deadline is ignored."""
        if self._deadlines.pop(request_id, None) is not None and len(self._heap) > 2 * len(self._deadlines) + 64:
            self._heap = [(deadline, request_id) for request_id, deadline in self._deadlines.items()]
            heapq.heapify(self._heap)

    def pop_expired(self, now: float) -> list[int]:
        """Removes and returns the requests whose deadline is ``now`` or earlier, earliest first."""
        expired = []
        while self._heap and self._heap[0][0] <= now:
            deadline, request_id = heapq.heappop(self._heap)
            if self._deadlines.get(request_id) == deadline:
                del self._deadlines[request_id]
                expired.append(request_id)
        return expired
