"""A live request's place in the scheduler."""

from __future__ import annotations

from cluster.core.request import Priority, Request


class TrackedRequest:
    """Counters of one request that has not ended; the scheduler alone changes them.

        prompt                          sampled      placeholders
        [0 ........ num_prompt_tokens)  [.........)  [..........)
        [0 ..... num_computed_tokens)   <- computed, or in a step under way

    Attributes:
        request: as it came in.
        order: how many requests came before it; tells equal arrivals apart.
        priority: its class; P0 once it has been admitted out of turn for its age, so that it is not preempted for those
            it was let past.
        num_computed_tokens: of its tokens, those with a KV entry, now or after the steps under way.
        num_output_tokens: sampled, and known to be.
        num_placeholders: being sampled by steps under way.
        running: in the batch: it holds blocks, and the worker holds its state.
    """

    __slots__ = (
        "num_computed_tokens",
        "num_output_tokens",
        "num_placeholders",
        "order",
        "priority",
        "request",
        "running",
    )

    def __init__(self, request: Request, order: int) -> None:
        self.request = request
        self.order = order
        self.priority = request.priority
        self.num_computed_tokens = 0
        self.num_output_tokens = 0
        self.num_placeholders = 0
        self.running = False

    @property
    def num_tokens(self) -> int:
        """Prompt, sampled and placeholders."""
        return self.request.num_prompt_tokens + self.num_output_tokens + self.num_placeholders

    @property
    def num_missing_tokens(self) -> int:
        """Tokens that no step has computed or is computing."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_sampled_out(self) -> bool:
        """Whether the last token it may have is sampled or being sampled."""
        return self.num_output_tokens + self.num_placeholders >= self.request.max_tokens

    @property
    def age_key(self) -> tuple[float, int]:
        """Sorts by arrival."""
        return self.request.arrival, self.order

    @property
    def urgency_key(self) -> tuple[Priority, float, int]:
        """Sorts by class, then arrival; the greatest is preempted first."""
        return self.priority, self.request.arrival, self.order
