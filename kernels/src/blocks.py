"""What the kernels share: from a program's number to a block's changes, to new words.

Compiled functions. Whatever a form says, nothing outside of its tensors is read or written: counts
are bounded by sizes that the host knows, places by the block, and what is out of bounds sets the
task's fault.

Numbers are computed as format_spec/SPEC.md 6.1 wants it, on every device: products and sums are
float32, each rounded by itself (a sign is put on by xor between them, and kernels are launched
without fusion), and sums are rounded to the dtype by integer arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import form, table

_BLOCK = tl.constexpr(form.BLOCK)
MASK_TILE = tl.constexpr(form.MASK_TILE)
GAP_TILE = tl.constexpr(256)  # entries: up to a density of about 0.014 a block has one tile
_ESCAPE = tl.constexpr(form.ESCAPE)
_KEPT_BITS = tl.constexpr(20)  # a tile's gaps add up to less than 2^20
_STEPS = tl.constexpr((1 << 20) - 1)
_LOW_32 = tl.constexpr((1 << 32) - 1)

_FIELDS = tl.constexpr(table.FIELDS)
_PLACES = tl.constexpr(table.PLACES)
_VALUES = tl.constexpr(table.VALUES)
_PLACES_POINTER = tl.constexpr(table.PLACES_POINTER)
_COUNTS_POINTER = tl.constexpr(table.COUNTS_POINTER)
_ENTRIES = tl.constexpr(table.ENTRIES)
_VALUES_POINTER = tl.constexpr(table.VALUES_POINTER)
_NNZ = tl.constexpr(table.NNZ)
_FIRST_OLD = tl.constexpr(table.FIRST_OLD)
_COLUMNS = tl.constexpr(table.COLUMNS)
_ROWS_1 = tl.constexpr(table.ROWS_1)
_ROWS_2 = tl.constexpr(table.ROWS_2)
MASK_PLACES = tl.constexpr(table.MASK_PLACES)
GAP_PLACES = tl.constexpr(table.GAP_PLACES)
_WORD_VALUES = tl.constexpr(table.WORD_VALUES)
_SIGN_VALUES = tl.constexpr(table.SIGN_VALUES)
_INTEGER = tl.constexpr(table.INTEGER)
_BF16 = tl.constexpr(table.BF16)
_F16 = tl.constexpr(table.F16)


def launch_options(tensors: table.Tensors) -> dict[str, object]:
    """Of the kernels: how words are read, and the steps of a bisection over the tensors."""
    words = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
    return {
        "WORD": words[tensors.itemsize],
        "FLOAT": tensors.float_kind,
        "ALIGNED": tensors.aligned,
        "SEARCH": max(1, (len(tensors.words) - 1).bit_length()),
        "num_warps": 4,
        "enable_fp_fusion": False,
        # Compiled for Hopper what adds numbers takes up to 150, and 128 without a spill: then four
        # programs fit a multiprocessor, not three.
        "maxnreg": None if tensors.float_kind == table.INTEGER else 128,
    }


@triton.jit
def find(table_ptr, tensors, SEARCH: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's tensor, and the number of its block there."""
    program = tl.program_id(0).to(tl.int64)
    low = program * 0
    high = low + tensors
    for _ in range(SEARCH):
        middle = (low + high) // 2
        is_before = tl.load(table_ptr + middle) <= program
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low, program - tl.load(table_ptr + low)


@triton.jit
def words_of(  # type: ignore[no-untyped-def]
    table_ptr, tensors, tensor, WORD: tl.constexpr, ALIGNED: tl.constexpr
):
    """A tensor's words."""
    words = tl.load(table_ptr + (tensors + 1) + tensor).to(tl.pointer_type(WORD))
    if ALIGNED:
        words = tl.multiple_of(words, 16)
    return words


@triton.jit
def numel_of(table_ptr, tensors, tensor):  # type: ignore[no-untyped-def]
    """How many words a tensor has."""
    return tl.load(table_ptr + 2 * (tensors + 1) + tensor)


@triton.jit
def fields_of(rows_ptr, tensor):  # type: ignore[no-untyped-def]
    """A task's row for a tensor."""
    return rows_ptr + tensor * _FIELDS


@triton.jit
def places_of(fields):  # type: ignore[no-untyped-def]
    """How a row says where changes are, and how many there are."""
    return tl.load(fields + _PLACES), tl.load(fields + _NNZ)


@triton.jit
def mask_of(fields):  # type: ignore[no-untyped-def]
    """A mask's bits, and its counts."""
    bits_ptr = tl.load(fields + _PLACES_POINTER).to(tl.pointer_type(tl.int32))
    return bits_ptr, tl.load(fields + _COUNTS_POINTER).to(tl.pointer_type(tl.int32))


@triton.jit
def tiles_of(start, numel):  # type: ignore[no-untyped-def]
    """How many tiles of 1,024 a block has: of small tensors not all that it could have."""
    return (_bounded(numel - start) + MASK_TILE - 1) // MASK_TILE


@triton.jit
def mask_tile(  # type: ignore[no-untyped-def]
    bits_ptr, counts_ptr, nnz, start, tile, numel, fault_ptr
):
    """A tile of a mask. -> places in the block, which are kept, number among those kept: [1024].

    Before the last: how many are kept before the tile. In 64 bits there is only what all lanes
    share, here and elsewhere: registers are what limits how many programs run at a time.
    """
    lane = tl.arange(0, MASK_TILE)
    first = start + tile * MASK_TILE
    is_inside = lane < _bounded(numel - first)
    bits = tl.load((bits_ptr + first // 32) + lane // 32, mask=is_inside, other=0)
    kept = (bits >> (lane % 32)) & 1
    before = tl.load(counts_ptr + first // MASK_TILE, mask=first < numel, other=0)
    found = before.to(tl.int64) & _LOW_32
    rank = tl.cumsum(kept, 0) - kept
    fits = rank < _bounded(nnz - found)
    report((kept != 0) & (fits == 0), fault_ptr)
    return tile * MASK_TILE + lane, (kept != 0) & fits, found, rank


@triton.jit
def _bounded(number):  # type: ignore[no-untyped-def]
    """An int64 within what a tile is compared to."""
    return tl.minimum(tl.maximum(number, 0), _BLOCK).to(tl.int32)


@triton.jit
def gaps_of(fields, block, fault_ptr):  # type: ignore[no-untyped-def]
    """The gaps, and a block's part: first entry, end, elements kept before."""
    gaps_ptr = tl.load(fields + _PLACES_POINTER).to(tl.pointer_type(tl.uint8))
    anchors_ptr = tl.load(fields + _COUNTS_POINTER).to(tl.pointer_type(tl.int32)) + 2 * block
    entries = tl.load(fields + _ENTRIES)
    first = tl.load(anchors_ptr).to(tl.int64) & _LOW_32
    rank = tl.load(anchors_ptr + 1).to(tl.int64) & _LOW_32
    end = tl.load(anchors_ptr + 2).to(tl.int64) & _LOW_32
    # An entry is at least one element, so that a block has no more entries than elements.
    bounded = tl.minimum(tl.minimum(end, entries), first + _BLOCK)
    if (end != bounded) | (first > end):
        tl.store(fault_ptr, 1)
    return gaps_ptr, first, bounded, rank


@triton.jit
def gap_tile(  # type: ignore[no-untyped-def]
    gaps_ptr, nnz, at, end, passed, found, start, numel, fault_ptr
):
    """A tile of gaps, from entry ``at`` on, of a block whose first ``passed`` elements are done.

    -> places in the block, which are kept, number among those kept: [256]; what is then passed,
    and how many were kept.
    """
    lane = tl.arange(0, GAP_TILE)
    is_inside = lane < _bounded(end - at)
    gap = tl.load((gaps_ptr + at) + lane, mask=is_inside, other=0).to(tl.int32)
    kept = (is_inside & (gap != _ESCAPE)).to(tl.int32)
    both = gap + kept + (kept << _KEPT_BITS)
    upto = tl.cumsum(both, 0)
    local = passed + (upto & _STEPS) - 1
    rank = (upto >> _KEPT_BITS) - kept
    fits = (local < _bounded(numel - start)) & (rank < _bounded(nnz - found))
    report((kept != 0) & (fits == 0), fault_ptr)
    total = tl.sum(both, 0)
    passed = tl.minimum(passed + (total & _STEPS), _BLOCK)
    return local, (kept != 0) & fits, rank, passed, total >> _KEPT_BITS


@triton.jit
def report(wrong, fault_ptr):  # type: ignore[no-untyped-def]
    """Set the fault where anything is wrong."""
    tl.store(fault_ptr + wrong.to(tl.int32) * 0, 1, mask=wrong)


@triton.jit
def old_place(fields, old_ptr):  # type: ignore[no-untyped-def]
    """Where the words go that a tensor's changes leave behind."""
    return old_ptr + tl.load(fields + _FIRST_OLD)


@triton.jit
def are_words(fields, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether values are new words, not numbers."""
    if FLOAT == _INTEGER:
        return True
    else:
        return tl.load(fields + _VALUES) == _WORD_VALUES


@triton.jit
def value_words(fields, WORD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The new words themselves."""
    return tl.load(fields + _VALUES_POINTER).to(tl.pointer_type(WORD))


@triton.jit
def moved(  # type: ignore[no-untyped-def]
    fields, word, start, local, is_kept, found, rank, WORD: tl.constexpr, FLOAT: tl.constexpr
):
    """The base's words changed by signs or a grid; the same where they don't move."""
    if FLOAT == _INTEGER:
        return word
    else:
        first_row, row, column = in_matrix(start, local, tl.load(fields + _COLUMNS))
        change = number_of(fields, first_row, row, column, is_kept, found, rank)
        return _add(word, change, WORD, FLOAT)


@triton.jit
def in_matrix(start, local, columns):  # type: ignore[no-untyped-def]
    """The row of a block's first element, and rows from there on and columns of places in it."""
    first_row = start // columns
    at = (start - first_row * columns).to(tl.int32) + local
    row = at // columns.to(tl.int32)
    return first_row, row, at - row * columns.to(tl.int32)


@triton.jit
def number_of(fields, first_row, row, column, is_kept, found, rank):  # type: ignore[no-untyped-def]
    """How far signs or a grid move what is kept. -> float32"""
    factor = _look_up(fields + _ROWS_2, first_row, row, column, is_kept)
    values = tl.load(fields + _VALUES_POINTER)
    if tl.load(fields + _VALUES) == _SIGN_VALUES:
        bits_ptr = values.to(tl.pointer_type(tl.uint8)) + found // 8
        bit = (found % 8).to(tl.int32) + rank
        bits = tl.load(bits_ptr + bit // 8, mask=is_kept, other=0)
        minus = (bits.to(tl.int32) >> (bit % 8)) & 1
        number = _look_up(fields + _ROWS_1, first_row, row, column, is_kept)
    else:
        levels_ptr = values.to(tl.pointer_type(tl.int8)) + found
        level = tl.load(levels_ptr + rank, mask=is_kept, other=0)
        level = level.to(tl.int32)
        minus = (level < 0).to(tl.int32)
        number = tl.where(level < 0, -level, level).to(tl.float32)
    size = (number * factor).to(tl.int32, bitcast=True)
    return (size ^ (minus << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _look_up(part, first_row, row, column, is_kept):  # type: ignore[no-untyped-def]
    rows_ptr = tl.load(part).to(tl.pointer_type(tl.int8)) + first_row
    columns_ptr = tl.load(part + 1).to(tl.pointer_type(tl.int8))
    table_ptr = tl.load(part + 2).to(tl.pointer_type(tl.float32))
    lowest = tl.load(part + 3).to(tl.int32)
    length = tl.load(part + 4).to(tl.int32)
    exponent = tl.load(rows_ptr + row, mask=is_kept, other=0).to(tl.int32)
    exponent += tl.load(columns_ptr + column, mask=is_kept, other=0).to(tl.int32)
    at = tl.minimum(tl.maximum(exponent - lowest, 0), length - 1)
    return tl.load(table_ptr + at, mask=is_kept, other=0.0)


@triton.jit
def to_float32(word, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number that a word is."""
    if FLOAT == _BF16:
        return ((word.to(tl.int32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    elif FLOAT == _F16:
        return word.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return word.to(tl.float32, bitcast=True)


@triton.jit
def _add(word, change, WORD: tl.constexpr, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    infinite: tl.constexpr = 0x7F80 if FLOAT == _BF16 else 0x7C00 if FLOAT == _F16 else 0x7F800000
    low: tl.constexpr = 0x7FFF if infinite < 0x8000 else 0x7FFFFFFF
    total = (to_float32(word, FLOAT) + change).to(tl.int32, bitcast=True)
    if FLOAT == _BF16:
        before = word.to(tl.int32) & 0xFFFF
        size = total & 0x7FFFFFFF
        size = tl.where(size < 0x7F800000, size + 0x7FFF + ((size >> 16) & 1), 0x7F800000) >> 16
        after = size | ((total >> 16) & 0x8000)
    elif FLOAT == _F16:
        before = word.to(tl.int32) & 0xFFFF
        size = total & 0x7FFFFFFF
        # Under 2^-14 adding 1/2 leaves the multiples of 2^-24, to nearest even, as the low bits.
        small = (size.to(tl.float32, bitcast=True) + 0.5).to(tl.int32, bitcast=True) - 0x3F000000
        normal = (size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13
        size = tl.where(size < 0x38800000, small, tl.where(size < 0x477FF000, normal, 0x7C00))
        after = size | ((total >> 16) & 0x8000)
    else:
        before = word.to(tl.int32)
        after = total
    are_finite = ((before & infinite) != infinite) & ((after & infinite) != infinite)
    are_zero = ((before | after) & low) == 0
    return tl.where(are_finite & (are_zero == 0), after.to(WORD), word)
