"""Scores of a task vector (fine-tuned minus base), counted once and asked many times.

An element's score is its magnitude times its importance (1 where none is given). A score's *key*
is the upper 18 bits of its float32 pattern: 1,024 buckets an octave, in the order of the scores.
Counts and sums per key answer every question that choosing a threshold asks, so no candidate of a
search ever sorts the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit

KEY_SHIFT = 13
KEYS = 1 << (31 - KEY_SHIFT)
HISTOGRAM_BYTES = 16 * KEYS

Float32 = npt.NDArray[np.float32]

NEUTRAL: Float32 = np.ones(1, np.float32)


@dataclass
class Histogram:
    """Counts and sums of scores by key. counts: [KEYS] int64; sums: [KEYS] float64."""

    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]

    @classmethod
    def empty(cls) -> Histogram:
        """A histogram of no elements."""
        return cls(np.zeros(KEYS, np.int64), np.zeros(KEYS, np.float64))

    def add(self, base: Float32, finetuned: Float32, importance: Float32 = NEUTRAL) -> bool:
        """Count the scores of one piece of a task vector. base, finetuned: [n].

        importance: [n], or [1] for all. Returns False, the histogram then being of no use, where
        a difference is not finite.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            tau = finetuned - base
        return bool(_count(tau, importance, self.counts, self.sums))

    def merge(self, other: Histogram) -> None:
        """Add the elements of ``other``."""
        self.counts += other.counts
        self.sums += other.sums

    @property
    def numel(self) -> int:
        """Elements counted, zeros included."""
        return int(self.counts.sum())


def key_of(magnitude: float) -> int:
    """The key of a non-negative magnitude; KEYS - 1 at most."""
    bits = int(np.float32(min(magnitude, 3.0e38)).view(np.uint32))
    return min(bits >> KEY_SHIFT, KEYS - 1)


def subspace_edges(histogram: Histogram, top_shares: Sequence[float]) -> tuple[int, ...]:
    """Cut the magnitude ranking into subspaces (NPS, arXiv 2505.18713, section 3.2).

    ``top_shares`` descend within (0, 1): subspace m + 1 begins where that share of all elements
    is at least as large. Returns one key per share, ascending: the first key of subspaces 1 to
    len(top_shares); subspace 0 holds the smallest magnitudes.
    """
    at_least = histogram.counts[::-1].cumsum()[::-1]  # [KEYS]: elements with this key or above
    wanted = np.array(top_shares) * histogram.numel
    # The number of keys whose tail still holds more than wanted is the first that does not.
    edges = [int(np.count_nonzero(at_least > count)) for count in wanted]
    return tuple(edges)


@jit
def _count(tau, importance, counts, sums):  # type: ignore[no-untyped-def]
    for i in range(tau.size):
        score = abs(np.float32(tau[i])) * importance[i if importance.size > 1 else 0]
        bits = np.float32(score).view(np.uint32)
        if bits >= np.uint32(0x7F800000):
            return False
        key = bits >> np.uint32(KEY_SHIFT)
        counts[key] += 1
        sums[key] += score
    return True
