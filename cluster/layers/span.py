"""A part of something that is counted: rows or columns of a matrix."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """Numbers ``first`` up to, not with, ``last`` of ``of``."""

    first: int
    last: int
    of: int

    @classmethod
    def whole(cls, size: int) -> Span:
        return cls(0, size, size)

    @property
    def size(self) -> int:
        return self.last - self.first
