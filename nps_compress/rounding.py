"""Rounding of single float32 values to a dtype, inside compiled loops."""

from __future__ import annotations

import numpy as np

from nps_compress._jit import jit

# Mantissa bits that a float32 loses in each dtype, and the largest finite value of each.
DROPPED_BITS = {"F32": 0, "BF16": 16, "F16": 13}
LARGEST = {"F32": 3.4028234663852886e38, "BF16": 3.3895313892515355e38, "F16": 65504.0}


@jit
def rounded(value, dropped):  # type: ignore[no-untyped-def]
    """``value`` as dtypes.round_float32 rounds it, still as float32."""
    if dropped == 0:
        return value
    if dropped == 13 and abs(value) < np.float32(2.0**-14):  # subnormal in F16
        return np.float32(np.rint(value * np.float32(2.0**24)) * np.float32(2.0**-24))
    bits = np.float32(value).view(np.uint32)
    half = (np.uint32(1) << (dropped - np.uint32(1))) - np.uint32(1)
    bits += half + ((bits >> dropped) & np.uint32(1))
    return np.uint32((bits >> dropped) << dropped).view(np.float32)
