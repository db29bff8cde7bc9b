"""How requests are spread over replicas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cluster.errors import require

PolicyName = Literal["round_robin", "least_tokens", "prefix_affinity", "session"]


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Which replica takes a request.

    Attributes:
        policy: round_robin: in turn; least_tokens: where the fewest tokens are still to do; prefix_affinity: where the
            first token is predicted soonest, prompts that a replica has cached included; session: requests of one
            session_id on one replica, others as with prefix_affinity.
        slow_start_s: for so long a fresh replica gets less than its part, rising to it, in seconds; 0: not so.
        eject_after: a replica that fails so many requests one after the other, or half of those of the last half
            minute where these are as many, gets no more for some time; 0: never.
        ejection_s: how long the first time, in seconds; twice as long each time that it fails again when it is probed.
        max_ejection_s: no longer than this, in seconds.
    """

    policy: PolicyName = "prefix_affinity"
    slow_start_s: float = 10.0
    eject_after: int = 5
    ejection_s: float = 5.0
    max_ejection_s: float = 60.0

    def __post_init__(self) -> None:
        require(0 <= self.slow_start_s < math.inf, "slow_start_s", "must be at least 0")
        require(self.eject_after >= 0, "eject_after", "must be at least 0")
        require(0 < self.ejection_s < math.inf, "ejection_s", "must be above 0")
        require(
            self.ejection_s <= self.max_ejection_s < math.inf,
            "max_ejection_s",
            f"is {self.max_ejection_s:g}; it must be at least ejection_s, {self.ejection_s:g}",
        )
