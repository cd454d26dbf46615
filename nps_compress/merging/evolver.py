"""Evolver (arXiv 2406.12208): mutation and crossover over a population of fine-tunes.

The population starts as the fine-tunes. A child of member i is x_i, but in each element, with
probability ``crossover``, (1 - mutation) * x_i + mutation * x_r, with r another member. It takes
the place of x_i where the development score of the merged population rises: this is the paper's
merger mode, with the average as merger. The result is that average. (Its other mode scores members
one by one and returns the best: a fine-tune with a head of its own can't be scored on other tasks.)

A population is its list of accepted children: it is made again from the task vectors, block by
block.
"""

from __future__ import annotations

import numpy as np

from nps_compress.merging.contract import Block, Settings, Totals
from nps_compress.task_vector import Float32


def merge(block: Block, settings: Settings, totals: Totals) -> Float32:
    """The average of the population."""
    found: Float32 = population(block, settings).mean(0)
    return found


def population(block: Block, settings: Settings) -> Float32:
    """The members after all exchanges, as task vectors. -> [tasks, rows, columns]."""
    members, rate = block.taus.copy(), np.float32(settings.mutation)
    for exchange in settings.exchanges:
        one, other = members[exchange.member], members[exchange.other]
        taken = block.draws(exchange.seed, "evolver") < settings.crossover
        one[taken] = (1 - rate) * one[taken] + rate * other[taken]
    return members
