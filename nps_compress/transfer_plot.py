"""One score against another as an SVG of its own: a curve a method, single points with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 150, 40, 50
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
_TICKS = 5


@dataclass(frozen=True)
class Curve:
    """``points``: x, y and what is written beside."""

    label: str
    points: Sequence[tuple[float, float, str]]


def plot_curves(
    title: str,
    axes: tuple[str, str],
    curves: Sequence[Curve],
    marks: Mapping[str, tuple[float, float]],
) -> str:
    """The SVG's text. axes: what x and y are; marks: single points by name."""
    xs = [x for curve in curves for x, _, _ in curve.points] + [x for x, _ in marks.values()]
    ys = [y for curve in curves for _, y, _ in curve.points] + [y for _, y in marks.values()]
    (left, right), (low, high) = _range(xs), _range(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_text(_LEFT, 22, title, "start", 14)]
    for number in range(_TICKS + 1):
        x, y = (a + (b - a) * number / _TICKS for a, b in ((left, right), (low, high)))
        (px, bottom), (start, py) = at(x, low), at(left, y)
        top, end = at(left, high)[1], at(right, low)[0]
        parts.append(_line(px, bottom, px, top) + _line(start, py, end, py))
        parts.append(_text(px, bottom + 16, f"{x:.3g}", "middle"))
        parts.append(_text(start - 6, py + 4, f"{y:.3g}", "end"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, axes[0], "middle"))
    parts.append(_text(10, _TOP - 6, axes[1], "start"))
    for number, curve in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        placed = [(*at(x, y), word) for x, y, word in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        for x, y, word in placed:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            parts.append(_text(x + 5, y - 4, word, "start", 9))
        y = _TOP + 18 * number + 10
        parts.append(_text(_WIDTH - _RIGHT + 20, y, curve.label, "start", 12, colour))
    for label, (x, y) in marks.items():
        px, py = at(x, y)
        parts.append(f'<path d="M{px - 5:.1f} {py:.1f}h10m-5 -5v10" stroke="#000"/>')
        parts.append(_text(px + 7, py + 12, label, "start", 11))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 11, colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
