"""When requests are sent."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import require
from cluster.sim.workload import gamma_gaps, poisson_gaps


@dataclass(frozen=True, kw_only=True)
class Rate:
    """An open loop: requests come at their times, whether or not earlier ones have been answered.

    Attributes:
        per_s: requests a second.
        variation: deviation over mean of the gaps between them; 1 is Poisson, 0 even, above 1 they come in bursts.
    """

    per_s: float
    variation: float = 1.0

    def __post_init__(self) -> None:
        require(self.per_s > 0, "per_s", "must be positive")
        require(self.variation >= 0, "variation", "must not be negative")

    def times(self, rng: random.Random) -> Iterator[float]:
        """In seconds from the start, without end."""
        if self.variation == 0:
            return (index / self.per_s for index in itertools.count(1))
        if self.variation == 1:
            return itertools.accumulate(poisson_gaps(rng, self.per_s))
        return itertools.accumulate(gamma_gaps(rng, self.per_s, self.variation))


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """An open loop whose rate changes evenly from one to another, then stays there; arrivals are independent.

    Attributes:
        first_per_s, last_per_s: requests a second.
        duration_s: how long the change takes.
    """

    first_per_s: float
    last_per_s: float
    duration_s: float

    def __post_init__(self) -> None:
        require(self.first_per_s >= 0, "first_per_s", "must not be negative")
        require(self.last_per_s > 0, "last_per_s", "must be positive")
        require(self.duration_s > 0, "duration_s", "must be positive")

    def times(self, rng: random.Random) -> Iterator[float]:
        """In seconds from the start, without end."""
        # The expected number of arrivals by t is a t + b t^2; independent arrivals are 1 apart in that on average.
        a, b = self.first_per_s, (self.last_per_s - self.first_per_s) / (2 * self.duration_s)
        at_end = (self.first_per_s + self.last_per_s) / 2 * self.duration_s
        for expected in itertools.accumulate(poisson_gaps(rng, 1.0)):
            if expected >= at_end:
                yield self.duration_s + (expected - at_end) / self.last_per_s
            else:
                yield 2 * expected / (a + math.sqrt(a * a + 4 * b * expected))


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A closed loop: so many requests are always under way, and the next comes when one has ended."""

    concurrency: int

    def __post_init__(self) -> None:
        require(self.concurrency > 0, "concurrency", "must be positive")
