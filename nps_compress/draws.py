"""Random numbers from a counter: what fixes them is a seed and a position, whatever the order.

Compiled functions, for use inside loops.
"""

from __future__ import annotations

import numpy as np

from nps_compress._jit import jit

LEVELS = 65536.0  # of short draws


@jit
def _splitmix64(seed, number):  # type: ignore[no-untyped-def]
    """Output ``number`` of the generator that starts from ``seed``: 64 random bits."""
    z = seed + np.uint64(number + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def draw_of(seed, position):  # type: ignore[no-untyped-def]
    """Uniform on [0, 1), of 53 bits."""
    return np.float64(_splitmix64(seed, position) >> np.uint64(11)) * 2.0**-53


@jit
def short_draws(seed, start, out):  # type: ignore[no-untyped-def]
    """:func:`short_draw` of the positions from ``start`` on, four in each element. out: [n] uint64.

    start: a multiple of 4.
    """
    for i in range(out.size):
        out[i] = _splitmix64(seed, (start >> 2) + i)


@jit
def short_draw(seed, position):  # type: ignore[no-untyped-def]
    """An integer below 65536: a quarter of the number that four positions share."""
    z = _splitmix64(seed, position >> 2)
    return np.int64((z >> np.uint64(16 * (position & 3))) & np.uint64(0xFFFF))


@jit
def fill_draws(seed, start, out):  # type: ignore[no-untyped-def]
    """:func:`draw_of` the positions from ``start`` on. out: [n] float64."""
    for i in range(out.size):
        out[i] = draw_of(seed, start + i)
