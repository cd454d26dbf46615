"""Task arithmetic: theta = base + lambda * (tau_1 + ... + tau_T) (arXiv 2212.04089, section 2)."""

from __future__ import annotations

import numpy as np

from nps_compress.merging.contract import Block, Settings, Totals
from nps_compress.task_vector import Float32


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """The scaled sum of the task vectors."""
    found: Float32 = np.float32(settings.scale) * block.taus.sum(0)
    return found
