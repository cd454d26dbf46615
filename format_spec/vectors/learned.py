"""Masks in the codec *learned*: odds of rows and columns, contexts, decisions.

Written from SPEC.md with Python's integers alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from grids import LOWEST, Chance, Decisions, coded_words
from parts import EMPTY, FULL, LEARNED, Base, Chunk, Entry, little, words_of


def twice_log2(value: int) -> int:
    below = value.bit_length() - 1
    return 2 * below + (value >> (below - 1) & 1 if below else 0)


def odds(chance: int) -> int:
    bucket = chance >> 20
    return twice_log2(bucket + 1) - twice_log2(4096 - bucket)


def moved(chance: int, bit: int, count: int) -> int:
    goal = 0xFFFFFFFF if bit else 0
    return chance + ((goal - chance) * ((1 << 16) // (min(count, 511) + 16)) >> 16)


def decisions_of(
    kept: Collection[int], numel: int, start: int, columns: int, nnz: int | None = None
) -> Decisions:
    """kept: numbers within the chunk, whose first element is number ``start`` of the tensor.

    nnz: what the chunk's record says, where that is wrong.
    """
    return [each[:2] for each in _traced(kept, numel, start, columns, nnz)]


def contexts_of(kept: Collection[int], numel: int, start: int, columns: int) -> list[int]:
    return [each[2] for each in _traced(kept, numel, start, columns)]


def _traced(
    kept: Collection[int], numel: int, start: int, columns: int, nnz: int | None = None
) -> list[tuple[int, int, int]]:
    """Of each element whether it is kept, the share of 1, and the context."""
    prior = ((len(kept) if nnz is None else nnz) << 32) // numel
    kept = set(kept)
    chances = [Chance() for _ in range(64)]
    of_column = [prior] * min(columns, numel)
    of_row, in_row, out = prior, 0, []
    for i in range(numel):
        if (start + i) % columns == 0:
            of_row, in_row = prior, 0
        column, bit = i % columns, int(i in kept)
        context = odds(of_row) + odds(of_column[column]) - odds(prior) + 32
        context = min(max(context, 0), 63)
        out.append((bit, chances[context].share(), context))
        chances[context].learn(bit)
        of_row = moved(of_row, bit, in_row)
        of_column[column] = moved(of_column[column], bit, i // columns)
        in_row += 1
    return out


def learned_stream(decisions: Decisions, state: int = LOWEST) -> bytes:
    """state: that in which a decoder shall end."""
    return b"".join(little(word, 4) for word in coded_words(decisions, state))


def columns_of(entry: Entry) -> int:
    return math.prod(entry.shape[1:]) if len(entry.shape) > 1 else math.prod(entry.shape)


def kept_of(entry: Entry, base: Base, number: int) -> list[int]:
    """What is kept of a chunk, where that is what differs from the base."""
    part = slice(number << entry.chunk_log2, (number + 1) << entry.chunk_log2)
    after = words_of(replace(base, data=entry.data))[part]
    return [i for i, word in enumerate(words_of(base)[part]) if word != after[i]]


def with_learned_masks(entry: Entry, base: Base, chunks: Collection[int] | None = None) -> Entry:
    """The tensor with the masks of these chunks, or of all, in this codec."""
    size, width = 1 << entry.chunk_log2, len(base.data) // max(math.prod(entry.shape), 1)
    for number, chunk in enumerate(entry.chunks):
        if chunk.codec in (EMPTY, FULL) or (chunks is not None and number not in chunks):
            continue
        kept, start = kept_of(entry, base, number), number * size
        assert len(kept) == chunk.nnz
        numel = min(size, len(base.data) // width - start)
        stream = learned_stream(decisions_of(kept, numel, start, columns_of(entry)))
        set_mask(chunk, stream)
    return entry


def set_mask(chunk: Chunk, stream: bytes) -> None:
    chunk.mask, chunk.mask_raw, chunk.mask_zstd, chunk.codec = stream, len(stream), 0, LEARNED
