"""Where a rank stands in its group. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One rank of a group of ``pp_size`` stages with ``tp_size`` shards each.

    Ranks count the shards of the first stage, then those of the next: tensor parallel neighbours are neighbours.

    Attributes:
        rank: in [0, world_size).
        layers: first and last + 1 of the decoder layers that this rank's stage runs.
    """

    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    layers: tuple[int, int] | None = None

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def tp_rank(self) -> int:
        """Place among the shards of the stage."""
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """The stage."""
        return self.rank // self.tp_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def tp_ranks(self) -> tuple[int, ...]:
        """Ranks of the stage, this one included."""
        first = self.pp_rank * self.tp_size
        return tuple(range(first, first + self.tp_size))

    @property
    def pp_ranks(self) -> tuple[int, ...]:
        """The ranks with this one's place in every stage, first stage first."""
        return tuple(range(self.tp_rank, self.world_size, self.tp_size))
