"""Line plots as SVG, with nothing but text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 28, 38


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve; it is broken where a value is None.

    Attributes:
        color: as CSS has it.
        dashed: for what it is compared with.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    color: str
    dashed: bool = False


def plot(title: str, lines: Sequence[Line], *, x_label: str, y_label: str, log_y: bool = False) -> str:
    """An ``<svg>`` element; it says so where there is nothing to draw.

    Args:
        log_y: a logarithmic scale, on which values below the least positive one lie at the bottom.
    """
    ys = [y for line in lines for y in line.ys if y is not None and not (log_y and y <= 0)]
    xs = [x for line in lines for x in line.xs]
    head = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<text x="{_LEFT}" y="16" class="title">{escape(title)}</text>'
    )
    if not ys:
        return head + f'<text x="{_LEFT}" y="{_HEIGHT / 2}">nothing to show</text></svg>'
    across = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    up = _Axis(min(ys) if log_y else 0.0, max(ys), _HEIGHT - _BOTTOM, _TOP, log=log_y)
    parts = [head]
    for value in up.ticks():
        y = up.place(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in across.ticks():
        x = across.place(value)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>'
        f'<text x="4" y="16">{escape(y_label)}</text>'
    )
    parts += [_curve(line, across, up) for line in lines]
    parts.append(_legend(lines))
    return "".join(parts) + "</svg>"


class _Axis:
    """Values to places on the paper."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self._log = log
        if log:
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        self._low, self._high = low, high if high > low else low + 1
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        if self._log:
            share = math.log(max(value, self._low) / self._low) / math.log(self._high / self._low)
        else:
            share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """About five, at round values; powers of ten on a logarithmic scale."""
        if self._log:
            first, last = round(math.log10(self._low)), round(math.log10(self._high))
            return [10.0**power for power in range(first, last + 1)]
        rough = (self._high - self._low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self._low / step)
        return [round(index * step, 10) for index in range(first, math.floor(self._high / step + 1e-9) + 1)]


def _curve(line: Line, across: _Axis, up: _Axis) -> str:
    path, pen = [], "M"
    for x, y in zip(line.xs, line.ys, strict=True):
        if y is None:
            pen = "M"
        else:
            path.append(f"{pen}{across.place(x):.1f} {up.place(y):.1f}")
            pen = "L"
    dashes = ' stroke-dasharray="4 3"' if line.dashed else ""
    return f'<path d="{"".join(path)}" fill="none" stroke="{line.color}" stroke-width="1.6"{dashes}/>'


def _legend(lines: Sequence[Line]) -> str:
    parts, x = [], float(_LEFT)
    for line in lines:
        parts.append(f'<text x="{x:.0f}" y="{_HEIGHT - 6}" fill="{line.color}">{escape(line.name)}</text>')
        x += 7 * len(line.name) + 14
    return "".join(parts)
