"""delta_matmul: y += x Δᵀ for a batch whose rows are of different tasks; Δ is never in memory.

A program adds to 16 outputs of up to 64 rows of one task. It walks what the task changes in 16 rows
of the weight. Gaps: the blocks that overlap those rows, 256 entries at a time. These are gathered
from x, and a matrix of 16 x 256, that has each entry's change in the row where it belongs and 0
elsewhere, sums them up. Masks: tiles of 16 x 64 elements of Δ, zeros included, times x.

What moves: the task's form once for each 16 to 64 of its rows, for words also the sectors of the
base that hold a changed element; of x what is needed, from the cache; y is read and written.

Products are of float32 changes and x, each split in two parts of 11 bits (tf32x3), and sums are
float32 in a fixed order: |error| <= 2^-20 (8 + k) sum |x Δ| for k changed elements in a weight's
row, before y is rounded to its dtype. Nothing is added by atomics; equal runs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import blocks, form, table
from .blocks import GAP_PLACES, GAP_TILE, MASK_PLACES

_BLOCK = tl.constexpr(form.BLOCK)
_OUTPUTS = tl.constexpr(16)  # rows of a weight: the least that a matrix product takes
_COLUMNS = tl.constexpr(64)  # of a tile of a mask
_TILE_WORDS = tl.constexpr(form.MASK_TILE // 32)


@triton.jit(do_not_specialize=["number", "tensors", "tasks", "batch", "outputs", "columns"])
def _delta_matmul_kernel(  # type: ignore[no-untyped-def]
    table_ptr, tasks_ptr, starts_ptr, x_ptr, y_ptr, number, tensors, tasks, batch, outputs, columns,
    x_stride_row, x_stride_column, y_stride_row, y_stride_column,
    WORD: tl.constexpr, FLOAT: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    MASKS: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(1)
    wide = tl.full((), columns, tl.int64)
    first = tl.minimum(tl.maximum(tl.load(starts_ptr + task), 0), batch) + tl.program_id(2) * ROWS
    end = tl.minimum(tl.load(starts_ptr + task + 1), batch)
    fields = tl.load(tasks_ptr + task).to(tl.pointer_type(tl.int64))
    fields = blocks.fields_of(fields, tl.full((), number, tl.int64))
    places, nnz = blocks.places_of(fields)
    if (first < end) & (nnz > 0):
        fault = tl.load(tasks_ptr + tasks + task).to(tl.pointer_type(tl.int32))
        base = blocks.words_of(table_ptr, tensors, number, WORD, ALIGNED=False)
        row = tl.arange(0, ROWS)
        x = x_ptr + (first + row).to(tl.int64) * x_stride_row
        is_row = row < end - first
        output = tl.program_id(0) * _OUTPUTS
        total = tl.zeros((WARPS, _OUTPUTS, ROWS), tl.float32)
        if MASKS and places == MASK_PLACES:
            total = _multiply_mask(
                total, fields, nnz, base, x, x_stride_column, is_row, output, outputs, wide, fault,
                WORD, FLOAT, WARPS,
            )  # fmt: skip
        if GAPS and places == GAP_PLACES:
            total = _multiply_gaps(
                total, fields, nnz, base, x, x_stride_column, is_row, output, outputs, wide, fault,
                WORD, FLOAT, WARPS,
            )  # fmt: skip
        out = output + tl.arange(0, _OUTPUTS)
        y = y_ptr + (first + row).to(tl.int64)[None, :] * y_stride_row
        y += out.to(tl.int64)[:, None] * y_stride_column
        is_inside = (out < outputs)[:, None] & is_row[None, :]
        before = tl.load(y, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(y, (before + tl.sum(total, 0)).to(y_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _multiply_gaps(  # type: ignore[no-untyped-def]
    total, fields, nnz, base, x, x_stride_column, is_row, output, outputs, columns, fault_ptr,
    WORD: tl.constexpr, FLOAT: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    numel = columns * outputs
    start = output * columns
    end = tl.minimum(start + _OUTPUTS * columns, numel)
    for block in range(start // _BLOCK, (end + _BLOCK - 1) // _BLOCK):
        at = block * _BLOCK
        gaps, entry, last, found = blocks.gaps_of(fields, block, fault_ptr)
        passed = 0
        for tile in range(entry, last, GAP_TILE):
            local, is_kept, rank, passed, more = blocks.gap_tile(
                gaps, nnz, tile, last, passed, found, at, numel, fault_ptr
            )
            first_row, row, column = blocks.in_matrix(at, local, columns)
            out = (first_row - output).to(tl.int32) + row
            is_kept = is_kept & (out >= 0) & (out < _OUTPUTS)
            change = _change(
                fields, base + at + local, first_row, row, column, is_kept, found, rank, WORD, FLOAT
            )
            shape: tl.constexpr = [WARPS, GAP_TILE // WARPS]
            out, change = tl.reshape(out, shape), tl.reshape(change, shape)
            is_own = out[:, None, :] == tl.arange(0, _OUTPUTS)[None, :, None]
            delta = tl.where(is_own, change[:, None, :], 0.0)
            total = _multiply(total, delta, x, x_stride_column, column, is_kept, is_row, WARPS)
            found += more
    return total


@triton.jit
def _multiply_mask(  # type: ignore[no-untyped-def]
    total, fields, nnz, base, x, x_stride_column, is_row, output, outputs, columns, fault_ptr,
    WORD: tl.constexpr, FLOAT: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    bits_ptr, counts_ptr = blocks.mask_of(fields)
    row = tl.arange(0, _OUTPUTS)[:, None]
    is_output = row < outputs - output
    starts = (output + row) * columns
    found = _kept_before(bits_ptr, counts_ptr, starts, is_output)
    for first in range(0, columns, _COLUMNS):
        column = (first + tl.arange(0, _COLUMNS)).to(tl.int32)
        is_column = column < columns
        place = starts + column[None, :]
        word = tl.load(bits_ptr + place // 32, mask=is_output & is_column[None, :], other=0)
        kept = (word >> (place % 32).to(tl.int32)) & 1
        rank = tl.cumsum(kept, 1) - kept
        fits = found + rank < nnz
        blocks.report((kept != 0) & (fits == 0), fault_ptr)
        is_kept = (kept != 0) & fits
        across, down = tl.broadcast(column[None, :], row)
        delta = _change(
            fields, base + place, output, down, across, is_kept, found, rank, WORD, FLOAT
        )
        delta = tl.reshape(delta, [_OUTPUTS, WARPS, _COLUMNS // WARPS]).permute(1, 0, 2)
        total = _multiply(total, delta, x, x_stride_column, column, is_column, is_row, WARPS)
        found += tl.sum(kept, 1)[:, None]
    return total


@triton.jit
def _kept_before(bits_ptr, counts_ptr, place, is_inside):  # type: ignore[no-untyped-def]
    """How many elements a mask keeps before a place. place: [n, 1] -> [n, 1] int64."""
    tile = place // blocks.MASK_TILE
    before = tl.load(counts_ptr + tile, mask=is_inside, other=0).to(tl.int64) & 0xFFFFFFFF
    word = tl.arange(0, _TILE_WORDS)[None, :]
    length = (place % blocks.MASK_TILE).to(tl.int32) - 32 * word  # bits that count, of each word
    is_needed = is_inside & (length > 0)
    bits = tl.load(bits_ptr + tile * _TILE_WORDS + word, mask=is_needed, other=0)
    part = (1 << tl.minimum(tl.maximum(length, 0), 31)) - 1
    bits = tl.where(length < 32, bits & part, bits).to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    bits = (bits + (bits >> 16)) & 0x3F
    return before + tl.sum(bits.to(tl.int32), 1)[:, None]


@triton.jit
def _change(  # type: ignore[no-untyped-def]
    fields, base, first_row, row, column, is_kept, found, rank,
    WORD: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """How far what is kept moves; 0 for what is not. base: where its words are."""
    if blocks.are_words(fields, FLOAT):
        new = tl.load(blocks.value_words(fields, WORD) + found + rank, mask=is_kept, other=0)
        old = tl.load(base, mask=is_kept, other=0)
        change = blocks.to_float32(new, FLOAT) - blocks.to_float32(old, FLOAT)
    else:
        change = blocks.number_of(fields, first_row, row, column, is_kept, found, rank)
    return tl.where(is_kept, change, 0.0)


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    total, delta, x, x_stride_column, column, is_column, is_row, WARPS: tl.constexpr
):
    """Add delta times x at these columns. total: [WARPS, 16, ROWS]; delta: [WARPS, 16, n / WARPS].

    A warp has columns of its own: a product of 16 rows is too small to be shared otherwise.
    """
    at = x[None, :] + column.to(tl.int64)[:, None] * x_stride_column
    part = tl.load(at, mask=is_column[:, None] & is_row[None, :], other=0.0).to(tl.float32)
    part = tl.reshape(part, [WARPS, column.shape[0] // WARPS, is_row.shape[0]])
    return tl.dot(delta, part, total, input_precision="tf32x3")


def delta_matmul(
    tasks: table.Tasks, number: int, x: torch.Tensor, y: torch.Tensor, starts: torch.Tensor
) -> None:
    """y += x Δᵀ, where Δ is what each row's own task changes in tensor ``number``, none active.

    The tensor is a matrix of [N, K]. x: [batch, K]; y: [batch, N]; both bfloat16, float16 or
    float32, with any strides (x is read fastest where a column's rows lie together). starts:
    [tasks + 1] int32, ascending: the rows of task i are starts[i] to starts[i + 1]; those before
    the first and from the last on have no task.

    Δ of signs and grids is what they add before the sum is rounded to the weight's dtype; of new
    words their float32 difference to the base's. One that is not finite makes its output so.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit.
    """
    table.check_matmul(tasks, number, x, y, starts)
    batch, columns = x.shape
    outputs, count = y.shape[1], len(tasks.changes)
    if not batch or not outputs or not columns:
        return
    mean = -(-batch // count)
    rows = 16 if mean <= 16 else 32 if mean <= 32 else 64
    options = blocks.launch_options(tasks.tensors)
    del options["SEARCH"], options["ALIGNED"], options["maxnreg"]
    warps = 4 if rows < 64 else 8
    forms = [changes.forms[number] for changes in tasks.changes]
    kinds = {type(one.places) for one in forms if one}
    grid = (-(-outputs // _OUTPUTS.value), count, -(-batch // rows))
    _delta_matmul_kernel[grid](
        tasks.tensors.table,
        tasks.table,
        starts,
        x,
        y,
        number,
        len(tasks.tensors.words),
        count,
        batch,
        outputs,
        columns,
        *x.stride(),
        *y.stride(),
        **{**options, "num_warps": warps},
        ROWS=rows,
        WARPS=warps,
        # What no task has costs registers: a kernel of its own for each that occurs.
        MASKS=form.Mask in kinds,
        GAPS=form.Gaps in kinds,
    )
