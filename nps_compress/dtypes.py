"""Element types of checkpoints, seen as unsigned integer words.

Weights travel through this library as words: a 1-D numpy array of uint8, uint16, uint32 or uint64
that holds each element's bit pattern. Words compare and copy exactly (NaN payloads and -0.0
included) and need no numpy type for bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from nps_compress._jit import jit

Words = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class DType:
    """One element type: its safetensors name, its code in a ``.nps`` file, its width in bytes."""

    name: str
    code: int
    itemsize: int
    is_float: bool = False

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned numpy type of the same width."""
        return np.dtype(f"<u{self.itemsize}")


# Codes are written to files: never renumber, never reuse.
DTYPES = (
    DType("BOOL", 1, 1),
    DType("U8", 2, 1),
    DType("I8", 3, 1),
    DType("U16", 4, 2),
    DType("I16", 5, 2),
    DType("U32", 6, 4),
    DType("I32", 7, 4),
    DType("U64", 8, 8),
    DType("I64", 9, 8),
    DType("F8_E4M3", 10, 1),
    DType("F8_E5M2", 11, 1),
    DType("F8_E8M0", 12, 1),
    DType("F16", 13, 2, is_float=True),
    DType("BF16", 14, 2, is_float=True),
    DType("F32", 15, 4, is_float=True),
    DType("F64", 16, 8, is_float=True),
    DType("C64", 17, 8),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_CODE = {dtype.code: dtype for dtype in DTYPES}

# Task vectors are computed in float32; wider and non-float tensors are only ever stored exactly.
PRUNABLE = frozenset({"F16", "BF16", "F32"})


def to_float32(words: Words, dtype: DType) -> npt.NDArray[np.float32]:
    """Values of F16, BF16 or F32 words. words: [n] -> [n] float32, exact."""
    if dtype.name == "F32":
        return words.view(np.float32)
    if dtype.name == "BF16":
        wide = np.empty(words.size, np.float32)
        _widen(words, wide)
        return wide
    if dtype.name == "F16":
        return words.view(np.float16).astype(np.float32)
    raise ValueError(f"no float32 view of {dtype.name}")


def round_float32(values: npt.NDArray[np.float32], dtype: DType) -> Words:
    """Round finite float32 values to nearest even in F16, BF16 or F32. values: [n] -> [n] words."""
    if dtype.name == "F32":
        return values.view(np.uint32)
    if dtype.name == "BF16":
        bits = values.view(np.uint32)
        return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    if dtype.name == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    raise ValueError(f"no rounding to {dtype.name}")


def octets(words: Words) -> memoryview:
    """A tensor's bytes, little-endian. words: [numel], contiguous."""
    return words.view(np.uint8).data


def digest(words: Words) -> bytes:
    """BLAKE3 of a tensor's bytes, little-endian. words: [numel], contiguous -> 32 bytes."""
    return blake3(octets(words)).digest()


def difference(left: Words, right: Words, dtype: DType) -> npt.NDArray[np.float32]:
    """left - right in float32, of words as :func:`to_float32` takes them. [n], [n] -> [n]."""
    if dtype.name == "BF16":
        out = np.empty(left.size, np.float32)
        _difference(left, right, out)
        return out
    with np.errstate(invalid="ignore", over="ignore"):
        return to_float32(left, dtype) - to_float32(right, dtype)


@jit
def _widened(word):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@jit
def _widen(words, out):  # type: ignore[no-untyped-def]
    for i in range(words.size):
        out[i] = _widened(words[i])


@jit
def _difference(left, right, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = _widened(left[i]) - _widened(right[i])
