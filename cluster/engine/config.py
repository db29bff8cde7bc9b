"""An engine's configuration: its scheduler's."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.core.config import SchedulerConfig


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One replica's engine.

    Attributes:
        scheduler: limits of the running batch.
    """

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
