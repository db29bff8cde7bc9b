"""How a replica is cut into shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError, require

Size = int | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Shards of one replica, and how they talk.

    Attributes:
        tp: shards that hold a part of every layer each; auto takes the fewest that fit the devices.
        pp: stages that hold some of the layers each; auto takes the fewest that fit the devices.
        communicator: between shards. auto: nccl on CUDA; on CPU shm on one host and gloo across hosts.
        start_timeout_s: how long each of a shard's start-up stages may take: placed, joined, loaded, warmed.
        step_timeout_s: a shard that keeps a step longer than that is taken for hung, and its group ends.
    """

    tp: Size = 1
    pp: Size = 1
    communicator: Literal["auto", "nccl", "shm", "gloo"] = "auto"
    start_timeout_s: float = 300.0
    step_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("tp", "pp"):
            value = getattr(self, name)
            require(value == "auto" or (isinstance(value, int) and value >= 1), name, "must be at least 1, or auto")
        for name in ("start_timeout_s", "step_timeout_s"):
            require(getattr(self, name) > 0, name, "must be positive")

    @property
    def sizes(self) -> tuple[int, int]:
        """``tp`` and ``pp``. Raises ConfigError where one is still to be decided."""
        if self.tp == "auto" or self.pp == "auto":
            raise ConfigError("auto is not decided yet: give the number of shards", field="parallel")
        return self.tp, self.pp

    @property
    def is_single(self) -> bool:
        """Whether there is one shard, which runs in the engine's own process."""
        return self.tp == 1 and self.pp == 1
