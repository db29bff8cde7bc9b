"""An engine's configuration: its scheduler's."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.core.config import SchedulerConfig


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One replica's engine.

    Attributes:
        scheduler: limits of the running batch.
        prefix_cache: keep the KV of what has been computed while there is room, for prompts that begin alike.
    """

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    prefix_cache: bool = True
