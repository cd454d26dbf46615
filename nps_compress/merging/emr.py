"""EMR-Merging (arXiv 2405.17461, section 3): elect one vector, mask and rescale it a task.

The unified vector has the sign of the sum and the largest magnitude of that sign. A task's mask
keeps what agrees with its own sign, its rescaler restores the mean magnitude of its task vector.
Nothing is tuned. The result is one model a task, of one vector, a bit for each element of it and a
number.
"""

from __future__ import annotations

import numpy as np

from nps_compress.merging.contract import Block, Settings, Totals
from nps_compress.task_vector import Float32


def unified(taus: Float32) -> Float32:
    """taus: [tasks, ...] -> [...]. A sum of 0 counts as positive."""
    most, least = taus.max(0), taus.min(0)
    found: Float32 = np.where(taus.sum(0) >= 0, np.maximum(most, 0), np.minimum(least, 0))
    return found


def measure(block: Block) -> Totals:
    """Magnitudes of each task vector, and of what its mask keeps, summed up. -> [tasks, 2]."""
    one = unified(block.taus)
    masked = np.abs(one) * (block.taus * one > 0)
    sums = [np.abs(each).sum((1, 2), dtype=np.float64) for each in (block.taus, masked)]
    return np.stack(sums, 1)


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """The vector of each task. -> [tasks, rows, columns]."""
    one = unified(block.taus)
    kept = np.maximum(totals[:, 1], np.finfo(np.float64).tiny)
    rescale = (settings.scale or 0.0) * totals[:, 0] / kept
    found: Float32 = one * (block.taus * one > 0) * rescale.astype(np.float32)[:, None, None]
    return found
