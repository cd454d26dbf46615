"""Numbers that say where they come from, in tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# measured: on this machine, in this run. reported: by others, elsewhere. projected: computed from
# the two, from shapes, or from what the options assume.
Kind = Literal["measured", "projected", "reported"]
Unit = Literal["bytes", "seconds", "ratio", "bits", "USD", "parameters"]

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


@dataclass(frozen=True)
class Figure:
    """One number. ``subject`` is what it is of, ``name`` what it is."""

    subject: str
    name: str
    value: float
    unit: Unit
    kind: Kind

    @property
    def text(self) -> str:
        """The number for people, with three or four digits and its unit."""
        return human(self.value, self.unit)


@dataclass(frozen=True)
class Table:
    """Figures under one title. Of one name, all are of one kind."""

    title: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, ...]]:
        """Two rows of heads, names and kinds, then one row a subject; "-" where none is known."""
        kinds = {figure.name: figure.kind for figure in self.figures}
        cells = {(figure.subject, figure.name): figure.text for figure in self.figures}
        subjects = dict.fromkeys(figure.subject for figure in self.figures)
        heads = [("", *kinds), ("", *kinds.values())]
        body = [(who, *(cells.get((who, name), "-") for name in kinds)) for who in subjects]
        return [*heads, *body]


def row(subject: str, kind: Kind, cells: Sequence[tuple[str, float | None, Unit]]) -> list[Figure]:
    """Figures of one subject and kind; without those that are None."""
    return [
        Figure(subject, name, value, unit, kind) for name, value, unit in cells if value is not None
    ]


def human(value: float, unit: Unit) -> str:
    """A number as people read it. Decimal prefixes: 1 GB is 10^9 bytes."""
    if unit == "bytes":
        for prefix in _BYTES:
            if value < 999.95 or prefix == _BYTES[-1]:
                return f"{value:.4g} {prefix}" if prefix != "B" else f"{value:.0f} B"
            value /= 1000
    if unit == "seconds":
        if value < 0.9995:
            return f"{1000 * value:.3g} ms"
        return f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"
    if unit == "ratio":
        return f"{value:.3g}x" if value < 999.5 else f"{value:,.0f}x"
    if unit == "USD":
        return f"{value:,.2f} USD"
    if unit == "bits":
        return f"{value:.4g}"
    return f"{value:,.0f}"


def counted(number: int, what: str) -> str:
    """A number of things in words: "1 task", "2,000 tasks"."""
    return f"{number:,} {what}{'s' * (number != 1)}"
