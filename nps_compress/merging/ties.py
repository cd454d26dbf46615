"""TIES-Merging (arXiv 2306.01708, Algorithm 1): trim, elect signs, average what agrees.

Trimmed is before, by the largest magnitudes of each whole task vector. Where the values of an
element add up to 0, the elected sign is positive (the authors' code takes the sign of most other
elements; mergekit does as we do).
"""

from __future__ import annotations

import numpy as np

from nps_compress.merging.contract import Block, Settings, Totals
from nps_compress.merging.elect import elected_mean
from nps_compress.task_vector import Float32


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """lambda times the mean of the values with the elected sign."""
    found: Float32 = np.float32(settings.scale) * elected_mean(block.taus)
    return found
