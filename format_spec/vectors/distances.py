"""Tensors in the value codec *coded ulp*: tokens, contexts, shares, states, low bits.

Written from SPEC.md with Python's integers alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from parts import (
    CODED_ULP,
    DTYPES,
    EMPTY,
    ULP,
    Base,
    Chunk,
    Entry,
    delta,
    little,
    payload_word,
    words_of,
)

FIELDS = {13: (10, 5), 14: (7, 8), 15: (23, 8)}  # of the exponent, by dtype: lowest bit, bits
LOWEST = 1 << 16  # of the states; where encoding starts and decoding ends


def exponent_of(word: int, dtype: int) -> int:
    lowest, count = FIELDS[dtype]
    return word >> lowest & (1 << count) - 1


def token(distance: int) -> int:
    length = distance.bit_length()
    return 0 if length == 1 else 2 * (length - 1) + (distance >> (length - 2) & 1)


def low_bits(distances: Iterable[int]) -> bytes:
    held = count = 0
    for distance in distances:
        more = max(distance.bit_length() - 2, 0)
        held |= (distance & (1 << more) - 1) << count
        count += more
    return little(held, -(-count // 8))


@dataclass
class Context:
    """Shares of tokens from ``first_token`` on; every field can be set to what it should not be."""

    first_exponent: int
    first_token: int
    shares: list[int]
    count: int | None = None

    def stream(self) -> bytes:
        count = len(self.shares) if self.count is None else self.count
        head = bytes([self.first_exponent, self.first_token, count])
        return head + struct.pack(f"<{len(self.shares)}H", *self.shares)


def context(first_exponent: int, tokens: Sequence[int]) -> Context:
    """Shares nearly as tokens occur: 1 for each that does, the others' part to the commonest."""
    first, last = min(tokens, default=0), max(tokens, default=0)
    size = max(len(tokens), 1)
    shares = [
        max(tokens.count(t) * 4096 // size, 1) if t in tokens else 0 for t in range(first, last + 1)
    ] or [0]
    shares[shares.index(max(shares))] += 4096 - sum(shares)
    return Context(first_exponent, first, shares)


def table(contexts: Sequence[Context]) -> bytes:
    return bytes([len(contexts)]) + b"".join(each.stream() for each in contexts)


def words_of_tokens(
    coded: Sequence[tuple[int, int]],
    contexts: Sequence[Context],
    end: Sequence[int] = (LOWEST,) * 4,
) -> list[int]:
    """coded: exponent and token of each element. end: the states in which a decoder shall end."""
    states, words = list(end), []
    for number in reversed(range(len(coded))):
        where, what = coded[number]
        here = [each for each in contexts if each.first_exponent <= where][-1]
        index = what - here.first_token
        share, start = here.shares[index], sum(here.shares[:index])
        state = states[number % 4]
        if state >= share << 20:
            words.append(state % LOWEST)
            state //= LOWEST
        states[number % 4] = state // share * 4096 + state % share + start
    heads = [half for state in states for half in (state % LOWEST, state // LOWEST)]
    return [*heads, *reversed(words)]


def word_bytes(words: Iterable[int]) -> bytes:
    return b"".join(little(word, 2) for word in words)


def contexts_for(coded: Sequence[tuple[int, int]], firsts: Sequence[int]) -> list[Context]:
    """firsts: the first exponent of each context."""
    ends = [*firsts[1:], 256]
    return [
        context(first, [t for e, t in coded if first <= e < end])
        for first, end in zip(firsts, ends, strict=True)
    ]


@dataclass
class Distances:
    """What a chunk's planes are made of; every field can be set to what it should not be."""

    coded: list[tuple[int, int]]  # exponent and token of each kept element
    contexts: list[Context]
    low: bytes
    end: Sequence[int] = (LOWEST,) * 4

    def planes(self, width: int) -> list[bytes]:
        words = words_of_tokens(self.coded, self.contexts, self.end)
        tokens = table(self.contexts) + word_bytes(words)
        return [tokens, self.low, *[b""] * (width - 2)]


def distances_of(
    before: Sequence[int], after: Sequence[int], dtype: int, firsts: Sequence[int] = (0,)
) -> Distances:
    """Of the elements that differ."""
    bits = 8 * next(width for code, width in DTYPES.values() if code == dtype)
    kept = [(b, v) for b, v in zip(before, after, strict=True) if b != v]
    found = [payload_word(ULP, b, v, bits) + 1 for b, v in kept]
    coded = [(exponent_of(b, dtype), token(z)) for (b, _), z in zip(kept, found, strict=True)]
    return Distances(coded, contexts_for(coded, firsts), low_bits(found))


def moved(word: int, distance: int, bits: int) -> int:
    """The word that is so far from another, in the order of section 6; odd distances lead down."""
    low = (1 << (bits - 1)) - 1
    ordered = word ^ low if word > low else word
    step = -(distance + 1) // 2 if distance % 2 else distance // 2
    ordered = (ordered + step) % (1 << bits)
    return ordered ^ low if ordered > low else ordered


def coded_ulp(
    name: str,
    bases: list[Base],
    index: int,
    changes: dict[int, int],
    *,
    firsts: Sequence[int] = (0,),
    chunk_log2: int = 10,
    change: Callable[[int, Distances], Distances] = lambda number, given: given,
    **options: object,
) -> Entry:
    """The base tensor with some words changed. change: what is done to each chunk's distances."""
    entry = delta(name, bases, index, changes, codec=ULP, chunk_log2=chunk_log2, **options)  # type: ignore[arg-type]
    base = bases[index]
    before = words_of(base)
    after = words_of(replace(base, data=entry.data))
    width = next(width for code, width in DTYPES.values() if code == base.dtype)
    for number, chunk in enumerate(entry.chunks):
        part = slice(number << chunk_log2, (number + 1) << chunk_log2)
        given = distances_of(before[part], after[part], base.dtype, firsts)
        chunk.planes_zstd = 0
        chunk.planes = (
            [b""] * width if chunk.codec == EMPTY else change(number, given).planes(width)
        )
    return replace(entry, codec=CODED_ULP)


def expanding_chunk(kept: int, tokens: int, width: int) -> Chunk:
    """A chunk of which all are kept, in so many bytes of tokens, which mean nothing."""
    return Chunk(b"", 0, kept, 1, 0, [bytes(tokens), b"", *[b""] * (width - 2)], 0)
