"""Task vectors pruned before they are merged: by any rule of prune.py, ranked by magnitude.

What is ranked is the whole task vector, biases and norms included, as the papers do. With
``sampled`` and ``signs`` vectors (and for ``signs`` tiny tensors) stay as they are: a sample would
say too little of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable

import numpy as np

from nps_compress.candidates import TINY, kind_of
from nps_compress.dtypes import BY_NAME
from nps_compress.merging.contract import Settings
from nps_compress.prune import Elements, Rule, Selection, Weighting, plan, select, tensor_seed
from nps_compress.rank_one import rows_and_columns
from nps_compress.recipe import Scope
from nps_compress.signs import Scales, scales_of
from nps_compress.task_vector import NEUTRAL, Float32, Histogram, Ranking

Shape = tuple[int, ...]
Parts = Callable[[], Iterable[Float32]]  # a tensor's changes, in order, anew each time; [n] each
_NOWHERE = np.empty(0, np.uint32)


class TaskPruner:
    """Prunes one task vector. ``number``: of the task, so that no two draw alike. Thread-safe."""

    def __init__(self, number: int, rule: Rule, scope: Scope) -> None:
        self._number, self._rule, self._scope = number, rule, scope
        self._lock, self._counted = threading.Lock(), Histogram.empty()
        self._ranking: Ranking | None = None
        self._last: tuple[object, Selection] | None = None
        self._scales: dict[str, Scales] = {}

    def count(self, name: str, shape: Shape, parts: Parts) -> None:
        """Read a tensor once, before anything is pruned; its changes must be finite."""
        if self.is_whole(shape):
            return
        if self._rule == "signs":
            self._scales[name] = scales_of(parts, *rows_and_columns(shape))
        if self._scope == "global":
            histogram = self._histogram(name, parts)
            with self._lock:
                self._counted.merge(histogram)

    def is_whole(self, shape: Shape) -> bool:
        """Whether such a tensor is left as it is."""
        kind = kind_of(self._rule)
        if kind == "exact":
            return False
        return len(shape) < 2 or (kind == "signs" and math.prod(shape) <= TINY)

    def selection(self, name: str, shape: Shape, parts: Parts, by: Settings) -> Selection | None:
        """What :meth:`prune` needs for a tensor; None for one that is left as it is."""
        if self.is_whole(shape):
            return None
        if self._scope == "tensor":
            return self._plan(Ranking.of([self._histogram(name, parts)]), by)
        key = by.density, by.top_shares, by.coefficients
        last = self._last
        if last is None or last[0] != key:
            self._ranking = self._ranking or Ranking.of([self._counted])
            self._last = last = key, self._plan(self._ranking, by)
        return last[1]

    def prune(
        self, name: str, selection: Selection | None, tau: Float32, start: int, seed: int
    ) -> Float32:
        """Some elements of a tensor's changes, from position ``start`` on. tau: [n] -> [n]."""
        if selection is None:
            return tau
        changes, scores = self._changes(name, tau, start)
        # As if the base were 0, so that values come out unrounded.
        elements = Elements(np.zeros_like(tau), changes, scores, _NOWHERE, start)
        drawn = tensor_seed(seed, f"{self._number}/{name}")
        indices, values = select(selection, elements, BY_NAME["F32"], drawn)
        out = np.zeros_like(tau)
        out[indices] = values
        return out

    def _plan(self, ranking: Ranking, by: Settings) -> Selection:
        weighting = None
        if by.coefficients:
            mine = np.array([by.coefficients[self._number]])
            weighting = Weighting(mine, np.ones_like(mine))
        return plan(ranking, self._rule, by.density, by.top_shares, weighting)

    def _histogram(self, name: str, parts: Parts) -> Histogram:
        histogram, start = Histogram.empty(), 0
        for tau in parts():
            changes, scores = self._changes(name, tau, start)
            histogram.add(*((scores,) if self._rule == "signs" else (changes, scores)))
            start += tau.size
        return histogram

    def _changes(self, name: str, tau: Float32, start: int) -> tuple[Float32, Float32]:
        """What prune.Elements calls tau and importance."""
        if self._rule != "signs":
            return tau, NEUTRAL
        scales = self._scales[name]
        return scales.signed(tau, start), scales.scores(None, slice(start, start + tau.size))
