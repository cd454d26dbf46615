"""Small integers to nearly as few bytes as their distribution allows, and back.

Each magnitude becomes binary decisions: whether its bit length exceeds 0, 1, 2, ..., then its bits
below the leading one. The chances of the lengths, and of the first two bits after the leading one,
are learned as coding goes on, apart for each *context*, which both sides know from elsewhere;
further bits are taken to be even. The range variant of asymmetric numeral systems (Duda, arXiv
1311.2540) turns decisions into bytes. Defined bit by bit in format_spec/SPEC.md. Decoding treats
every stream as hostile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit

CONTEXTS = 64
MAX_MAGNITUDE = (1 << 15) - 1
_LENGTHS = MAX_MAGNITUDE.bit_length()
STATE_BYTES, WORD_BYTES = 8, 4

OK, ENDS_EARLY, ENDS_LATE, MISCOUNTED = range(4)

# How far a decision moves a chance that n others have moved, in units of 2^-16: 1 / (n + 1.5).
_RATES = np.array([(1 << 17) // (2 * n + 3) for n in range(512)], np.int64)
EVEN = np.int64(1 << 31)
_LEARNED_BELOW = 4  # a bit's chance is learned where those above it, from the leading one, are less
# A context's chances: of more, by length so far; from here on of a next bit, by length and the
# bits above it.
_BITS = _LENGTHS + 1
_LEARNED = _BITS + _LEARNED_BELOW * (_LENGTHS + 1)


def stream_bytes_range(numel: Any) -> tuple[int, Any]:
    """The least and most bytes of a stream of so many magnitudes; an int or an int64 array."""
    return STATE_BYTES, STATE_BYTES + WORD_BYTES * _LENGTHS * numel


def encode_magnitudes(magnitudes: npt.NDArray[np.int16], contexts: npt.NDArray[np.int8]) -> bytes:
    """The stream. magnitudes: [n], up to MAX_MAGNITUDE; contexts: [n], below CONTEXTS, or negative
    where nothing is coded."""
    lengths = int(np.frexp(np.float32(magnitudes.max(initial=0)))[1])
    decisions = np.empty(int((contexts >= 0).sum()) * (2 * lengths + 1), np.uint32)
    made = _decide(magnitudes, contexts, decisions)
    return encode_decisions(decisions[:made])


def decode_magnitudes(
    stream: bytes,
    contexts: npt.NDArray[np.int8],
    positions: npt.NDArray[np.uint32],
    magnitudes: npt.NDArray[np.int16],
) -> int:
    """Undo :func:`encode_magnitudes` for those that are not 0.

    positions, magnitudes: [nnz], written. -> OK, or what is wrong with the stream.
    """
    words = np.frombuffer(stream, "<u4").astype(np.uint32)
    status: int = _decode(words, contexts, positions, magnitudes)
    return status


def encode_decisions(decisions: npt.NDArray[np.uint32]) -> bytes:
    """The stream. decisions: [n], each 2 * (share of a 1, in units of 2^-16) + (the bit)."""
    words = np.empty(decisions.size // 2 + 3, np.uint32)
    first = _encode(decisions, words)
    return words[first:].astype("<u4").tobytes()


@jit
def learn(chances, seen, at, bit):  # type: ignore[no-untyped-def]
    """Move the chance of a 1, in units of 2^-32, towards what was seen."""
    target = np.int64(4294967295) if bit else np.int64(0)
    chances[at] += ((target - chances[at]) * _RATES[seen[at]]) >> np.int64(16)
    if seen[at] < _RATES.size - 1:
        seen[at] += 1


@jit
def share_of(chance):  # type: ignore[no-untyped-def]
    """A chance in units of 2^-16, at least one of them on either side."""
    return min(max(chance >> np.int64(16), np.int64(1)), np.int64(65535))


@jit
def _decide(magnitudes, contexts, decisions):  # type: ignore[no-untyped-def]
    """Each decision as 2 * (share of a 1) + (what was decided)."""
    chances = np.full(CONTEXTS * _LEARNED, EVEN)
    seen = np.zeros(chances.size, np.int64)
    made = 0
    for i in range(magnitudes.size):
        if contexts[i] < 0:
            continue
        at = np.int64(contexts[i]) * _LEARNED
        magnitude = np.int64(magnitudes[i])
        length = 0
        while length < _LENGTHS:
            longer = np.int64((magnitude >> length) != 0)
            decisions[made] = np.uint32(2 * share_of(chances[at + length]) + longer)
            made += 1
            learn(chances, seen, at + length, longer)
            if not longer:
                break
            length += 1
        at += _BITS + _LEARNED_BELOW * length
        for below in range(length - 2, -1, -1):
            bit = (magnitude >> below) & 1
            above = magnitude >> (below + 1)
            share = np.int64(32768)
            if above < _LEARNED_BELOW:
                share = share_of(chances[at + above])
                learn(chances, seen, at + above, bit)
            decisions[made] = np.uint32(2 * share + bit)
            made += 1
    return made


@jit
def _encode(decisions, words):  # type: ignore[no-untyped-def]
    """Fill ``words`` from its end; returns where they begin."""
    state = np.uint64(1) << np.uint64(32)
    at = words.size
    for i in range(decisions.size - 1, -1, -1):
        share = np.uint64(decisions[i] >> np.uint32(1))
        below = np.uint64(0)
        if (decisions[i] & np.uint32(1)) == 0:
            below = share
            share = np.uint64(65536) - share
        if state >> np.uint64(48) >= share:
            at -= 1
            words[at] = np.uint32(state & np.uint64(0xFFFFFFFF))
            state >>= np.uint64(32)
        whole = state // share
        state = (whole << np.uint64(16)) + (state - whole * share) + below
    words[at - 1] = np.uint32(state >> np.uint64(32))
    words[at - 2] = np.uint32(state & np.uint64(0xFFFFFFFF))
    return at - 2


@jit
def _decode(words, contexts, positions, magnitudes):  # type: ignore[no-untyped-def]
    chances = np.full(CONTEXTS * _LEARNED, EVEN)
    seen = np.zeros(chances.size, np.int64)
    state = (np.uint64(words[1]) << np.uint64(32)) | np.uint64(words[0])
    if state >> np.uint64(32) == 0:
        return ENDS_LATE
    at_word = 2
    found = 0
    for i in range(contexts.size):
        if contexts[i] < 0:
            continue
        at = np.int64(contexts[i]) * _LEARNED
        length = 0
        below = 0  # bits that follow the leading one
        magnitude = np.int64(0)
        while True:
            learned = magnitude < _LEARNED_BELOW
            share = np.uint64(share_of(chances[at])) if learned else np.uint64(32768)
            low = state & np.uint64(0xFFFF)
            one = int(low < share)
            if one:
                state = share * (state >> np.uint64(16)) + low
            else:
                state = (np.uint64(65536) - share) * (state >> np.uint64(16)) + low - share
            if state >> np.uint64(32) == 0:
                if at_word == words.size:
                    return ENDS_EARLY
                state = (state << np.uint64(32)) | np.uint64(words[at_word])
                at_word += 1
            if learned:
                learn(chances, seen, at, one)
            if magnitude:
                magnitude = 2 * magnitude + one
                below -= 1
                at += 1 + one  # which matters after the first bit alone
            else:
                length += one
                if one and length < _LENGTHS:
                    at += 1
                    continue
                magnitude = np.int64(length > 0)
                below = length - 1
                at = np.int64(contexts[i]) * _LEARNED + _BITS + _LEARNED_BELOW * length + 1
            if below <= 0:
                break
        if magnitude:
            if found == positions.size:
                return MISCOUNTED
            positions[found] = i
            magnitudes[found] = magnitude
            found += 1
    if found != positions.size:
        return MISCOUNTED
    if at_word != words.size or state != np.uint64(1) << np.uint64(32):
        return ENDS_LATE
    return OK
