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

_BLOCK = 1024  # distances whose tokens are held at once: in the nearest cache; a multiple of 4
_REFILL = 8  # bytes of low bits looked at at once

Distances = npt.NDArray[np.uint32]
Positions = npt.NDArray[np.uint32]
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
    low = np.empty(most_low_bytes(4, distances.size) // 8 + 1, np.uint64)
    bits: int = _tokenise(distances, exponents, tokens, counts, low)
    context_of = np.empty(_EXPONENTS, np.uint8)
    shares = _normalised(_merged(counts, context_of))
    words = np.empty(2 * distances.size + 2 * _STATES, np.uint16)
    first = _encode(tokens, exponents, context_of, shares, words)
    table = np.empty(most_token_bytes(0), np.uint8)
    coded = table[: _write_table(context_of, shares, table)].tobytes()
    low_bytes = low.astype("<u8").view(np.uint8)[: (bits + 7) // 8]
    return coded + words[first:].astype("<u2").tobytes(), low_bytes.tobytes()


def distances_of(
    base: Words, new: Words, positions: Positions, dtype: DType
) -> tuple[Distances, Exponents]:
    """How far kept words lie apart, and the base's exponents there.

    base, new: [n], different at ``positions``, [nnz] -> [nnz], [nnz].
    """
    distances, exponents = np.empty(positions.size, np.uint32), np.empty(positions.size, np.uint8)
    _measure(base, new, positions, MANTISSA_BITS[dtype.name], distances, exponents)
    return distances, exponents


def apply_distances(
    stream: bytes, low: bytes, positions: Positions | None, words: Words, dtype: DType
) -> None:
    """Undo :func:`encode_distances`, and move each kept word by its distance.

    positions: [nnz], ascending, or None for all; words: [n], the base's, changed in place, and
    worth nothing where this fails.

    Raises:
        FormatError: P-TABLE, P-CODE, P-TAIL.
    """
    if positions is None:
        positions = np.arange(words.size, dtype=np.uint32)
    if not positions.size:
        return
    context_of, shares, at = read_table(stream, dtype.itemsize)
    coded = np.frombuffer(stream[at:], "<u2")  # aligned, so that one compiled loop does
    bits = np.frombuffer(low + bytes(_REFILL), np.uint8)
    mantissa = MANTISSA_BITS[dtype.name]
    status: int = _apply(coded, bits, context_of, shares, positions, words, mantissa)
    if status != _OK:
        raise FormatError(*_FAULTS[status])


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


@jit
def _write_table(context_of, shares, out):  # type: ignore[no-untyped-def]
    """The number of contexts; of each its first exponent, first token, tokens, and shares."""
    out[0] = shares.shape[0]
    at, exponent = 1, 0
    for context in range(shares.shape[0]):
        while context_of[exponent] != context:
            exponent += 1
        first, last = 0, _TOKENS - 1
        while shares[context, first] == 0:
            first += 1
        while shares[context, last] == 0:
            last -= 1
        out[at], out[at + 1], out[at + 2] = exponent, first, last - first + 1
        at += 3
        for token in range(first, last + 1):
            out[at] = shares[context, token] & 0xFF
            out[at + 1] = shares[context, token] >> 8
            at += 2
    return at


@jit
def _measure(base, new, positions, mantissa, distances, exponents):  # type: ignore[no-untyped-def]
    # Words as signed integers in the order of the floats: a negative one has its other bits turned.
    width = np.int64(8 * base.itemsize)
    unused = np.int64(64) - width
    others = (np.int64(1) << (width - np.int64(1))) - np.int64(1)
    field = (np.int64(1) << (width - np.int64(1) - mantissa)) - np.int64(1)
    for i in range(positions.size):
        position = positions[i]
        before = np.int64(base[position]) << unused >> unused
        after = np.int64(new[position]) << unused >> unused
        exponents[i] = (before >> mantissa) & field
        before ^= (before >> np.int64(63)) & others
        after ^= (after >> np.int64(63)) & others
        difference = (after - before) << unused >> unused
        distances[i] = (difference << np.int64(1)) ^ (difference >> np.int64(63))


@jit
def _tokenise(distances, exponents, tokens, counts, low):  # type: ignore[no-untyped-def]
    """Fill tokens [n], their counts by exponent, and the low bits; returns how many of these."""
    held = np.uint64(0)
    have = np.uint64(0)
    at = 0
    for i in range(distances.size):
        distance = np.uint64(distances[i])
        # The exponent of a float64 counts the bits below the leading one.
        below = (np.float64(distance).view(np.uint64) >> np.uint64(52)) - np.uint64(1023)
        rest = max(below, np.uint64(1)) - np.uint64(1)
        token = np.uint64(2) * below + ((distance >> rest) & np.uint64(1))
        token = token if distance > 1 else np.uint64(0)
        bits = distance & ((np.uint64(1) << rest) - np.uint64(1))
        held |= bits << have
        have += rest
        if have >= 64:
            low[at] = held
            at += 1
            have -= np.uint64(64)
            held = bits >> (rest - have)
        tokens[i] = token
        counts[exponents[i], token] += 1
    low[at] = held
    return 64 * at + np.int64(have)


@jit
def _encode(tokens, exponents, context_of, shares, words):  # type: ignore[no-untyped-def]
    """Fill ``words`` from its end; returns where they begin."""
    # Of each token in a context its share, and above that its start.
    table = np.empty(shares.shape[0] * _TOKENS, np.uint32)
    for context in range(shares.shape[0]):
        start = np.int64(0)
        for token in range(_TOKENS):
            table[context * _TOKENS + token] = shares[context, token] | (start << np.int64(16))
            start += shares[context, token]
    states = np.full(_STATES, np.uint32(1) << np.uint32(16))
    at = words.size
    for i in range(tokens.size - 1, -1, -1):
        entry = table[np.uint32(context_of[exponents[i]]) * np.uint32(_TOKENS) + tokens[i]]
        share = entry & np.uint32(0xFFFF)
        state = states[i & (_STATES - 1)]
        # Without a branch: what is not taken is written over by the next one that is.
        words[at - 1] = np.uint16(state & np.uint32(0xFFFF))
        full = np.uint64(state) >= np.uint64(share) << np.uint64(32 - _SHARE_BITS)
        state = state >> np.uint32(16) if full else state
        at -= np.int64(full)
        whole = state // share
        states[i & (_STATES - 1)] = (
            (whole << np.uint32(_SHARE_BITS)) + (state - whole * share) + (entry >> np.uint32(16))
        )
    for number in range(_STATES - 1, -1, -1):
        at -= 2
        words[at] = np.uint16(states[number] & np.uint32(0xFFFF))
        words[at + 1] = np.uint16(states[number] >> np.uint32(16))
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
def _slots(context_of, shares):  # type: ignore[no-untyped-def]
    """Of each remainder in a context: token, the token's share, and how far into that it lies."""
    contexts = np.int64(context_of[_EXPONENTS - 1]) + 1
    slots = np.empty(contexts << _SHARE_BITS, np.uint32)
    at = 0
    for context in range(contexts):
        for token in range(_TOKENS):
            share = np.uint32(shares[context, token])
            for offset in range(share):
                slots[at] = (
                    np.uint32(token)
                    | (share << np.uint32(6))
                    | (np.uint32(offset) << np.uint32(19))
                )
                at += 1
    return slots


@jit
def _next(slot, state, words, at):  # type: ignore[no-untyped-def]
    """A state past one token, and how many words were taken.

    Without a branch, which would often be guessed wrong. Past the last word any one does: that
    there were too few is seen before anything comes of it.
    """
    share = (slot >> np.uint32(6)) & np.uint32(0x1FFF)
    state = share * (state >> np.uint32(_SHARE_BITS)) + (slot >> np.uint32(19))
    short = state >> np.uint32(16) == 0
    word = np.uint32(words[min(at, np.uint64(words.size - 1))])
    return (state << np.uint32(16)) | word if short else state, at + np.uint64(short)


@jit
def _apply(words, low, context_of, shares, positions, out, mantissa):  # type: ignore[no-untyped-def]
    slots = _slots(context_of, shares)
    first_slot = np.empty(_EXPONENTS, np.uint32)
    for exponent in range(_EXPONENTS):
        first_slot[exponent] = np.uint32(context_of[exponent]) << np.uint32(_SHARE_BITS)
    states = np.empty(_STATES, np.uint32)
    for number in range(_STATES):
        states[number] = np.uint32(words[2 * number]) | (
            np.uint32(words[2 * number + 1]) << np.uint32(16)
        )
        if states[number] >> np.uint32(16) == 0:
            return _ENDS_LATE
    remainder = np.uint32((1 << _SHARE_BITS) - 1)
    top = np.uint32(8 * out.itemsize - 1)
    exponents = np.uint32((np.uint32(1) << (top - np.uint32(mantissa))) - np.uint32(1))
    others = np.int64((np.int64(1) << np.int64(top)) - np.int64(1))
    unused = np.int64(63) - np.int64(top)
    next_word = np.uint64(2 * _STATES)
    held, have, next_low = np.uint64(0), np.uint64(0), np.uint64(0)
    last_low = np.uint64(low.size - _REFILL)
    tokens, slot_of = np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint32)
    for start in range(0, positions.size, _BLOCK):
        here = positions[start : start + _BLOCK]
        for i in range(here.size):
            word = np.uint32(out[here[i]])
            slot_of[i] = first_slot[(word >> np.uint32(mantissa)) & exponents]
        s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
        for i in range(0, here.size - 3, 4):
            slot = slots[slot_of[i] | (s0 & remainder)]
            tokens[i] = slot & np.uint32(63)
            s0, next_word = _next(slot, s0, words, next_word)
            slot = slots[slot_of[i + 1] | (s1 & remainder)]
            tokens[i + 1] = slot & np.uint32(63)
            s1, next_word = _next(slot, s1, words, next_word)
            slot = slots[slot_of[i + 2] | (s2 & remainder)]
            tokens[i + 2] = slot & np.uint32(63)
            s2, next_word = _next(slot, s2, words, next_word)
            slot = slots[slot_of[i + 3] | (s3 & remainder)]
            tokens[i + 3] = slot & np.uint32(63)
            s3, next_word = _next(slot, s3, words, next_word)
        states[0], states[1], states[2], states[3] = s0, s1, s2, s3
        for i in range(here.size // 4 * 4, here.size):
            slot = slots[slot_of[i] | (states[i % 4] & remainder)]
            tokens[i] = slot & np.uint32(63)
            states[i % 4], next_word = _next(slot, states[i % 4], words, next_word)
        for i in range(here.size):
            # At least 56 bits are held then, more than a distance has.
            at = min(next_low, last_low)
            eight = np.uint64(0)
            for k in range(_REFILL):
                eight |= np.uint64(low[at + np.uint64(k)]) << np.uint64(8 * k)
            held |= eight << have
            next_low += (np.uint64(63) - have) >> np.uint64(3)
            have |= np.uint64(56)
            coded = np.uint64(tokens[i])
            rest = max(coded >> np.uint64(1), np.uint64(1)) - np.uint64(1)
            distance = np.uint64(2 + (coded & np.uint64(1))) << rest
            distance |= held & ((np.uint64(1) << rest) - np.uint64(1))
            distance = distance if coded else np.uint64(1)
            held >>= rest
            have -= rest
            # Words as signed integers in the order of the floats: a negative one has its other
            # bits turned.
            steps = np.int64(distance >> np.uint64(1)) ^ -np.int64(distance & np.uint64(1))
            moved = np.int64(out[here[i]]) << unused >> unused
            moved ^= (moved >> np.int64(63)) & others
            moved = (moved + steps) << unused >> unused
            moved ^= (moved >> np.int64(63)) & others
            out[here[i]] = moved
    if next_word > np.uint64(words.size):
        return _ENDS_EARLY
    if next_word != np.uint64(words.size):
        return _ENDS_LATE
    for number in range(_STATES):
        if states[number] != np.uint32(1) << np.uint32(16):
            return _ENDS_LATE
    taken = np.uint64(8) * next_low - have  # bits
    return _BAD_BITS if (taken + np.uint64(7)) >> np.uint64(3) != last_low or held else _OK
