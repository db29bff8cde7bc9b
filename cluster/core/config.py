"""Limits and policies of the scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.core.request import Priority
from cluster.errors import require


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """What a priority class is promised.

    Attributes:
        share: part of the work that the class gets whenever it has enough of its own, in (0, 1]; what it leaves goes to
            the others.
        target_ms: how soon a request should get its turn, in milliseconds; null: whenever there is time.
    """

    share: float
    target_ms: float | None = None

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", f"is {self.share}; it must be above 0 and at most 1")
        require(
            self.target_ms is None or 0 < self.target_ms < math.inf,
            "target_ms",
            f"is {self.target_ms}; it must be above 0, or null",
        )

    @property
    def target_s(self) -> float:
        """Infinite where there is none."""
        return math.inf if self.target_ms is None else self.target_ms / 1e3


@dataclass(frozen=True, kw_only=True)
class ClassesConfig:
    """The priority classes. Their shares add up to 1 at most.

    Attributes:
        p0: the most urgent: a person waits.
        p1: the class of requests that name none.
        p2: less urgent.
        p3: batch work.
    """

    p0: ClassConfig = field(default_factory=lambda: ClassConfig(share=0.4, target_ms=200.0))
    p1: ClassConfig = field(default_factory=lambda: ClassConfig(share=0.3, target_ms=500.0))
    p2: ClassConfig = field(default_factory=lambda: ClassConfig(share=0.2, target_ms=1000.0))
    p3: ClassConfig = field(default_factory=lambda: ClassConfig(share=0.1))

    def __post_init__(self) -> None:
        total = sum(each.share for each in self.by_priority().values())
        require(total <= 1 + 1e-9, "", f"the shares add up to {total:g}; they may add up to 1")

    def by_priority(self) -> dict[Priority, ClassConfig]:
        return dict(zip(Priority, (self.p0, self.p1, self.p2, self.p3), strict=True))


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How much runs at once, and for whom.

    Attributes:
        max_num_seqs: sequences in the running batch.
        max_num_batched_tokens: tokens computed in one step; long prompts are cut into chunks of at most this.
        max_num_waiting: sequences that may wait in the engine. More are refused, but of classes of which fewer wait
            than their share of this: one class's flood does not shut the others out.
        classes: shares and latency targets of the priority classes.
        target_itl_ms: how long a step may take while sequences are being generated, in milliseconds, so that their next
            tokens come in time; prompts are cut to what fits. null: only max_num_batched_tokens cuts them.
        park_bytes: host memory for the KV of preempted sequences that is dearer to compute again than to copy. It is
            taken when it is needed, and given back. 0: none.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_num_waiting: int = 4096
    classes: ClassesConfig = field(default_factory=ClassesConfig)
    target_itl_ms: float | None = None
    park_bytes: int = 2**30

    def __post_init__(self) -> None:
        require(self.max_num_seqs >= 1, "max_num_seqs", "must be at least 1")
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"is {self.max_num_batched_tokens}; every sequence of a batch needs one: at least max_num_seqs, "
            f"{self.max_num_seqs}",
        )
        require(self.max_num_waiting >= 1, "max_num_waiting", "must be at least 1")
        require(
            self.target_itl_ms is None or 0 < self.target_itl_ms < math.inf,
            "target_itl_ms",
            f"is {self.target_itl_ms}; it must be above 0, or null",
        )
        require(self.park_bytes >= 0, "park_bytes", "must be at least 0")
