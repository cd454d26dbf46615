"""Which elements of a task vector survive, and at which value. Pure functions.

The coefficients scale magnitude subspaces (NPS, arXiv 2505.18713, eq. 2); a rule then selects from
the reweighted task vector. Two rules:

``magnitude``
    keep the largest magnitudes (eq. 4), at their reweighted value.
``sampled``
    keep each element with probability p = min(1, |t| / step), at t / p, that is at +-step where
    p < 1: unbiased, and of least variance for the expected number kept. Also known as stochastic
    rounding of t to {0, +-step}. What is kept is rounded to the base's dtype, and then moves the
    base by d, not by step; the draw uses |t| / |d|, which keeps the expectation exact. (Where
    |t| >= step the sum is rounded to nearest, exact unless the fine-tune is in a wider dtype.)

Both rank by score: the magnitude times an importance (see importance.py; 1 where there is none).
``sampled`` then keeps with probability min(1, score / step), at +-step / importance where it is
below 1: still unbiased, with the errors where they matter least.

Draws come from a counter: (seed, tensor name, position) fix the outcome, whatever the chunking.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit
from nps_compress.dtypes import DType, Words, round_float32, to_float32
from nps_compress.errors import InvalidArgumentError
from nps_compress.task_vector import (
    KEY_SHIFT,
    KEYS,
    NEUTRAL,
    Histogram,
    key_of,
    subspace_edges,
)

Rule = Literal["magnitude", "sampled"]
RULES: tuple[Rule, ...] = get_args(Rule)
Cuts = Literal["tail", "equal"]
CUTS: tuple[Cuts, ...] = get_args(Cuts)
MAX_SUBSPACES = 64
COEFFICIENTS = (1e-6, 1e6)  # wider than any search goes, narrow enough for float32


@dataclass(frozen=True)
class Selection:
    """A rule made concrete for one ranking: apply it with :func:`prune`.

    subspace_of: [KEYS] uint8, factors: [M] float32. ``magnitude``: keys above ``boundary[m]`` are
    kept, those at it with probability ``tie_share``. ``sampled``: see ``step``.
    """

    rule: Rule
    subspace_of: npt.NDArray[np.uint8]
    factors: npt.NDArray[np.float32]
    boundary: npt.NDArray[np.int64]
    tie_share: float
    step: float


def top_shares(subspaces: int, density: float, cuts: Cuts) -> tuple[float, ...]:
    """Where to cut the magnitude ranking, as shares of the largest elements, descending.

    ``equal``: subspaces of equal count, the paper's. ``tail``: the top shares halve from one
    subspace to the next, from eight times the density (for 8 subspaces) to an eighth of it: the
    search moves the threshold across subspaces on both sides of the budget's edge.
    """
    if not 1 <= subspaces <= MAX_SUBSPACES:
        raise InvalidArgumentError("subspaces", subspaces, f"from 1 to {MAX_SUBSPACES}")
    if cuts == "equal":
        return tuple(1 - m / subspaces for m in range(1, subspaces))
    widest = min(0.5, density * 2 ** ((subspaces - 1) // 2))
    return tuple(widest / 2**m for m in range(subspaces - 1))


def check_density(density: float) -> None:
    """Raise InvalidArgumentError unless density is a number with 0 < density <= 1."""
    if isinstance(density, bool | str) or not 0 < density <= 1:
        raise InvalidArgumentError("density", density, "in (0, 1]")


def plan(
    histogram: Histogram,
    rule: Rule,
    density: float,
    shares: Sequence[float] = (),
    coefficients: Sequence[float] = (1.0,),
) -> Selection:
    """Find the threshold or step at which ``density`` of all elements is kept, without a sort.

    coefficients: one positive factor per subspace, len(shares) + 1 of them.

    The arguments are those of a valid recipe.
    """
    starts = (0, *subspace_edges(histogram, shares))
    subspace_of = np.zeros(KEYS, np.uint8)
    for m, start in enumerate(starts):
        subspace_of[start:] = m
    factors = np.array(coefficients, np.float32)
    boundary, tie_share, step = np.zeros(len(starts), np.int64), 0.0, 0.0
    if rule == "magnitude":
        boundary, tie_share = _threshold(histogram, density, starts, coefficients)
    else:
        step = _step(histogram, density, starts, coefficients)
    return Selection(rule, subspace_of, factors, boundary, tie_share, step)


def prune(
    selection: Selection,
    base: Words,
    dtype: DType,
    finetuned: Words,
    finetuned_dtype: DType,
    seed: int,
    start: int = 0,
    importance: npt.NDArray[np.float32] = NEUTRAL,
) -> Words:
    """Words of base + selected task vector, rounded to nearest even; the base's where dropped.

    base, finetuned: [n] words of F16, BF16 or F32, finite; ``seed`` from :func:`tensor_seed`;
    ``start`` is the position of the first element within its tensor; importance: [n], or [1] for
    all. -> [n] words of ``dtype``.
    """
    before, after = to_float32(base, dtype), to_float32(finetuned, finetuned_dtype)
    tau = after - before
    positions, values = np.empty(tau.size, np.uint32), np.empty(tau.size, np.float32)
    kept = _select(
        before,
        tau,
        importance,
        selection.subspace_of,
        selection.factors,
        selection.rule == "sampled",
        selection.boundary,
        selection.tie_share,
        selection.step,
        np.uint64(seed),
        start,
        np.uint32(_DROPPED_BITS[dtype.name]),
        np.float32(_LARGEST[dtype.name]),
        positions,
        values,
    )
    out = base.copy()
    out[positions[:kept]] = round_float32(values[:kept], dtype)
    return out


def tensor_seed(seed: int, name: str) -> int:
    """The 64-bit seed of one tensor's draws."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _threshold(
    histogram: Histogram, density: float, starts: Sequence[int], coefficients: Sequence[float]
) -> tuple[npt.NDArray[np.int64], float]:
    """Boundary key of each subspace and the share kept of the elements at it."""
    at_least = np.append(histogram.counts[::-1].cumsum()[::-1], 0)
    ends = (*starts[1:], KEYS)
    nonzero = histogram.numel - int(histogram.counts[0])
    target = min(density * histogram.numel, nonzero)

    def boundaries(threshold: float) -> list[int]:
        return [key_of(threshold / c) for c in coefficients]

    def kept(keys: list[int], inclusive: bool) -> int:
        total = 0
        for key, start, end in zip(keys, starts, ends, strict=True):
            first = min(max(key if inclusive else key + 1, start), end)
            total += int(at_least[first] - at_least[end])
        return total

    low, high = 0.0, 3.0e38
    if kept(boundaries(low), inclusive=False) <= target:
        high = low
    while True:  # down to adjacent floats: kept() is a step function of the threshold
        middle = math.sqrt(low * high) if low else high / 2**16
        if not low < middle < high or high < 1e-44:
            break
        if kept(boundaries(middle), inclusive=False) <= target:
            high = middle
        else:
            low = middle
    keys = boundaries(high)
    above, with_ties = kept(keys, inclusive=False), kept(keys, inclusive=True)
    tie_share = (target - above) / (with_ties - above) if with_ties > above else 0.0
    return np.array(keys, np.int64), min(max(tie_share, 0.0), 1.0)


def _step(
    histogram: Histogram, density: float, starts: Sequence[int], coefficients: Sequence[float]
) -> float:
    """The step at which min(1, |t| / step) sums to the target; 0 where all can be kept."""
    counts = np.append(0, histogram.counts.cumsum())  # [KEYS + 1]: elements with a lower key
    sums = np.append(0.0, histogram.sums.cumsum())
    ends = (*starts[1:], KEYS)
    nonzero = histogram.numel - int(histogram.counts[0])
    target = density * histogram.numel
    if target >= nonzero:
        return 0.0

    def expected(step: float) -> float:
        total = 0.0
        for c, start, end in zip(coefficients, starts, ends, strict=True):
            certain = min(max(key_of(step / c), start), end)
            total += c / step * float(sums[certain] - sums[start])
            total += float(counts[end] - counts[certain])
        return total

    low, high = 1e-38, 1e38
    for _ in range(200):
        middle = math.sqrt(low * high)
        if expected(middle) > target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


# Mantissa bits that a float32 loses in each dtype, and the largest finite value of each.
_DROPPED_BITS = {"F32": 0, "BF16": 16, "F16": 13}
_LARGEST = {"F32": 3.4028234663852886e38, "BF16": 3.3895313892515355e38, "F16": 65504.0}


@jit
def _rounded(value, dropped):  # type: ignore[no-untyped-def]
    """``value`` as :func:`round_float32` rounds it, still as float32."""
    if dropped == 0:
        return value
    if dropped == 13 and abs(value) < np.float32(2.0**-14):  # subnormal in F16
        return np.float32(np.rint(value * np.float32(2.0**24)) * np.float32(2.0**-24))
    bits = np.float32(value).view(np.uint32)
    half = (np.uint32(1) << (dropped - np.uint32(1))) - np.uint32(1)
    bits += half + ((bits >> dropped) & np.uint32(1))
    return np.uint32((bits >> dropped) << dropped).view(np.float32)


@jit
def _select(  # type: ignore[no-untyped-def]
    before,
    tau,
    importance,
    subspace_of,
    factors,
    sampled,
    boundary,
    tie_share,
    step,
    seed,
    start,
    dropped,
    largest,
    positions,
    values,
):
    kept = 0
    step32 = np.float32(step)
    for i in range(tau.size):
        weight = importance[i if importance.size > 1 else 0]
        score_bits = np.float32(abs(np.float32(tau[i])) * weight).view(np.uint32)
        if score_bits == 0:
            continue
        key = score_bits >> np.uint32(KEY_SHIFT)
        m = subspace_of[key]
        if sampled:
            value = tau[i] * factors[m]
            probability = abs(np.float64(value)) * weight / step if step > 0.0 else 1.0
        else:
            if key < boundary[m]:
                continue
            value = tau[i] * factors[m]
            probability = tie_share if key == boundary[m] else 1.0
        wanted = abs(np.float64(value))
        draw = -1.0
        if probability < 1.0:
            # splitmix64 of a counter: the top 53 bits are uniform on [0, 1)
            z = seed + np.uint64(start + i + 1) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
            draw = np.float64(z >> np.uint64(11)) * 2.0**-53
            # A step is at most twice what rounding leaves of it, unless that is nothing: 1.5 times
            # within an octave, twice where it crosses into one of wider spacing.
            if draw >= (2.0 * probability if sampled else probability):
                continue
            if sampled:
                size = step32 / weight
                value = size if value > 0 else -size
        word = _rounded(before[i] + value, dropped)
        moved = abs(np.float64(word) - np.float64(before[i]))
        if moved == 0.0 or not abs(word) <= largest:
            continue
        if sampled and draw >= 0.0 and draw * moved >= wanted:
            continue
        positions[kept] = i
        values[kept] = word
        kept += 1
    return kept
