"""Scores of a task vector (fine-tuned minus base), counted once and asked many times.

An element's score is its magnitude times its importance (1 where none is given). A score's *key*
is the upper 18 bits of its float32 pattern: 1,024 buckets an octave, in the order of the scores.
Counts and sums per key answer every question that choosing a threshold asks, so no candidate of a
search ever sorts the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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

    def add(self, tau: Float32, importance: Float32 = NEUTRAL) -> bool:
        """Count the scores of one piece of a task vector. tau: [n].

        importance: [n], or [1] for all. Returns False, the histogram then being of no use, where
        a score is not finite.
        """
        return bool(_count(tau, importance, self.counts, self.sums))

    def merge(self, other: Histogram) -> None:
        """Add the elements of ``other``."""
        self.counts += other.counts
        self.sums += other.sums

    @property
    def numel(self) -> int:
        """Elements counted, zeros included."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class Ranking:
    """Histograms of groups of tensors, summed up for questions about ranks.

    counts: [groups, KEYS + 1] int64, elements whose key is lower; sums: [groups, KEYS + 1] float64,
    their scores. zeros: elements that score nothing.
    """

    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    zeros: int
    # A search asks for the same edges again and again.
    _edges: dict[tuple[float, ...], tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, histograms: Sequence[Histogram]) -> Ranking:
        """The ranking of all elements of these groups."""
        counts = np.zeros((len(histograms), KEYS + 1), np.int64)
        sums = np.zeros((len(histograms), KEYS + 1))
        for group, histogram in enumerate(histograms):
            histogram.counts.cumsum(out=counts[group, 1:])
            histogram.sums.cumsum(out=sums[group, 1:])
        return cls(counts, sums, sum(int(histogram.counts[0]) for histogram in histograms))

    @property
    def numel(self) -> int:
        """Elements ranked, zeros included."""
        return int(self.counts[:, -1].sum())

    def subspace_edges(self, top_shares: Sequence[float]) -> tuple[int, ...]:
        """Cut the ranking into subspaces (NPS, arXiv 2505.18713, section 3.2).

        ``top_shares`` descend within (0, 1): subspace m + 1 begins where that share of all elements
        is at least as large. Returns one key per share, ascending: the first key of subspaces 1 to
        len(top_shares); subspace 0 holds the smallest scores.
        """
        shares = tuple(top_shares)
        if shares not in self._edges:
            at_least = self.numel - self.counts.sum(0)[:-1]  # [KEYS]: of this key or above
            wanted = np.array(shares) * self.numel
            # The number of keys whose tail holds more than wanted is the first that does not.
            edges = [int(np.count_nonzero(at_least > count)) for count in wanted]
            self._edges[shares] = tuple(edges)
        return self._edges[shares]


def keys_of(magnitudes: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The keys of non-negative magnitudes; KEYS - 1 at most."""
    bits = np.minimum(magnitudes, 3.0e38).astype(np.float32).view(np.uint32)
    return np.minimum(bits >> KEY_SHIFT, KEYS - 1).astype(np.int64)


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
