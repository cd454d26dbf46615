"""DARE (arXiv 2311.03099, section 3): drop at random, rescale, then merge.

Dropped is before: each element is kept with the same probability and divided by it. What is left is
added up as in task arithmetic, or with ``elect`` averaged as in TIES (the paper's DARE with TIES).
"""

from __future__ import annotations

from nps_compress.merging import task_arithmetic, ties
from nps_compress.merging.contract import Block, Settings, Totals
from nps_compress.task_vector import Float32


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """lambda times the sum, or times the mean of the values with the elected sign."""
    return (ties if settings.elect else task_arithmetic).merge(block, settings, totals)
