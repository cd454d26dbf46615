"""Tensors stored as signs, and small ones as levels: streams to words, and back.

A reader draws again which elements are kept, and computes how far each moves, from the tensor's
*parameters*: a seed, factors of rows and columns, and what the recipe makes of them. Defined byte
by byte in format_spec/SPEC.md. Decoding treats every stream as hostile.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit
from nps_compress.codecs import (
    DEFAULT_LEVEL,
    EncodedChunk,
    MaskCodec,
    Positions,
    compress_if_smaller,
    drawing_work,
)
from nps_compress.draws import LEVELS, short_draws
from nps_compress.dtypes import DType, Words, round_float32, to_float32
from nps_compress.errors import FormatError
from nps_compress.rank_one import LARGEST as LARGEST_EXPONENT
from nps_compress.rank_one import POWERS, ZERO, RankOne, power
from nps_compress.rounding import DROPPED_BITS, LARGEST, rounded

SUBSPACES = 64
_BLOCK = 4096  # draws held at once: in the nearest cache
LEVELS_PARAMETER_BYTES = 2
_HEAD, _SUBSPACE = struct.Struct("<QfHH"), struct.Struct("<hHfd")
_NEVER = -128  # the stored exponent of the factor 0
_FROM_THE_START = -(1 << 15)
_PARAMETER_LEVEL = 19  # of zstd: a few hundred bytes a tensor

Bits = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Signs = tuple[Positions, Bits]


def sign_parameter_bytes(subspaces: int, rows: int, columns: int) -> int:
    """Size of the parameter stream of signs."""
    return _HEAD.size + subspaces * _SUBSPACE.size + 2 * (rows + columns)


def is_sign_parameter_bytes(sizes: Int64, factors: Int64) -> npt.NDArray[np.bool_]:
    """Whether parameter streams of signs may have these sizes. factors: rows + columns. All [n]."""
    subspaces = sizes - _HEAD.size - 2 * factors
    least, most = _SUBSPACE.size, SUBSPACES * _SUBSPACE.size
    return (subspaces % least == 0) & (subspaces >= least) & (subspaces <= most)


@dataclass(frozen=True)
class SignParameters:
    """What says which elements of a matrix are kept and how far they move.

    Subspace m begins at the score exponent ``first[m]`` (half octaves); an element's probability
    is its score times ``rate[m]``, and what it moves by is multiplied by ``scale[m]``.
    """

    seed: int
    gain: float
    first: tuple[int, ...]
    rate: tuple[float, ...]
    scale: tuple[float, ...]
    sizes: RankOne
    importance: RankOne

    def to_bytes(self) -> bytes:
        """The parameter stream."""
        head = _HEAD.pack(self.seed, self.gain, len(self.first), 0)
        subspaces = (
            _SUBSPACE.pack(first if number else _FROM_THE_START, 0, scale, rate)
            for number, (first, rate, scale) in enumerate(
                zip(self.first, self.rate, self.scale, strict=True)
            )
        )
        return head + b"".join(subspaces) + exponent_bytes(self.sizes, self.importance)

    @classmethod
    def parse(cls, data: bytes, rows: int, columns: int) -> SignParameters:
        """Undo :meth:`to_bytes`. Raises FormatError (P-PARAMETERS)."""
        seed, gain, count, reserved = _HEAD.unpack_from(data)
        if reserved:
            fail_parameters("reserved bytes are not zero")
        if not 1 <= count <= SUBSPACES or sign_parameter_bytes(count, rows, columns) != len(data):
            fail_parameters(f"{count} subspaces in {len(data)} bytes")
        if not math.isfinite(gain) or math.copysign(1, gain) < 0:
            fail_parameters(f"gain of {gain}")
        table = [
            _SUBSPACE.unpack_from(data, _HEAD.size + number * _SUBSPACE.size)
            for number in range(count)
        ]
        first, reserved_words, scale, rate = zip(*table, strict=True)
        if any(reserved_words):
            fail_parameters("reserved bytes are not zero")
        if first[0] != _FROM_THE_START or list(first) != sorted(set(first)):
            fail_parameters(f"subspaces begin at {first}")
        if not all(math.isfinite(value) and value > 0 for value in (*scale, *rate)):
            fail_parameters("a scale or rate is not finite and positive")
        at = _HEAD.size + count * _SUBSPACE.size
        return cls(seed, gain, first, rate, scale, *parse_exponents(data[at:], rows, columns))

    @cached_property
    def _score(self) -> RankOne:
        return self.sizes.times(self.importance)

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """By score exponent, from the least: draws below that level are kept; factor of the size.

        The same operations as in prune.select, so that a search sees what is stored.
        """
        with np.errstate(over="ignore"):
            scores = POWERS * np.float32(self.gain)
        exponents = np.arange(scores.size) - scores.size // 2
        m = np.searchsorted(np.array(self.first[1:]), exponents, side="right")
        with np.errstate(over="ignore"):
            level = LEVELS * (scores.astype(np.float64) * np.array(self.rate)[m])
        level = np.where(scores > 0, np.minimum(LEVELS, np.rint(level)), 0)
        scale = np.array(self.scale, np.float32).astype(np.float64)[m]
        with np.errstate(over="ignore"):
            factor = np.where(level > 0, scale * LEVELS / np.maximum(level, 1), 0).astype(
                np.float32
            )
        return level.astype(np.int32), factor

    def drawn(self, start: int, stop: int) -> Positions:
        """Elements kept among ``start`` to ``stop``, ascending, counted from ``start``."""
        positions = np.empty(stop - start + 1, np.uint32)  # one more, which is written and not kept
        score = self._score
        levels, seed = self._tables[0], np.uint64(self.seed)
        found = _drawn(score.rows, score.columns, levels, seed, start, stop, positions)
        return positions[:found].copy()

    @property
    def products(self) -> tuple[tuple[RankOne, Float32], tuple[RankOne, Float32]]:
        """A drawn element moves by one number times another, each the entry of its exponent."""
        with np.errstate(over="ignore"):
            sizes = POWERS * np.float32(self.gain)
        return (self.sizes, sizes), (self._score, self._tables[1])

    def changes(self, start: int, positions: Positions, minus: Bits) -> Float32:
        """How far drawn elements move. positions: [nnz] from ``start``; minus: [nnz] 0 or 1."""
        (own, sizes), (score, factors) = self.products
        out = np.empty(positions.size, np.float32)
        exponents = (score.rows, score.columns, own.rows, own.columns)
        _changes(*exponents, sizes, factors, start, positions, minus, out)
        return out

    def apply(
        self, start: int, positions: Positions, minus: Bits, base: Words, out: Words, dtype: DType
    ) -> None:
        """Write the words of drawn elements. minus: [nnz] 0 or 1; base, out: [n], may be one."""
        add_changes(positions, self.changes(start, positions, minus), base, out, dtype)


def exponent_bytes(sizes: RankOne, importance: RankOne) -> bytes:
    """Factors of a tensor's rows and columns, as its parameters end: a byte each."""
    factors = (sizes.rows, sizes.columns, importance.rows, importance.columns)
    stored = (np.where(each == ZERO, _NEVER, each) for each in factors)
    return b"".join(each.astype(np.int8).tobytes() for each in stored)


def parse_exponents(data: bytes, rows: int, columns: int) -> tuple[RankOne, RankOne]:
    """Undo :func:`exponent_bytes`. Raises FormatError (P-PARAMETERS)."""
    exponents = np.frombuffer(data, np.int8).astype(np.int16)
    parts = np.split(exponents, np.cumsum((rows, columns, rows)))
    for part, may_be_zero in zip(parts, (True, True, False, False), strict=True):
        odd = np.abs(part) > LARGEST_EXPONENT
        if may_be_zero:
            odd &= part != _NEVER
        if odd.any():
            fail_parameters(f"an exponent of {part[odd][0]}")
    sizes = (np.where(part == _NEVER, ZERO, part).astype(np.int16) for part in parts[:2])
    return RankOne(*sizes), RankOne(*parts[2:])


def fail_parameters(detail: str) -> NoReturn:
    """Raise FormatError (P-PARAMETERS)."""
    raise FormatError("P-PARAMETERS", f"parameters: {detail}")


def parameter_chunk(data: bytes) -> EncodedChunk:
    """The first chunk of a tensor: its parameter stream."""
    stored, compressed = compress_if_smaller(data, _PARAMETER_LEVEL)
    return EncodedChunk(0, MaskCodec.PARAMETERS, len(data), compressed, stored, 0, ())


def encode_signs(parameters: SignParameters, start: int, signed: Float32) -> EncodedChunk:
    """Signs of what is kept of the changes from position ``start`` on. signed: [n]."""
    positions = parameters.drawn(start, start + signed.size)
    minus = np.packbits(signed[positions] < 0, bitorder="little").tobytes()
    work = drawing_work(signed.size)
    return EncodedChunk(positions.size, MaskCodec.DRAWN, 0, False, b"", 0, (minus,), work)


def decode_signs(stored: bytes, parameters: SignParameters, span: range, nnz: int) -> Signs:
    """What is kept of ``span``, and which of it moves down.

    -> [nnz] positions, ascending, counted from the span's start, and [nnz] 0 or 1.

    Raises:
        FormatError: P-POPCOUNT, P-TAIL.
    """
    positions = parameters.drawn(span.start, span.stop)
    if positions.size != nnz:
        raise FormatError("P-POPCOUNT", f"{positions.size} elements are drawn, not {nnz}")
    minus = np.unpackbits(np.frombuffer(stored, np.uint8), bitorder="little")
    if minus[nnz:].any():
        raise FormatError("P-TAIL", "bits are set past the last sign")
    return positions, minus[:nnz]


def encode_levels(levels: npt.NDArray[np.int8], compression: int = DEFAULT_LEVEL) -> EncodedChunk:
    """Levels of a chunk. levels: [n]."""
    stored, compressed = compress_if_smaller(levels.tobytes(), compression)
    return EncodedChunk(levels.size, MaskCodec.FULL, 0, False, b"", int(compressed), (stored,))


def levels_parameters(exponent: int) -> bytes:
    """The parameter stream of levels: the step is 2^(exponent / 2)."""
    return struct.pack("<h", exponent)


def parse_levels_parameters(data: bytes) -> int:
    """Undo :func:`levels_parameters`. Raises FormatError (P-PARAMETERS)."""
    exponent: int = struct.unpack("<h", data)[0]
    if abs(exponent) > 2 * LARGEST_EXPONENT:
        fail_parameters(f"a step of 2^({exponent} / 2)")
    return exponent


def level_changes(levels: npt.NDArray[np.int8], exponent: int) -> Float32:
    """Levels times the step. levels: [n] -> [n]."""
    return levels.astype(np.float32) * power(exponent)


def add_changes(
    positions: Positions, changes: npt.NDArray[np.float32], base: Words, out: Words, dtype: DType
) -> None:
    """out = base + changes at these positions, rounded, the base elsewhere.

    An element whose sum is its base's value, or is not finite, keeps the base's word. changes:
    [nnz]; base, out: [n] words, which may be the same.
    """
    dropped, largest = np.uint32(DROPPED_BITS[dtype.name]), np.float32(LARGEST[dtype.name])
    if dtype.name in {"BF16", "F32"}:
        if out is not base:
            np.copyto(out, base)
        add = _add_to_bf16 if dtype.name == "BF16" else _add_to_f32
        add(positions, changes, dropped, largest, out)
        return
    before = to_float32(base[positions], dtype)
    values = np.empty(positions.size, np.float32)
    moved = np.empty(positions.size, np.int64)
    found = _moved(before, changes, dropped, largest, values, moved)
    if out is not base:
        np.copyto(out, base)
    out[positions[moved[:found]]] = round_float32(values[:found], dtype)


@jit
def _drawn(rows, columns, levels, seed, start, stop, positions):  # type: ignore[no-untyped-def]
    # The first level is for what is never kept, so that no element needs a branch of its own.
    levels_from_0 = np.zeros(levels.size + 1, np.int64)
    levels_from_0[1:] = levels
    middle = levels.size // 2 + 1
    numbers = np.empty(_BLOCK // 4, np.uint64)
    draws = numbers.view(np.uint16)
    row, column = start // columns.size, start % columns.size
    found = 0
    for block in range(start - start % 4, stop, _BLOCK):
        short_draws(seed, block, numbers)
        position, end = max(block, start), min(block + _BLOCK, stop)
        while position < end:
            run = min(end - position, columns.size - column)
            of_row = middle + np.int64(rows[row])
            for i in range(run):
                at = max(of_row + np.int64(columns[column + i]), 0)
                positions[found] = position + i - start
                found += int(np.int64(draws[position + i - block]) < levels_from_0[at])
            position += run
            column += run
            if column == columns.size:
                row, column = row + 1, 0
    return found


@jit
def _changes(  # type: ignore[no-untyped-def]
    rows, columns, own_rows, own_columns, sizes, factors, start, positions, minus, changes
):
    middle = sizes.size // 2
    row = start // columns.size
    row_end = (row + 1) * columns.size - start
    for i in range(positions.size):
        while positions[i] >= row_end:
            row += 1
            row_end += columns.size
        column = np.int64(positions[i]) - row_end + columns.size
        score = middle + np.int64(rows[row]) + np.int64(columns[column])
        size = middle + np.int64(own_rows[row]) + np.int64(own_columns[column])
        change = np.float32(sizes[size] * factors[score])
        changes[i] = -change if minus[i] else change


@jit
def _add_to_bf16(positions, changes, dropped, largest, words):  # type: ignore[no-untyped-def]
    """As _moved, and what follows it, in one pass, as _add_to_f32 does."""
    for i in range(positions.size):
        word = words[positions[i]]
        before = np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)
        value = rounded(before + changes[i], dropped)
        moves = (value != before) & (abs(value) <= largest) & (abs(before) <= largest)
        new = np.uint16(np.float32(value).view(np.uint32) >> np.uint32(16))
        words[positions[i]] = new if moves else word  # no branch: nobody could guess it


@jit
def _add_to_f32(positions, changes, dropped, largest, words):  # type: ignore[no-untyped-def]
    for i in range(positions.size):
        word = np.uint32(words[positions[i]])
        before = word.view(np.float32)
        value = np.float32(before + changes[i])
        moves = (value != before) & (abs(value) <= largest) & (abs(before) <= largest)
        words[positions[i]] = value.view(np.uint32) if moves else word


@jit
def _moved(before, changes, dropped, largest, values, moved):  # type: ignore[no-untyped-def]
    found = 0
    for i in range(before.size):
        word = rounded(before[i] + changes[i], dropped)
        if word == before[i] or not abs(word) <= largest or not abs(before[i]) <= largest:
            continue
        values[found] = word
        moved[found] = i
        found += 1
    return found
