"""A live request's place in the scheduler."""

from __future__ import annotations

from cluster.core.request import Priority, Request
from cluster.core.sibling_group import SiblingGroup


class TrackedRequest:
    """Counters of one request that has not ended; the scheduler alone changes them.

        prompt                          completion   placeholders
        [0 ........ num_prompt_tokens)  [.........)  [.. num_tokens)
        [0 ..... num_computed_tokens)   <- computed, or in a step under way

    Attributes:
        request: as it came in.
        order: how many requests came before it; tells equal arrivals apart.
        group: it and its siblings, where it has any.
        block_hashes: of its full blocks, as far as they are known.
        num_tokens: prompt, completion so far and placeholders.
        max_num_tokens: with the last token that it may have.
        num_placeholders: being sampled by steps under way.
        sampled_in: which plan sampled its newest token, of all plans; -1: none yet.
        num_computed_tokens: of its tokens, those with a KV entry in its blocks or in host memory, now or after the
            steps under way.
        num_block_tokens: how many fit in its blocks.
        running: in the batch: it holds blocks, and the worker holds its state.
        num_tokens_preempted: of its tokens, those that it had when it was preempted last; 0: it never was.
        is_shielded: it runs for its class's share, so more urgent classes do not preempt it.
    """

    __slots__ = (
        "block_hashes",
        "group",
        "is_shielded",
        "max_num_tokens",
        "num_block_tokens",
        "num_computed_tokens",
        "num_placeholders",
        "num_tokens",
        "num_tokens_preempted",
        "order",
        "request",
        "running",
        "sampled_in",
    )

    def __init__(self, request: Request, order: int, group: SiblingGroup | None = None) -> None:
        self.request = request
        self.order = order
        self.group = group
        self.block_hashes = list(request.block_hashes)
        self.num_tokens = request.num_prompt_tokens + request.num_emitted_tokens
        self.max_num_tokens = request.num_prompt_tokens + request.max_tokens
        self.num_placeholders = 0
        self.sampled_in = -1
        self.num_computed_tokens = 0
        self.num_block_tokens = 0
        self.running = False
        self.num_tokens_preempted = 0
        self.is_shielded = False

    @property
    def num_missing_tokens(self) -> int:
        """Tokens that no step has computed or is computing."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def has_computed_prompt(self) -> bool:
        return self.num_computed_tokens >= self.request.num_prompt_tokens

    @property
    def age_key(self) -> tuple[float, int]:
        """Sorts by arrival."""
        return self.request.arrival, self.order

    @property
    def urgency_key(self) -> tuple[Priority, float, int]:
        """Sorts by class, then arrival; the greatest is preempted first."""
        return Priority.P0 if self.is_shielded else self.request.priority, self.request.arrival, self.order
