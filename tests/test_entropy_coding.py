"""Coded magnitudes: round trips, sizes, numbers by hand, damage."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minimal_reader
from nps_compress.entropy_coding import (
    CONTEXTS,
    ENDS_EARLY,
    ENDS_LATE,
    MAX_MAGNITUDE,
    MISCOUNTED,
    OK,
    decode_magnitudes,
    encode_magnitudes,
    stream_bytes_range,
)

LOWEST = 1 << 32  # of the states


def decode(stream, contexts, nnz):
    """Status, positions and magnitudes, and that nothing is written beside them."""
    guard = np.full((2, nnz + 2), 0x5A5A)
    positions, magnitudes = guard[0].astype(np.uint32), guard[1].astype(np.int16)
    status = decode_magnitudes(stream, contexts, positions[1:-1], magnitudes[1:-1])
    for array in (positions, magnitudes):
        assert array[0] == array[-1] == 0x5A5A
    return status, positions[1:-1], magnitudes[1:-1]


def assert_round_trip(magnitudes, contexts):
    stream = encode_magnitudes(magnitudes, contexts)
    wanted = np.flatnonzero((magnitudes > 0) & (contexts >= 0))
    status, positions, found = decode(stream, contexts, wanted.size)
    assert status == OK
    assert np.array_equal(positions, wanted)
    assert np.array_equal(found, magnitudes[wanted])
    low, high = stream_bytes_range(magnitudes.size)
    assert len(stream) % 4 == 0
    assert low <= len(stream) <= high
    return stream


@st.composite
def coded(draw):
    """Magnitudes and contexts, few of either or many, up to the largest."""
    size = draw(st.integers(0, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = draw(st.sampled_from([0, 1, 2, 3, 4, 100, 255, 256, MAX_MAGNITUDE]))
    magnitudes = rng.integers(0, largest + 1, size)
    if draw(st.booleans()):
        magnitudes >>= rng.integers(0, 16, size)
    magnitudes[rng.random(size) < draw(st.sampled_from([0, 0.5, 0.99]))] = 0
    lowest, contexts = draw(st.sampled_from([-1, 0])), draw(st.integers(1, CONTEXTS))
    return magnitudes.astype(np.int16), rng.integers(lowest, contexts, size).astype(np.int8)


@settings(deadline=None, max_examples=300)
@given(data=coded())
def test_round_trip(data):
    magnitudes, contexts = data
    stream = assert_round_trip(magnitudes, contexts)
    words = np.frombuffer(stream, "<u4").tolist()
    kept = np.flatnonzero((magnitudes > 0) & (contexts >= 0))
    found = minimal_reader.decode_magnitudes(words, contexts.tolist(), kept.size, "")
    assert list(found) == kept.tolist()
    assert list(found.values()) == magnitudes[kept].tolist()


@pytest.mark.parametrize(
    "magnitudes",
    [
        np.arange(MAX_MAGNITUDE + 1),
        np.full(20_000, MAX_MAGNITUDE),
        np.tile([0, MAX_MAGNITUDE], 10_000),
        np.zeros(100_000, int),
        np.where(np.arange(30_000) % 7001 == 7000, 1, 0),
        np.where(np.arange(30_000) % 7001 == 7000, 0, 1),
        np.where(np.arange(30_000) % 7001 == 7000, 1 << 14, 3),
    ],
)
def test_extremes(magnitudes):
    """All magnitudes; chances at both of their ends, and surprises there."""
    assert_round_trip(magnitudes.astype(np.int16), np.full(magnitudes.size, 63, np.int8))


def test_the_largest_chunk():
    numel = 1 << 24
    magnitudes = np.zeros(numel, np.int16)
    magnitudes[[0, 5, numel - 1]] = 1, MAX_MAGNITUDE, 2
    assert len(assert_round_trip(magnitudes, np.zeros(numel, np.int8))) < 100


@pytest.mark.parametrize("mean", [0.02, 0.3, 2.0, 40.0])
def test_sizes_are_near_the_entropy(rng, mean):
    """Of magnitudes in 30 contexts, each with another distribution."""
    numel = 1 << 20
    contexts = rng.integers(0, 30, numel).astype(np.int8)
    magnitudes = np.floor(rng.exponential(mean * 1.1 ** (contexts - 15.0)) + rng.random(numel))
    magnitudes = magnitudes.astype(np.int16)
    bits = 0.0
    for context in range(30):
        counts = np.bincount(magnitudes[contexts == context])
        counts = counts[counts > 0]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    size = 8 * len(assert_round_trip(magnitudes, contexts))
    print(f"mean {mean}: {size / bits:.4f} of the entropy")
    assert 0.99 * bits < size < 1.02 * bits


def test_contexts_do_not_mix(rng):
    """What is learned in one says nothing in another: each is as large as if it were alone."""
    numel = 50_000
    first, second = (rng.random(numel) < share for share in (0.01, 0.9))
    apart = sum(
        len(encode_magnitudes(each.astype(np.int16), np.zeros(numel, np.int8)))
        for each in (first, second)
    )
    magnitudes = np.stack([first, second], axis=1).astype(np.int16).reshape(-1)
    together = encode_magnitudes(magnitudes, np.tile(np.array([0, 1], np.int8), numel))
    mixed = encode_magnitudes(magnitudes, np.zeros(2 * numel, np.int8))
    assert abs(len(together) - apart) < 20
    assert len(mixed) > 1.5 * apart


# -- by hand ---------------------------------------------------------------------------------------


class TestByHand:
    """The arithmetic of section 6.5 of SPEC.md, worked out on paper."""

    def test_one_zero(self):
        """One decision, 0, at the share 32768: x = (65536 - 32768) * 2^16 * 2 + 32768."""
        # Encoding 2^32: floor(2^32 / 32768) = 2^17, remainder 0; 2^17 * 2^16 + 0 + 32768.
        stream = struct.pack("<II", 32768, 2)
        assert encode_magnitudes(np.zeros(1, np.int16), np.zeros(1, np.int8)) == stream
        assert decode(stream, np.zeros(1, np.int8), 0)[0] == OK

    def test_one_one(self):
        """Two decisions, "more than 0 bits?" 1 and "more than 1 bit?" 0, at 32768 each."""
        # The last first: 2^33 + 32768 as above. Then 1: floor((2^33 + 32768) / 32768) = 2^18 + 1,
        # remainder 0: (2^18 + 1) * 2^16 = 2^34 + 65536.
        stream = struct.pack("<II", 65536, 4)
        assert encode_magnitudes(np.ones(1, np.int16), np.zeros(1, np.int8)) == stream
        status, positions, magnitudes = decode(stream, np.zeros(1, np.int8), 1)
        assert (status, positions.tolist(), magnitudes.tolist()) == (OK, [0], [1])

    def test_what_is_learned(self):
        """Two zeros: the second one's share has moved by 43690 / 65536 of the way to 0."""
        # 2^31 + floor(-2^31 * 43690 / 2^16) = 2147483648 - 1431633920 = 715849728; / 2^16 = 10923.
        # Encoding 0 at 10923, 65536 - 10923 = 54613: 2^32 = 54613 * 78643 + 37137; then
        # 78643 * 65536 + 37137 + 10923 = 5153995708. Encoding 0 at 32768:
        # 5153995708 = 32768 * 157287 + 15292; 157287 * 65536 + 15292 + 32768 = 10308008892.
        quotient, rest = divmod(1 << 32, 54613)
        assert (quotient, rest) == (78643, 37137)
        state = 78643 * 65536 + 37137 + 10923
        assert divmod(state, 32768) == (157287, 15292)
        state = 157287 * 65536 + 15292 + 32768
        stream = struct.pack("<Q", state)
        assert state == 10308008892
        assert encode_magnitudes(np.zeros(2, np.int16), np.zeros(2, np.int8)) == stream
        # In another context the second zero is a first one.
        other = struct.pack("<Q", (1 << 34) + 65536 + 32768)
        assert encode_magnitudes(np.zeros(2, np.int16), np.array([0, 1], np.int8)) == other
        assert decode(stream, np.zeros(2, np.int8), 0)[0] == OK
        assert decode(other, np.array([0, 1], np.int8), 0)[0] == OK

    def test_bits_of_a_magnitude(self):
        """5 = 101: lengths 1, 1, 1, 0, then 0, then 1, all at 32768, nothing being learned yet: the
        state gains a bit for each, the first decision being its lowest 16 bits' highest but
        inverted."""
        state = 1 << 32
        for bit in reversed([1, 1, 1, 0, 0, 1]):
            quotient, rest = divmod(state, 32768)
            state = quotient * 65536 + rest + (0 if bit else 32768)
        stream = struct.pack("<Q", state)
        assert encode_magnitudes(np.array([5], np.int16), np.zeros(1, np.int8)) == stream
        assert decode(stream, np.zeros(1, np.int8), 1)[2].tolist() == [5]

    def test_the_second_bit_knows_the_first(self):
        """The last 0 of 6 = 110 follows 11 for the first time; that of a second 4 = 100 does not
        follow 10 for the first time."""
        # From 32768 a share moves to 10923 (see above), or for a 1 by the same way to 54612.
        for magnitudes, last in (([4, 6], 32768), ([4, 4], 10923)):
            shares = [*[32768] * 6, *[54612] * 3, 10923, 10923, last]
            first = magnitudes[1] >> 1 & 1
            decided = [*(1, 1, 1, 0, 0, 0), *(1, 1, 1, 0, first, 0)]
            state, words = 1 << 32, []
            for bit, share in reversed(list(zip(decided, shares, strict=True))):
                width = share if bit else 65536 - share
                if state >> 48 >= width:
                    words.insert(0, state & 0xFFFFFFFF)
                    state >>= 32
                state = state // width * 65536 + state % width + (0 if bit else share)
            stream = struct.pack(f"<Q{len(words)}I", state, *words)
            assert encode_magnitudes(np.array(magnitudes, np.int16), np.zeros(2, np.int8)) == stream
            assert decode(stream, np.zeros(2, np.int8), 2)[2].tolist() == magnitudes

    def test_a_word_is_taken_below_the_lowest_state(self):
        """32 even decisions make one word, and it is taken where the state has sunk below 2^32."""
        magnitudes, contexts = np.zeros(32, np.int16), np.arange(32, dtype=np.int8)
        state, words = 1 << 32, []
        for _ in range(32):
            if state >> 48 >= 32768:
                words.append(state & 0xFFFFFFFF)
                state >>= 32
            quotient, rest = divmod(state, 32768)
            state = quotient * 65536 + rest + 32768
        assert len(words) == 1
        stream = struct.pack("<QI", state, *words)
        assert encode_magnitudes(magnitudes, contexts) == stream
        assert decode(stream, contexts, 0)[0] == OK

    def test_rates(self):
        """A chance after many zeros, in exact steps; then a stream that needs it."""
        chance, count, shares = 1 << 31, 0, []
        for _ in range(4000):
            shares.append(min(max(chance >> 16, 1), 65535))
            chance = math.floor(chance - chance * ((1 << 17) // (2 * count + 3)) / (1 << 16))
            count = min(count + 1, 511)
        assert shares[0] == 32768
        assert shares[1] == 10923
        assert shares[-1] == 1
        size = len(encode_magnitudes(np.zeros(4000, np.int16), np.zeros(4000, np.int8)))
        bits = -sum(math.log2(1 - share / 65536) for share in shares)
        assert abs(8 * (size - 4) - bits) < 40  # the state's lowest value takes 32 bits


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def stored(rng):
    contexts = rng.integers(-1, 5, 300).astype(np.int8)
    magnitudes = (rng.exponential(1.5, 300) * (contexts >= 0)).astype(np.int16)
    return encode_magnitudes(magnitudes, contexts), contexts, int((magnitudes > 0).sum())


def test_every_truncation_is_noticed(stored):
    stream, contexts, nnz = stored
    for size in range(8, len(stream), 4):
        assert decode(stream[:size], contexts, nnz)[0] in (ENDS_EARLY, ENDS_LATE, MISCOUNTED)
    assert decode(stream, contexts, nnz)[0] == OK
    assert decode(stream + bytes(4), contexts, nnz)[0] == ENDS_LATE
    for other in (0, 1, nnz - 1, nnz + 1, 300):
        assert decode(stream, contexts, other)[0] == MISCOUNTED


def test_every_flipped_bit_is_noticed_or_decodes_to_something(stored):
    """A stream has one form, so another one that decodes has other magnitudes."""
    stream, contexts, nnz = stored
    wanted = decode(stream, contexts, nnz)[1:]
    noticed = 0
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        status, *found = decode(bytes(damaged), contexts, nnz)
        noticed += status != OK
        if status == OK:
            assert not all(map(np.array_equal, found, wanted))
    assert noticed > 7.9 * len(stream)


@settings(deadline=None, max_examples=500)
@given(
    words=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=60),
    contexts=st.lists(st.integers(-1, CONTEXTS - 1), max_size=60),
    nnz=st.integers(0, 61),
)
def test_any_words(words, contexts, nnz):
    """The package and the minimal reader find the same, or the same fault; no other exception."""
    stream, where = struct.pack(f"<{len(words)}I", *words), np.array(contexts, np.int8)
    status, positions, magnitudes = decode(stream, where, nnz)
    rule = {OK: None, MISCOUNTED: "P-POPCOUNT"}.get(status, "P-CODE")
    try:
        found = minimal_reader.decode_magnitudes(words, contexts, nnz, "")
        refused = None
    except minimal_reader.Refused as refusal:
        refused = refusal.rule
    assert refused == rule
    if rule is None:
        assert positions.tolist() == list(found)
        assert magnitudes.tolist() == list(found.values())
        whole = np.zeros(len(contexts), np.int16)
        whole[positions] = magnitudes
        assert encode_magnitudes(whole, where) == stream  # the one form of a stream


def test_a_stream_without_elements():
    empty = np.empty(0, np.int8)
    assert encode_magnitudes(np.empty(0, np.int16), empty) == struct.pack("<Q", LOWEST)
    assert decode(struct.pack("<Q", LOWEST), empty, 0)[0] == OK
    assert decode(struct.pack("<Q", LOWEST + 1), empty, 0)[0] == ENDS_LATE
    assert decode(bytes(8), empty, 0)[0] == ENDS_LATE
    nothing = np.full(3, -1, np.int8)
    assert decode(struct.pack("<Q", LOWEST), nothing, 1)[0] == MISCOUNTED
