"""One step's plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from cluster.core.request import Priority
from cluster.core.step import ParkedBlocks, ScheduledSequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One step's plan.

    Attributes:
        scheduled: the sequences' shares; empty when there is nothing to run now.
        started: ids in ``scheduled`` that the worker does not hold: they travel whole.
        dropped: ids whose state the worker forgets before this step, with what it has parked of them. They wait for a
            plan that is not empty.
        preempted: ids that lost their place to others; they come back later.
        expired: ids that ended because their deadline passed.
        num_cached_tokens: of each in ``started``, how many of its first tokens it did not compute itself: the prefix
            cache had them, or a sibling.
        parked: blocks of ``dropped`` sequences to copy to host memory, after ``dropped`` and before anything is
            written. They too wait for a plan that is not empty. A copy is kept until it is resumed or a later plan
            drops its id.
        resumed: parked blocks to write back, after ``parked``; what is not named of a sequence was in the pool.
        copies: (source, destination) blocks to copy within the pool, in order, after ``resumed`` and before the forward
            pass.
    """

    scheduled: tuple[ScheduledSequence, ...]
    started: tuple[int, ...]
    dropped: tuple[int, ...]
    preempted: tuple[int, ...]
    expired: tuple[int, ...]
    num_cached_tokens: tuple[int, ...] = ()
    parked: tuple[ParkedBlocks, ...] = ()
    resumed: tuple[ParkedBlocks, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class StepPlan:
    """A Schedule in the making.

    Attributes:
        waiting: classes with prompts that could be computed in it.
    """

    waiting: Collection[Priority]
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    num_cached_tokens: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    dropped: dict[int, None] = field(default_factory=dict)
    parked: dict[int, ParkedBlocks] = field(default_factory=dict)
    resumed: list[ParkedBlocks] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def finish(self, expired: Iterable[int]) -> Schedule:
        return Schedule(
            scheduled=tuple(self.scheduled),
            started=tuple(self.started),
            dropped=tuple(self.dropped),
            preempted=tuple(self.preempted),
            expired=tuple(expired),
            num_cached_tokens=tuple(self.num_cached_tokens),
            parked=tuple(self.parked.values()),
            resumed=tuple(self.resumed),
            copies=tuple(self.copies),
        )
