"""What a method of merging sees, and what it gives back.

A method never sees a model, only blocks: some rows of one tensor of the base, and the same rows of
every task vector, pruned by the rule that was asked for. It returns what is to be added to the
base. What it must know of all tensors together it gets from a first pass, as sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nps_compress.draws import fill_draws
from nps_compress.prune import Rule, tensor_seed
from nps_compress.recipe import Scope
from nps_compress.task_vector import Float32

Float64 = npt.NDArray[np.float64]


class Exchange(NamedTuple):
    """One accepted child of an evolution: ``member`` took over parts of ``other``, by a mask that
    follows from ``seed``."""

    member: int
    other: int
    seed: int


@dataclass(frozen=True)
class Settings:
    """The numbers that methods are run with; each reads those it has a use for.

    ``scale``: lambda, the factor of the merged vector; None: what the method finds from the task
    vectors alone (NeuroMerging). ``density``, ``prune``, ``scope``: how task vectors are pruned
    before they are merged, ``prune`` None: not at all. ``elect``: average only what has the elected
    sign. ``seed``: of all draws. ``coefficients``: a factor for each subspace of each task's
    ranking, which ``top_shares`` cut (NPS); none: all 1. ``parallel``: lambda 1 of NeuroMerging.
    ``window``: DELLA's epsilon, None: the density. ``threshold`` and ``agreement``: of TALL masks.
    ``mutation``, ``crossover``: F and Cr of Evolver, ``exchanges`` what was accepted there.
    """

    scale: float | None = 1.0
    density: float = 0.2
    prune: Rule | None = None
    scope: Scope = "global"
    elect: bool = False
    seed: int = 0
    top_shares: tuple[float, ...] = ()
    coefficients: tuple[tuple[float, ...], ...] = ()
    parallel: float = 0.0
    window: float | None = None
    threshold: float = 0.4
    agreement: int = 2
    mutation: float = 0.5
    crossover: float = 0.5
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class Block:
    """Some rows of one tensor, float32.

    base: [rows, columns]; taus: [tasks, rows, columns], pruned; whole: the same, not pruned.
    A vector, as biases and norms are, is one row. ``start``: the position in the tensor of the
    first element.
    """

    name: str
    base: Float32
    taus: Float32
    whole: Float32
    start: int
    is_vector: bool

    def draws(self, seed: int, about: str) -> Float64:
        """Uniform draws from [0, 1), fixed by seed, tensor, ``about`` and position.

        -> [rows, columns].
        """
        out = np.empty(self.base.size)
        fill_draws(np.uint64(tensor_seed(seed, f"{about}/{self.name}")), self.start, out)
        return out.reshape(self.base.shape)


Totals = Float64  # what the first pass adds up, [tasks, 2]; all 0 where a method has none
# -> [rows, columns] to add to the base, or [tasks, rows, columns] where each task has its own.
Merge = Callable[[Block, Settings, Totals], Float32]
Measure = Callable[[Block], Totals]
