"""Limits and policies of the scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from cluster.core.request import Priority
from cluster.errors import require


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """What a priority class is promised.

    Attributes:
        share: part of the work that the class gets whenever it has enough of its own, in (0, 1]; what it leaves goes to
            the others.
        target_ms: how soon a request should get its turn, in milliseconds; null: whenever there is time.
        max_e2e_ms: how long a request of the class may take from its arrival to its end, in milliseconds; its deadline
            is no later than that. null: only its own deadline counts.
        max_queued_requests: of the class, that may wait at a gateway for one model; null: as many as all classes.
        max_queued_tokens: of the class, that may wait at a gateway for one model, prompts and expected completions;
            null: as many as all classes.
    """

    share: float
    target_ms: float | None = None
    max_e2e_ms: float | None = None
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", f"is {self.share}; it must be above 0 and at most 1")
        require(
            self.target_ms is None or 0 < self.target_ms < math.inf,
            "target_ms",
            f"is {self.target_ms}; it must be above 0, or null",
        )
        require(
            self.max_e2e_ms is None or 0 < self.max_e2e_ms < math.inf,
            "max_e2e_ms",
            f"is {self.max_e2e_ms}; it must be above 0, or null",
        )
        for name in ("max_queued_requests", "max_queued_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, f"is {value}; it must be at least 1, or null")

    @property
    def target_s(self) -> float:
        """Infinite where there is none."""
        return math.inf if self.target_ms is None else self.target_ms / 1e3

    @property
    def max_e2e_s(self) -> float:
        """Infinite where there is none."""
        return math.inf if self.max_e2e_ms is None else self.max_e2e_ms / 1e3


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
class AdmissionConfig:
    """How much may wait at a gateway for one model. Each class may have its share of it in any case; where more comes,
    the lowest class that has more than its share gives way.

    Attributes:
        max_queued_requests: of all classes together.
        max_queued_tokens: of all classes together, prompts and expected completions. A class of which nothing waits may
            have one request of any size.
    """

    max_queued_requests: int = 2048
    max_queued_tokens: int = 2**21

    def __post_init__(self) -> None:
        require(self.max_queued_requests >= 1, "max_queued_requests", "must be at least 1")
        require(self.max_queued_tokens >= 1, "max_queued_tokens", "must be at least 1")


OTHER_TENANTS = "*"


@dataclass(frozen=True, kw_only=True)
class TenantConfig:
    """What a tenant may use, of all gateways together; each enforces an equal part. null: no limit.

    Attributes:
        name: as callers' credentials name it; "*": each tenant that is not listed.
        requests_per_s: that it may send; as many may come at once after a pause, one at least.
        tokens_per_min: of prompts and completions; what a request is expected to use counts when it comes, and what it
            did not use is given back at its end.
        max_concurrent_requests: queued or running.
        max_priority: the most urgent class that it may use; requests that name none are of this class where it is less
            urgent than P1.
        models: that it may use.
    """

    name: str
    requests_per_s: float | None = None
    tokens_per_min: int | None = None
    max_concurrent_requests: int | None = None
    max_priority: Literal["P0", "P1", "P2", "P3"] = "P0"
    models: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(bool(self.name), "name", f"must name a tenant, or be {OTHER_TENANTS!r} for all that are not listed")
        for name in ("requests_per_s", "tokens_per_min", "max_concurrent_requests"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, f"is {value}; it must be above 0, or null")

    @property
    def is_limited(self) -> bool:
        """Whether it has any quota."""
        limits = (self.requests_per_s, self.tokens_per_min, self.max_concurrent_requests)
        return any(limit is not None for limit in limits)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How much runs at once, and for whom.

    Attributes:
        max_num_seqs: sequences in the running batch.
        max_num_batched_tokens: tokens computed in one step; long prompts are cut into chunks of at most this.
        max_num_waiting: sequences that may wait in the engine. More are refused, but of classes of which fewer wait
            than their share of this: one class's flood does not shut the others out.
        target_itl_ms: how long a step may take while sequences are being generated, in milliseconds, so that their next
            tokens come in time; prompts are cut to what fits. null: only max_num_batched_tokens cuts them.
        park_bytes: host memory for the KV of preempted sequences that is dearer to compute again than to copy. It is
            taken when it is needed, and given back. 0: none.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_num_waiting: int = 4096
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
