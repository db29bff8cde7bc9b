"""What has ended and may be asked for again."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.errors import require

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """For how long a request that has ended is answered again, from memory, when it comes again under its request_id.

    Attributes:
        window_s: after its end; 0: not at all.
        max_generations: that are kept at most.
        max_bytes: that they may take, about.
    """

    window_s: float = 120.0
    max_generations: int = 4096
    max_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name in ("window_s", "max_generations", "max_bytes"):
            require(getattr(self, name) >= 0, name, "must not be negative")


class ReplayWindow(Generic[Value]):
    """Keeps values for a while: the latest, as far as they fit."""

    def __init__(self, config: ReplayConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._kept: OrderedDict[Hashable, tuple[Value, int, float]] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Keeps ``value``, of about so many bytes, in the place of what the key had."""
        self.drop(key)
        if num_bytes <= self._config.max_bytes and self._config.window_s:
            self._kept[key] = (value, num_bytes, self._clock() + self._config.window_s)
            self._num_bytes += num_bytes
        self._evict()

    def get(self, key: Hashable) -> Value | None:
        """What is still kept for the key."""
        self._evict()
        entry = self._kept.get(key)
        return None if entry is None else entry[0]

    def drop(self, key: Hashable) -> None:
        """Forgets the key; nothing happens where it is not known."""
        entry = self._kept.pop(key, None)
        if entry is not None:
            self._num_bytes -= entry[1]

    def _evict(self) -> None:
        config, now = self._config, self._clock()
        while self._kept:
            key, (_, _, expires_s) = next(iter(self._kept.items()))
            if expires_s > now and len(self._kept) <= config.max_generations and self._num_bytes <= config.max_bytes:
                return
            self.drop(key)
