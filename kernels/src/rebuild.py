"""rebuild: base words + sparse form -> words of the fine-tune, integers only.

Byte floor per element of w bytes at density d: read w + 1/8 + w d, write w.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .form import BLOCK, SparseForm


@triton.jit
def _rebuild_kernel(  # type: ignore[no-untyped-def]
    base_ptr,
    mask_ptr,
    prefix_ptr,
    values_ptr,
    out_ptr,
    numel,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    offsets = block * BLOCK + lane
    inside = offsets < numel
    word = tl.load(base_ptr + offsets, mask=inside, other=0)
    bits = tl.load(mask_ptr + block * (BLOCK // 32) + lane // 32, mask=inside, other=0)
    kept = (bits >> (lane % 32)) & 1
    rank = tl.cumsum(kept, 0) - kept
    first = tl.load(prefix_ptr + block).to(tl.int64)
    is_kept = inside & (kept != 0)
    value = tl.load(values_ptr + first + rank, mask=is_kept, other=0)
    if KIND == 1:
        new = value
    elif KIND == 2:
        new = word ^ value
    else:
        narrow = word.dtype
        wide = tl.int64 if WIDE else tl.int32
        old = word.to(wide)
        old = tl.where(old < 0, old ^ LOW_BITS, old)
        moved = (old + value.to(wide)).to(narrow).to(wide)  # wraps at the word's width
        new = tl.where(moved < 0, moved ^ LOW_BITS, moved).to(narrow)
    tl.store(out_ptr + offsets, tl.where(is_kept, new, word), mask=inside)


def rebuild(base: torch.Tensor, form: SparseForm, out: torch.Tensor | None = None) -> torch.Tensor:
    """Base words with the form's changes applied, on the device of all three.

    base, out: [numel] int8, int16, int32 or int64, contiguous; ``out`` may be ``base``.

    Raises:
        ValueError: sizes, dtypes or devices differ.
    """
    if out is None:
        out = torch.empty_like(base)
    for name, tensor in (("base", base), ("out", out)):
        if tensor.shape != (form.numel,) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous of shape ({form.numel},), got {tensor.shape}"
            )
        if tensor.dtype != form.values.dtype or tensor.device != form.values.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, "
                f"the form {form.values.dtype} on {form.values.device}"
            )
    if form.numel:
        grid = (triton.cdiv(form.numel, BLOCK),)
        _rebuild_kernel[grid](
            base,
            form.mask,
            form.prefix,
            form.values,
            out,
            form.numel,
            KIND=form.kind,
            WIDE=base.element_size() == 8,
            LOW_BITS=torch.iinfo(base.dtype).max,
            BLOCK=BLOCK,
        )
    return out
