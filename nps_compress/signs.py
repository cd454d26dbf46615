"""A task vector as signs: each change becomes its sign times a factor of its row and its column.

What is then stored of a kept change is one bit. The factors are mean magnitudes of rows and
columns; one gain for the tensor makes the projection on the true changes exact:
sum(signs * tau) = sum(tau^2). BitDelta (arXiv 2402.10193) keeps all signs at the mean magnitude,
which shrinks that projection by a third or more; here what a shrunken task vector loses is paid for
with variance, as in sampling.

Vectors (biases, norms) are not summed over, so that their errors don't average out, and a factor
for each element would say more than its sign: they are rounded to a grid instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit
from nps_compress.rank_one import LARGEST, RankOne, power

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scales:
    """Magnitudes of a tensor's changes: ``gain``, a float32 number, times ``sizes``.

    ``still``: elements that don't change though others in their row and their column do.
    """

    sizes: RankOne
    gain: float
    still: int = 0

    def scores(self, importance: RankOne | None, part: slice) -> Float32:
        """Magnitude times importance of some elements. -> [n]; 0 where nothing is ever kept.

        One product in float32 of the gain and a power of the square root of 2, so that elements
        whose exponents have the same sum have the same score.
        """
        factors = self.sizes.times(importance) if importance else self.sizes
        return factors.part(part.start, part.stop) * np.float32(self.gain)

    def signed(self, tau: Float32, start: int) -> Float32:
        """Changes from position ``start`` on as signs times magnitudes. tau: [n] -> [n].

        A change of 0 in a row and column that do change gets either sign, by its position: storing
        which are 0 would cost more bits than the noise is worth, unless most are.
        """
        out = self.sizes.part(start, start + tau.size)
        _sign(tau, np.float32(self.gain), start, out)
        return out


def scales_of(parts: Callable[[], Iterable[Float32]], rows: int, columns: int) -> Scales:
    """Scales of a tensor, [rows, columns], whose changes come in pieces, in row-major order.

    parts: gives them anew, each [n].
    """
    by_row, by_column = np.zeros(rows), np.zeros(columns)
    start = 0
    for tau in parts():
        _add_magnitudes(tau, start, by_row, by_column)
        start += tau.size
    total = by_row.sum()
    if not total > 0:
        return Scales(RankOne.of(np.zeros(rows), np.zeros(columns)), 0.0)
    sizes = RankOne.of(by_row * rows / total, by_column * columns / total)
    start, squares, along, still = 0, 0.0, 0.0, 0
    for tau in parts():
        more = _project(tau, sizes.part(start, start + tau.size))
        squares, along, still = squares + more[0], along + more[1], still + more[2]
        start += tau.size
    return Scales(sizes, float(np.float32(squares / along)) if along > 0 else 0.0, still)


def levels_of(tau: Float32) -> tuple[int, npt.NDArray[np.int8]]:
    """A small tensor's changes as multiples of a step: its exponent (half octaves), and [n].

    The step is about half the root mean square, and no change more than 127 of them.
    """
    mean = float(np.square(tau, dtype=np.float64).mean()) if tau.size else 0.0
    if not mean > 0:
        return 0, np.zeros(tau.size, np.int8)
    exponent = round(math.log2(mean)) - 2  # half octaves of sqrt(mean) / 2
    exponent = min(max(exponent, -2 * LARGEST), 2 * LARGEST)
    return exponent, np.clip(np.rint(tau / power(exponent)), -127, 127).astype(np.int8)


@jit
def _sign(tau, gain, start, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        size = out[i] * gain
        positive = tau[i] > 0
        if tau[i] == 0:
            z = np.uint64(start + i + 1) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            positive = (z >> np.uint64(63)) != 0
        out[i] = size if positive else -size


@jit
def _add_magnitudes(tau, start, by_row, by_column):  # type: ignore[no-untyped-def]
    columns = by_column.size
    row, column = start // columns, start % columns
    for i in range(tau.size):
        size = np.float64(abs(tau[i]))
        by_row[row] += size
        by_column[column] += size
        column += 1
        if column == columns:
            row, column = row + 1, 0


@jit
def _project(tau, sizes):  # type: ignore[no-untyped-def]
    squares = 0.0
    along = 0.0
    still = 0
    for i in range(tau.size):
        value = np.float64(tau[i])
        if value == 0.0 and sizes[i] > 0:
            still += 1
        squares += value * value
        along += abs(value) * np.float64(sizes[i])
    return squares, along, still
