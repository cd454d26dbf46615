"""Tensors in the value codecs *signs* and *levels*: parameter streams, draws, words.

Written from SPEC.md with struct and math alone. Python's floats are float64; a product or a sum of
two float32 in them, rounded once more, is the float32 product or sum, because 53 >= 2 * 24 + 2.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from parts import (
    DELTA,
    DRAWN,
    DTYPES,
    FULL,
    LEVELS,
    PARAMETERS,
    SIGNS,
    Base,
    Chunk,
    Entry,
    frame,
    little,
    pack_words,
    words_of,
)

U64 = 2**64 - 1
NEVER = -128  # the size exponent that stands for the factor 0
SQRT2 = struct.unpack("<f", little(0x3FB504F3, 4))[0]
FORMATS = {DTYPES["F16"][0]: "<e", DTYPES["F32"][0]: "<f"}  # the other one is BF16


# -- float32, F16, BF16 --------------------------------------------------------------------------


def float32(number: float) -> float:
    """The nearest float32, ties to even; infinite where it is too large."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    except OverflowError:
        rounded = math.copysign(math.inf, number)
    return rounded


def half_power(exponent: int) -> float:
    """2^(exponent / 2) as a float32."""
    root, power = (SQRT2, exponent - 1) if exponent % 2 else (1.0, exponent)
    return math.ldexp(root, power // 2)


def number_of(word: int, dtype: int) -> float:
    """The float that a word stands for."""
    if dtype in FORMATS:
        code = FORMATS[dtype]
        found: float = struct.unpack(code, little(word, struct.calcsize(code)))[0]
    else:
        found = struct.unpack("<f", little(word << 16, 4))[0]
    return found


def word_of(number: float, dtype: int) -> int:
    """The word nearest to a float32, ties to even; infinite where it is too large."""
    if dtype in FORMATS:
        try:
            return int.from_bytes(struct.pack(FORMATS[dtype], number), "little")
        except OverflowError:
            return word_of(math.copysign(math.inf, number), dtype)
    word = int.from_bytes(struct.pack("<f", number), "little")
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16


def changed(word: int, change: float, dtype: int) -> int:
    """The base's word plus a change; the base's word where that is no other finite number."""
    before = number_of(word, dtype)
    total = float32(before + change)
    if not math.isfinite(before) or not math.isfinite(total):
        return word
    result = word_of(total, dtype)
    after = number_of(result, dtype)
    return result if math.isfinite(after) and after != before else word


def weights(seed: str, count: int, dtype: str) -> list[int]:
    """Words of numbers between -1/32 and 1/32."""
    source = random.Random(seed)
    numbers = [math.ldexp(source.getrandbits(24) - (1 << 23), -28) for _ in range(count)]
    return [word_of(number, DTYPES[dtype][0]) for number in numbers]


# -- draws ---------------------------------------------------------------------------------------


GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_bits(seed: int, number: int) -> int:
    """Output of splitmix64."""
    z = (seed + (number + 1) * GOLDEN) & U64
    z = (z ^ z >> 30) * FIRST & U64
    z = (z ^ z >> 27) * SECOND & U64
    return z ^ z >> 31


def seed_of(draws: Sequence[int]) -> int:
    """The seed by which the first four elements draw these: splitmix64 backwards."""

    def unshift(mixed: int, shift: int) -> int:
        found = mixed
        for _ in range(64 // shift):
            found = mixed ^ found >> shift
        return found

    z = sum(draw << 16 * place for place, draw in enumerate(draws))
    z = unshift(z, 31) * pow(SECOND, -1, 1 << 64) & U64
    z = unshift(z, 27) * pow(FIRST, -1, 1 << 64) & U64
    return (unshift(z, 30) - GOLDEN) & U64


# -- parameters ----------------------------------------------------------------------------------


@dataclass
class Subspace:
    """Elements from the exponent ``first`` on; every field can be set to what it should not be."""

    scale: float = 1.0
    rate: float = 1.0
    first: int = -32768
    reserved: int = 0


@dataclass
class Parameters:
    """Of one tensor in signs; every field can be set to what it should not be."""

    size_rows: list[int]
    size_columns: list[int]
    rows: list[int]  # importance
    columns: list[int]
    gain: float = 1.0
    subspaces: list[Subspace] = field(default_factory=lambda: [Subspace()])
    seed: int = 0
    count: int | None = None  # of subspaces, as recorded
    reserved: int = 0

    def stream(self) -> bytes:
        count = len(self.subspaces) if self.count is None else self.count
        out = struct.pack("<QfHH", self.seed, self.gain, count, self.reserved)
        for part in self.subspaces:
            out += struct.pack("<hHfd", part.first, part.reserved, part.scale, part.rate)
        exponents = (*self.size_rows, *self.size_columns, *self.rows, *self.columns)
        return out + struct.pack(f"<{len(exponents)}b", *exponents)

    def change(self, position: int) -> float | None:
        """Magnitude of the element's change; None where it is not drawn."""
        row, column = divmod(position, len(self.columns))
        sizes = (self.size_rows[row], self.size_columns[column])
        if NEVER in sizes:
            return None
        exponent = sum(sizes) + self.rows[row] + self.columns[column]
        score = float32(self.gain * half_power(exponent))
        part = [part for part in self.subspaces if part.first <= exponent][-1]
        expected = 65536.0 * (score * part.rate)
        level = 65536 if expected > 65536 else round(expected)  # Python rounds ties to even
        draw = random_bits(self.seed, position >> 2) >> 16 * (position & 3) & 0xFFFF
        if score == 0 or draw >= level:
            return None
        size = float32(self.gain * half_power(sum(sizes)))
        return float32(size * float32(part.scale * 65536.0 / level))


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def parameters(
    shape: Sequence[int],
    gain: float = 1.0,
    rate: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
    *,
    subspaces: list[Subspace] | None = None,
    size_rows: Sequence[int] = (0,),
    size_columns: Sequence[int] = (0,),
    rows: Sequence[int] = (0,),
    columns: Sequence[int] = (0,),
) -> Parameters:
    """For a shape; exponents are repeated until they are enough."""
    height, width = sides(shape)

    def repeated(exponents: Sequence[int], size: int) -> list[int]:
        return [exponents[i % len(exponents)] for i in range(size)]

    return Parameters(
        repeated(size_rows, height),
        repeated(size_columns, width),
        repeated(rows, height),
        repeated(columns, width),
        gain,
        subspaces or [Subspace(scale, rate)],
        seed,
    )


# -- tensors -------------------------------------------------------------------------------------


def parameter_chunk(stream: bytes, width: int, stored: bytes | None = None) -> Chunk:
    """stored: the stream as a zstd frame."""
    planes = [b""] * width
    mask = stream if stored is None else stored
    return Chunk(mask, len(stream), 0, PARAMETERS, int(stored is not None), planes, 0)


def bits(signs: Sequence[int]) -> bytes:
    out = bytearray(-(-len(signs) // 8))
    for place, sign in enumerate(signs):
        out[place // 8] |= sign << place % 8
    return bytes(out)


def signs(
    name: str,
    bases: list[Base],
    index: int,
    given: Parameters,
    *,
    chunk_log2: int = 10,
    compress: bool = False,
    minus: Callable[[int], bool] | None = None,
) -> Entry:
    """The base tensor with what is drawn changed. minus: of an element; any where it is None."""
    base = bases[index]
    before = words_of(base)
    after = list(before)
    width = next(width for code, width in DTYPES.values() if code == base.dtype)
    stream = given.stream()
    chunks = [parameter_chunk(stream, width, frame(stream) if compress else None)]
    source = random.Random(f"signs of {name}")
    for start in range(0, len(before), 1 << chunk_log2):
        chosen = []
        for position in range(start, min(start + (1 << chunk_log2), len(before))):
            change = given.change(position)
            if change is None:
                continue
            sign = source.getrandbits(1) if minus is None else int(minus(position))
            chosen.append(sign)
            after[position] = changed(before[position], -change if sign else change, base.dtype)
        planes = [bits(chosen)] + [b""] * (width - 1)
        chunks.append(Chunk(b"", 0, len(chosen), DRAWN, 0, planes, 0))
    data = pack_words(after, width)
    return Entry(
        name.encode(), base.dtype, list(base.shape), DELTA, SIGNS, chunk_log2, index, data, chunks
    )


def levels(
    name: str,
    bases: list[Base],
    index: int,
    exponent: int,
    steps: Sequence[int],
    *,
    chunk_log2: int = 10,
    compress: bool = False,
) -> Entry:
    """The base tensor changed by multiples of 2^(exponent / 2). compress: what gets smaller."""
    base = bases[index]
    before = words_of(base)
    assert len(before) == len(steps)
    width = next(width for code, width in DTYPES.values() if code == base.dtype)
    chunks = [parameter_chunk(struct.pack("<h", exponent), width)]
    for start in range(0, len(steps), 1 << chunk_log2):
        part = steps[start : start + (1 << chunk_log2)]
        plane = struct.pack(f"<{len(part)}b", *part)
        zstd = compress and len(frame(plane)) < len(plane)
        planes = [frame(plane) if zstd else plane] + [b""] * (width - 1)
        chunks.append(Chunk(b"", 0, len(part), FULL, 0, planes, int(zstd)))
    step = half_power(exponent)
    after = [
        changed(word, float32(k * step), base.dtype) for word, k in zip(before, steps, strict=True)
    ]
    data = pack_words(after, width)
    return Entry(
        name.encode(), base.dtype, list(base.shape), DELTA, LEVELS, chunk_log2, index, data, chunks
    )
