"""Which elements of a task vector survive, and at which value. Pure functions.

Coefficients scale parts of the task vector (NPS, arXiv 2505.18713, eq. 2); a rule then selects from
the reweighted one. Three rules:

``magnitude``
    keep the largest magnitudes (eq. 4), at their reweighted value.
``sampled``
    keep each element with probability p = min(1, |t| / step), at t / p, that is at +-step where
    p < 1: unbiased, and of least variance for the expected number kept. Also known as stochastic
    rounding of t to {0, +-step}. What is kept is rounded to the base's dtype, and then moves the
    base by d, not by step; the draw uses |t| / |d|, which keeps the expectation exact. (Where
    |t| >= step the sum is rounded to nearest, exact unless the fine-tune is in a wider dtype.)
    With ``grid``, what exceeds the step is rounded at random to one of the two multiples of it
    beside it, again unbiased: then every value is a small integer times the step.
``random``
    keep each element with the same probability p, at t / p (DARE, arXiv 2311.03099).

A share ``eligible`` below 1 lets ``sampled`` keep elements only where a hash of seed, tensor and
position says so, at values larger by 1 / eligible: still unbiased, and who knows the seed need not
be told which positions can't be kept. ``random`` is the limit: all that is eligible is kept.

All rank by score: the magnitude times an importance (see importance.py; 1 where there is none).
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
    Ranking,
    keys_of,
)

Rule = Literal["magnitude", "sampled", "random"]
RULES: tuple[Rule, ...] = get_args(Rule)
Cuts = Literal["tail", "equal"]
CUTS: tuple[Cuts, ...] = get_args(Cuts)
MAX_SUBSPACES = 64
COEFFICIENTS = (1e-6, 1e6)  # as far as a search may go, narrow enough for float32


@dataclass(frozen=True)
class Weighting:
    """Factors by group of tensors and subspace, positive float64 [groups, subspaces] each.

    ``scale`` multiplies the task vector: what survives, and at which value (the paper's
    coefficients). ``density`` multiplies the score alone: how much of a part survives.
    """

    scale: npt.NDArray[np.float64]
    density: npt.NDArray[np.float64]

    @classmethod
    def ones(cls, groups: int = 1, subspaces: int = 1) -> Weighting:
        """Changes nothing."""
        return cls(np.ones((groups, subspaces)), np.ones((groups, subspaces)))

    @property
    def rank(self) -> npt.NDArray[np.float64]:
        """Factors of the score. [groups, subspaces]."""
        return self.scale * self.density


@dataclass(frozen=True)
class Selection:
    """A rule made concrete for one ranking: apply it with :func:`prune`.

    subspace_of: [KEYS] uint8. rank, scale: [groups, subspaces] float32 factors of score and value.
    ``magnitude``: keys above ``boundary[group, subspace]`` are kept, those at it with probability
    ``tie_share``. ``sampled``: ``step`` is that of the scores of eligible elements.
    """

    rule: Rule
    subspace_of: npt.NDArray[np.uint8]
    rank: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    boundary: npt.NDArray[np.int64]
    tie_share: float
    step: float
    eligible: float
    grid: bool


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
    ranking: Ranking,
    rule: Rule,
    density: float,
    shares: Sequence[float] = (),
    weighting: Weighting | None = None,
    eligible: float = 1.0,
    grid: bool = False,
) -> Selection:
    """Find the threshold or step at which ``density`` of all elements is kept, without a sort.

    shares: cut the ranking into len(shares) + 1 subspaces. ``eligible``, at least the density,
    counts for ``sampled``.

    The arguments are those of a valid recipe.
    """
    starts = np.array([0, *ranking.subspace_edges(shares)])
    weighting = weighting or Weighting.ones(len(ranking.counts), len(starts))
    subspace_of = np.zeros(KEYS, np.uint8)
    for m, start in enumerate(starts):
        subspace_of[start:] = m
    boundary, tie_share, step = np.zeros(weighting.rank.shape, np.int64), 0.0, 0.0
    if rule == "magnitude":
        eligible = 1.0
        boundary, tie_share = _threshold(ranking, density, starts, weighting.rank)
    elif rule == "sampled":
        step = _step(ranking, density / eligible, starts, weighting.rank)
    else:
        eligible = density
    return Selection(
        rule,
        subspace_of,
        weighting.rank.astype(np.float32),
        weighting.scale.astype(np.float32),
        boundary,
        tie_share,
        step,
        eligible,
        grid,
    )


@dataclass(frozen=True)
class Elements:
    """Elements of one tensor that may be kept, in float32.

    before: [n], the base; tau: [n]; importance: [n], or [1] for all; at: [n] uint32 positions from
    ``start``, or [0] where the elements follow each other from there.
    """

    before: npt.NDArray[np.float32]
    tau: npt.NDArray[np.float32]
    importance: npt.NDArray[np.float32]
    at: npt.NDArray[np.uint32]
    start: int = 0


def select(
    selection: Selection, elements: Elements, dtype: DType, seed: int, group: int = 0
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
    """What is kept of a tensor whose base has ``dtype`` (F16, BF16 or F32).

    -> [nnz] indices into ``elements`` ascending, and [nnz] weights rounded to ``dtype``; none is
    equal to the base's. ``seed`` from :func:`tensor_seed`.
    """
    size = elements.tau.size
    indices, values = np.empty(size, np.uint32), np.empty(size, np.float32)
    kept = _select(
        elements.before,
        elements.tau,
        elements.importance,
        elements.at,
        elements.start,
        selection.subspace_of,
        selection.rank[group],
        selection.scale[group],
        selection.rule != "magnitude",
        selection.boundary[group],
        selection.tie_share,
        selection.step,
        selection.eligible,
        selection.grid,
        np.uint64(seed),
        np.uint32(_DROPPED_BITS[dtype.name]),
        np.float32(_LARGEST[dtype.name]),
        indices,
        values,
    )
    return indices[:kept], values[:kept]


def prune(
    selection: Selection,
    base: Words,
    dtype: DType,
    finetuned: Words,
    finetuned_dtype: DType,
    seed: int,
    start: int = 0,
    importance: npt.NDArray[np.float32] = NEUTRAL,
    group: int = 0,
) -> Words:
    """Words of base + selected task vector, rounded to nearest even; the base's where dropped.

    base, finetuned: [n] words of F16, BF16 or F32, finite; ``seed`` from :func:`tensor_seed`;
    ``start`` is the position of the first element within its tensor; importance: [n], or [1] for
    all; ``group``: whose factors count. -> [n] words of ``dtype``.
    """
    before, after = to_float32(base, dtype), to_float32(finetuned, finetuned_dtype)
    elements = Elements(before, after - before, importance, np.empty(0, np.uint32), start)
    indices, values = select(selection, elements, dtype, seed, group)
    out = base.copy()
    out[indices] = round_float32(values, dtype)
    return out


@dataclass(frozen=True)
class Reach:
    """What a selection can keep of one group: candidates within another's reach need no more.

    ``lowest``: the lowest key, ``ratio``: the highest of draw / score; each by its rule.
    """

    lowest: int
    ratio: float

    def covers(self, other: Reach) -> bool:
        """Whether all that ``other`` can keep is within this one."""
        return self.lowest <= other.lowest and self.ratio >= other.ratio

    def widened(self) -> Reach:
        """Room for candidates that keep somewhat more."""
        return Reach(self.lowest - _KEYS_PER_OCTAVE // 2, 1.5 * self.ratio)


def reach(selection: Selection, group: int = 0) -> Reach:
    """The reach of a selection."""
    if selection.rule == "magnitude":
        starts = np.searchsorted(selection.subspace_of, np.arange(selection.rank.shape[1]))
        ends = np.append(starts[1:], KEYS)
        lowest = np.maximum(selection.boundary[group], starts)
        return Reach(int(np.where(lowest < ends, lowest, KEYS).min()), math.inf)
    if selection.step == 0:
        return Reach(0, math.inf)
    return Reach(0, _SLACK * float(selection.rank[group].max()) / selection.step)


def within(limits: Reach, selection: Selection, elements: Elements, seed: int) -> Elements:
    """Those of adjacent elements that are within reach, with their positions in the tensor.

    ``selection`` gives rule and eligible share, which its candidates have in common.
    """
    tau, importance = elements.tau, elements.importance
    at = np.empty(tau.size, np.uint32)
    found = _within(
        tau,
        importance,
        selection.rule != "magnitude",
        limits.lowest,
        limits.ratio,
        selection.eligible,
        np.uint64(seed),
        elements.start,
        at,
    )
    at = at[:found]
    weight = importance[at] if importance.size > 1 else importance
    return Elements(elements.before[at], tau[at], weight, at + np.uint32(elements.start))


def tensor_seed(seed: int, name: str) -> int:
    """The 64-bit seed of one tensor's draws."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _threshold(
    ranking: Ranking, density: float, starts: npt.NDArray[np.int64], rank: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], float]:
    """Boundary key of each group and subspace, and the share kept of the elements at it."""
    cells = _Cells(ranking, starts, rank)
    target = min(density * ranking.numel, ranking.numel - ranking.zeros)

    def kept(threshold: float, inclusive: bool) -> int:
        first = cells.keys(threshold) + (not inclusive)
        return int((cells.counts(cells.ends) - cells.counts(cells.clip(first))).sum())

    low, high = 0.0, 3.0e38
    if kept(low, inclusive=False) <= target:
        high = low
    while True:  # down to adjacent floats: kept() is a step function of the threshold
        middle = math.sqrt(low * high) if low else high / 2**16
        if not low < middle < high or high < 1e-44:
            break
        if kept(middle, inclusive=False) <= target:
            high = middle
        else:
            low = middle
    above, with_ties = kept(high, inclusive=False), kept(high, inclusive=True)
    tie_share = (target - above) / (with_ties - above) if with_ties > above else 0.0
    return cells.keys(high), min(max(tie_share, 0.0), 1.0)


def _step(
    ranking: Ranking, density: float, starts: npt.NDArray[np.int64], rank: npt.NDArray[np.float64]
) -> float:
    """The step at which min(1, score / step) sums to the target; 0 where all can be kept."""
    cells = _Cells(ranking, starts, rank)
    target = density * ranking.numel
    if target >= ranking.numel - ranking.zeros:
        return 0.0
    below = cells.sums(cells.starts)

    def expected(step: float) -> float:
        certain = cells.clip(cells.keys(step))
        drawn = rank / step * (cells.sums(certain) - below)
        return float((drawn + cells.counts(cells.ends) - cells.counts(certain)).sum())

    low, high = 1e-38, 1e38
    for _ in range(100):
        middle = math.sqrt(low * high)
        if expected(middle) > target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


class _Cells:
    """Groups x subspaces. starts, ends: [groups, subspaces] keys; rank: factors of the score."""

    def __init__(
        self, ranking: Ranking, starts: npt.NDArray[np.int64], rank: npt.NDArray[np.float64]
    ) -> None:
        self._ranking, self._rank = ranking, rank
        self._groups = np.arange(len(rank))[:, None]
        self.starts = np.broadcast_to(starts, rank.shape)
        self.ends = np.broadcast_to(np.append(starts[1:], KEYS), rank.shape)

    def keys(self, score: float) -> npt.NDArray[np.int64]:
        """The key of each cell that its factor moves to this score."""
        return keys_of(score / self._rank)

    def clip(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.clip(keys, self.starts, self.ends)

    def counts(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._ranking.counts[self._groups, keys]

    def sums(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return self._ranking.sums[self._groups, keys]


_KEYS_PER_OCTAVE = 1 << (23 - KEY_SHIFT)
_ELIGIBLE = 0xD1B54A32D192ED03
_SLACK = 2.0
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
def _draw(seed, position):  # type: ignore[no-untyped-def]
    """splitmix64 of a counter: the top 53 bits are uniform on [0, 1)."""
    z = seed + np.uint64(position + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@jit
def _is_eligible(eligible, seed, position):  # type: ignore[no-untyped-def]
    """A draw independent of the one that decides what is kept."""
    return eligible >= 1.0 or _draw(seed ^ np.uint64(_ELIGIBLE), position) < eligible


@jit
def _within(  # type: ignore[no-untyped-def]
    tau, importance, sampled, lowest, ratio, eligible, seed, start, at
):
    found = 0
    for i in range(tau.size):
        weight = importance[i if importance.size > 1 else 0]
        score = np.float32(abs(np.float32(tau[i])) * weight)
        bits = score.view(np.uint32)
        if bits == 0:
            continue
        if sampled:
            position = start + i
            if not _is_eligible(eligible, seed, position):
                continue
            if _draw(seed, position) >= ratio * score:
                continue
        elif np.int64(bits >> np.uint32(KEY_SHIFT)) < lowest:
            continue
        at[found] = i
        found += 1
    return found


@jit
def _select(  # type: ignore[no-untyped-def]
    before,
    tau,
    importance,
    at,
    start,
    subspace_of,
    rank,
    scale,
    sampled,
    boundary,
    tie_share,
    step,
    eligible,
    grid,
    seed,
    dropped,
    largest,
    indices,
    values,
):
    kept = 0
    for i in range(tau.size):
        weight = importance[i if importance.size > 1 else 0]
        score = np.float32(abs(np.float32(tau[i])) * weight)
        bits = score.view(np.uint32)
        if bits == 0:
            continue
        key = bits >> np.uint32(KEY_SHIFT)
        m = subspace_of[key]
        position = start + (at[i] if at.size else i)
        value = tau[i] * scale[m]
        if not sampled:
            if key < boundary[m]:
                continue
            if key == boundary[m] and _draw(seed, position) >= tie_share:
                continue
            word = _rounded(before[i] + value, dropped)
        else:
            if not _is_eligible(eligible, seed, position):
                continue
            probability = np.float64(score) * rank[m] / step if step > 0.0 else 1.0
            wanted = abs(np.float64(value)) / eligible
            if probability >= 1.0 and not (grid and step > 0.0):
                word = _rounded(before[i] + np.float32(value / eligible), dropped)
            else:
                # A step is at most twice what rounding leaves of it, unless that is nothing: 1.5
                # times within an octave, twice where it crosses into one of wider spacing.
                draw = _draw(seed, position)
                if draw >= _SLACK * probability:
                    continue
                size = step * scale[m] / (rank[m] * eligible * weight)
                level = math.floor(probability)
                sign = 1.0 if value > 0 else -1.0
                low = _rounded(before[i] + np.float32(sign * level * size), dropped)
                high = _rounded(before[i] + np.float32(sign * (level + 1.0) * size), dropped)
                near = abs(np.float64(low) - np.float64(before[i]))
                far = abs(np.float64(high) - np.float64(before[i]))
                # So that the expectation is exact after rounding.
                word = high if draw * (far - near) < wanted - near else low
        if word == before[i] or not abs(word) <= largest:
            continue
        indices[kept] = i
        values[kept] = word
        kept += 1
    return kept
