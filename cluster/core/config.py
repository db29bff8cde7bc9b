"""Limits of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import require


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How much runs at once.

    Attributes:
        max_num_seqs: sequences in the running batch.
        max_num_batched_tokens: tokens computed in one step; long prompts are cut into chunks of at most this.
        max_num_waiting: sequences that may wait in the engine; more are refused.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_num_waiting: int = 4096

    def __post_init__(self) -> None:
        require(self.max_num_seqs >= 1, "max_num_seqs", "must be at least 1")
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"is {self.max_num_batched_tokens}; every sequence of a batch needs one: at least max_num_seqs, "
            f"{self.max_num_seqs}",
        )
        require(self.max_num_waiting >= 1, "max_num_waiting", "must be at least 1")
