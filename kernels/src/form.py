"""The form a sparse tensor has on a device: fixed-length, with random access by block.

One bit per element says whether it is kept; a count per block of 1,024 elements says where the
block's values begin. At density d a tensor of w-bit elements takes 1 + 32/1024 + w d bits each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 1024
REPLACE, XOR, ULP = 1, 2, 3


@dataclass(frozen=True)
class SparseForm:
    """A tensor's changes on one device, for words of ``values``' width.

    mask: [ceil(numel / 32)] int32, least significant bit first.
    prefix: [ceil(numel / BLOCK)] int32 (int64 from 2^31 kept elements), kept before each block.
    values: [nnz] int8, int16, int32 or int64: the new word (REPLACE), base ^ new (XOR), or the
    signed distance in the order of the floats, modulo the width (ULP).
    """

    numel: int
    kind: int
    mask: torch.Tensor
    prefix: torch.Tensor
    values: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes it takes on its device."""
        return sum(t.numel() * t.element_size() for t in (self.mask, self.prefix, self.values))


def sparse_form(
    numel: int,
    positions: npt.NDArray[np.int64],
    values: npt.NDArray[np.signedinteger],
    kind: int,
    device: torch.device | str = "cpu",
) -> SparseForm:
    """Build the form from ascending positions [nnz] and their values [nnz]."""
    bits = np.zeros(-(-numel // 32) * 32, np.uint8)
    bits[positions] = 1
    mask = np.packbits(bits, bitorder="little").view(np.int32)
    blocks = np.arange(-(-numel // BLOCK), dtype=np.int64) * BLOCK
    prefix = np.searchsorted(positions, blocks)
    prefix = prefix.astype(np.int32 if len(positions) < 2**31 else np.int64)
    tensors = (torch.from_numpy(array).to(device) for array in (mask, prefix, values))
    return SparseForm(numel, kind, *tensors)
