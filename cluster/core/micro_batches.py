"""What goes into which step, where several steps are under way in the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from cluster.core.tracked_request import TrackedRequest

_ROUNDS = 2  # of the stages, over which prompts are spread
_SAMPLED_IN = attrgetter("sampled_in")


class MicroBatches:
    """Cuts the work into steps that are alike, so that no stage waits for another that has a longer one.

    Those that decode fall apart into as many parts as there are stages, one for each step in turn.

    A sequence whose newest token is being sampled by one of the last ``num_stages - 1`` plans that are under way would
    only have the first stage wait for it, so it takes no part. Of the others a step has an equal part of all that
    decode at most, those first that have waited longest: what is slow in a pipeline is its largest micro-batch, which
    every stage waits for. No step waits for a part to be full.

    Prompts are spread over as many steps as go through the pipeline in two rounds: every stage would stand idle while a
    whole one passes through the others. As the rest is spread anew with each step, prompts that come one by one make
    for chunks of much the same size. The rule is that of gLLM (Guo et al., SC 2025), less its look at the KV pool.

    With one stage nobody is left out, and nothing is cut.

    Attributes:
        num_planned: plans so far, and so the number of the next one.

    Args:
        num_stages: of the pipeline.
        min_prompt_tokens: to which prompts are cut at most; a step of less would not be shorter by much.
    """

    def __init__(self, num_stages: int, min_prompt_tokens: int) -> None:
        self._num_stages = num_stages
        self._min_prompt_tokens = min_prompt_tokens
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

    def max_prompt_tokens(self, prompts: Iterable[TrackedRequest], limit: int) -> int:
        """How many tokens of prompts the next step may have.

        Args:
            prompts: all that could be computed in it, were it long enough.
            limit: what it may have at most for other reasons.
        """
        if self._num_stages == 1:
            return limit
        num_steps = _ROUNDS * self._num_stages
        num_tokens = 0
        for tracked in prompts:
            num_tokens += tracked.num_missing_tokens
            if num_tokens >= num_steps * limit:
                return limit
        return min(limit, max(-(-num_tokens // num_steps), self._min_prompt_tokens))

    def plan(self) -> None:
        """A step was planned that is not empty."""
        self.num_planned += 1

    def finish(self) -> None:
        """The oldest step under way is done."""
        self._num_done += 1

    def _ready(self, decoding: list[TrackedRequest]) -> list[TrackedRequest]:
        first_waited_for = max(self._num_done, self.num_planned - self._num_stages + 1)
        return [tracked for tracked in decoding if tracked.sampled_in < first_waited_for]
