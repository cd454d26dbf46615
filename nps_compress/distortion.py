"""How far pruning moves a tensor from the fine-tune's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nps_compress._jit import jit
from nps_compress.dtypes import DType, Words, to_float32

_SLICE = 1 << 18  # elements handled at once: a few MB, which a core's cache holds


@dataclass(frozen=True)
class Distortion:
    """Sums of squares over elements: of packed - fine-tuned, and of fine-tuned - base."""

    lost: float = 0.0
    changed: float = 0.0

    @property
    def relative(self) -> float:
        """The first norm over the second: 0 is exact, 1 as if nothing had been kept.

        An unbiased sample goes beyond 1: it pays for its exact expectation with variance.
        """
        if not self.lost:
            return 0.0
        return math.sqrt(self.lost / self.changed) if self.changed else math.inf


def distortion(
    base: Words, base_dtype: DType, finetuned: Words, finetuned_dtype: DType, packed: Words
) -> Distortion:
    """Of one tensor. base, packed: [numel] words of base_dtype; finetuned: [numel] of its own.

    Dtypes are F16, BF16 or F32; sums are float64, in the order of the elements, so that every
    machine finds the same.
    """
    lost, changed = 0.0, 0.0
    for start in range(0, base.size, _SLICE):
        part = slice(start, start + _SLICE)
        more = _squares(
            to_float32(base[part], base_dtype),
            to_float32(finetuned[part], finetuned_dtype),
            to_float32(packed[part], base_dtype),
        )
        lost, changed = lost + more[0], changed + more[1]
    return Distortion(lost, changed)


def total(parts: Iterable[Distortion]) -> Distortion:
    """Of several tensors taken as one."""
    found = list(parts)
    return Distortion(math.fsum(p.lost for p in found), math.fsum(p.changed for p in found))


@jit
def _squares(base, finetuned, packed):  # type: ignore[no-untyped-def]
    lost = 0.0
    changed = 0.0
    for i in range(base.size):
        wanted = np.float64(finetuned[i])  # numba's float() would keep float32
        off = np.float64(packed[i]) - wanted
        moved = wanted - np.float64(base[i])
        lost += off * off
        changed += moved * moved
    return lost, changed
