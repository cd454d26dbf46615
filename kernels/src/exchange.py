"""exchange: a task's words go in and the tensors' old ones come out, in place.

What moves, at density d, for elements of w bytes: the form (f bytes an element, kernels/README.md),
and 2 s w for a share s = 1 - (1 - d)^(32 / w) of sectors (32 bytes, the least that memory moves)
that are read and written; the old words, written, w d. Not what the whole tensor has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import blocks, form, table
from .blocks import GAP_PLACES, GAP_TILE, MASK_PLACES

_BLOCK = tl.constexpr(form.BLOCK)


@triton.jit
def swap_block(  # type: ignore[no-untyped-def]
    words, numel, block, fields, old_ptr, fault_ptr,
    UNDO: tl.constexpr, WORD: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """A block's new words in, its old ones out; with UNDO the old ones back in."""
    places, nnz = blocks.places_of(fields)
    are_words = blocks.are_words(fields, FLOAT)
    values = blocks.value_words(fields, WORD)
    old = blocks.old_place(fields, old_ptr)
    start = block * _BLOCK
    if places == MASK_PLACES:
        bits, counts = blocks.mask_of(fields)
        for tile in range(blocks.tiles_of(start, numel)):
            local, is_kept, found, rank = blocks.mask_tile(
                bits, counts, nnz, start, tile, numel, fault_ptr
            )
            _swap(
                words, start, local, is_kept, are_words, values, old, found, rank, fields,
                UNDO, WORD, FLOAT,
            )  # fmt: skip
    elif places == GAP_PLACES:
        gaps, first, end, found = blocks.gaps_of(fields, block, fault_ptr)
        passed = 0
        for at in range(first, end, GAP_TILE):
            local, is_kept, rank, passed, more = blocks.gap_tile(
                gaps, nnz, at, end, passed, found, start, numel, fault_ptr
            )
            _swap(
                words, start, local, is_kept, are_words, values, old, found, rank, fields,
                UNDO, WORD, FLOAT,
            )  # fmt: skip
            found += more


@triton.jit
def _swap(  # type: ignore[no-untyped-def]
    words, start, local, is_kept, are_words, values, old, found, rank, fields,
    UNDO: tl.constexpr, WORD: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    at = (words + start) + local
    word = tl.load(at, mask=is_kept, other=0)
    if are_words:
        value = (values + found) + rank
        tl.store(at, tl.load(value, mask=is_kept, other=0), mask=is_kept)
        tl.store(value, word, mask=is_kept)
    elif UNDO:
        tl.store(at, tl.load((old + found) + rank, mask=is_kept, other=0), mask=is_kept)
    else:
        new = blocks.moved(fields, word, start, local, is_kept, found, rank, WORD, FLOAT)
        tl.store(at, new, mask=is_kept)
        tl.store((old + found) + rank, word, mask=is_kept)


@triton.jit
def _exchange_kernel(  # type: ignore[no-untyped-def]
    table_ptr, rows_ptr, old_ptr, fault_ptr, tensors,
    UNDO: tl.constexpr, WORD: tl.constexpr, FLOAT: tl.constexpr,
    ALIGNED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    tensor, block = blocks.find(table_ptr, tensors, SEARCH)
    words = blocks.words_of(table_ptr, tensors, tensor, WORD, ALIGNED)
    numel = blocks.numel_of(table_ptr, tensors, tensor)
    fields = blocks.fields_of(rows_ptr, tensor)
    swap_block(words, numel, block, fields, old_ptr, fault_ptr, UNDO, WORD, FLOAT)


def exchange(
    changes: table.Changes, old: torch.Tensor | None = None, *, undo: bool = False
) -> None:
    """Put a task's words into its tensors; with ``undo`` put the old ones back, bit for bit.

    old: [changes.old_words] of the tensors' word, on their device: filled, and what undoing reads.
    None where all values are words, which swap places with the old ones.

    Raises:
        ValueError: ``old`` does not fit.
    """
    tensors = changes.tensors
    old = changes.check_old(old)
    options = blocks.launch_options(tensors)
    if undo:
        options["maxnreg"] = None  # nothing is added: fewer, if the compiler is left alone
    if tensors.programs:
        _exchange_kernel[(tensors.programs,)](
            tensors.table,
            changes.rows,
            old,
            changes.fault,
            len(tensors.words),
            UNDO=undo,
            **options,
        )
