"""Racing: the candidates of one generation, each measured only as long as it may still win.

All are measured on a first part of the calibration data; those that are then clearly worse than the
best half on the same examples are dropped, the others go on (as in F-Race, Birattari et al. 2002,
with a one-sided paired z-test). CMA-ES uses the ranks of a generation, and the best half most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nps_compress.measured import Measured, join

Z = 2.0  # standard errors that tell a candidate from a better one: one in 44 is dropped wrongly
_FIRST_ROUNDS = (0.125, 0.25, 0.5)  # shares of the data after which candidates are dropped


@dataclass(frozen=True)
class Outcome:
    """A candidate's score, and the share of the data it took.

    For one that was dropped, the score that it would have if it stayed as far behind the candidate
    that it was compared with.
    """

    score: float
    share: float


def rounds(parts: int, is_mean: bool) -> list[range]:
    """The parts measured in each round. One round where a score is no mean over examples."""
    ends = [round(share * parts) for share in _FIRST_ROUNDS] if is_mean else []
    ends = [*sorted({end for end in ends if 0 < end < parts}), parts]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def race(
    candidates: int,
    parts: Sequence[range],
    measure: Callable[[Sequence[int], range], Sequence[Measured]],
) -> list[Outcome]:
    """Scores of so many candidates.

    measure: candidates by number, and the parts that they are to be measured on next.
    """
    running = list(range(candidates))
    found: list[list[Measured]] = [[] for _ in running]
    left: dict[int, tuple[int, float]] = {}  # dropped: behind whom, and by how much
    for number, span in enumerate(parts):
        for candidate, measured in zip(running, measure(running, span), strict=True):
            found[candidate].append(measured)
        if number + 1 == len(parts):
            break
        sums = {candidate: join(found[candidate]) for candidate in running}
        ranked = sorted(running, key=lambda c: -_order(sums[c].score))
        middle = ranked[(candidates + 1) // 2 - 1] if len(ranked) > candidates // 2 else ranked[-1]
        for candidate in ranked[ranked.index(middle) + 1 :]:
            behind, error = _behind(sums[middle], sums[candidate])
            if not behind <= Z * error:
                left[candidate] = middle, behind
        running = [candidate for candidate in running if candidate not in left]
    scores: dict[int, float] = {}
    total = sum(map(len, parts))
    for candidate in running:
        scores[candidate] = join(found[candidate]).score
    for candidate, (middle, behind) in reversed(left.items()):
        scores[candidate] = scores[middle] - behind
    return [
        Outcome(scores[c], sum(len(parts[r]) for r in range(len(found[c]))) / total)
        for c in range(candidates)
    ]


def _order(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _behind(better: Measured, worse: Measured) -> tuple[float, float]:
    """By how much a mean is lower on the same examples, and the standard error of that."""
    total = better.counts.sum()
    if not total:
        return 0.0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        differences = better.sums - worse.sums
        mean = differences.sum() / total
        spread = differences - mean * better.counts
        error = math.sqrt(float(np.square(spread).sum())) / total
    return float(mean), float(error)
