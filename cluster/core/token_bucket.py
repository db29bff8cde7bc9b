"""A limit on a rate."""

from __future__ import annotations


class TokenBucket:
    """Fills at a rate up to its capacity; who takes more than it holds has to wait. It may be taken into debt by what
    was known too late, and by a single charge above its capacity, which a full bucket lets through.

    Args:
        rate: units per second.
        capacity: units that may be taken at once after a pause.
    """

    def __init__(self, rate: float, capacity: float) -> None:
        self._rate = rate
        self._capacity = capacity
        self._scale = 1.0
        self._level = capacity
        self._filled_at: float | None = None

    def scale(self, scale: float, now: float) -> None:
        """Rate and capacity from now on, in parts of what was given at first."""
        self._fill(now)
        self._scale = scale
        self._level = min(self._level, self._capacity * scale)

    def missing_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` may be taken; 0: now."""
        self._fill(now)
        missing = min(amount, self._capacity * self._scale) - self._level
        return max(missing, 0.0) / (self._rate * self._scale)

    def take(self, amount: float, now: float) -> None:
        """Takes it, whether it is there or not."""
        self._fill(now)
        self._level -= amount

    def give_back(self, amount: float, now: float) -> None:
        """What was taken and not used."""
        self._fill(now)
        self._level = min(self._level + amount, self._capacity * self._scale)

    def is_full(self, now: float) -> bool:
        """Whether it is as if it had never been used."""
        self._fill(now)
        return self._level >= self._capacity * self._scale

    def _fill(self, now: float) -> None:
        if self._filled_at is not None and now > self._filled_at:
            gained = (now - self._filled_at) * self._rate * self._scale
            self._level = min(self._level + gained, self._capacity * self._scale)
        self._filled_at = now if self._filled_at is None else max(now, self._filled_at)
