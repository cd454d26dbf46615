"""switch: from one task to another in place, in one pass.

What moves: of each block what undoing the first task's exchange and the second one's moves, but
sectors that both touch come from memory once: the block is still in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import blocks, table
from .exchange import swap_block


@triton.jit
def _switch_kernel(  # type: ignore[no-untyped-def]
    table_ptr, left_ptr, left_old_ptr, left_fault_ptr, right_ptr, right_old_ptr, right_fault_ptr,
    tensors, WORD: tl.constexpr, FLOAT: tl.constexpr, ALIGNED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    tensor, block = blocks.find(table_ptr, tensors, SEARCH)
    words = blocks.words_of(table_ptr, tensors, tensor, WORD, ALIGNED)
    numel = blocks.numel_of(table_ptr, tensors, tensor)
    left = blocks.fields_of(left_ptr, tensor)
    swap_block(words, numel, block, left, left_old_ptr, left_fault_ptr, True, WORD, FLOAT)
    tl.debug_barrier()  # an element of both must have the base's word before it gets the new one
    right = blocks.fields_of(right_ptr, tensor)
    swap_block(words, numel, block, right, right_old_ptr, right_fault_ptr, False, WORD, FLOAT)


def switch(
    left: table.Changes,
    right: table.Changes,
    left_old: torch.Tensor | None = None,
    right_old: torch.Tensor | None = None,
) -> None:
    """Take an active task out of its tensors and put another one in.

    left_old, right_old: as for :func:`~nps_compress.kernels.exchange.exchange`, two buffers.

    Raises:
        ValueError: the tasks are of other tensors, a buffer does not fit or both are one.
    """
    tensors = left.tensors
    table.check_switch(left, right, left_old, right_old)
    left_old, right_old = left.check_old(left_old), right.check_old(right_old)
    if tensors.programs:
        _switch_kernel[(tensors.programs,)](
            tensors.table,
            left.rows,
            left_old,
            left.fault,
            right.rows,
            right_old,
            right.fault,
            len(tensors.words),
            **blocks.launch_options(tensors),
        )
