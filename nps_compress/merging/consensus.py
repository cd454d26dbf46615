"""Consensus merging (TALL masks, arXiv 2405.07813): drop what only few tasks have a use for.

A task has a use for an element of the multi-task vector where |tau_t| >= threshold * |tau_mtl -
tau_t| (its TALL mask). The elements that at least ``agreement`` tasks have a use for are kept. The
multi-task vector is that of task arithmetic with lambda 1 or, with ``elect``, that of TIES.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nps_compress.merging.contract import Block, Settings, Totals
from nps_compress.merging.elect import elected_mean
from nps_compress.task_vector import Float32


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """lambda times what is left of the multi-task vector."""
    merged = elected_mean(block.taus) if settings.elect else block.taus.sum(0)
    users = tall_masks(block.whole, merged, settings.threshold).sum(0)
    found: Float32 = np.float32(settings.scale) * merged * (users >= settings.agreement)
    return found


def tall_masks(taus: Float32, merged: Float32, threshold: float) -> npt.NDArray[np.bool_]:
    """What each task has a use for. taus: [tasks, ...]; merged: [...] -> [tasks, ...]."""
    found: npt.NDArray[np.bool_] = np.abs(taus) >= np.float32(threshold) * np.abs(merged - taus)
    return found
