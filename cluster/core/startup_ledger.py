"""How far each rank of a group has come on its way to serving, and who is late. Time is an argument."""

from __future__ import annotations

import enum


class Stage(enum.IntEnum):
    """What a rank has reached. All ranks begin a stage together, once every one of them has reached that before."""

    PLACED = 0
    JOINED = 1
    LOADED = 2
    WARMED = 3


_DONE = {
    Stage.PLACED: "connected to the group's leader",
    Stage.JOINED: "joined the group",
    Stage.LOADED: "loaded their part of the model",
    Stage.WARMED: "allocated their KV cache and warmed up",
}


class StartupLedger:
    """Ranks and the stages they have reached. Times are seconds on the caller's clock.

    Args:
        num_ranks: of the group.
        timeout_s: for each stage of each rank.
        now: when the first stage begins.
    """

    def __init__(self, num_ranks: int, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._nodes: list[str | None] = [None] * num_ranks
        self._began = {Stage.PLACED: now}
        self._reached: dict[Stage, dict[int, float]] = {Stage.PLACED: {}}

    @property
    def stage(self) -> Stage:
        """That which the ranks are in."""
        return max(self._began)

    @property
    def is_complete(self) -> bool:
        """Whether every rank has reached the stage."""
        return not self.missing

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that have not reached the stage."""
        reached = self._reached[self.stage]
        return tuple(rank for rank in range(len(self._nodes)) if rank not in reached)

    @property
    def deadline(self) -> float:
        """By when every rank must have reached the stage."""
        return self._began[self.stage] + self._timeout_s

    def node(self, rank: int) -> str | None:
        """Where the rank was placed; None: not known yet."""
        return self._nodes[rank]

    def place(self, rank: int, node: str, now: float) -> None:
        """The rank has reached PLACED, on a node of that name."""
        self.reach(rank, Stage.PLACED, now)
        self._nodes[rank] = node

    def reach(self, rank: int, stage: Stage, now: float) -> None:
        """
        Raises:
            ValueError: there is no such rank, or it was there already, or the ranks are in another stage.
        """
        if not 0 <= rank < len(self._nodes):
            raise ValueError(f"there is no rank {rank} in a group of {len(self._nodes)}")
        if stage is not self.stage:
            raise ValueError(f"rank {rank} says {stage.name} while the group is on its way to {self.stage.name}")
        if rank in self._reached[stage]:
            raise ValueError(f"rank {rank} has said {stage.name} before")
        self._reached[stage][rank] = now

    def begin(self, stage: Stage, now: float) -> None:
        """Raises ValueError unless every rank has reached the stage before."""
        if not self.is_complete or stage != self.stage + 1:
            raise ValueError(f"{stage.name} cannot begin: ranks {self.missing} are on their way to {self.stage.name}")
        self._began[stage] = now
        self._reached[stage] = {}

    def lateness(self, now: float) -> str | None:
        """Which ranks are late, where, and with what, in words; None before the deadline, or where none is."""
        if now < self.deadline or self.is_complete:
            return None
        late = self.missing
        ranks = ", ".join(f"rank {rank} on {self._nodes[rank] or 'a node not known yet'}" for rank in late)
        others = len(self._nodes) - len(late)
        return (
            f"{ranks}: not {_DONE[self.stage]} within {self._timeout_s:g} s ({others} of {len(self._nodes)} ranks "
            "have): see the shard's log, or raise parallel.start_timeout_s"
        )

    def summary(self) -> str:
        """How long the slowest rank took for each stage, e.g. "placed 2.1 s, joined 0.1 s (rank 1)"."""
        parts = []
        for stage, reached in self._reached.items():
            if reached:
                slowest = max(reached, key=lambda rank: reached[rank])
                parts.append(f"{stage.name.lower()} {reached[slowest] - self._began[stage]:.1f} s (rank {slowest})")
        return ", ".join(parts)
