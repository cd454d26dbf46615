"""How precisely kept changes are stored: exactly, or as a few bits each.

A change of B bits is a multiple of a step, up to 2^(B - 1) of them either way: its sign takes one
bit, and ``sign`` is nothing else. A tensor has one step, divided by the importance where there is
one. On six real fine-tunes a step for each row (in half octaves) made no smaller errors at the same
bits; what sizes of rows and columns say of the multiples, the arithmetic coder uses anyway.

The step is that of the least squared error, found from a *tally* of the sizes that are kept, which
is the same however they come in pieces: counts, sums and sums of squares by bin, 64 bins an octave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Values = Literal["auto", "exact", "int8", "int4", "int3", "int2", "sign"]
VALUES: tuple[Values, ...] = get_args(Values)
BITS: dict[Values, int] = {"sign": 1, "int2": 2, "int3": 3, "int4": 4, "int8": 8}
MOST_BITS = 8  # that ``auto`` takes
# Of the squares of the kept changes, what ``auto`` may lose in each tensor: with it, models differ
# from those of exact values by less than accuracies can tell.
BUDGET = 0.005

TALLY_SHIFT = 17  # of a float32's bits: 64 bins an octave
TALLY_BINS = 1 << (31 - TALLY_SHIFT)
_TRIED_AN_OCTAVE = 16

Tally = npt.NDArray[np.float64]  # [3, TALLY_BINS]: counts, sums, sums of squares


@dataclass(frozen=True)
class Rounding:
    """Kept changes become multiples of ``step`` (over the importance), ``most`` of them at most.

    A step of 0: they are left as they are.
    """

    step: float
    most: int


EXACT = Rounding(0.0, 0)


def empty_tally() -> Tally:
    """A tally of nothing."""
    return np.zeros((3, TALLY_BINS))


def rounding_of(tally: Tally, values: Values) -> Rounding:
    """What to round changes of these sizes to.

    ``auto``: of the fewest bits with which the squared error stays within BUDGET of the squares;
    EXACT where there are none.
    """
    found = tally[:, tally[0] > 0]
    if values == "exact" or not found.size:
        return EXACT
    for bits in range(1, MOST_BITS + 1) if values == "auto" else (BITS[values],):
        most = 1 << (bits - 1)
        step, error = _best_step(found, most)
        if values != "auto" or error <= BUDGET * found[2].sum():
            return Rounding(step, most) if math.isfinite(step) and step > 0 else EXACT
    return EXACT


def _best_step(tally: Tally, most: int) -> tuple[float, float]:
    """The step, and the squared error at it. tally: [3, bins], without empty ones.

    Of steps a sixteenth of an octave apart, from where the largest size is the last multiple to
    where half the root mean square is, each moved to where it is best for the multiples that it
    leads to (Lloyd, 1957).
    """
    counts, sums, squares = tally
    sizes = sums / counts
    root_mean_square = math.sqrt(squares.sum() / counts.sum())
    octaves = 1 + math.log2(sizes[-1] / root_mean_square) if root_mean_square else 0
    tried = np.arange(math.ceil(_TRIED_AN_OCTAVE * octaves) + 1) / _TRIED_AN_OCTAVE
    steps = sizes[-1] / most * np.exp2(-tried)
    multiples = np.minimum(np.rint(sizes / steps[:, None]), most)
    along, across = multiples @ sums, np.square(multiples) @ counts
    gains = np.divide(along**2, across, out=np.zeros_like(along), where=across > 0)
    best = int(gains.argmax())
    if not gains[best] > 0:
        return 0.0, float(squares.sum())
    return float(along[best] / across[best]), float(squares.sum() - gains[best])
