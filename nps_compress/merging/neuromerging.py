"""NeuroMerging (arXiv 2503.05320): merge along and across each neuron's weights of the base.

A neuron is a row of a matrix. Each task's change of it is split into the part along the base's row
w and the rest, orthogonal to w. The rests are expressed in their common singular vectors. Both are
merged coordinate by coordinate, by the mean of the values with the elected sign, and added with
lambda 1 (``parallel``) and lambda 2 (``scale``). Without validation data lambda 1 is 0 and lambda 2
is 1 / (1 - sigma), sigma the largest share of a task vector's magnitudes that pruning dropped.
Vectors have no neurons: they are merged as in TIES, with lambda 2.

The authors' code adds the parallel part along w / |w|, whose size then does not fit the split; here
it is along w. A coordinate whose values add up to 0 counts as positive.
"""

from __future__ import annotations

import numpy as np

from nps_compress.merging.contract import Block, Float64, Settings, Totals
from nps_compress.merging.elect import elected_mean
from nps_compress.task_vector import Float32

_NOISE = 1e-12  # of the largest squared singular value: below it there is no direction


def measure(block: Block) -> Totals:
    """Magnitudes of each task vector, and of what pruning kept, summed up. -> [tasks, 2]."""
    sums = [np.abs(each).sum((1, 2), dtype=np.float64) for each in (block.whole, block.taus)]
    return np.stack(sums, 1)


def free_scale(totals: Totals) -> float:
    """lambda 2 without validation data: 1 / (1 - sigma); 1 where nothing changes."""
    shares = totals[:, 1] / np.maximum(totals[:, 0], np.finfo(np.float64).tiny)
    kept = shares[totals[:, 0] > 0]
    return float(1 / kept.min()) if kept.size and kept.min() > 0 else 1.0


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """Both parts of every neuron, scaled."""
    scale = free_scale(totals) if settings.scale is None else settings.scale
    if block.is_vector:
        return np.float32(scale) * elected_mean(block.taus)
    taus = block.taus.astype(np.float64).swapaxes(0, 1)  # [rows, tasks, columns]
    base = block.base.astype(np.float64)
    squares = np.einsum("rc,rc->r", base, base)
    along = np.einsum("rtc,rc->rt", taus, base) / np.where(squares > 0, squares, 1)[:, None]
    across = taus - along[:, :, None] * base[:, None, :]
    merged = scale * merge_across(across)
    if settings.parallel:
        merged += settings.parallel * elected_mean(along.T)[:, None] * base
    return merged.astype(np.float32)


def merge_across(parts: Float64) -> Float64:
    """Merge in the coordinates of the singular vectors. parts: [rows, tasks, columns].

    -> [rows, columns]. The Gram matrix gives the same coordinates as a thin SVD: parts = U S V^T,
    parts parts^T = U S^2 U^T.
    """
    squares, left = np.linalg.eigh(parts @ parts.swapaxes(1, 2))  # [rows, tasks], [rows, ., tasks]
    sizes = np.sqrt(np.where(squares > _NOISE * squares[:, -1:], squares, 0))
    coordinates = left * sizes[:, None, :]  # U S: [rows, tasks, directions]
    merged = elected_mean(coordinates.swapaxes(0, 1)) / np.where(sizes > 0, sizes, 1)
    weights = np.einsum("rd,rtd->rt", merged, left)  # of each task's part: V = parts^T U / S
    found: Float64 = np.einsum("rt,rtc->rc", weights, parts)
    return found
