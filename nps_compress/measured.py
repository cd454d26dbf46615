"""A fitness by example: what it needs to be resampled, cut into parts and compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Reduction = Literal["mean", "perplexity", "spearman"]


@dataclass(frozen=True)
class Measured:
    """Figures of n examples, and how they make a score.

    sums: [n] float64, over all that an example predicts; counts: [n] int64 of that (1 for a class,
    the next tokens of a text). ``how``: ``mean``, the mean over all that is predicted;
    ``perplexity``, minus the exponential of minus that; ``spearman``, the rank correlation of
    ``sums`` with ``targets``, [n] float64.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    how: Reduction = "mean"
    targets: npt.NDArray[np.float64] | None = None

    @property
    def score(self) -> float:
        """Higher is better; NaN where there is nothing to judge by."""
        if self.targets is not None:
            return spearman(self.sums, self.targets)
        count = int(self.counts.sum())
        mean = float(self.sums.sum()) / count if count else math.nan
        if self.how == "mean" or math.isnan(mean):
            return mean
        return -math.exp(-mean) if mean > -700 else -math.inf  # where exp would overflow

    def take(self, indices: npt.NDArray[np.int64]) -> Measured:
        """Some examples, any number of times each: a bootstrap sample, or a part."""
        targets = None if self.targets is None else self.targets[indices]
        return Measured(self.sums[indices], self.counts[indices], self.how, targets)


def join(parts: Iterable[Measured]) -> Measured:
    """Parts of one measure, in their order. There must be one at least."""
    found = list(parts)
    targets = [part.targets for part in found if part.targets is not None]
    return Measured(
        np.concatenate([part.sums for part in found]),
        np.concatenate([part.counts for part in found]),
        found[0].how,
        np.concatenate(targets) if targets else None,
    )


def spearman(found: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> float:
    """Correlation of ranks; ties share their mean rank. NaN where either side is constant."""
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return math.nan
    left, right = (_ranks(values) - (len(values) - 1) / 2 for values in (found, wanted))
    size = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / size if size else math.nan


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """From 0. -> [n] float64."""
    _, place, size = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(size) - 1
    return (last - (size - 1) / 2)[place]
