"""Which sequences decode in which step, where several steps are under way in the stages of a pipeline."""

from __future__ import annotations

from operator import attrgetter

from cluster.core.tracked_request import TrackedRequest

_SAMPLED_IN = attrgetter("sampled_in")


class MicroBatches:
    """Lets the decoding sequences fall apart into as many parts as there are stages, one for each step in turn.

    A sequence whose newest token is being sampled by one of the last ``num_stages - 1`` plans that are under way would
    only have the first stage wait for it, so it takes no part. Of the others a step has an equal part of all that
    decode at most, those first that have waited longest: what is slow in a pipeline is its largest micro-batch, which
    every stage waits for. No step waits for a part to be full.

    With one stage nobody is ever left out.

    Attributes:
        num_planned: plans so far, and so the number of the next one.
    """

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self.num_planned = 0
        self._num_done = 0

    def pick(self, decoding: list[TrackedRequest]) -> list[TrackedRequest]:
        """Who takes part in the next step, of all that miss one token; the order stays."""
        if self._num_stages == 1:
            return list(decoding)
        ready = self._ready(decoding)
        size = -(-len(decoding) // self._num_stages)
        if len(ready) <= size:
            return ready
        oldest = set(sorted(ready, key=_SAMPLED_IN)[:size])
        return [tracked for tracked in ready if tracked in oldest]

    def plan(self) -> None:
        """A step was planned that is not empty."""
        self.num_planned += 1

    def finish(self) -> None:
        """The oldest step under way is done."""
        self._num_done += 1

    def _ready(self, decoding: list[TrackedRequest]) -> list[TrackedRequest]:
        first_waited_for = max(self._num_done, self.num_planned - self._num_stages + 1)
        return [tracked for tracked in decoding if tracked.sampled_in < first_waited_for]
