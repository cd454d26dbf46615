"""torch tensors seen as integer words, without copies."""

from __future__ import annotations

import numpy as np
import torch

from nps_compress.dtypes import BY_NAME, DType, Words
from nps_compress.errors import InvalidArgumentError

_TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_of(tensor: torch.Tensor) -> DType:
    """The element type of a tensor. Raises InvalidArgumentError for one no file can hold."""
    if tensor.dtype not in _NAMES:
        raise InvalidArgumentError("dtype", tensor.dtype, f"one of {', '.join(_TORCH_DTYPES)}")
    return BY_NAME[_NAMES[tensor.dtype]]


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's own for an element type."""
    return _TORCH_DTYPES[dtype.name]


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bit patterns, flat. -> [numel] int8, int16, int32 or int64, sharing memory."""
    return tensor.detach().contiguous().reshape(-1).view(_SIGNED[tensor.element_size()])


def to_numpy(words: torch.Tensor) -> Words:
    """Words on the CPU as numpy's unsigned integers, sharing memory where they lie there."""
    array = words.cpu().numpy()
    return array.view(np.dtype(f"<u{array.itemsize}"))


def from_numpy(words: Words, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    """Words as a tensor, sharing memory. words: [numel] -> ``shape``."""
    signed = words.view(np.dtype(f"<i{dtype.itemsize}"))
    return torch.from_numpy(signed).view(_TORCH_DTYPES[dtype.name]).reshape(shape)
