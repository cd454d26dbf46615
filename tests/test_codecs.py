"""Mask and value codecs: round trips for every bit pattern, and refusal of malformed streams."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nps_compress import codecs
from nps_compress.codecs import MaskCodec, ValueCodec
from nps_compress.dtypes import BY_NAME, DTYPES, DType, round_float32, to_float32
from nps_compress.errors import FormatError


@st.composite
def masks(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Ascending positions and the number of elements, gaps beyond every escape included."""
    gaps = draw(
        st.lists(
            st.sampled_from([0, 1, 2, 7, 253, 254, 255, 256, 510, 65_534, 65_535]), max_size=12
        )
    )
    tail = draw(st.sampled_from([0, 1, 8, 300, 70_000]))
    positions = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    numel = int(positions[-1]) + 1 + tail if len(gaps) else tail
    return positions.astype(np.uint32), numel


@pytest.mark.parametrize("codec", codecs.MASK_CODECS.values(), ids=lambda c: c.id.name)
@given(mask=masks())
@settings(deadline=None)
def test_mask_round_trip(codec, mask):
    positions, numel = mask
    if not len(positions):
        return
    data = codec.encode(positions, numel)
    low, high = codec.raw_bytes_range(numel, len(positions))
    assert low <= len(data) <= high
    assert np.array_equal(codec.decode(data, numel, len(positions)), positions)


@given(mask=masks())
@settings(deadline=None)
def test_chosen_mask_round_trip(mask):
    positions, numel = mask
    codec, raw_bytes, stored, compressed = codecs.encode_mask(positions, numel)
    raw = codecs.decompress(stored, raw_bytes) if compressed else stored
    assert len(raw) == raw_bytes
    found = codecs.decode_mask(codec, raw, numel, len(positions))
    expected = positions if codec is not MaskCodec.FULL else None
    assert found is None if expected is None else np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("codec", "data", "numel", "nnz", "rule"),
    [
        (MaskCodec.BITMASK, b"\x03", 8, 1, "P-POPCOUNT"),
        (MaskCodec.BITMASK, b"\x01", 8, 2, "P-POPCOUNT"),
        (MaskCodec.BITMASK, b"\x21", 5, 2, "P-TAIL"),
        (MaskCodec.GAP8, b"\x00\x00", 8, 1, "P-POPCOUNT"),
        (MaskCodec.GAP8, b"\x00", 8, 2, "P-POPCOUNT"),
        (MaskCodec.GAP8, b"\x08", 8, 1, "P-GAP"),
        (MaskCodec.GAP8, b"\x00\xff", 600, 1, "P-ESCAPE"),
        (MaskCodec.GAP16, b"\x08\x00", 8, 1, "P-GAP"),
        (MaskCodec.GAP16, b"\x00\xff\x00\xff", 70_000, 1, "P-ESCAPE"),
        (MaskCodec.GAP16, b"\x00\x00\x00\x00", 8, 1, "P-POPCOUNT"),
    ],
)
def test_malformed_mask(codec, data, numel, nnz, rule):
    with pytest.raises(FormatError) as caught:
        codecs.decode_mask(codec, data, numel, nnz)
    assert caught.value.rule == rule


def _rebuild(codec: ValueCodec, base: np.ndarray, new: np.ndarray, dtype: DType) -> np.ndarray:
    chunk = codecs.encode_chunk(base, new, dtype, codec)
    mask = chunk.mask
    if chunk.mask_compressed:
        mask = codecs.decompress(mask, chunk.mask_raw_bytes)
    planes = codecs.decode_planes(chunk.planes, chunk.planes_compressed, chunk.nnz)
    positions = codecs.decode_mask(chunk.mask_codec, mask, base.size, chunk.nnz)
    out = np.full_like(base, 0x5A)
    codecs.apply_payload(codec, planes, positions, base, out, dtype)
    in_place = base.copy()
    codecs.apply_payload(codec, planes, positions, in_place, in_place, dtype)
    assert np.array_equal(in_place, out)
    return out


@pytest.mark.parametrize(
    ("dtype", "codec"),
    [
        pytest.param(dtype, codec, id=f"{dtype.name}-{codec.name}")
        for dtype in DTYPES
        for codec in (ValueCodec.REPLACE, ValueCodec.XOR, ValueCodec.ULP)
        if dtype.is_float or codec is not ValueCodec.ULP
    ],
)
@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 0.3, 1.0])
def test_values_round_trip_for_random_bits(dtype, codec, density, rng):
    base = np.frombuffer(rng.bytes(40_000 * dtype.itemsize), dtype.word)
    other = np.frombuffer(rng.bytes(40_000 * dtype.itemsize), dtype.word)
    new = np.where(rng.random(40_000) < density, other, base)
    assert np.array_equal(_rebuild(codec, base, new, dtype), new)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_ulp_covers_all_pairs_of_special_words(name):
    dtype = BY_NAME[name]
    every = np.arange(1 << 16, dtype=np.uint16)  # NaN payloads, infinities and -0.0 among them
    for base in (0x0000, 0x8000, 0x7FFF, 0xFFFF, 0x7F80, 0xFF80, 0x0001, 0x8001):
        before = np.full(1 << 16, base, np.uint16)
        assert np.array_equal(_rebuild(ValueCodec.ULP, before, every, dtype), every)


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "F64"])
def test_ulp_payload_of_all_ones_leaves_the_base(name):
    dtype = BY_NAME[name]
    base = np.array([1, 0x3F81], dtype.word)
    planes = np.full((dtype.itemsize, 2), 0xFF, np.uint8)
    for positions in (None, np.array([0, 1], np.uint32)):
        out = np.zeros_like(base)
        codecs.apply_payload(ValueCodec.ULP, planes, positions, base, out, dtype)
        assert np.array_equal(out, base)


def test_ulp_payload_counts_steps_between_floats():
    dtype = BY_NAME["BF16"]
    base = np.array([0x3F80, 0x3F80, 0x8001], np.uint16)  # 1.0, 1.0, the float below -0.0
    new = np.array([0x3F81, 0x3F7F, 0x0000], np.uint16)  # one step up, one down, two up over -0.0
    payload = codecs.payload_of(ValueCodec.ULP, base, new, dtype)
    assert payload.tolist() == [1, 0, 3]  # zigzag minus one of +1, -1, +2


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_rounding_agrees_with_torch(name, rng):
    import torch

    dtype = BY_NAME[name]
    target = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[name]
    values = rng.normal(0, 1, 10_000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 65504.0]  # 1 + 2^-8: a tie of bfloat16
    expected = torch.from_numpy(values).to(target)
    words = round_float32(values, dtype)
    width = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert np.array_equal(words.view(f"<i{dtype.itemsize}"), expected.view(width).numpy())
    assert np.array_equal(to_float32(words, dtype), expected.float().numpy())


PAYLOAD = b"weights" * 50
FRAME = codecs.compress(PAYLOAD)


def _set(frame: bytes, position: int, byte: int) -> bytes:
    return frame[:position] + bytes([byte]) + frame[position + 1 :]


def _one_shot(frame: bytes, expected: int) -> bytes:
    """The call of the library's documentation, with its output limit."""
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=expected)


def _stream(frame: bytes, expected: int) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(frame)).read()


# What a frame is, what is expected of it, and a naive call that lets it pass.
HAZARDS = {
    "ten million bytes in place of a hundred": (codecs.compress(bytes(10**7)), 100, _one_shot),
    "trailing byte": (FRAME + b"x", 350, _one_shot),
    "second frame": (FRAME + FRAME, 350, _one_shot),
    "states 0, holds 20": (_set(codecs.compress(b"a" * 20), 5, 0), 0, _one_shot),
    "truncated": (FRAME[:-1], 350, _stream),
    "states no size": (
        zstandard.ZstdCompressor(write_content_size=False).compress(PAYLOAD),
        350,
        _one_shot,
    ),
    "window over 8 MiB": (
        zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=24)
        ).compress(bytes(1 << 24)),
        1 << 24,
        _one_shot,
    ),
    "checksum": (zstandard.ZstdCompressor(write_checksum=True).compress(PAYLOAD), 350, _one_shot),
}


class TestZstd:
    """Hazards of the library that decompress() guards against."""

    def refuse(self, frame: bytes, expected: int) -> None:
        with pytest.raises(FormatError) as caught:
            codecs.decompress(frame, expected)
        assert caught.value.rule == "P-ZSTD"

    def test_round_trip(self):
        assert codecs.decompress(FRAME, len(PAYLOAD)) == PAYLOAD

    @pytest.mark.parametrize("hazard", HAZARDS)
    def test_what_a_naive_call_lets_pass_is_refused(self, hazard):
        frame, expected, naive = HAZARDS[hazard]
        naive(frame, expected)  # no error
        self.refuse(frame, expected)

    def test_exabytes_are_refused_before_they_are_allocated(self):
        frame = bytes.fromhex("28b52ffde0") + (7 * 10**18).to_bytes(8, "little") + b"\x01\x00\x00"
        with pytest.raises(MemoryError):
            _one_shot(frame, 100)
        self.refuse(frame, 100)

    def test_threads_share_no_decompressor(self):
        frames = [codecs.compress(bytes([i]) * 100_000) for i in range(50)]
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda frame: codecs.decompress(frame, 100_000), frames * 20)
            for i, data in enumerate(found):
                assert data == bytes([i % 50]) * 100_000

    def test_not_a_frame(self):
        self.refuse(b"", 5)
        self.refuse(b"hello world", 5)
        self.refuse(_set(codecs.compress(b"a" * 20), 5, 0), 20)
