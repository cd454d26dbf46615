"""Tensors stored as small integers times a step: streams to words, and back.

The step of an element follows from the importance of its row and column, and how large its integer
is likely to be from their mean magnitudes too: both are in the tensor's *parameters*. Defined byte
by byte in format_spec/SPEC.md. Decoding treats every stream as hostile.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit
from nps_compress.codecs import EncodedChunk, MaskCodec, Positions, decoding_work
from nps_compress.dtypes import DType, Words
from nps_compress.entropy_coding import (
    CONTEXTS,
    ENDS_EARLY,
    ENDS_LATE,
    MISCOUNTED,
    OK,
    decode_magnitudes,
    encode_magnitudes,
)
from nps_compress.errors import FormatError
from nps_compress.rank_one import POWERS, ZERO, RankOne
from nps_compress.sign_codec import (
    add_changes,
    exponent_bytes,
    fail_parameters,
    parse_exponents,
)

_HEAD = struct.Struct("<dhHI")
_FIRST = (-(1 << 15), (1 << 15) - 1)

Levels = npt.NDArray[np.int16]

_FAULTS = {
    ENDS_EARLY: ("P-CODE", "the magnitudes end before all are decoded"),
    ENDS_LATE: ("P-CODE", "the magnitudes don't end where they should"),
    MISCOUNTED: ("P-POPCOUNT", "another number of elements is kept than the record says"),
}


def grid_parameter_bytes(factors: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Sizes of parameter streams. factors: rows + columns."""
    return _HEAD.size + 2 * np.asarray(factors, np.int64)


@dataclass(frozen=True)
class GridParameters:
    """What the integers of a matrix stand for, and how they are coded.

    An integer k is a change of k * ``step`` / importance. Its context is the score exponent (half
    octaves) less ``first``, within what there are; an element of size 0 has no code.
    """

    step: float
    first: int
    sizes: RankOne
    importance: RankOne

    @classmethod
    def of(cls, step: float, sizes: RankOne, importance: RankOne) -> GridParameters:
        """Parameters whose contexts tell the highest scores apart."""
        score = sizes.times(importance)
        highest = int(score.rows.max(initial=ZERO)) + int(score.columns.max(initial=ZERO))
        return cls(step, max(highest - CONTEXTS + 1, _FIRST[0]), sizes, importance)

    def to_bytes(self) -> bytes:
        """The parameter stream."""
        return _HEAD.pack(self.step, self.first, 0, 0) + exponent_bytes(self.sizes, self.importance)

    @classmethod
    def parse(cls, data: bytes, rows: int, columns: int) -> GridParameters:
        """Undo :meth:`to_bytes`; of a fitting size. Raises FormatError (P-PARAMETERS)."""
        step, first, *reserved = _HEAD.unpack_from(data)
        if any(reserved):
            fail_parameters("reserved bytes are not zero")
        if not (math.isfinite(step) and step > 0):
            fail_parameters(f"a step of {step}")
        return cls(step, first, *parse_exponents(data[_HEAD.size :], rows, columns))

    @cached_property
    def _score(self) -> RankOne:
        return self.sizes.times(self.importance)

    @cached_property
    def _steps(self) -> npt.NDArray[np.float32]:
        with np.errstate(over="ignore"):
            return (self.step / POWERS.astype(np.float64)).astype(np.float32)

    @property
    def products(self) -> tuple[RankOne, npt.NDArray[np.float32]]:
        """An element moves by its integer times the entry of its exponent."""
        return self.importance, self._steps

    def contexts(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        """Contexts of some elements, -1 where nothing is coded. -> [stop - start]."""
        out = np.empty(stop - start, np.int8)
        if out.size:
            _contexts(self._score.rows, self._score.columns, self.first, start, out)
        return out

    def changes(self, start: int, positions: Positions, levels: Levels) -> npt.NDArray[np.float32]:
        """How far elements move. positions: [nnz] from ``start``; levels: [nnz] -> [nnz]."""
        out = np.empty(positions.size, np.float32)
        rows, columns = self.importance.rows, self.importance.columns
        _changes(rows, columns, self._steps, start, positions, levels, out)
        return out

    def apply(
        self,
        start: int,
        positions: Positions,
        levels: Levels,
        base: Words,
        out: Words,
        dtype: DType,
    ) -> None:
        """Write the words of elements that move. base, out: [n] from ``start``, may be one."""
        add_changes(positions, self.changes(start, positions, levels), base, out, dtype)


def encode_grid(parameters: GridParameters, start: int, levels: Levels) -> EncodedChunk:
    """Integers from position ``start`` on. levels: [n]."""
    positions = np.flatnonzero(levels)
    if not positions.size:
        return EncodedChunk(0, MaskCodec.EMPTY, 0, False, b"", 0, ())
    contexts = parameters.contexts(start, start + levels.size)
    stream = encode_magnitudes(np.abs(levels), contexts)
    minus = np.packbits(levels[positions] < 0, bitorder="little").tobytes()
    return EncodedChunk(
        positions.size,
        MaskCodec.CODED,
        len(stream),
        False,
        stream,
        0,
        (minus,),
        decoding_work(levels.size, positions.size),
    )


def decode_grid(
    stored: bytes, mask_bytes: int, parameters: GridParameters, span: range, nnz: int
) -> tuple[Positions, Levels]:
    """What moves of ``span``, and how far in steps.

    -> [nnz] positions, ascending, counted from the span's start, and [nnz] integers.

    Raises:
        FormatError: P-CODE, P-POPCOUNT, P-TAIL.
    """
    positions, levels = np.empty(nnz, np.uint32), np.empty(nnz, np.int16)
    contexts = parameters.contexts(span.start, span.stop)
    status = decode_magnitudes(stored[:mask_bytes], contexts, positions, levels)
    if status != OK:
        raise FormatError(*_FAULTS[status])
    minus = np.unpackbits(np.frombuffer(stored, np.uint8, offset=mask_bytes), bitorder="little")
    if minus[nnz:].any():
        raise FormatError("P-TAIL", "bits are set past the last sign")
    np.negative(levels, out=levels, where=minus[:nnz].astype(bool))
    return positions, levels


@jit
def _contexts(rows, columns, first, start, out):  # type: ignore[no-untyped-def]
    row, column = start // columns.size, start % columns.size
    for i in range(out.size):
        exponent = np.int64(rows[row]) + np.int64(columns[column])
        context = min(max(exponent - first, 0), CONTEXTS - 1)
        out[i] = context if exponent >= -(POWERS.size // 2) else -1
        column += 1
        if column == columns.size:
            row, column = row + 1, 0


@jit
def _changes(rows, columns, steps, start, positions, levels, out):  # type: ignore[no-untyped-def]
    middle = steps.size // 2
    row = start // columns.size
    row_end = (row + 1) * columns.size - start
    for i in range(positions.size):
        while positions[i] >= row_end:
            row += 1
            row_end += columns.size
        column = np.int64(positions[i]) - row_end + columns.size
        at = middle + np.int64(rows[row]) + np.int64(columns[column])
        out[i] = np.float32(np.float32(levels[i]) * steps[at])
