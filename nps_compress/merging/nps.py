"""Neural Parameter Search for fusion (arXiv 2505.18713, section 3 and eq. 7).

Before, each task vector is cut into subspaces of magnitude, each subspace scaled by a coefficient
(eq. 2), and the largest of what results is kept (eq. 4). Coefficients and lambda are searched; all
coefficients at 1 is plain pruning. In eq. 7 a common lambda cancels, though the paper tunes one
from 0.8 to 2.5: it is read here as lambda times the mean, over the tasks whose value was kept (as
TIES and PCB-Merging average), with ``elect`` over those of the elected sign.

Of one task this is the paper's knowledge transfer: base + lambda * (mask * tau) (eq. 6).
"""

from __future__ import annotations

import numpy as np

from nps_compress.merging.contract import Block, Settings, Totals
from nps_compress.merging.elect import elected_mean, mean_of_nonzero
from nps_compress.task_vector import Float32


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """lambda times the mean of what was kept."""
    mean = elected_mean if settings.elect else mean_of_nonzero
    found: Float32 = np.float32(settings.scale) * mean(block.taus)
    return found
