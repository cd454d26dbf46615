"""Coded distances: round trips, sizes, numbers by hand, damage, whole files."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from conftest import bits, changed_in_place, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import minimal_reader
import nps_compress
from nps_compress import BaseMismatchError, FormatError, InvalidArgumentError, torch_words
from nps_compress.codecs import (
    EncodedChunk,
    ValueCodec,
    distances_work,
    encode_chunk,
    payload_of,
)
from nps_compress.dtypes import BY_NAME, digest
from nps_compress.format import layout
from nps_compress.format.layout import Op
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.format.writer import NpsWriter
from nps_compress.reconstruct import Task
from nps_compress.ulp_coding import (
    LEAST_TOKEN_BYTES,
    MANTISSA_BITS,
    MAX_CONTEXTS,
    apply_distances,
    encode_distances,
    exponents_of,
    most_low_bytes,
    most_token_bytes,
)

LARGEST = {2: (1 << 16) - 1, 4: (1 << 32) - 1}
RULES = ("P-TABLE", "P-CODE", "P-TAIL")


def words_with(exponents, itemsize):
    """Words of BF16 or F32 with these exponents."""
    if itemsize == 2:
        return exponents.astype(np.uint16) << 7
    return exponents.astype(np.uint32) << 23


def by_minimal_reader(tokens, low, exponents, itemsize):
    """Distances, or the rule by which it refuses."""
    dtype = "BF16" if itemsize == 2 else "F32"
    words = words_with(exponents, itemsize).tolist()
    try:
        return [p + 1 for p in minimal_reader.decode_distances(dtype, tokens, low, words, "")]
    except minimal_reader.Refused as refusal:
        return refusal.rule


def distances_of(tokens, low, exponents, itemsize):
    """How far words with these exponents are moved."""
    dtype = BY_NAME["BF16" if itemsize == 2 else "F32"]
    before = words_with(exponents, itemsize)
    after = before.copy()
    apply_distances(tokens, low, None, after, dtype)
    return payload_of(ValueCodec.ULP, before, after, dtype).astype(np.uint32) + np.uint32(1)


def by_package(tokens, low, exponents, itemsize):
    try:
        return distances_of(tokens, low, exponents, itemsize).tolist()
    except FormatError as error:
        return error.rule


def decode(tokens, low, exponents, itemsize):
    """What both readers agree on."""
    mine = by_package(tokens, low, exponents, itemsize)
    assert mine == by_minimal_reader(tokens, low, exponents, itemsize)
    return mine


def assert_round_trip(distances, exponents, itemsize=4, minimal=True):
    """The streams, within the sizes that the format allows."""
    distances, exponents = np.asarray(distances, np.uint32), np.asarray(exponents, np.uint8)
    tokens, low = encode_distances(distances, exponents)
    assert LEAST_TOKEN_BYTES <= len(tokens) <= most_token_bytes(distances.size)
    assert len(low) <= most_low_bytes(itemsize, distances.size)
    assert np.array_equal(distances_of(tokens, low, exponents, itemsize), distances)
    if minimal:
        assert by_minimal_reader(tokens, low, exponents, itemsize) == distances.tolist()
    return tokens, low


@st.composite
def chunks(draw):
    """Distances, exponents and the width: few kinds of either or many, up to the largest."""
    itemsize = draw(st.sampled_from([2, 4]))
    size = draw(st.one_of(st.integers(1, 9), st.integers(1, 3000)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 300, LARGEST[2], LARGEST[itemsize]]))
    distances = rng.integers(1, largest + 1, size)
    if draw(st.booleans()):
        distances = np.maximum(distances >> rng.integers(0, 33, size), 1)
    if draw(st.booleans()):
        same = rng.random(size) < draw(st.sampled_from([0.5, 0.99, 1]))
        distances[same] = draw(st.integers(1, LARGEST[itemsize]))
    low, high = draw(st.sampled_from([(0, 1), (255, 256), (110, 120), (0, 256)]))
    return distances.astype(np.uint32), rng.integers(low, high, size).astype(np.uint8), itemsize


@settings(deadline=None, max_examples=300)
@given(data=chunks())
def test_round_trip(data):
    assert_round_trip(*data)


def every_length(itemsize):
    """The smallest, the largest and a middle one of each bit length."""
    each = [(1 << n, (2 << n) - 1, (3 << n) >> 1) for n in range(8 * itemsize)]
    return sorted({min(z, LARGEST[itemsize]) for some in each for z in some})


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("times", [1, 300])
def test_every_length(rng, itemsize, times):
    distances = rng.permutation(every_length(itemsize) * times)
    assert_round_trip(distances, np.zeros(distances.size), itemsize)
    assert_round_trip(distances, rng.integers(0, 256, distances.size), itemsize)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 1000, LARGEST[4]])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 256, 100_000])
def test_all_the_same(distance, size):
    """Takes little, but never nothing."""
    distances = np.full(size, distance, np.uint32)
    tokens, _ = assert_round_trip(distances, np.full(size, 255), minimal=size < 1000)
    assert (0.19 * size - 64) / 8 < len(tokens) < 0.2 * size / 8 + 150


def test_the_most_that_a_chunk_takes():
    """Low bits are at their limit, tokens are not above theirs."""
    for itemsize in (2, 4):
        size = 1000
        distances = np.full(size, LARGEST[itemsize], np.uint32)
        _, low = assert_round_trip(distances, np.zeros(size), itemsize)
        assert len(low) == most_low_bytes(itemsize, size)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 32, 1 << 16)
    distances = (1 << lengths) + (rng.integers(0, 1 << 32, 1 << 16) >> (32 - lengths))
    exponents = np.arange(1 << 16) % 256
    tokens, _ = assert_round_trip(distances, exponents, minimal=False)
    assert tokens[0] == MAX_CONTEXTS
    assert len(tokens) < most_token_bytes(1 << 16)


def test_the_largest_chunk(rng):
    size = 1 << 24
    distances = (1 + rng.integers(0, 3, size, np.uint8)).astype(np.uint32)
    tokens, low = assert_round_trip(distances, np.zeros(size, np.uint8), minimal=False)
    assert low == b""
    assert len(tokens) < 1.586 * size / 8 + 100  # log2(3) = 1.585


@pytest.mark.parametrize("mean", [0.3, 6.0, 900.0])
def test_sizes_are_near_the_entropy(rng, mean):
    """Of distances given the exponent, each of which has another distribution."""
    size = 1 << 20
    exponents = np.minimum(rng.geometric(0.3, size), 30)
    means = np.maximum(mean * 1.7 ** (8.0 - exponents), 0.02)
    distances = 1 + np.floor(rng.exponential(means)).astype(np.int64)
    # Of a geometric distribution, that of its first decision times their mean number.
    more = np.exp(-1 / means)
    entropy = -float((np.log2(1 - more) + more / (1 - more) * np.log2(more)).sum())
    tokens, low = assert_round_trip(distances, 127 - exponents, minimal=False)
    taken = 8 * (len(tokens) + len(low))
    plain = 8 * sum(map(len, encode_distances(distances.astype(np.uint32), np.zeros(size, "u1"))))
    print(f"mean {mean}: {taken / entropy:.4f} of the entropy, {taken / plain:.4f} of one context")
    assert 0.98 * entropy < taken < 1.03 * entropy
    assert taken < 0.97 * plain


# -- by hand ---------------------------------------------------------------------------------------


class TestByHand:
    """The arithmetic of section 6.6 of SPEC.md, worked out on paper."""

    def table(self, first, shares):
        return bytes([1, 0, first, len(shares)]) + struct.pack(f"<{len(shares)}H", *shares)

    def test_one_distance_of_one(self):
        """Token 0; token 2 gets half: 2^16 = 2048 * 32, so the first state is 4096 * 32."""
        tokens, low = encode_distances(np.ones(1, np.uint32), np.full(1, 9, np.uint8))
        states = [4096 * 32, 1 << 16, 1 << 16, 1 << 16]
        assert tokens == self.table(0, [2048, 0, 2048]) + struct.pack("<4I", *states)
        assert low == b""

    def test_low_bits(self):
        """5 = 101: token 2 * 2 + 0, then a low bit of 1. Its start is the 2048 of token 0."""
        tokens, low = encode_distances(np.full(1, 5, np.uint32), np.zeros(1, np.uint8))
        states = [4096 * 32 + 2048, 1 << 16, 1 << 16, 1 << 16]
        assert tokens == self.table(0, [2048, 0, 0, 0, 2048]) + struct.pack("<4I", *states)
        assert low == b"\1"

    def test_low_bits_of_several(self):
        """22 = 10110 and 29 = 11101: 110, then 101; the first one's are the lower."""
        _, low = encode_distances(np.array([22, 29], np.uint32), np.zeros(2, np.uint8))
        assert low == bytes([0b101110])

    def test_a_word(self):
        """Five distances of 2 with a share of 1, which starts at 4095; the first and the last are
        of the first state."""
        # Encoding 2^16: 2^16 * 4096 + 4095 = 0x10000FFF. That is over 1 * 2^20: 0x0FFF is put out,
        # 0x1000 is left, and becomes 0x1000 * 4096 + 4095 = 0x01000FFF.
        words = struct.pack("<4IH", 0x01000FFF, 0x10000FFF, 0x10000FFF, 0x10000FFF, 0x0FFF)
        tokens = self.table(0, [4095, 0, 1]) + words
        exponents = np.zeros(5, np.uint8)
        assert decode(tokens, b"", exponents, 4) == [2] * 5
        assert decode(tokens[:-2], b"", exponents, 4) == "P-CODE"

    def test_a_share_of_all(self):
        """Takes no bits: the states stay what they are."""
        tokens = self.table(3, [4096]) + struct.pack("<4I", *[1 << 16] * 4)
        assert decode(tokens, b"", np.zeros(1000, np.uint8), 2) == [3] * 1000
        assert decode(tokens, b"", np.zeros(0, np.uint8), 2) == []
        assert len(tokens) == LEAST_TOKEN_BYTES

    def test_exponents(self):
        for name, word, exponent in (
            ("F16", 0x3C01, 15),
            ("F16", 0xFC00, 31),
            ("BF16", 0x3F81, 127),
            ("BF16", 0xFFFF, 255),
            ("F32", 0x3F800001, 127),
            ("F32", 0x80000001, 0),
        ):
            dtype = BY_NAME[name]
            assert exponents_of(np.array([word], dtype.word), dtype).tolist() == [exponent]


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture(params=[2, 4])
def stored(rng, request):
    """Streams of 700 distances in two contexts."""
    exponents = rng.integers(118, 122, 700).astype(np.uint8)
    distances = 1 + np.floor(rng.exponential(20.0, 700)).astype(np.uint32)
    tokens, low = encode_distances(distances, exponents)
    assert tokens[0] == 2
    return tokens, low, exponents, request.param


def test_every_truncation_is_noticed(stored):
    tokens, low, exponents, itemsize = stored
    for size in range(LEAST_TOKEN_BYTES, len(tokens)):
        assert by_package(tokens[:size], low, exponents, itemsize) in RULES
    for size in range(len(low)):
        assert by_package(tokens, low[:size], exponents, itemsize) == "P-TAIL"
    assert by_package(tokens + b"\0", low, exponents, itemsize) == "P-TABLE"
    assert by_package(tokens + b"\0\0", low, exponents, itemsize) == "P-CODE"
    assert by_package(tokens, low + b"\0", exponents, itemsize) == "P-TAIL"
    for other in (exponents[:-1], np.append(exponents, exponents[:1])):
        assert by_package(tokens, low, other, itemsize) in RULES


def test_every_flipped_bit_is_noticed_or_decodes_to_something(stored):
    """Alike in both readers. A flipped low bit is another distance."""
    tokens, low, exponents, itemsize = stored
    wanted = by_package(tokens, low, exponents, itemsize)
    noticed = 0
    for bit in range(0, 8 * len(tokens), 3):
        damaged = bytearray(tokens)
        damaged[bit // 8] ^= 1 << bit % 8
        noticed += isinstance(decode(bytes(damaged), low, exponents, itemsize), str)
    assert noticed > 0.9 * 8 * len(tokens) / 3
    for bit in range(0, 8 * len(low), 7):
        damaged = bytearray(low)
        damaged[bit // 8] ^= 1 << bit % 8
        found = by_package(tokens, bytes(damaged), exponents, itemsize)
        assert found == "P-TAIL" or sum(map(int.__ne__, found, wanted)) == 1


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_any_table_and_words(data):
    """The package and the minimal reader find the same, or the same fault; no other exception."""
    itemsize = data.draw(st.sampled_from([2, 4]))
    contexts, first = b"", 0
    for _ in range(data.draw(st.integers(0, 4))):
        token = data.draw(st.integers(0, 70))
        shares = data.draw(st.lists(st.sampled_from([0, 1, 16, 2048]), max_size=5))
        rest = data.draw(st.sampled_from([4096, 4096, 4096, 4095, 4097])) - sum(shares)
        shares.insert(data.draw(st.integers(0, len(shares))), rest % 65536)
        contexts += bytes([first, token, len(shares)]) + struct.pack(f"<{len(shares)}H", *shares)
        first = min(first + data.draw(st.integers(0, 99)), 255)
    number = data.draw(st.sampled_from([0, 1, 2, 3, 4, 64, 65]))
    words = data.draw(st.lists(st.sampled_from([0, 1, 2, 4095, 4096, 65535]), max_size=16))
    tokens = bytes([number]) + contexts + struct.pack(f"<{len(words)}H", *words)
    tokens = tokens.ljust(LEAST_TOKEN_BYTES, b"\0")
    exponents = np.array(data.draw(st.lists(st.integers(0, 255), min_size=1)), np.uint8)
    decode(tokens, data.draw(st.binary(max_size=8)), exponents, itemsize)


@settings(deadline=None, max_examples=300)
@given(
    tokens=st.binary(min_size=LEAST_TOKEN_BYTES, max_size=200),
    low=st.binary(max_size=20),
    exponents=st.lists(st.integers(0, 255), min_size=1, max_size=60),
    itemsize=st.sampled_from([2, 4]),
)
def test_any_bytes(tokens, low, exponents, itemsize):
    decode(tokens, low, np.array(exponents, np.uint8), itemsize)


# -- what it counts as -----------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("other", [None, 2, 9, LARGEST[2]])
def test_no_chunk_counts_for_more_than_the_format_allows(itemsize, other):
    """Not even of distances that are all the same, or nearly: then no file can, however many chunks
    it has. Only the mask is left, which the writer stores raw where it must."""
    most = 0.0
    for size in (*range(1, 600), *range(600, 30_000, 97), *range(12_000, 14_000, 4), 1 << 20):
        distances = np.ones(size, np.uint32)
        if other:
            distances[:: 1 << 11] = other
        tokens, low = encode_distances(distances, np.zeros(size, np.uint8))
        counted = len(tokens) + len(low) + distances_work(len(tokens), itemsize, size)
        most = max(most, counted / (len(tokens) + len(low)))
    assert most < layout.MAX_EXPANSION
    assert itemsize == 2 or other or most > 0.99 * layout.MAX_EXPANSION


def test_a_context_counts_only_where_it_fits():
    assert [distances_work(size, 4, 0) for size in (0, 22, 26, 27, 336, 337, 10_000)] == [
        *(0, 512, 512, 1024),
        *(63 * 512, 64 * 512, 64 * 512),
    ]
    sizes = np.array([0, 22, 337], np.int64)
    assert distances_work(sizes, 2, np.array([0, 1, 7])).tolist() == [0, 514, 64 * 512 + 14]


# -- files -----------------------------------------------------------------------------------------


def coded_file(before, after, dtype, log2=10):
    """A file of one tensor, every chunk coded."""
    parts = [slice(start, start + (1 << log2)) for start in range(0, before.size, 1 << log2)]
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    writer.add_chunks(encode_chunk(before[p], after[p], dtype, ValueCodec.CODED_ULP) for p in parts)
    shape, codec = (before.size,), ValueCodec.CODED_ULP
    writer.add_tensor(TensorEntry("w", dtype, shape, Op.DELTA, codec, log2, 0, digest(after)))
    writer.finish([BaseTensor("w", dtype, shape, digest(before))], {})
    return stream.getvalue()


def assert_rebuilt(tmp_path, before, after, dtype, log2=10):
    data = coded_file(before, after, dtype, log2)
    path = tmp_path / "w.nps"
    path.write_bytes(data)
    with Task(path) as task:
        for threads in (1, 2):
            for in_place in (True, False):
                found = task.rebuild_words("w", before.copy(), in_place=in_place, threads=threads)
                assert np.array_equal(found, after)
        positions = np.flatnonzero(before != after)
        assert np.array_equal(task.kept_positions("w"), positions)
        (entry,) = task.reader.tensors
        task.reader.verify(entry)
        if before.size:
            with pytest.raises(InvalidArgumentError, match="base"):
                task.form("w")
        base = torch_words.from_numpy(before.copy(), dtype, (before.size,))
        assert changed_in_place(task, "w", base) == after.tobytes()
    minimal = minimal_reader.Nps(data)
    minimal.verify()
    source = {"w": (dtype.name, (before.size,), before.tobytes())}
    assert minimal.rebuild(source) == {"w": after.tobytes()}
    return data


SPECIALS = {
    "F16": [0, 0x8000, 1, 0x8001, 0x3FF, 0x7BFF, 0x7C00, 0xFC00, 0x7C01, 0xFFFF, 0x3C00],
    "BF16": [0, 0x8000, 1, 0x8001, 0x7F, 0x7F7F, 0x7F80, 0xFF80, 0x7F81, 0xFFFF, 0x3F80],
}
SPECIALS["F32"] = [word << 16 | 0xFFFF * (word & 1) for word in SPECIALS["BF16"]]


@pytest.mark.parametrize("name", sorted(MANTISSA_BITS))
def test_specials(tmp_path, name):
    """From and to zeros of both signs, subnormals, infinities and NaNs."""
    dtype = BY_NAME[name]
    words = np.array(SPECIALS[name], dtype.word)
    assert_rebuilt(tmp_path, np.repeat(words, words.size), np.tile(words, words.size), dtype)


@pytest.mark.parametrize("name", sorted(MANTISSA_BITS))
@pytest.mark.parametrize("numel", [0, 1, 5, 1023, 1024, 1025, 4096])
@pytest.mark.parametrize("kept", ["nothing", "all", "first", "some", "all but the last"])
def test_chunks_that_keep(tmp_path, rng, name, numel, kept):
    dtype = BY_NAME[name]
    before = np.frombuffer(rng.bytes(numel * dtype.itemsize), dtype.word)
    which = {
        "nothing": np.zeros(numel, bool),
        "all": np.ones(numel, bool),
        "first": np.arange(numel) == 0,
        "some": (np.arange(numel) % 7 == 2) & (np.arange(numel) // 1024 != 1),
        "all but the last": np.arange(numel) < numel - 1,
    }[kept]
    after = np.where(which, before ^ dtype.word.type(3), before)
    data = assert_rebuilt(tmp_path, before, after, dtype)
    assert data == coded_file(before, after, dtype)


def test_a_base_of_other_values_is_told_from_damage(tmp_path, rng):
    words = {
        name: torch.from_numpy(rng.normal(size=5000).astype("f4")).bfloat16()
        for name in ("base", "other")
    }
    tuned = words["base"].float() * 1.01
    base = write_checkpoint(tmp_path / "base", {"w": words["base"]})
    other = write_checkpoint(tmp_path / "other", {"w": words["other"]})
    path = tmp_path / "x.nps"
    finetuned = write_checkpoint(tmp_path / "tuned", {"w": tuned.bfloat16()})
    nps_compress.pack(base, finetuned, path, lossless=True)
    with nps_compress.open(path) as task:
        assert task.entry("w").value_codec is ValueCodec.CODED_ULP
        assert bits(task.rebuild("w", words["base"])) == bits(tuned.bfloat16())
        for verify in (True, False):
            with pytest.raises(BaseMismatchError, match="has other values"):
                task.rebuild("w", words["other"], verify=verify)
    with pytest.raises(BaseMismatchError, match="has other values"):
        nps_compress.unpack(other, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BaseMismatchError, match="has other values"):
        nps_compress.verify(other, path)
    nps_compress.unpack(base, path, tmp_path / "out")


def damaged_file(before, after, dtype):
    """A file whose distances have one word too many, with every checksum right."""
    chunk = encode_chunk(before, after, dtype, ValueCodec.CODED_ULP)
    tokens, low = chunk.planes
    fields = (chunk.nnz, chunk.mask_codec, chunk.mask_raw_bytes, chunk.mask_compressed, chunk.mask)
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    writer.add_chunks([EncodedChunk(*fields, 0, (tokens + b"\0\0", low))])
    shape, codec = (before.size,), ValueCodec.CODED_ULP
    writer.add_tensor(TensorEntry("w", dtype, shape, Op.DELTA, codec, 13, 0, digest(after)))
    writer.finish([BaseTensor("w", dtype, shape, digest(before))], {})
    return stream.getvalue()


def test_damage_shows_beside_the_base(tmp_path):
    """Without it the mask is all that is decoded."""
    words = torch.linspace(-1, 1, 5000)
    base = write_checkpoint(tmp_path / "base", {"w": words})
    before = words.numpy().view(np.uint32)
    path = tmp_path / "x.nps"
    path.write_bytes(damaged_file(before, before + 5, BY_NAME["F32"]))
    nps_compress.verify(None, path)
    for call in (nps_compress.verify, lambda b, p: nps_compress.unpack(b, p, tmp_path / "out")):
        with pytest.raises(FormatError, match=r"chunk 0 of 'w': the distances don't end") as info:
            call(base, path)
        assert info.value.rule == "P-CODE"
    assert not (tmp_path / "out").exists()
    with Task(path) as task, pytest.raises(FormatError, match="P-CODE"):
        task.rebuild("w", words)


@pytest.mark.parametrize("numel", [1 << 10, 12_800])
def test_all_the_same_in_very_many_chunks(tmp_path, numel):
    """As little as can be stored for what has to be decoded: the writer stays within C-EXPANSION
    far beyond the 64 MiB that any file may ask for."""
    dtype = BY_NAME["F32"]
    before = np.full(numel, 0x3F800000, np.uint32)
    chunk = encode_chunk(before, before + 1, dtype, ValueCodec.CODED_ULP)
    count = 3 * layout.EXPANSION_SLACK // (chunk.raw_bytes + chunk.work)
    log2 = (numel - 1).bit_length()
    shape, codec = (numel,), ValueCodec.CODED_ULP
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    for number in range(count):
        writer.add_chunks([chunk])
        name = f"{number:06}"
        writer.add_tensor(
            TensorEntry(name, dtype, shape, Op.DELTA, codec, log2, 0, digest(before + 1))
        )
    writer.finish([BaseTensor("w", dtype, shape, digest(before))], {})
    path = tmp_path / "x.nps"
    path.write_bytes(stream.getvalue())
    counted = count * (chunk.raw_bytes + chunk.work)
    assert counted > 2.9 * layout.EXPANSION_SLACK
    with NpsReader(path) as reader:
        assert len(reader.tensors) == count
        assert reader.nnz(reader.tensors[-1]) == numel
