"""Matrices that are the product of a factor for each row and one for each column.

Factors are powers of the square root of 2, so that they cost a few bits each, products are table
lookups, and what threads and devices add up in another order nearly always comes out the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit

Float32 = npt.NDArray[np.float32]
Exponents = npt.NDArray[np.int16]

ZERO = -(1 << 14)  # the exponent of a factor that is 0
_SLOTS, _NONE = 32, -(1 << 40)
LARGEST = 60  # of other exponents, either way: the product of two matrices stays within float32
# 2^(k / 2) in float32, k from -4 to 4 times LARGEST.
POWERS = np.exp2(np.arange(-4 * LARGEST, 4 * LARGEST + 1) / 2).astype(np.float32)


@dataclass(frozen=True)
class RankOne:
    """Element i * columns + j is 2^((rows[i] + columns[j]) / 2). rows: [r]; columns: [c]."""

    rows: Exponents
    columns: Exponents

    @classmethod
    def of(cls, rows: npt.ArrayLike, columns: npt.ArrayLike) -> RankOne:
        """The nearest factors. rows: [r], columns: [c], not negative; 0 stays 0."""
        return cls(_exponents(rows), _exponents(columns))

    def part(self, start: int, stop: int) -> Float32:
        """Elements ``start`` to ``stop`` in row-major order. -> [stop - start]."""
        out = np.empty(stop - start, np.float32)
        if out.size:
            _expand(self.rows, self.columns, POWERS, start, out)
        return out

    def times(self, other: RankOne) -> RankOne:
        """The product of corresponding elements."""
        pairs = ((self.rows, other.rows), (self.columns, other.columns))
        return RankOne(*(np.maximum(ours + theirs, ZERO) for ours, theirs in pairs))


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a matrix: the first dimension by the others; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def power(exponent: int) -> np.float32:
    """2^(exponent / 2)."""
    found: np.float32 = POWERS[POWERS.size // 2 + exponent]
    return found


def _exponents(factors: npt.ArrayLike) -> Exponents:
    values = np.asarray(factors, np.float64)
    with np.errstate(divide="ignore"):
        found = np.clip(np.rint(2 * np.log2(values)), -LARGEST, LARGEST)
    return np.where(values > 0, found, ZERO).astype(np.int16)


@jit
def _expand(rows, columns, table, start, out):  # type: ignore[no-untyped-def]
    row, column = start // columns.size, start % columns.size
    # Many rows have the same exponent: those expanded last are copied.
    slots = _SLOTS if out.size > 4 * _SLOTS * columns.size else 0
    known = np.full(slots, _NONE, np.int64)
    expanded = np.empty((slots, columns.size if slots else 0), np.float32)
    done = 0
    while done < out.size:
        exponent = np.int64(rows[row])
        end = column + min(columns.size - column, out.size - done)
        part = out[done : done + end - column]
        if slots:
            slot = exponent % slots
            if known[slot] != exponent:
                known[slot] = exponent
                _expand_row(exponent, columns, table, expanded[slot])
            part[:] = expanded[slot, column:end]
        else:
            _expand_row(exponent, columns[column:end], table, part)
        done += part.size
        row, column = row + 1, 0


@jit
def _expand_row(exponent, columns, table, out):  # type: ignore[no-untyped-def]
    first = table.size // 2 + exponent
    for i in range(out.size):
        at = first + np.int64(columns[i])
        out[i] = table[at] if at >= 0 else np.float32(0.0)
