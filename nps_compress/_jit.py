"""One way to compile a hot loop with numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the GIL, so that threads scale, and keep the machine code between runs.

    Where no folder for that cache is writable, numba refuses to decorate; then each process
    compiles anew.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)
