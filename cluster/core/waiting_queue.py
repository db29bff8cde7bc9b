"""Who is admitted to the batch next."""

from __future__ import annotations

import bisect
from operator import attrgetter

from cluster.core.request import Priority
from cluster.core.tracked_request import TrackedRequest

AGEING_S = 5.0
MAX_PASSED = 3

_AGE_KEY = attrgetter("age_key")


class WaitingQueue:
    """Requests that wait, most urgent class first, oldest first within a class, with ageing.

    Ageing: a request is *overdue* once ``AGEING_S`` seconds have gone since its arrival. While the oldest of all that
    wait is overdue, at most ``MAX_PASSED`` admissions in a row go to others; the next one is its. So an overdue request
    that ``m`` older ones wait beside (or come back to, preempted) is admitted after at most
    ``(MAX_PASSED + 1) * (m + 1)`` admissions whatever arrives meanwhile, and lower classes take no more than one
    admission in ``MAX_PASSED + 1`` from the urgent ones.
    """

    def __init__(self) -> None:
        # A sorted list per class: arrivals are nearly in order, so insertion is at the end, and a cancelled request
        # leaves nothing behind.
        self._classes: tuple[list[TrackedRequest], ...] = tuple([] for _ in Priority)
        self._num_passed = 0

    def __len__(self) -> int:
        return sum(map(len, self._classes))

    def push(self, tracked: TrackedRequest) -> None:
        bisect.insort(self._classes[tracked.priority], tracked, key=_AGE_KEY)

    def peek(self, now: float) -> TrackedRequest | None:
        """Whom to admit next; None when nobody waits."""
        heads = [waiting[0] for waiting in self._classes if waiting]
        if not heads:
            return None
        if self._num_passed >= MAX_PASSED:
            oldest = min(heads, key=_AGE_KEY)
            if _is_overdue(oldest, now):
                return oldest
        return heads[0]

    def admit(self, tracked: TrackedRequest, now: float) -> bool:
        """Removes the request that ``peek`` named. True: it went before a more urgent class for its age."""
        oldest = min((waiting[0] for waiting in self._classes if waiting), key=_AGE_KEY)
        out_of_turn = any(self._classes[: tracked.priority])
        self._num_passed = self._num_passed + 1 if tracked is not oldest and _is_overdue(oldest, now) else 0
        self.remove(tracked)
        return out_of_turn

    def remove(self, tracked: TrackedRequest) -> bool:
        """False where it does not wait here."""
        waiting = self._classes[tracked.priority]
        index = bisect.bisect_left(waiting, tracked.age_key, key=_AGE_KEY)
        if index == len(waiting) or waiting[index] is not tracked:
            return False
        del waiting[index]
        return True


def _is_overdue(tracked: TrackedRequest, now: float) -> bool:
    return now - tracked.request.arrival >= AGEING_S
