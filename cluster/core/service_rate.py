"""How fast a queue gets shorter."""

from __future__ import annotations

import math

_MEMORY_S = 10.0
_MIN_BUSY_S = 0.05


class ServiceRate:
    """Tokens served per second of the time in which somebody waited, the last ten seconds of it counting most."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._busy_s = 0.0
        self._busy_since: float | None = None

    def advance(self, now: float, *, busy: bool) -> None:
        """Whether anybody waits from now on."""
        if self._busy_since is not None and now > self._busy_since:
            elapsed_s = now - self._busy_since
            decay = math.exp(-elapsed_s / _MEMORY_S)
            self._num_tokens *= decay
            # The integral of what decays: elapsed time that is long ago counts less.
            self._busy_s = self._busy_s * decay + _MEMORY_S * (1.0 - decay)
        self._busy_since = now if busy else None

    def serve(self, num_tokens: int) -> None:
        """One that had waited is served; ``advance`` has been called with the time."""
        self._num_tokens += num_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """None: nobody has waited long enough to tell."""
        if self._busy_s < _MIN_BUSY_S or self._num_tokens <= 0.0:
            return None
        return self._num_tokens / self._busy_s
