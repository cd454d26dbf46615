"""Learned masks: round trips, sizes, numbers by hand, damage, and when they are taken."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import minimal_reader
import nps_compress
from nps_compress import codecs, encoding, mask_coding
from nps_compress.codecs import MaskCodec, ValueCodec
from nps_compress.entropy_coding import ENDS_EARLY, ENDS_LATE, MISCOUNTED, OK
from nps_compress.format import layout
from nps_compress.format.reader import NpsReader
from nps_compress.mask_coding import Place, decode_positions, encode_positions

LOWEST = 1 << 32  # of the states


def decode(stream: bytes, numel: int, place: Place, nnz: int) -> tuple[int, np.ndarray]:
    """Status and positions, and that nothing is written beside them."""
    guard = np.full(nnz + 2, 0x5A5A, np.uint32)
    status = decode_positions(stream, numel, place, guard[1:-1])
    assert guard[0] == guard[-1] == 0x5A5A
    return status, guard[1:-1]


def assert_round_trip(kept: np.ndarray, place: Place) -> bytes:
    positions = np.flatnonzero(kept).astype(np.uint32)
    stream = encode_positions(positions, kept.size, place)
    status, found = decode(stream, kept.size, place, positions.size)
    assert status == OK
    assert np.array_equal(found, positions)
    low, high = mask_coding.stream_bytes_range(kept.size)
    assert len(stream) % 4 == 0
    assert low <= len(stream) <= high
    return stream


def by_minimal_reader(stream: bytes, numel: int, place: Place, nnz: int) -> list[int]:
    words = np.frombuffer(stream, "<u4").tolist()
    span = slice(place.start, place.start + numel)
    return minimal_reader.decode_learned(words, span, place.columns, nnz, "")


@st.composite
def masks(draw: st.DrawFn) -> tuple[np.ndarray, Place]:
    """Neither none nor all of some elements, anywhere in matrices of any width."""
    size = draw(st.integers(2, 600))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = rng.random(size) < draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.95, 1.0]))
    if kept.all() == kept.any():  # all are, or none is
        kept[rng.integers(size)] ^= True
    columns = draw(st.one_of(st.integers(1, 40), st.integers(1, 700), st.just(1 << 48)))
    return kept, Place(draw(st.integers(0, 1 << 40)), columns)


@settings(deadline=None, max_examples=300)
@given(mask=masks())
def test_round_trip(mask):
    kept, place = mask
    stream = assert_round_trip(kept, place)
    found = by_minimal_reader(stream, kept.size, place, int(kept.sum()))
    assert found == np.flatnonzero(kept).tolist()


def test_the_largest_chunk():
    numel = 1 << 24
    kept = np.zeros(numel, bool)
    kept[[0, 5, numel - 1]] = True
    assert len(assert_round_trip(kept, Place(numel, 4096))) < 100
    assert len(assert_round_trip(~kept, Place(numel, 1 << 30))) < 100


def independent(rng: np.random.Generator, rows: int, columns: int, mean: float) -> np.ndarray:
    """Chances that are products of a factor for each row and column. [rows, columns]."""
    of_row, of_column = (np.exp(0.8 * rng.normal(size=n)) for n in (rows, columns))
    chances = np.outer(of_row, of_column)
    return np.clip(mean * chances / chances.mean(), 0, 0.97)


@pytest.mark.parametrize("mean", [0.05, 0.5])
def test_sizes_are_near_the_entropy(rng, mean):
    """Of rows and columns that differ, and far below what knows nothing of them."""
    chances = independent(rng, 1024, 768, mean)
    kept = rng.random(chances.shape) < chances
    entropy = -float((chances * np.log2(chances) + (1 - chances) * np.log2(1 - chances)).sum())
    size = 8 * len(assert_round_trip(kept.reshape(-1), Place(0, 768)))
    share = kept.mean()
    alike = -kept.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    print(f"mean {mean}: {size / entropy:.3f} of the entropy, {size / alike:.3f} of one chance")
    assert size < 1.06 * entropy
    assert size < 0.93 * alike


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_what_is_alike_costs_no_more_than_one_chance(rng, density):
    kept = rng.random(1 << 20) < density
    share = kept.mean()
    alike = -kept.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert 8 * len(assert_round_trip(kept, Place(0, 512))) < 1.01 * alike


def test_rows_and_columns_are_those_of_the_tensor(rng):
    """A chunk that begins within a row; told another width, nothing of its columns is seen."""
    kept = (np.arange(384) % 16 == 3) & (rng.random((300, 384)) < 0.9)
    part = kept.reshape(-1)[1000:]
    right = len(assert_round_trip(part, Place(1000, 384)))
    assert right < 0.6 * len(assert_round_trip(part, Place(1000, 383)))
    rows = np.repeat(rng.random(600) < 0.1, 384)[1000:]
    right = len(assert_round_trip(rows, Place(1000, 384)))
    assert right < 0.8 * len(assert_round_trip(rows, Place(1100, 384)))


# -- by hand ---------------------------------------------------------------------------------------


class TestByHand:
    """The arithmetic of section 5.1 of SPEC.md, worked out on paper."""

    def test_odds(self):
        """t = floor(a / 2^20); h(1) = 0, h(2) = 2, h(3) = 3, h(4) = 4, h(6) = 5, h(4096) = 24."""
        # a = 2^31: h(2049) - h(2048) = 22 - 22. a = 2^32 / 4: h(1025) - h(3072) = 20 - 23.
        for chance, odds in (
            (0, -24),
            ((1 << 20) - 1, -24),
            (1 << 20, 2 - 23),
            (2 << 20, 3 - 23),
            (1 << 30, -3),
            (1 << 31, 0),
            (3 << 30, 22 + 1 - 20),
            ((1 << 32) - 1, 24),
        ):
            assert mask_coding._odds(chance) == odds

    def test_contexts_beyond_the_ends_are_those_at_the_ends(self):
        wanted = {-16: 0, -1: 0, 0: 0, 1: 1, 32: 32, 62: 62, 63: 63, 64: 63, 104: 63}
        assert {odds: mask_coding._context(odds) for odds in wanted} == wanted

    def test_moved(self):
        """Of 16 + n elements: floor(65536 / 16) = 4096, floor(65536 / 527) = 124 from 511 on."""
        half = 1 << 31
        assert mask_coding._moved(half, False, 0) == half - half // 16
        # floor((2^32 - 1 - 2^31) x 4096 / 2^16) = floor(134217727.9...)
        assert mask_coding._moved(half, True, 0) == half + 134217727
        assert mask_coding._moved(half, False, 1) == half - -(-half * 3855 // 65536)
        for seen in (511, 512, 1 << 24):
            assert mask_coding._moved(1 << 30, False, seen) == (1 << 30) - (1 << 14) * 124
        assert mask_coding._moved(0, False, 0) == 0
        assert mask_coding._moved((1 << 32) - 1, True, 0) == (1 << 32) - 1

    def test_two_elements_of_one_row(self):
        """The first kept, the second not: prior 2^31, the first one's context 32, its share 32768.

        After it r = 2^31 + 134217727 = 2281701375, t = 2175: h(2176) - h(1921) = 22 - 21 = 1, c is
        the prior: context 33, which is new. Two even decisions, written from the last one on.
        """
        state = 1 << 32
        state = state // 32768 * 65536 + state % 32768 + 32768  # a 0
        state = state // 32768 * 65536 + state % 32768  # a 1
        stream = struct.pack("<Q", state)
        assert encode_positions(np.array([0], np.uint32), 2, Place(0, 2)) == stream
        assert decode(stream, 2, Place(0, 2), 1)[1].tolist() == [0]
        # As two rows of one column r begins anew, and c is what r was: the same context.
        assert encode_positions(np.array([0], np.uint32), 2, Place(0, 1)) == stream

    def test_what_ends_a_row(self):
        """As two rows of columns of their own both decisions are made in context 32."""
        # In a matrix of two columns, from its second element on: i = 0 is the end of a row.
        # 2^31 + floor((2^31 - 1) x 43690 / 2^16) = 3579117567 is the second one's chance.
        share = (2147483648 + 2147483647 * 43690 // 65536) >> 16
        assert share == 54612
        state, rest = 1 << 32, 65536 - share
        state = state // rest * 65536 + state % rest + share  # a 0
        state = state // 32768 * 65536 + state % 32768  # a 1
        stream = struct.pack("<Q", state)
        assert encode_positions(np.array([0], np.uint32), 2, Place(1, 2)) == stream


# -- damage ----------------------------------------------------------------------------------------

PLACE = Place(5, 23)


@pytest.fixture
def stored(rng):
    kept = rng.random(300) < 0.3
    return assert_round_trip(kept, PLACE), int(kept.sum())


def test_every_truncation_is_noticed(stored):
    stream, nnz = stored
    for size in range(8, len(stream), 4):
        assert decode(stream[:size], 300, PLACE, nnz)[0] in (ENDS_EARLY, ENDS_LATE, MISCOUNTED)
    assert decode(stream, 300, PLACE, nnz)[0] == OK
    assert decode(stream + bytes(4), 300, PLACE, nnz)[0] == ENDS_LATE
    assert decode(stream[:4] + bytes(4) + stream[8:], 300, PLACE, nnz)[0] == ENDS_LATE


def test_every_flipped_bit_is_noticed_or_decodes_to_something(stored):
    """A stream has one form, so another one that decodes keeps other elements."""
    stream, nnz = stored
    wanted = decode(stream, 300, PLACE, nnz)[1]
    noticed = 0
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        status, found = decode(bytes(damaged), 300, PLACE, nnz)
        noticed += status != OK
        assert status != OK or not np.array_equal(found, wanted)
    assert noticed > 7.9 * len(stream)


@settings(deadline=None, max_examples=500)
@given(
    words=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=40),
    numel=st.integers(2, 80),
    columns=st.integers(1, 90),
    nnz=st.integers(1, 79),
)
def test_any_words(words, numel, columns, nnz):
    """The package and the minimal reader find the same, or the same fault; no other exception."""
    stream, place = struct.pack(f"<{len(words)}I", *words), Place(3, columns)
    nnz = 1 + nnz % (numel - 1)  # the format has other codecs for none and all
    status, positions = decode(stream, numel, place, nnz)
    rule = {OK: None, MISCOUNTED: "P-POPCOUNT"}.get(status, "P-CODE")
    try:
        found = by_minimal_reader(stream, numel, place, nnz)
        refused = None
    except minimal_reader.Refused as refusal:
        refused = refusal.rule
    assert refused == rule
    if rule is None:
        assert positions.tolist() == found
        assert encode_positions(positions, numel, place) == stream  # the one form of a stream


# -- when they are taken ---------------------------------------------------------------------------


def taken(kept: np.ndarray, place: Place | None) -> tuple[MaskCodec, int]:
    """The codec and the bytes of a mask."""
    positions = np.flatnonzero(kept).astype(np.uint32)
    codec, raw_bytes, stored, compressed = codecs.encode_mask(positions, kept.size, 19, place)
    raw = codecs.decompress(stored, raw_bytes) if compressed else stored
    found = codecs.decode_mask(codec, raw, kept.size, positions.size, place or Place(0, 1))
    assert np.array_equal(found, positions)
    return codec, len(stored)


def test_taken_where_it_saves_a_32nd(rng):
    chances = independent(rng, 512, 512, 0.05)
    kept = (rng.random(chances.shape) < chances).reshape(-1)
    codec, learned = taken(kept, Place(0, 512))
    assert codec is MaskCodec.LEARNED
    other, size = taken(kept, None)
    assert other is not MaskCodec.LEARNED
    assert learned <= 31 / 32 * size
    alike = rng.random(1 << 18) < 0.5
    assert taken(alike, Place(0, 512))[0] is MaskCodec.BITMASK


def test_never_taken_for_more_work_than_a_file_may_ask_for():
    """Most of one row of 2^22 elements: the stream is the smallest, but below what 3.5 asks for."""
    kept = np.zeros(1 << 22, bool)
    kept[104_000:112_000] = np.random.default_rng(0).random(8000) < 0.95
    codec, size = taken(kept, Place(0, 8000))
    assert codec is not MaskCodec.LEARNED
    stream = encode_positions(np.flatnonzero(kept).astype(np.uint32), kept.size, Place(0, 8000))
    assert codecs.learning_work(kept.size) > codecs.MOST_WORK * len(stream)
    assert len(stream) < size  # it would have been taken
    assert codecs.MOST_WORK < layout.MAX_EXPANSION


def save_pair(folder: Path, rng: np.random.Generator, dtype: torch.dtype) -> None:
    """A matrix of several chunks, a fifth of which is changed by an ulp or more, and a vector."""
    chances = independent(rng, 1000, 900, 0.2)
    base = torch.from_numpy(rng.normal(0, 0.02, chances.shape)).to(dtype)
    moved = torch.from_numpy(rng.random(chances.shape) < chances)
    tensors = {"m": base, "v": base[0].clone()}
    save_file(tensors, folder / "base.safetensors")
    tensors = {"m": torch.where(moved, base * 1.01, base), "v": tensors["v"] * 1.5}
    save_file(tensors, folder / "tuned.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_level_max(tmp_path, rng, dtype):
    """Smaller, and the same content, as every reader finds it; level default has none of them."""
    save_pair(tmp_path, rng, dtype)
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    masks, content = {}, set()
    for level in ("default", "max"):
        out = tmp_path / f"{level}.nps"
        nps_compress.pack(base, tuned, out, lossless=True, level=level)
        nps_compress.verify(None, out)
        content.add(nps_compress.verify(base, out).content_digest)
        with NpsReader(out) as reader:
            matrix = reader.tensors[0]
            assert matrix.chunks > 1
            masks[level] = reader.mask_codecs(matrix)
        minimal = minimal_reader.Nps(out.read_bytes())
        found = minimal.rebuild(minimal_reader.read_safetensors(base))
        wanted = minimal_reader.read_safetensors(tuned)
        assert {name: bytes(data) for name, (*_, data) in wanted.items()} == found
    assert masks == {"default": [MaskCodec.BITMASK], "max": [MaskCodec.LEARNED]}
    assert len(content) == 1
    assert (tmp_path / "max.nps").stat().st_size < (tmp_path / "default.nps").stat().st_size


def test_a_grid_that_asks_for_too_much_work_is_stored_exactly(tmp_path, rng, monkeypatch):
    save_pair(tmp_path, rng, torch.bfloat16)
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    recipe = nps_compress.Recipe(prune="sampled", density=0.05)
    content = []
    for most, stored in ((codecs.MOST_WORK, ValueCodec.GRID), (1, ValueCodec.CODED_ULP)):
        monkeypatch.setattr(encoding, "MOST_WORK", most)
        out = tmp_path / f"{most}.nps"
        nps_compress.pack(base, tuned, out, recipe=recipe)
        content.append(nps_compress.verify(base, out).content_digest)
        with NpsReader(out) as reader:
            assert reader.tensors[0].value_codec is stored
    assert content[0] == content[1]
