"""Two plots as inline SVG: bars with their figures beside them, and lines over logarithmic axes.

All text is escaped; colours and fonts come from the page's style sheet, by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT = 860, 250, 190
_BAR, _GAP = 18, 10
_HEIGHT, _TOP, _BOTTOM = 380, 14, 46
_LABEL_STEP = 15  # between the names of two lines that end side by side


@dataclass(frozen=True)
class Bar:
    """``parts``: lengths one after another, each with its class; ``text`` stands at the end."""

    label: str
    parts: Sequence[tuple[float, str]]
    text: str


@dataclass(frozen=True)
class Line:
    """``points``: x and y, both over 0, from left to right; ``style``: a class."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars on one linear scale from 0."""
    longest = max((sum(length for length, _ in bar.parts) for bar in rows), default=0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    parts = []
    for number, bar in enumerate(rows):
        y = number * (_BAR + _GAP)
        middle = y + _BAR / 2 + 4
        parts.append(_text(_LEFT - 8, middle, bar.label, "end"))
        x = float(_LEFT)
        for length, style in bar.parts:
            width = max(scale * length, 1)
            parts.append(
                f'<rect class="{style}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}"/>'
            )
            x += width
        parts.append(_text(x + 6, middle, bar.text, "start"))
    return _svg(title, len(rows) * (_BAR + _GAP), parts)


def lines(title: str, across: str, series: Sequence[Line], unit: Callable[[float], str]) -> str:
    """Lines over logarithmic axes, each named at its right end. ``unit`` writes a y for people."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    left, right, low, high = 80.0, _WIDTH - 230.0, math.log10(min(ys)), math.log10(max(ys))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    first, last = math.log10(min(xs)), math.log10(max(xs))
    span = last - first or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (math.log10(x) - first) / span * (right - left),
            _TOP + (high - math.log10(y)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for power in range(low, high + 1):
        _, y = at(1, 10.0**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, unit(10.0**power), "end"))
    for x_value in _ticks(min(xs), max(xs)):
        x, _ = at(x_value, 1)
        parts.append(_text(x, _HEIGHT - _BOTTOM + 18, f"{x_value:,.0f}", "middle"))
    parts.append(_text((left + right) / 2, _HEIGHT - 6, across, "middle"))
    for line in series:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
    ends = sorted((at(*line.points[-1])[1], line.label) for line in series)
    free = -math.inf
    for end, label in ends:
        y = max(end, free)
        free = y + _LABEL_STEP
        parts.append(
            f'<line class="lead" x1="{right}" x2="{right + 10}" y1="{end:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(right + 14, y + 4, label, "start"))
    return _svg(title, _HEIGHT, parts)


def _ticks(low: float, high: float) -> list[float]:
    """The ends, and the powers of ten between that are not too near to them."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    between = [10.0**power for power in powers if 2 * low < 10.0**power < high / 2]
    return [low, *between, high] if high > low else [low]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    name = escape(title)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )
