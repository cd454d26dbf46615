"""Means over some of the tasks, element by element. taus: [tasks, ...] -> [...]."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Values = TypeVar("Values", bound=npt.NDArray[np.floating])


def elected_mean(taus: Values) -> Values:
    """The mean of those that have the sign of the sum (TIES-Merging, arXiv 2306.01708, Algorithm 1,
    steps 2 and 3). A sum of 0 counts as positive."""
    positive = taus.sum(0) >= 0
    return _mean(taus, np.where(positive, taus > 0, taus < 0))


def mean_of_nonzero(taus: Values) -> Values:
    """The mean of those that are not 0; 0 where all are."""
    return _mean(taus, taus != 0)


def _mean(taus: Values, chosen: npt.NDArray[np.bool_]) -> Values:
    count = np.maximum(chosen.sum(0, dtype=np.float32), np.float32(1))
    found: Values = (taus * chosen).sum(0) / count
    return found
