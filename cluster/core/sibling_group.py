"""Candidates of one prompt, which is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.core.tracked_request import TrackedRequest


class SiblingGroup:
    """Requests with the same prompt: the first computes it, the others wait for it and fork from whoever has it.

    Should the first end before that, the next takes its place. Once the prompt has been computed nobody is held back
    any more, even where all that have it have lost their blocks: these can be found by hash while they last.
    """

    def __init__(self) -> None:
        self._first: TrackedRequest | None = None
        self._held_back: list[TrackedRequest] = []
        self._sources: dict[int, TrackedRequest] = {}

    @property
    def source(self) -> TrackedRequest | None:
        """A running sibling that earlier steps have computed the prompt of."""
        return next(iter(self._sources.values()), None)

    def add(self, tracked: TrackedRequest) -> bool:
        """Takes in a sibling before any of them has run. False: it is held back."""
        if self._first is None:
            self._first = tracked
            return True
        self._held_back.append(tracked)
        return False

    def computed(self, tracked: TrackedRequest) -> list[TrackedRequest]:
        """A sibling's prompt is computed by the steps planned so far; returns those that need not wait any more."""
        self._sources[tracked.request.request_id] = tracked
        released, self._held_back = self._held_back, []
        return released

    def stopped(self, tracked: TrackedRequest) -> None:
        """A sibling has lost its blocks."""
        self._sources.pop(tracked.request.request_id, None)

    def ended(self, tracked: TrackedRequest) -> TrackedRequest | None:
        """A sibling has ended; returns the one that takes its place, if it was waited for."""
        if tracked in self._held_back:
            self._held_back.remove(tracked)
        elif tracked is self._first and self._held_back:
            self._first = self._held_back.pop(0)
            return self._first
        return None
