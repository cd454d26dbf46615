"""DELLA-Merging (arXiv 2406.11617, section 3): MagPrune, elect, fuse.

MagPrune keeps an element with a probability that is linear in the rank of its magnitude within its
row, from density - window / 2 to density + window / 2, and divides it by that. ``window`` is the
paper's epsilon (mergekit calls half of it epsilon); by default the density, or what 1 leaves.
"""

from __future__ import annotations

import numpy as np

from nps_compress.errors import InvalidArgumentError
from nps_compress.merging.contract import Block, Float64, Settings, Totals
from nps_compress.merging.elect import elected_mean
from nps_compress.task_vector import Float32


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """lambda times the mean of the sampled values that have the elected sign."""
    window = window_of(settings)
    sampled = np.zeros_like(block.taus)
    for task, tau in enumerate(block.taus):
        keep = keep_probabilities(tau, settings.density, window)
        kept = block.draws(settings.seed, f"della {task}") < keep
        sampled[task][kept] = tau[kept] / keep[kept]
    found: Float32 = np.float32(settings.scale) * elected_mean(sampled)
    return found


def window_of(settings: Settings) -> float:
    """The width of the range of probabilities.

    Raises:
        InvalidArgumentError: some would leave (0, 1].
    """
    density, window = settings.density, settings.window
    if window is None:
        return min(density, 1 - density)
    if not 0 <= window <= 2 * (1 - density) or window >= 2 * density:
        what = f"such that {density} +- window / 2 is in (0, 1]"
        raise InvalidArgumentError("window", window, what)
    return window


def keep_probabilities(tau: Float32, density: float, window: float) -> Float64:
    """Of each element, by the rank of its magnitude in its row. tau: [rows, columns] -> same."""
    order = np.abs(tau).argsort(1, kind="stable")
    last = tau.shape[1] - 1
    line = density + window * (np.arange(last + 1) / max(last, 1) - 0.5 * (last > 0))
    keep = np.empty(tau.shape)
    np.put_along_axis(keep, order, np.broadcast_to(line, tau.shape), 1)
    return keep
