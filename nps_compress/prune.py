"""Which elements of a task vector survive, and at which value. Pure functions.

Coefficients scale parts of the task vector (NPS, arXiv 2505.18713, eq. 2); a rule then selects from
the reweighted one. Four rules:

``magnitude``
    keep the largest magnitudes (eq. 4), at their reweighted value.
``sampled``
    keep each element with probability p = min(1, |t| / step), at t / p, that is at +-step where
    p < 1: unbiased, and of least variance for the expected number kept. What exceeds the step is
    rounded at random to one of the two multiples of it beside it: every value is a small integer
    times the step (stochastic rounding). The sum is rounded to the base's dtype, and then moves
    the base by d, not by a multiple of the step; the draw uses d, which keeps the expectation
    exact.
``signs``
    sample likewise from the task vector as signs (signs.py): whether an element is kept, and at
    which size, then follows from its row, its column and the seed, and only its sign from t.
``random``
    keep each element with the same probability p, at t / p (DARE, arXiv 2311.03099).

All rank by score: the magnitude times an importance (see importance.py; 1 where there is none).
``sampled`` then keeps with probability min(1, score / step), at multiples of step / importance:
still unbiased, with the errors where they matter least; ``signs`` does the same.

What ``magnitude`` and ``random`` keep is stored exactly, or rounded to nearest multiples of a step
of the tensor (values.py), over the importance likewise.

Draws come from a counter: (seed, tensor name, position) fix the outcome, whatever the chunking.
Those of ``signs`` have 16 bits, four from each number, and probabilities are rounded to match: a
reader has to draw again for every weight.
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
from nps_compress.draws import LEVELS, draw_of, short_draw
from nps_compress.dtypes import DType
from nps_compress.entropy_coding import MAX_MAGNITUDE
from nps_compress.errors import InvalidArgumentError
from nps_compress.rank_one import POWERS
from nps_compress.rounding import DROPPED_BITS, LARGEST, rounded
from nps_compress.task_vector import (
    KEY_SHIFT,
    KEYS,
    Ranking,
    keys_of,
)
from nps_compress.values import EXACT, TALLY_SHIFT, Rounding, Tally

Rule = Literal["magnitude", "sampled", "signs", "random"]
RULES: tuple[Rule, ...] = get_args(Rule)
Cuts = Literal["tail", "equal"]
CUTS: tuple[Cuts, ...] = get_args(Cuts)
MAX_SUBSPACES = 64
Levels = npt.NDArray[np.int16]
_NOT_WANTED: Levels = np.empty(0, np.int16)
_NO_TALLY: Tally = np.empty((3, 0))
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
    """A rule made concrete for one ranking: apply it with :func:`select`.

    subspace_of: [KEYS] uint8. rank, scale: [groups, subspaces] float32 factors of score and value.
    ``magnitude``: keys above ``boundary[group, subspace]`` are kept, those at it with probability
    ``tie_share``. ``sampled`` and ``signs``: ``step`` is that of the scores (0: all that changes is
    kept); ``unit``: [groups], for ``sampled``, the step of values whose importance is 1.
    ``random``: ``density`` is the probability of each.
    """

    rule: Rule
    subspace_of: npt.NDArray[np.uint8]
    rank: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    boundary: npt.NDArray[np.int64]
    tie_share: float
    step: float
    unit: npt.NDArray[np.float64]
    density: float


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
) -> Selection:
    """Find the threshold or step at which ``density`` of all elements is kept, without a sort.

    shares: cut the ranking into len(shares) + 1 subspaces. The arguments are those of a valid
    recipe.
    """
    starts = np.array([0, *ranking.subspace_edges(shares)])
    weighting = weighting or Weighting.ones(len(ranking.counts), len(starts))
    subspace_of = np.zeros(KEYS, np.uint8)
    for m, start in enumerate(starts):
        subspace_of[start:] = m
    boundary, tie_share, step = np.zeros(weighting.rank.shape, np.int64), 0.0, 0.0
    if rule == "magnitude":
        boundary, tie_share = _threshold(ranking, density, starts, weighting.rank)
    elif rule != "random":
        step = _step(ranking, density, starts, weighting.rank)
    return Selection(
        rule,
        subspace_of,
        weighting.rank.astype(np.float32),
        weighting.scale.astype(np.float32),
        boundary,
        tie_share,
        step,
        step / weighting.density[:, 0],
        density,
    )


@dataclass(frozen=True)
class Elements:
    """Elements of one tensor that may be kept, in float32.

    before: [n], the base; tau: [n]; importance: [n], or [1] for all (for ``signs`` the scores
    themselves, [n]); at: [n] uint32 positions from
    ``start``, or [0] where the elements follow each other from there.
    """

    before: npt.NDArray[np.float32]
    tau: npt.NDArray[np.float32]
    importance: npt.NDArray[np.float32]
    at: npt.NDArray[np.uint32]
    start: int = 0


def select(
    selection: Selection,
    elements: Elements,
    dtype: DType,
    seed: int,
    group: int = 0,
    levels: Levels = _NOT_WANTED,
    rounding: Rounding = EXACT,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
    """What is kept of a tensor whose base has ``dtype`` (F16, BF16 or F32).

    -> [nnz] indices into ``elements`` ascending, and [nnz] weights rounded to ``dtype``; none is
    equal to the base's. ``seed`` from :func:`tensor_seed`. levels: [n], receives the multiples of
    the step that ``sampled`` keeps, at their indices, or those of ``rounding``, which is for
    ``magnitude`` and ``random``.
    """
    size = elements.tau.size
    indices, values = np.empty(size, np.uint32), np.empty(size, np.float32)
    into = indices, values, levels, _NO_TALLY
    kept = _run(selection, elements, dtype, seed, group, rounding, *into)
    return indices[:kept], values[:kept]


def add_to_tally(
    tally: Tally, selection: Selection, elements: Elements, dtype: DType, seed: int, group: int
) -> None:
    """Count the sizes, times importance, of what ``magnitude`` or ``random`` keeps."""
    nothing = np.empty(0, np.uint32), np.empty(0, np.float32), _NOT_WANTED
    _run(selection, elements, dtype, seed, group, EXACT, *nothing, tally)


def _run(
    selection: Selection,
    elements: Elements,
    dtype: DType,
    seed: int,
    group: int,
    rounding: Rounding,
    indices: npt.NDArray[np.uint32],
    values: npt.NDArray[np.float32],
    levels: Levels,
    tally: Tally,
) -> int:
    kept: int = _select(
        elements.before,
        elements.tau,
        elements.importance,
        elements.at,
        elements.start,
        selection.subspace_of,
        selection.rank[group],
        selection.scale[group],
        RULES.index(selection.rule),
        selection.boundary[group],
        selection.tie_share,
        selection.step,
        selection.unit[group],
        selection.density,
        np.uint64(seed),
        np.uint32(DROPPED_BITS[dtype.name]),
        np.float32(LARGEST[dtype.name]),
        rounding.step,
        rounding.most,
        indices,
        values,
        levels,
        tally,
    )
    return kept


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

    ``selection`` gives the rule (and the density of ``random``), which its candidates have in
    common.
    """
    tau, importance = elements.tau, elements.importance
    at = np.empty(tau.size, np.uint32)
    found = _within(
        tau,
        importance,
        RULES.index(selection.rule),
        limits.lowest,
        limits.ratio,
        selection.density,
        np.uint64(seed),
        elements.start,
        at,
    )
    at = at[:found]
    weights = importance[at] if importance.size > 1 else np.full(found, importance[0])
    return Elements(elements.before[at], tau[at], weights, at + np.uint32(elements.start))


def subspaces_by_exponent(
    selection: Selection, group: int, gain: float
) -> list[tuple[int, float, float]]:
    """The subspaces of ``signs`` where scores are ``gain`` times powers of the square root of 2.

    -> the first exponent (half octaves) of each that occurs, the probability for a score of 1, and
    the factor of values.
    """
    scores = POWERS * np.float32(gain)
    subspaces = selection.subspace_of[keys_of(scores.astype(np.float64))]
    firsts = np.flatnonzero(np.diff(subspaces, prepend=-1))
    rank, scale = selection.rank[group], selection.scale[group]
    return [
        (
            int(first) - POWERS.size // 2,
            float(rank[m]) / selection.step if selection.step else _CERTAIN,
            float(scale[m]),
        )
        for first, m in ((first, subspaces[first]) for first in firsts)
    ]


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
_MAGNITUDE, _SIGNS, _RANDOM = (RULES.index(rule) for rule in ("magnitude", "signs", "random"))
_SLACK = 2.0
_CERTAIN = 1e300  # a rate at which every score is kept


@jit
def _within(  # type: ignore[no-untyped-def]
    tau, importance, rule, lowest, ratio, density, seed, start, at
):
    found = 0
    for i in range(tau.size):
        weight = importance[i if importance.size > 1 else 0]
        score = weight if rule == _SIGNS else np.float32(abs(np.float32(tau[i])) * weight)
        bits = np.float32(score).view(np.uint32)
        if bits == 0:
            continue
        position = start + i
        if rule == _MAGNITUDE:
            if np.int64(bits >> np.uint32(KEY_SHIFT)) < lowest:
                continue
        elif rule == _RANDOM:
            if draw_of(seed, position) >= density:
                continue
        elif rule == _SIGNS:
            if short_draw(seed, position) > LEVELS * ratio * score:
                continue
        elif draw_of(seed, position) >= ratio * score:
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
    rule,
    boundary,
    tie_share,
    step,
    unit,
    density,
    seed,
    dropped,
    largest,
    grid_step,
    most,
    indices,
    values,
    levels,
    tally,
):
    kept = 0
    rates = np.ones(rank.size)  # by subspace, the probability for a score of 1
    if step > 0.0:
        for m in range(rank.size):
            rates[m] = rank[m] / step
    for i in range(tau.size):
        weight = importance[i if importance.size > 1 else 0]
        score = weight if rule == _SIGNS else np.float32(abs(np.float32(tau[i])) * weight)
        bits = np.float32(score).view(np.uint32)
        if bits == 0:
            continue
        key = bits >> np.uint32(KEY_SHIFT)
        m = subspace_of[key]
        position = start + (at[i] if at.size else i)
        value = tau[i] * scale[m]
        multiple = 0.0
        if rule == _MAGNITUDE:
            if key < boundary[m]:
                continue
            if key == boundary[m] and draw_of(seed, position) >= tie_share:
                continue
        elif rule == _RANDOM:
            if draw_of(seed, position) >= density:
                continue
            value = np.float32(value / density)
        elif rule == _SIGNS:
            level = LEVELS
            if step > 0.0:
                level = min(level, np.rint(LEVELS * (np.float64(score) * rates[m])))
            if short_draw(seed, position) >= level:
                continue
            word = rounded(before[i] + tau[i] * np.float32(scale[m] * LEVELS / level), dropped)
        else:
            if step == 0.0:
                word = rounded(before[i] + value, dropped)
            else:
                probability = np.float64(score) * rates[m]
                # A step is at most twice what rounding leaves of it, unless that is nothing: 1.5
                # times within an octave, twice where it crosses into one of wider spacing.
                draw = draw_of(seed, position)
                if draw >= _SLACK * probability:
                    continue
                wanted = abs(np.float64(value))
                size = np.float32(unit / weight)
                level = min(math.floor(probability), MAX_MAGNITUDE - 1.0)
                sign = 1.0 if value > 0 else -1.0
                low, near = before[i], 0.0
                if level > 0.0:
                    low = rounded(before[i] + np.float32(np.float32(sign * level) * size), dropped)
                    near = abs(np.float64(low) - np.float64(before[i]))
                more = np.float32(np.float32(sign * (level + 1.0)) * size)
                high = rounded(before[i] + more, dropped)
                far = abs(np.float64(high) - np.float64(before[i]))
                # So that the expectation is exact after rounding.
                word = low
                if draw * (far - near) < wanted - near:
                    word = high
                    level += 1.0
                multiple = sign * level
        if rule in (_MAGNITUDE, _RANDOM):
            if tally.size:
                _tally(np.float32(abs(value) * weight), tally)
                continue
            if grid_step > 0.0:
                size = np.float32(grid_step / weight)
                if size == 0:
                    continue
                multiple = min(np.rint(abs(np.float64(value)) / size), most)
                multiple = multiple if value > 0 else -multiple
                value = np.float32(np.float32(multiple) * size)
            word = rounded(before[i] + value, dropped)
        if word == before[i] or not abs(word) <= largest:
            continue
        if levels.size:
            levels[i] = np.int16(multiple)
        indices[kept] = i
        values[kept] = word
        kept += 1
    return kept


@jit
def _tally(size, tally):  # type: ignore[no-untyped-def]
    bits = np.float32(size).view(np.uint32)
    if bits < np.uint32(0x7F800000):
        at = bits >> np.uint32(TALLY_SHIFT)
        tally[0, at] += 1.0
        tally[1, at] += np.float64(size)
        tally[2, at] += np.float64(size) * np.float64(size)
