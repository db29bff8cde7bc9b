"""Files that change while we run: certificates, keys, lists of callers."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from cluster.errors import ConfigError

_CHECK_INTERVAL_S = 1.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


class WatchedFiles(Generic[T]):
    """What some files say, taken together and read again when one of them has changed. May be used by several threads.

    There is no thread that watches: whoever asks looks, at most once in a while. What cannot be read or makes no sense
    stops the start; later it is logged, and what was read before stays in force.

    Args:
        paths: all of them are read for each ``parse``.
        parse: gets their contents in this order; raises ConfigError where they make no sense.
        field: of the configuration, which names them in errors.
        check_interval_s: between two looks.

    Raises:
        ConfigError: they cannot be read, or make no sense.
    """

    def __init__(
        self,
        paths: Sequence[str],
        parse: Callable[..., T],
        *,
        field: str,
        check_interval_s: float = _CHECK_INTERVAL_S,
    ) -> None:
        self._paths = tuple(paths)
        self._parse = parse
        self._field = field
        self._check_interval_s = check_interval_s
        self._lock = threading.Lock()
        self._seen = self._look()
        self._current = self._read()
        self._looked_at = time.monotonic()

    def current(self) -> T:
        """As the files are now, or were when they last made sense."""
        if time.monotonic() - self._looked_at < self._check_interval_s:
            return self._current
        with self._lock:
            if time.monotonic() - self._looked_at >= self._check_interval_s:
                self._looked_at = time.monotonic()
                self._refresh()
        return self._current

    def _refresh(self) -> None:
        seen = self._look()
        if seen == self._seen:
            return
        # Files of one set are not replaced at one instant: this may fail now and succeed at the next look.
        self._seen = seen
        try:
            self._current = self._read()
        except ConfigError as error:
            logger.error("what was read before stays in force: %s: %s", error.field, error.message)
        else:
            logger.warning("%s: read again: %s", self._field, ", ".join(self._paths))

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in self._paths)

    def _read(self) -> T:
        contents = []
        for path in self._paths:
            try:
                with open(path, "rb") as file:
                    contents.append(file.read())
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}", field=self._field) from error
        return self._parse(*contents)


def _stamp(path: str) -> tuple[int, int, int] | None:
    """What differs once the file has been written or replaced; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
