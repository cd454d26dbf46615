"""Distances between floats to nearly as few bytes as their distribution allows, and back.

How many floats lie between a weight and its fine-tuned value depends on the weight's exponent: a
change of one size is many steps of a small number and few of a large one. So the leading bits of
each distance are coded by the frequencies of its exponent (range variant of asymmetric numeral
systems, Duda, arXiv 1311.2540; four interleaved states), the others, which are even, as they are.
Defined bit by bit in format_spec/SPEC.md. Decoding treats every stream as hostile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit
from nps_compress.dtypes import DType, Words
from nps_compress.errors import FormatError

# Mantissa bits of the dtypes whose weights have exponents.
MANTISSA_BITS = {"F16": 10, "BF16": 7, "F32": 23}
MAX_CONTEXTS = 64
_TOKENS, _SHARE_BITS, _STATES = 64, 12, 4
_EXPONENTS = 256
_SMALLEST_CONTEXT = 3 + 2  # bytes of one that has one token
# A context's frequencies take some 20 bytes: with fewer distances than this they don't pay.
_LEAST_OF_A_CONTEXT = 256
LEAST_TOKEN_BYTES = 1 + _SMALLEST_CONTEXT + 4 * _STATES  # and no words

Distances = npt.NDArray[np.uint32]
Exponents = npt.NDArray[np.uint8]
Bytes = npt.NDArray[np.uint8]

_OK, _BAD_TABLE, _ENDS_EARLY, _ENDS_LATE, _BAD_BITS = range(5)
_FAULTS = {
    _BAD_TABLE: ("P-TABLE", "the frequencies of the distances make no sense"),
    _ENDS_EARLY: ("P-CODE", "the distances end before all are decoded"),
    _ENDS_LATE: ("P-CODE", "the distances don't end where they should"),
    _BAD_BITS: ("P-TAIL", "the distances' low bits don't end where they should"),
}


def most_token_bytes(nnz: Any) -> Any:
    """The most bytes that the tokens of so many distances take; an int or an int64 array."""
    return 1 + MAX_CONTEXTS * (3 + 2 * _TOKENS) + 4 * _STATES + 2 * nnz


def most_low_bytes(itemsize: Any, nnz: Any) -> Any:
    """The most bytes that the low bits of so many distances take."""
    return -(-nnz * (8 * itemsize - 2) // 8)


def table_work(token_bytes: Any) -> Any:
    """What reading the shares counts as, in bytes: 512 for each context that these may hold.

    Beside what elements count as, it is less than the format allows for so many bytes, since no
    share that is written is much over 7/8.
    """
    room = (token_bytes - LEAST_TOKEN_BYTES) // _SMALLEST_CONTEXT + 1
    return 512 * np.clip(room, 0, MAX_CONTEXTS)


def exponents_of(words: Words, dtype: DType) -> Exponents:
    """The exponent fields of F16, BF16 or F32 words. words: [n] -> [n]."""
    shifted = words >> dtype.word.type(MANTISSA_BITS[dtype.name])
    return shifted.astype(np.uint8) & np.uint8(0x1F if dtype.name == "F16" else 0xFF)


def encode_distances(distances: Distances, exponents: Exponents) -> tuple[bytes, bytes]:
    """Tokens, and low bits. distances: [nnz], at least 1; exponents: [nnz], of the base's words."""
    counts = np.zeros((_EXPONENTS, _TOKENS), np.int64)
    tokens = np.empty(distances.size, np.uint8)
    low = np.zeros(most_low_bytes(4, distances.size) + 8, np.uint8)
    used = _tokenise(distances, exponents, tokens, counts, low)
    context_of = np.empty(_EXPONENTS, np.uint8)
    shares = _normalised(_merged(counts, context_of))
    words = np.empty(2 * distances.size + 2 * _STATES, np.uint16)
    first = _encode(tokens, exponents, context_of, shares, words)
    return _table(context_of, shares) + words[first:].astype("<u2").tobytes(), low[:used].tobytes()


def decode_distances(
    stream: bytes, low: bytes, exponents: Exponents, itemsize: int = 4
) -> Distances:
    """Undo :func:`encode_distances`: none takes more bits than an element of ``itemsize`` bytes.

    Raises:
        FormatError: P-TABLE, P-CODE, P-TAIL.
    """
    context_of, shares, at = read_table(stream, itemsize)
    words = np.frombuffer(stream[at:], "<u2")  # aligned, so that one compiled loop does
    out = np.empty(exponents.size, np.uint32)
    bits = np.frombuffer(low, np.uint8)
    status: int = _decode(words, bits, exponents, context_of, shares, out)
    if status != _OK:
        raise FormatError(*_FAULTS[status])
    return out


def read_table(stream: bytes, itemsize: int) -> tuple[Bytes, npt.NDArray[np.int64], int]:
    """What needs no base: contexts of exponents, [256]; their shares; where the words begin.

    Raises:
        FormatError: P-TABLE.
    """
    data = np.frombuffer(stream, np.uint8)
    context_of, shares = np.zeros(_EXPONENTS, np.uint8), np.zeros((MAX_CONTEXTS, _TOKENS), np.int64)
    at = _read_table(data, 16 * itemsize, context_of, shares)
    if at < 0 or (data.size - at) % 2 or data.size - at < 4 * _STATES:
        raise FormatError(*_FAULTS[_BAD_TABLE])
    return context_of, shares, at


@jit
def _merged(counts, context_of):  # type: ignore[no-untyped-def]
    """Neighbouring exponents together until each context has enough.

    counts: [exponents, tokens]; context_of: [exponents], written -> [contexts, tokens].
    """
    totals = counts.sum(axis=1)
    left = totals.sum()
    least = max(_LEAST_OF_A_CONTEXT, left // MAX_CONTEXTS)
    context, have = 0, np.int64(0)
    merged = np.zeros((MAX_CONTEXTS, _TOKENS), np.int64)
    for exponent in range(_EXPONENTS):
        if have >= least and left >= least:
            context += 1
            have = np.int64(0)
        context_of[exponent] = context
        if totals[exponent]:
            merged[context] += counts[exponent]
            have += totals[exponent]
            left -= totals[exponent]
    return merged[: context + 1]


@jit
def _normalised(counts):  # type: ignore[no-untyped-def]
    """Shares that sum to 2^12 in each context, none of what occurs 0. [contexts, tokens].

    None is over 7/8 either, so that no stream decodes to more than a file may hold for its bytes.
    """
    whole = np.int64(1) << _SHARE_BITS
    shares = np.zeros_like(counts)
    for context in range(counts.shape[0]):
        total = counts[context].sum()
        if 8 * counts[context].max() > 7 * total:
            other = 2 if counts[context, 0] > counts[context, 2] else 0
            more = total // 7 + 1
            counts[context, other] += more
            total += more
        left = whole
        for token in range(counts.shape[1]):
            if counts[context, token]:
                share = max(np.int64(1), counts[context, token] * whole // total)
                shares[context, token] = share
                left -= share
        # What rounding left over, or took too much of, is least felt by the largest.
        while left:
            largest = np.argmax(shares[context])
            step = max(left, -(shares[context, largest] // 2))
            shares[context, largest] += step
            left -= step
    return shares


def _table(context_of: npt.NDArray[np.uint8], shares: npt.NDArray[np.int64]) -> bytes:
    """The number of contexts; of each its first exponent, first token, tokens, and shares."""
    parts = [bytes([len(shares)])]
    for context, share in enumerate(shares):
        there = np.flatnonzero(share)
        first, last = int(there[0]), int(there[-1])
        start = int(np.searchsorted(context_of, context))
        parts.append(bytes([start, first, last - first + 1]))
        parts.append(share[first : last + 1].astype("<u2").tobytes())
    return b"".join(parts)


@jit
def _tokenise(distances, exponents, tokens, counts, low):  # type: ignore[no-untyped-def]
    """Fill tokens [n], their counts by exponent, and the low bits; returns the bytes of these."""
    held = np.uint64(0)
    have = np.uint64(0)
    at = 0
    for i in range(distances.size):
        distance = np.uint64(distances[i])
        token = np.uint64(0)
        if distance > 1:
            # The exponent of a float64 counts the bits below the leading one.
            below = (np.float64(distance).view(np.uint64) >> np.uint64(52)) - np.uint64(1023)
            rest = below - np.uint64(1)
            token = np.uint64(2) * below + ((distance >> rest) & np.uint64(1))
            held |= (distance & ((np.uint64(1) << rest) - np.uint64(1))) << have
            have += rest
            while have >= 8:
                low[at] = np.uint8(held & np.uint64(0xFF))
                held >>= np.uint64(8)
                have -= np.uint64(8)
                at += 1
        tokens[i] = token
        counts[exponents[i], token] += 1
    if have > 0:
        low[at] = np.uint8(held)
        at += 1
    return at


@jit
def _encode(tokens, exponents, context_of, shares, words):  # type: ignore[no-untyped-def]
    """Fill ``words`` from its end; returns where they begin."""
    starts = np.zeros(shares.shape, np.uint64)
    for context in range(shares.shape[0]):
        for token in range(1, shares.shape[1]):
            starts[context, token] = starts[context, token - 1] + np.uint64(
                shares[context, token - 1]
            )
    states = np.full(_STATES, np.uint64(1) << np.uint64(16))
    at = words.size
    for i in range(tokens.size - 1, -1, -1):
        context, token = context_of[exponents[i]], tokens[i]
        share = np.uint64(shares[context, token])
        state = states[i & (_STATES - 1)]
        if state >= share << np.uint64(32 - _SHARE_BITS):
            at -= 1
            words[at] = np.uint16(state & np.uint64(0xFFFF))
            state >>= np.uint64(16)
        whole = np.uint64(np.uint32(state) // np.uint32(share))
        rest = state - whole * share
        states[i & (_STATES - 1)] = (
            (whole << np.uint64(_SHARE_BITS)) + rest + starts[context, token]
        )
    for number in range(_STATES - 1, -1, -1):
        at -= 2
        words[at] = np.uint16(states[number] & np.uint64(0xFFFF))
        words[at + 1] = np.uint16(states[number] >> np.uint64(16))
    return at


@jit
def _read_table(data, tokens, context_of, shares):  # type: ignore[no-untyped-def]
    """Undo :func:`_table`, tokens being below ``tokens``; returns its bytes, or -1."""
    if data.size < 1 or not 1 <= data[0] <= MAX_CONTEXTS:
        return -1
    at = 1
    previous = -1
    for context in range(data[0]):
        if data.size < at + 3:
            return -1
        start, first, count = int(data[at]), int(data[at + 1]), int(data[at + 2])
        at += 3
        if (context == 0 and start != 0) or start <= previous or count < 1:
            return -1
        if first + count > tokens or data.size < at + 2 * count:
            return -1
        previous = start
        total = 0
        for token in range(first, first + count):
            share = int(data[at]) + 256 * int(data[at + 1])
            at += 2
            shares[context, token] = share
            total += share
        if total != 1 << _SHARE_BITS or shares[context, first] == 0 or shares[context, 1]:
            return -1
        if shares[context, first + count - 1] == 0:
            return -1
        for exponent in range(start, _EXPONENTS):
            context_of[exponent] = context
    return at


@jit
def _decode(words, low, exponents, context_of, shares, out):  # type: ignore[no-untyped-def]
    # Of each slot of a context: its token, the token's share, and how far into that it lies.
    contexts = np.int64(context_of[_EXPONENTS - 1]) + 1
    slots = np.empty((contexts, 1 << _SHARE_BITS), np.uint32)
    for context in range(contexts):
        at = 0
        for token in range(_TOKENS):
            share = np.uint32(shares[context, token])
            for offset in range(share):
                slots[context, at] = (
                    np.uint32(token)
                    | (share << np.uint32(6))
                    | (np.uint32(offset) << np.uint32(19))
                )
                at += 1
    states = np.empty(_STATES, np.uint32)
    for number in range(_STATES):
        states[number] = np.uint32(words[2 * number]) | (
            np.uint32(words[2 * number + 1]) << np.uint32(16)
        )
        if states[number] >> np.uint32(16) == 0:
            return _ENDS_LATE
    next_word = 2 * _STATES
    held = np.uint64(0)
    have = np.uint64(0)
    next_low = 0
    for i in range(exponents.size):
        state = states[i & (_STATES - 1)]
        slot = slots[context_of[exponents[i]], state & np.uint32((1 << _SHARE_BITS) - 1)]
        share = (slot >> np.uint32(6)) & np.uint32(0x1FFF)
        state = share * (state >> np.uint32(_SHARE_BITS)) + (slot >> np.uint32(19))
        # Without a branch, which would often be guessed wrong. Past the last word any one does:
        # that there were too few is seen before anything comes of it.
        short = state >> np.uint32(16) == 0
        word = np.uint32(words[min(next_word, words.size - 1)])
        state = (state << np.uint32(16)) | word if short else state
        next_word += int(short)
        states[i & (_STATES - 1)] = state
        coded = np.uint64(slot & np.uint32(63))
        rest = max(coded >> np.uint64(1), np.uint64(1)) - np.uint64(1)
        if have < rest:
            while have <= 48 and next_low < low.size:
                held |= np.uint64(low[next_low]) << have
                next_low += 1
                have += np.uint64(8)
            if have < rest:
                return _ENDS_EARLY if next_word > words.size else _BAD_BITS
        value = np.uint64(2 + (coded & np.uint64(1))) << rest
        value |= held & ((np.uint64(1) << rest) - np.uint64(1))
        out[i] = np.uint32(value) if coded else np.uint32(1)
        held >>= rest
        have -= rest
    if next_word > words.size:
        return _ENDS_EARLY
    if next_low != low.size or have >= 8 or held:
        return _BAD_BITS
    if next_word != words.size:
        return _ENDS_LATE
    for number in range(_STATES):
        if states[number] != np.uint32(1) << np.uint32(16):
            return _ENDS_LATE
    return _OK
