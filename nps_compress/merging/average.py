"""Weight averaging: theta = (theta_1 + ... + theta_T) / T (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from nps_compress.merging.contract import Block, Settings, Totals
from nps_compress.task_vector import Float32


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """The mean of the task vectors."""
    found: Float32 = block.taus.mean(0)
    return found
