"""What the kernels compute, in plain torch: slow, short, and the truth they are tested against."""

from __future__ import annotations

import torch

from .form import REPLACE, XOR, SparseForm


def rebuild(base: torch.Tensor, form: SparseForm) -> torch.Tensor:
    """Base words with the form's changes applied. base: [numel] intN -> [numel] intN."""
    shifts = torch.arange(32, dtype=torch.int32, device=base.device)
    kept = (((form.mask[:, None] >> shifts) & 1) != 0).flatten()[: form.numel]
    old = base[kept]
    if form.kind == REPLACE:
        new = form.values
    elif form.kind == XOR:
        new = old ^ form.values
    else:
        new = ordered(ordered(old) + form.values)
    out = base.clone()
    out[kept] = new
    return out


def ordered(words: torch.Tensor) -> torch.Tensor:
    """Float words as integers in the order of the floats; its own inverse. [n] intN -> [n] intN."""
    return torch.where(words < 0, words ^ torch.iinfo(words.dtype).max, words)
