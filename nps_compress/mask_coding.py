"""Which elements of a matrix are kept, to nearly as few bits as their rows and columns allow.

A fine-tune changes some rows and columns of a matrix far more than others. So each element is a
binary decision, whose chance is learned in a *context*: how often the elements before it in its row
were kept, and those above it in its column, within the chunk. Both sides count along, so nothing is
stored beside the decisions, and every chunk decodes by itself. Defined bit by bit in
format_spec/SPEC.md. Decoding treats every stream as hostile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit
from nps_compress.entropy_coding import (
    CONTEXTS,
    ENDS_EARLY,
    ENDS_LATE,
    EVEN,
    MISCOUNTED,
    OK,
    STATE_BYTES,
    WORD_BYTES,
    encode_decisions,
    learn,
    share_of,
)

Positions = npt.NDArray[np.uint32]

_MIDDLE = CONTEXTS // 2
_BUCKET_BITS = 12
# How far an element moves the chance of its row or column that n others have moved, in units of
# 2^-16: as if 16 elements of the chunk's density had been seen before.
_RATES = np.array([(1 << 16) // (n + 16) for n in range(512)], np.int64)


class Place(NamedTuple):
    """Where a chunk lies: its first element, and the columns of the tensor read as a matrix."""

    start: int
    columns: int


def _half_octaves(value: int) -> int:
    """Twice the logarithm to base 2, roughly; of at least 1."""
    length = value.bit_length()
    return 2 * (length - 1) + (value >> (length - 2) & 1 if length > 1 else 0)


# The odds of each of 4096 chances, in half octaves.
_ODDS = np.array(
    [
        _half_octaves(bucket + 1) - _half_octaves((1 << _BUCKET_BITS) - bucket)
        for bucket in range(1 << _BUCKET_BITS)
    ],
    np.int64,
)


def stream_bytes_range(numel: Any) -> tuple[int, Any]:
    """The least and most bytes of the stream of so many elements; an int or an int64 array."""
    return STATE_BYTES, STATE_BYTES + WORD_BYTES * numel


def encode_positions(positions: Positions, numel: int, place: Place) -> bytes:
    """The stream. positions: [nnz], ascending; neither none nor all of ``numel``."""
    kept = np.zeros(numel, np.bool_)
    kept[positions] = True
    decisions = np.empty(numel, np.uint32)
    _decide(kept, positions.size, *place, decisions)
    return encode_decisions(decisions)


def decode_positions(stream: bytes, numel: int, place: Place, positions: Positions) -> int:
    """Undo :func:`encode_positions`. positions: [nnz], written -> OK, or what is wrong."""
    words = np.frombuffer(stream, "<u4").astype(np.uint32)
    status: int = _decode(words, numel, *place, positions)
    return status


@jit
def _odds(chance):  # type: ignore[no-untyped-def]
    return _ODDS[np.int64(chance) >> np.int64(32 - _BUCKET_BITS)]


@jit
def _context(odds):  # type: ignore[no-untyped-def]
    return min(max(odds, np.int64(0)), np.int64(CONTEXTS - 1))


@jit
def _moved(chance, kept, seen):  # type: ignore[no-untyped-def]
    """The chance of a row or column, in units of 2^-32, after an element more."""
    chance = np.int64(chance)
    target = np.int64(4294967295) if kept else np.int64(0)
    return chance + (((target - chance) * _RATES[min(seen, _RATES.size - 1)]) >> np.int64(16))


@jit
def _decide(kept, nnz, start, columns, decisions):  # type: ignore[no-untyped-def]
    """Each decision as 2 * (share of a 1) + (what was decided). kept: [numel]."""
    chances = np.full(CONTEXTS, EVEN)
    seen = np.zeros(CONTEXTS, np.int64)
    prior = (np.int64(nnz) << np.int64(32)) // kept.size
    below = _odds(prior) - _MIDDLE
    of_column = np.full(min(columns, kept.size), np.uint32(prior))
    of_row, in_row, left = prior, 0, columns - start % columns
    column, rows = 0, 0
    for i in range(kept.size):
        at = _context(_odds(of_row) + _odds(of_column[column]) - below)
        decisions[i] = np.uint32(2 * share_of(chances[at]) + kept[i])
        learn(chances, seen, at, kept[i])
        of_row = _moved(of_row, kept[i], in_row)
        of_column[column] = np.uint32(_moved(of_column[column], kept[i], rows))
        in_row += 1
        left -= 1
        if left == 0:
            of_row, in_row, left = prior, 0, columns
        column += 1
        if column == of_column.size:
            column, rows = 0, rows + 1


@jit
def _decode(words, numel, start, columns, positions):  # type: ignore[no-untyped-def]
    chances = np.full(CONTEXTS, EVEN)
    seen = np.zeros(CONTEXTS, np.int64)
    prior = (np.int64(positions.size) << np.int64(32)) // numel
    below = _odds(prior) - _MIDDLE
    of_column = np.full(min(columns, numel), np.uint32(prior))
    of_row, in_row, left = prior, 0, columns - start % columns
    column, rows = 0, 0
    state = (np.uint64(words[1]) << np.uint64(32)) | np.uint64(words[0])
    if state >> np.uint64(32) == 0:
        return ENDS_LATE
    at_word = 2
    found = 0
    for i in range(numel):
        at = _context(_odds(of_row) + _odds(of_column[column]) - below)
        share = np.uint64(share_of(chances[at]))
        low = state & np.uint64(0xFFFF)
        kept = low < share
        if kept:
            state = share * (state >> np.uint64(16)) + low
        else:
            state = (np.uint64(65536) - share) * (state >> np.uint64(16)) + low - share
        if state >> np.uint64(32) == 0:
            if at_word == words.size:
                return ENDS_EARLY
            state = (state << np.uint64(32)) | np.uint64(words[at_word])
            at_word += 1
        if kept:
            if found == positions.size:
                return MISCOUNTED
            positions[found] = i
            found += 1
        learn(chances, seen, at, kept)
        of_row = _moved(of_row, kept, in_row)
        of_column[column] = np.uint32(_moved(of_column[column], kept, rows))
        in_row += 1
        left -= 1
        if left == 0:
            of_row, in_row, left = prior, 0, columns
        column += 1
        if column == of_column.size:
            column, rows = 0, rows + 1
    if found != positions.size:
        return MISCOUNTED
    if at_word != words.size or state != np.uint64(1) << np.uint64(32):
        return ENDS_LATE
    return OK
