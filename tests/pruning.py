"""A rule applied to words at once, as the package does slice by slice."""

from __future__ import annotations

import numpy as np

from nps_compress.dtypes import DType, Words, round_float32, to_float32
from nps_compress.prune import Elements, Selection, select
from nps_compress.task_vector import NEUTRAL


def prune(
    selection: Selection,
    base: Words,
    dtype: DType,
    finetuned: Words,
    finetuned_dtype: DType,
    seed: int,
    start: int = 0,
    importance: np.ndarray = NEUTRAL,
    group: int = 0,
) -> Words:
    """Words of base + selected task vector; the base's where dropped. base, finetuned: [n]."""
    before = to_float32(base, dtype)
    tau = to_float32(finetuned, finetuned_dtype) - before
    elements = Elements(before, tau, importance, np.empty(0, np.uint32), start)
    indices, values = select(selection, elements, dtype, seed, group)
    out = base.copy()
    out[indices] = round_float32(values, dtype)
    return out
