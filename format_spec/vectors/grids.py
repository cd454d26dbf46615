"""Tensors in the value codec *grid*: contexts, decisions, coded magnitudes, words.

Written from SPEC.md with struct and Python's integers alone; floats are as in signs.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parts import (
    CODED,
    DELTA,
    DTYPES,
    EMPTY,
    GRID,
    Base,
    Chunk,
    Entry,
    frame,
    little,
    pack_words,
    words_of,
)
from signs import NEVER, bits, changed, float32, half_power, parameter_chunk, sides

LOWEST = 1 << 32  # of the states; where encoding starts and decoding ends


@dataclass
class GridParameters:
    """Of one tensor in a grid; every field can be set to what it should not be."""

    size_rows: list[int]
    size_columns: list[int]
    rows: list[int]  # importance
    columns: list[int]
    step: float = 1.0
    first: int = 0
    reserved: int = 0
    more_reserved: int = 0

    def stream(self) -> bytes:
        exponents = (*self.size_rows, *self.size_columns, *self.rows, *self.columns)
        head = struct.pack("<dhHI", self.step, self.first, self.reserved, self.more_reserved)
        return head + struct.pack(f"<{len(exponents)}b", *exponents)

    def context(self, position: int) -> int | None:
        """None where nothing is coded."""
        row, column = divmod(position, len(self.columns))
        factors = (self.size_rows[row], self.size_columns[column])
        if NEVER in factors:
            return None
        u = sum(factors) + self.rows[row] + self.columns[column]
        return min(max(u - self.first, 0), 63)

    def change(self, position: int, k: int) -> float:
        row, column = divmod(position, len(self.columns))
        return float32(k * float32(self.step / half_power(self.rows[row] + self.columns[column])))


def grid_parameters(
    shape: Sequence[int],
    step: float = 1.0,
    first: int = 0,
    *,
    size_rows: Sequence[int] = (0,),
    size_columns: Sequence[int] = (0,),
    rows: Sequence[int] = (0,),
    columns: Sequence[int] = (0,),
) -> GridParameters:
    """For a shape; exponents are repeated until they are enough."""
    height, width = sides(shape)

    def repeated(exponents: Sequence[int], size: int) -> list[int]:
        return [exponents[i % len(exponents)] for i in range(size)]

    return GridParameters(
        repeated(size_rows, height),
        repeated(size_columns, width),
        repeated(rows, height),
        repeated(columns, width),
        step,
        first,
    )


# -- coded magnitudes ----------------------------------------------------------------------------


class Chance:
    """That a decision is 1, as it is learned."""

    def __init__(self) -> None:
        self.of_one, self.count = 1 << 31, 0

    def share(self) -> int:
        return min(max(self.of_one >> 16, 1), 65535)

    def learn(self, bit: int) -> None:
        goal = 0xFFFFFFFF if bit else 0
        self.of_one += (goal - self.of_one) * ((1 << 17) // (2 * self.count + 3)) >> 16
        self.count = min(self.count + 1, 511)


Decisions = list[tuple[int, int]]  # each a bit, and the share of 1


def decisions_of(coded: Sequence[tuple[int, int]]) -> Decisions:
    """coded: magnitude and context of each element that has a code."""
    lengths = [[Chance() for _ in range(15)] for _ in range(64)]
    seconds = [[Chance() for _ in range(16)] for _ in range(64)]
    thirds = [[[Chance(), Chance()] for _ in range(16)] for _ in range(64)]
    out: Decisions = []

    def learned(chance: Chance, bit: int) -> None:
        out.append((bit, chance.share()))
        chance.learn(bit)

    for magnitude, context in coded:
        size = magnitude.bit_length()
        for number in range(min(size + 1, 15)):
            learned(lengths[context][number], int(number < size))
        for number in range(1, size):
            bit = magnitude >> (size - 1 - number) & 1
            if number == 1:
                learned(seconds[context][size], bit)
            elif number == 2:
                learned(thirds[context][size][magnitude >> (size - 2) & 1], bit)
            else:
                out.append((bit, 32768))
    return out


def coded_words(decisions: Decisions, state: int = LOWEST) -> list[int]:
    """state: that in which a decoder shall end."""
    words: list[int] = []
    for bit, share in reversed(decisions):
        start, width = (0, share) if bit else (share, 65536 - share)
        if state >= width << 48:
            words.append(state % LOWEST)
            state //= LOWEST
        state = state // width * 65536 + start + state % width
    return [state % LOWEST, state // LOWEST, *reversed(words)]


def coded_stream(coded: Sequence[tuple[int, int]], state: int = LOWEST) -> bytes:
    return b"".join(little(word, 4) for word in coded_words(decisions_of(coded), state))


# -- tensors -------------------------------------------------------------------------------------


def grid_chunk(given: GridParameters, start: int, ks: Sequence[int], width: int) -> Chunk:
    """The integers of elements from ``start`` on."""
    kept = [k for k in ks if k]
    planes = [bits([int(k < 0) for k in kept])] + [b""] * (width - 1)
    if not kept:
        return Chunk(b"", 0, 0, EMPTY, 0, planes, 0)
    coded = []
    for position, k in enumerate(ks, start):
        context = given.context(position)
        if context is None:
            assert not k
        else:
            coded.append((abs(k), context))
    stream = coded_stream(coded)
    return Chunk(stream, len(stream), len(kept), CODED, 0, planes, 0)


def grid(
    name: str,
    bases: list[Base],
    index: int,
    given: GridParameters,
    integer: Callable[[int], int],
    *,
    chunk_log2: int = 10,
    compress: bool = False,
) -> Entry:
    """The base tensor changed by integers, that of each position; 0 where there is no code."""
    base = bases[index]
    before = words_of(base)
    ks = [0 if given.context(p) is None else integer(p) for p in range(len(before))]
    width = next(width for code, width in DTYPES.values() if code == base.dtype)
    stream = given.stream()
    chunks = [parameter_chunk(stream, width, frame(stream) if compress else None)]
    for start in range(0, len(before), 1 << chunk_log2):
        chunks.append(grid_chunk(given, start, ks[start : start + (1 << chunk_log2)], width))
    after = [
        changed(word, given.change(position, k), base.dtype) if k else word
        for position, (word, k) in enumerate(zip(before, ks, strict=True))
    ]
    data = pack_words(after, width)
    return Entry(
        name.encode(), base.dtype, list(base.shape), DELTA, GRID, chunk_log2, index, data, chunks
    )
