"""rebuild: base words + form -> words of the fine-tune, beside the base.

Byte floor per element of w bytes: read w and the form (kernels/README.md), write w.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import blocks, form, table
from .blocks import GAP_PLACES, GAP_TILE, MASK_PLACES, MASK_TILE

_BLOCK = tl.constexpr(form.BLOCK)


@triton.jit
def _rebuild_kernel(  # type: ignore[no-untyped-def]
    table_ptr, out_table_ptr, rows_ptr, fault_ptr, tensors,
    WORD: tl.constexpr, FLOAT: tl.constexpr, ALIGNED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    tensor, block = blocks.find(table_ptr, tensors, SEARCH)
    base = blocks.words_of(table_ptr, tensors, tensor, WORD, ALIGNED)
    out = blocks.words_of(out_table_ptr, tensors, tensor, WORD, ALIGNED)
    numel = blocks.numel_of(table_ptr, tensors, tensor)
    fields = blocks.fields_of(rows_ptr, tensor)
    places, nnz = blocks.places_of(fields)
    are_words = blocks.are_words(fields, FLOAT)
    values = blocks.value_words(fields, WORD)
    bits, counts = blocks.mask_of(fields)
    start = block * _BLOCK
    is_whole = start + _BLOCK <= numel  # without a mask, words move 16 bytes at a time
    lane = tl.arange(0, MASK_TILE)
    for tile in range(blocks.tiles_of(start, numel)):
        at = start + tile * MASK_TILE
        is_inside = lane < numel - at
        if is_whole:
            word = tl.load((base + at) + lane)
        else:
            word = tl.load((base + at) + lane, mask=is_inside, other=0)
        if places == MASK_PLACES:
            local, is_kept, found, rank = blocks.mask_tile(
                bits, counts, nnz, start, tile, numel, fault_ptr
            )
            new = _new(
                fields, are_words, values, word, start, local, is_kept, found, rank, WORD, FLOAT
            )
            word = tl.where(is_kept, new, word)
        if is_whole:
            tl.store((out + at) + lane, word)
        else:
            tl.store((out + at) + lane, word, mask=is_inside)
    if places == GAP_PLACES:
        tl.debug_barrier()  # other threads have written the words that change now
        gaps, first, end, found = blocks.gaps_of(fields, block, fault_ptr)
        passed = 0
        for entry in range(first, end, GAP_TILE):
            local, is_kept, rank, passed, more = blocks.gap_tile(
                gaps, nnz, entry, end, passed, found, start, numel, fault_ptr
            )
            word = tl.load((base + start) + local, mask=is_kept, other=0)
            new = _new(
                fields, are_words, values, word, start, local, is_kept, found, rank, WORD, FLOAT
            )
            tl.store((out + start) + local, new, mask=is_kept)
            found += more


@triton.jit
def _new(  # type: ignore[no-untyped-def]
    fields, are_words, values, word, start, local, is_kept, found, rank,
    WORD: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    if are_words:
        new = tl.load((values + found) + rank, mask=is_kept, other=0)
    else:
        new = blocks.moved(fields, word, start, local, is_kept, found, rank, WORD, FLOAT)
    return new


def rebuild(changes: table.Changes, out: table.Tensors) -> None:
    """Write tensors with a task's changes, which must not be active, into others of their sizes.

    ``out`` may be the tensors themselves.

    Raises:
        ValueError: ``out`` differs in dtype, device or sizes.
    """
    tensors = changes.tensors
    table.check_out(changes, out)
    if tensors.programs:
        options = blocks.launch_options(tensors)
        _rebuild_kernel[(tensors.programs,)](
            tensors.table,
            out.table,
            changes.rows,
            changes.fault,
            len(tensors.words),
            **{**options, "ALIGNED": tensors.aligned and out.aligned},
        )
