"""Which replica takes a request: pure policies over snapshots."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSnapshot:
    """A replica as the caller sees it now.

    Attributes:
        replica_id: its name.
        ready: connected and not draining.
        outstanding_tokens: prompt and completion tokens that the caller sent it and that are not done.
    """

    replica_id: str
    ready: bool
    outstanding_tokens: int


class LeastTokens:
    """Picks the ready replica with the least outstanding tokens; a tie is drawn.

    Args:
        rng: source of randomness, so that gateways which start together do not pick alike.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, replicas: Iterable[ReplicaSnapshot]) -> str | None:
        """The chosen replica's id, or None when none is ready."""
        ready = [replica for replica in replicas if replica.ready]
        if not ready:
            return None
        least = min(replica.outstanding_tokens for replica in ready)
        return self._rng.choice([r.replica_id for r in ready if r.outstanding_tokens == least])
