"""Mask and value streams of one chunk: positions and words to bytes, and back.

A chunk is a run of elements of one tensor. Its *mask* says which positions are kept; its *values*
say, with the base's word at each kept position, which word the fine-tune has there. Both are
defined byte by byte in format_spec/SPEC.md. Decoding treats every stream as hostile.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from nps_compress import entropy_coding, mask_coding, ulp_coding
from nps_compress._jit import jit
from nps_compress.dtypes import PRUNABLE, DType, Words
from nps_compress.errors import FormatError
from nps_compress.mask_coding import Place

Positions = npt.NDArray[np.uint32]  # ascending, within the chunk

DEFAULT_LEVEL = 3
# Changed words by which a codec is chosen: zstd shows with few what it makes of their planes, a
# table of frequencies has to pay.
_SAMPLE, _SAMPLE_OF_TABLES = 1 << 10, 1 << 12
MAX_ZSTD_WINDOW = 1 << 23
_GAP8_ESCAPE, _GAP16_ESCAPE = 0xFF, 0xFFFF
# Outside these densities the other codec was never the smaller one on random masks.
_BITMASK_FROM, _GAP8_UNTIL = 0.07, 0.15
_GAP8_FROM, _GAP16_UNTIL = 0.002, 0.01
_ONE_ROW = Place(0, 1 << 48)
# A learned mask takes far longer to decode than others: this share of their bytes it must save.
_LEARNED_SAVES = 1 / 32


class MaskCodec(IntEnum):
    """How the positions kept in a chunk are stored."""

    EMPTY = 0
    FULL = 1
    BITMASK = 2
    GAP8 = 3
    GAP16 = 4
    DRAWN = 7  # follow from the tensor's parameters (sign_codec.py)
    PARAMETERS = 8  # not a mask: the first chunk of a tensor that has them
    CODED = 9  # come with the magnitudes of integers (grid_codec.py)
    LEARNED = 10  # as likely as in their row and column so far (mask_coding.py)


class ValueCodec(IntEnum):
    """How the values at kept positions are stored. 19 to 31 are reserved for quantised values."""

    NONE = 0
    REPLACE = 1
    XOR = 2
    ULP = 3
    CODED_ULP = 4
    SIGNS = 16
    LEVELS = 17
    GRID = 18


# How exact values may be stored, the likeliest first.
EXACT_CODECS = (ValueCodec.CODED_ULP, ValueCodec.ULP, ValueCodec.REPLACE, ValueCodec.XOR)
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EncodedChunk:
    """The streams of one chunk as they are stored."""

    nnz: int
    mask_codec: MaskCodec
    mask_raw_bytes: int
    mask_compressed: bool
    mask: bytes
    planes_compressed: int  # bit i set: plane i is a zstd frame
    planes: tuple[bytes, ...]  # least significant byte of each payload word first
    work: int = 0  # what decoding takes beside undoing zstd, counted as bytes

    @property
    def data(self) -> bytes:
        """Mask and planes, end to end."""
        return self.mask + b"".join(self.planes)

    @property
    def raw_bytes(self) -> int:
        """Bytes of mask and planes once zstd is undone."""
        planes = (
            self.nnz if self.planes_compressed >> index & 1 else len(plane)
            for index, plane in enumerate(self.planes)
        )
        return self.mask_raw_bytes + sum(planes)

    def stored_raw(self) -> EncodedChunk:
        """The same chunk without zstd."""
        mask = decompress(self.mask, self.mask_raw_bytes) if self.mask_compressed else self.mask
        planes = tuple(
            decompress(plane, self.nnz) if self.planes_compressed >> index & 1 else plane
            for index, plane in enumerate(self.planes)
        )
        return EncodedChunk(self.nnz, self.mask_codec, self.mask_raw_bytes, False, mask, 0, planes)


# -- work ---------------------------------------------------------------------------------------
#
# What a reader does for what is not stored as such counts as bytes of decoded streams, of which
# the format allows so many for each byte of a file. All for ints and int64 arrays alike.

DRAWN_PER_BYTE, CODED_PER_BYTE, BYTES_PER_CODED = 32, 4, 4
# For each byte stored, work that no writer goes beyond, since C-EXPANSION allows little more.
MOST_WORK = 255


def drawing_work(numel: Any) -> Any:
    """Of drawing which of so many elements are kept."""
    return numel // DRAWN_PER_BYTE


def learning_work(numel: Any) -> Any:
    """Of decoding a learned mask of so many elements."""
    return numel // CODED_PER_BYTE


def decoding_work(numel: Any, nnz: Any) -> Any:
    """Of decoding so many magnitudes, of which ``nnz`` are not 0."""
    return numel // CODED_PER_BYTE + BYTES_PER_CODED * nnz


def distances_work(token_bytes: Any, itemsize: Any, nnz: Any) -> Any:
    """Of decoding so many distances."""
    return ulp_coding.table_work(token_bytes) + itemsize * nnz


# -- zstd -------------------------------------------------------------------------------------


class _Zstd(threading.local):
    """Compressors and decompressors are not thread-safe: one of each per thread."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def compress(data: bytes, level: int = DEFAULT_LEVEL, dictionary: bytes = b"") -> bytes:
    """One zstd frame that states its content size, without checksum or dictionary id.

    dictionary: what may be repeated as if it came before; of 8 bytes or more, or none.
    """
    compressor = None if dictionary else _zstd.compressors.get(level)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(
            level=level,
            dict_data=_dictionary(dictionary) if dictionary else None,
            write_content_size=True,
            write_checksum=False,
            write_dict_id=False,
        )
        if not dictionary:
            _zstd.compressors[level] = compressor
    return compressor.compress(data)


def decompress(
    frame: bytes, expected_bytes: int, rule: str = "P-ZSTD", dictionary: bytes = b""
) -> bytes:
    """Undo :func:`compress`, allocating nothing before the frame is known to fit.

    The only caller of the decompressor: the library's own limits do not bind where a frame states
    its own size, ignore what follows a frame, and accept an empty result for a frame of size 0.

    Raises:
        FormatError: the frame is not exactly one frame of ``expected_bytes`` bytes.
    """
    try:
        parameters = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise FormatError(rule, f"not a zstd frame ({error})") from None
    if expected_bytes == 0:
        raise FormatError(rule, "an empty stream must be stored as no bytes")
    if parameters.content_size != expected_bytes:
        raise FormatError(
            rule, f"zstd frame states {parameters.content_size} bytes, expected {expected_bytes}"
        )
    if parameters.dict_id or parameters.has_checksum or parameters.window_size > MAX_ZSTD_WINDOW:
        raise FormatError(
            rule, "zstd frame with a dictionary id, a checksum or a window over 8 MiB"
        )
    decompressor = _zstd.decompressor
    if dictionary:
        decompressor = zstandard.ZstdDecompressor(dict_data=_dictionary(dictionary))
    try:
        data = decompressor.decompress(
            frame, max_output_size=expected_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise FormatError(rule, f"zstd frame does not decompress ({error})") from None
    if len(data) != expected_bytes:
        raise FormatError(rule, f"zstd frame held {len(data)} bytes, expected {expected_bytes}")
    return data


def _dictionary(content: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def compress_if_smaller(data: bytes, level: int = DEFAULT_LEVEL) -> tuple[bytes, bool]:
    """The zstd frame and True, or ``data`` itself and False where that is no larger."""
    if len(data) < 16:  # a frame's own header alone takes about that
        return data, False
    frame = compress(data, level)
    return (frame, True) if len(frame) < len(data) else (data, False)


# -- masks ------------------------------------------------------------------------------------


class BitmaskCodec:
    """One bit per element, least significant bit first; bits past the chunk's end are 0."""

    id = MaskCodec.BITMASK

    @staticmethod
    def raw_bytes_range(numel: int, nnz: int) -> tuple[int, int]:
        """The least and most bytes the stream can have."""
        size = -(-numel // 8)
        return size, size

    @staticmethod
    def encode(positions: Positions, numel: int) -> bytes:
        """positions: [nnz] uint32, ascending -> the stream."""
        bits = np.zeros(numel, np.uint8)
        bits[positions] = 1
        return np.packbits(bits, bitorder="little").tobytes()

    @staticmethod
    def decode(data: bytes, numel: int, nnz: int) -> Positions:
        """The stream -> [nnz] uint32. Raises FormatError (P-POPCOUNT, P-TAIL)."""
        positions = np.empty(nnz + 8, np.uint32)
        stream = np.frombuffer(data, np.uint8)
        _check_mask(_bitmask_decode(stream, numel, BIT_COUNTS, BIT_POSITIONS, positions))
        return positions[:nnz]


class Gap8Codec:
    """One byte per kept position: how many were skipped before it; 255 skips 255 and goes on."""

    id = MaskCodec.GAP8

    @staticmethod
    def raw_bytes_range(numel: int, nnz: int) -> tuple[int, int]:
        """The least and most bytes the stream can have."""
        return nnz, nnz + (numel - nnz) // _GAP8_ESCAPE

    @staticmethod
    def encode(positions: Positions, numel: int) -> bytes:
        """positions: [nnz] uint32, ascending -> the stream."""
        return _gaps(positions, numel, np.dtype("u1")).tobytes()

    @staticmethod
    def decode(data: bytes, numel: int, nnz: int) -> Positions:
        """The stream -> [nnz] uint32. Raises FormatError (P-GAP, P-ESCAPE, P-POPCOUNT)."""
        positions = np.empty(nnz, np.uint32)
        _check_mask(_gap8_decode(np.frombuffer(data, np.uint8), numel, positions))
        return positions


class Gap16Codec:
    """As gap8 with 16-bit gaps and escape 65,535; all low bytes come first, then all high bytes."""

    id = MaskCodec.GAP16

    @staticmethod
    def raw_bytes_range(numel: int, nnz: int) -> tuple[int, int]:
        """The least and most bytes the stream can have."""
        return 2 * nnz, 2 * (nnz + (numel - nnz) // _GAP16_ESCAPE)

    @staticmethod
    def encode(positions: Positions, numel: int) -> bytes:
        """positions: [nnz] uint32, ascending -> the stream."""
        words = _gaps(positions, numel, np.dtype("<u2"))
        return words.view(np.uint8).reshape(-1, 2).T.tobytes()

    @staticmethod
    def decode(data: bytes, numel: int, nnz: int) -> Positions:
        """The stream -> [nnz] uint32. Raises FormatError (P-GAP, P-ESCAPE, P-POPCOUNT)."""
        if len(data) % 2:
            raise FormatError("C-MASKSIZE", f"gap16 stream of odd length {len(data)}")
        planes = np.frombuffer(data, np.uint8).reshape(2, -1)
        positions = np.empty(nnz, np.uint32)
        _check_mask(_gap16_decode(planes[0], planes[1], numel, positions))
        return positions


class LearnedCodec:
    """A binary decision per element, by how often its row and column were kept so far."""

    id = MaskCodec.LEARNED

    @staticmethod
    def raw_bytes_range(numel: Any, nnz: Any) -> tuple[int, Any]:
        """The least and most bytes the stream can have; a multiple of 4."""
        return mask_coding.stream_bytes_range(numel)

    @staticmethod
    def encode(positions: Positions, numel: int, place: Place = _ONE_ROW) -> bytes:
        """positions: [nnz] uint32, ascending, nnz from 1 to numel - 1 -> the stream."""
        return mask_coding.encode_positions(positions, numel, place)

    @staticmethod
    def decode(data: bytes, numel: int, nnz: int, place: Place = _ONE_ROW) -> Positions:
        """The stream -> [nnz] uint32. Raises FormatError (P-CODE, P-POPCOUNT)."""
        positions = np.empty(nnz, np.uint32)
        status = mask_coding.decode_positions(data, numel, place, positions)
        if status != entropy_coding.OK:
            raise FormatError(*_LEARNED_FAULTS[status])
        return positions


_LEARNED_FAULTS = {
    entropy_coding.ENDS_EARLY: ("P-CODE", "the mask ends before all is decoded"),
    entropy_coding.ENDS_LATE: ("P-CODE", "the mask doesn't end where it should"),
    entropy_coding.MISCOUNTED: (
        "P-POPCOUNT",
        "mask keeps another number of elements than its record says",
    ),
}
_AnyMask = type[BitmaskCodec] | type[Gap8Codec] | type[Gap16Codec] | type[LearnedCodec]
MASK_CODECS: dict[MaskCodec, _AnyMask] = {
    codec.id: codec for codec in (BitmaskCodec, Gap8Codec, Gap16Codec, LearnedCodec)
}


def mask_raw_bytes_range(codec: MaskCodec, numel: Any, nnz: Any) -> tuple[Any, Any]:
    """The least and most bytes a mask can have before compression; ints or int64 arrays alike."""
    if codec in (MaskCodec.EMPTY, MaskCodec.FULL, MaskCodec.DRAWN):
        return 0, 0
    return MASK_CODECS[codec].raw_bytes_range(numel, nnz)


def decode_mask(
    codec: MaskCodec, data: bytes, numel: int, nnz: int, place: Place = _ONE_ROW
) -> Positions | None:
    """Kept positions of a chunk, ascending; None where all are kept. Raises FormatError (P-*)."""
    if codec is MaskCodec.EMPTY:
        return np.empty(0, np.uint32)
    if codec is MaskCodec.FULL:
        return None
    if codec is MaskCodec.LEARNED:
        return LearnedCodec.decode(data, numel, nnz, place)
    return MASK_CODECS[codec].decode(data, numel, nnz)


def encode_mask(
    positions: Positions,
    numel: int,
    level: int = DEFAULT_LEVEL,
    place: Place | None = None,
    bits: Bytes | None = None,
) -> tuple[MaskCodec, int, bytes, bool]:
    """The smallest of the codecs that can win at this density: codec, raw bytes, stored, zstd?

    place: None where a learned mask is not to be tried. bits: [ceil(numel / 8)], the bitmask, where
    it is known already.
    """
    nnz = len(positions)
    if nnz == 0:
        return MaskCodec.EMPTY, 0, b"", False
    if nnz == numel:
        return MaskCodec.FULL, 0, b"", False
    density = nnz / numel
    candidates: list[type[BitmaskCodec] | type[Gap8Codec] | type[Gap16Codec]] = []
    if density < _GAP16_UNTIL:
        candidates.append(Gap16Codec)
    if _GAP8_FROM < density < _GAP8_UNTIL:
        candidates.append(Gap8Codec)
    if density > _BITMASK_FROM:
        candidates.append(BitmaskCodec)
    best: tuple[MaskCodec, int, bytes, bool] | None = None
    for codec in candidates:
        if bits is not None and codec is BitmaskCodec:
            raw = bits.tobytes()
        else:
            raw = codec.encode(positions, numel)
        stored, compressed = compress_if_smaller(raw, level)
        if best is None or len(stored) < len(best[2]):
            best = (codec.id, len(raw), stored, compressed)
    assert best is not None
    if place is not None:
        learned = LearnedCodec.encode(positions, numel, place)
        pays = len(learned) <= (1 - _LEARNED_SAVES) * len(best[2])
        if pays and learning_work(numel) <= (MOST_WORK - 1) * len(learned):
            return MaskCodec.LEARNED, len(learned), learned, False
    return best


def _gaps(
    positions: Positions, numel: int, dtype: np.dtype[np.unsignedinteger]
) -> npt.NDArray[np.unsignedinteger]:
    """The stream of a gap codec with elements of this type, whose largest value is the escape."""
    escape = np.iinfo(dtype).max
    out = np.empty(positions.size + numel // int(escape), dtype)
    return out[: _write_gaps(positions, escape, out)]


@jit
def _write_gaps(positions, escape, out):  # type: ignore[no-untyped-def]
    at, following = 0, np.uint32(0)
    for i in range(positions.size):
        gap = positions[i] - following
        while gap >= escape:
            out[at] = escape
            at += 1
            gap -= np.uint32(escape)
        out[at] = gap
        at += 1
        following = positions[i] + np.uint32(1)
    return at


_OK, _BAD_POPCOUNT, _BAD_TAIL, _BAD_GAP, _BAD_ESCAPE = range(5)
_MASK_FAULTS = {
    _BAD_POPCOUNT: ("P-POPCOUNT", "mask keeps another number of elements than its record says"),
    _BAD_TAIL: ("P-TAIL", "mask has bits set past the end of the chunk"),
    _BAD_GAP: ("P-GAP", "mask runs past the end of the chunk"),
    _BAD_ESCAPE: ("P-ESCAPE", "mask ends in an escape"),
}


def _check_mask(status: int) -> None:
    if status != _OK:
        raise FormatError(*_MASK_FAULTS[status])


# The bits set in each byte, ascending, and how many: one look-up a byte and no branch a bit.
BIT_COUNTS = np.array([byte.bit_count() for byte in range(256)], np.int64)
BIT_POSITIONS = np.zeros((256, 8), np.uint32)
for _byte in range(256):
    _set = [bit for bit in range(8) if _byte >> bit & 1]
    BIT_POSITIONS[_byte, : len(_set)] = _set


@jit
def _bitmask_decode(data, numel, counts, table, positions):  # type: ignore[no-untyped-def]
    room = positions.size - 8  # every byte writes eight positions, of which its count are kept
    found = 0
    for i in range(data.size):
        if found > room:
            return _BAD_POPCOUNT
        byte = data[i]
        for k in range(8):
            positions[found + k] = np.uint32(8 * i) + table[byte, k]
        found += counts[byte]
    if found != room:
        return _BAD_POPCOUNT
    return _BAD_TAIL if found and positions[found - 1] >= numel else _OK


@jit
def _gap8_decode(data, numel, positions):  # type: ignore[no-untyped-def]
    # Unsigned indices: numba would check signed ones for wrapping around.
    found = np.uint64(0)
    nnz = np.uint64(positions.size)
    position = np.uint64(0)
    for i in range(data.size):
        gap = data[i]
        position += np.uint64(gap)
        if gap == 255:
            continue
        if position >= np.uint64(numel):
            return _BAD_GAP
        if found == nnz:
            return _BAD_POPCOUNT
        positions[found] = np.uint32(position)
        found += np.uint64(1)
        position += np.uint64(1)
    if data.size and data[data.size - 1] == 255:
        return _BAD_ESCAPE
    return _OK if found == nnz else _BAD_POPCOUNT


@jit
def _gap16_decode(low, high, numel, positions):  # type: ignore[no-untyped-def]
    found = np.uint64(0)
    nnz = np.uint64(positions.size)
    position = np.uint64(0)
    for i in range(low.size):
        gap = np.uint64(low[i]) | (np.uint64(high[i]) << np.uint64(8))
        position += gap
        if gap == 65535:
            continue
        if position >= np.uint64(numel):
            return _BAD_GAP
        if found == nnz:
            return _BAD_POPCOUNT
        positions[found] = np.uint32(position)
        found += np.uint64(1)
        position += np.uint64(1)
    if low.size and low[low.size - 1] == 255 and high[high.size - 1] == 255:
        return _BAD_ESCAPE
    return _OK if found == nnz else _BAD_POPCOUNT


# -- values -----------------------------------------------------------------------------------


def payload_of(
    codec: ValueCodec, base: Words | None, new: Words, dtype: DType
) -> npt.NDArray[np.unsignedinteger]:
    """What is stored for each kept element. base, new: [nnz] words of one width -> [nnz] words.

    ``REPLACE``: the new word. ``XOR``: base ^ new. ``ULP``: both words are mapped to integers in
    the order of the floats they stand for, subtracted, zigzagged, minus one.
    """
    if codec is ValueCodec.REPLACE or base is None:
        return new
    if codec is ValueCodec.XOR:
        return base ^ new
    signed = np.dtype(f"<i{dtype.itemsize}")
    out = np.empty_like(new)
    _ulp_payload(base.view(signed), new.view(signed), 8 * dtype.itemsize - 1, out.view(signed))
    return out


@jit
def _ulp_payload(base, new, top, out):  # type: ignore[no-untyped-def]
    # Words as signed integers. In the order of the floats a negative one has its other bits turned.
    low = (np.int64(1) << top) - np.int64(1)
    for i in range(base.size):
        before, after = np.int64(base[i]), np.int64(new[i])
        before ^= (before >> 63) & low
        after ^= (after >> 63) & low
        difference = (after - before) << (63 - top) >> (63 - top)
        zigzag = ((difference << 1) ^ (difference >> 63)) - 1
        out[i] = zigzag << (63 - top) >> (63 - top)  # plain Python refuses what does not fit


def apply_payload(
    codec: ValueCodec,
    planes: npt.NDArray[np.uint8],
    positions: Positions | None,
    base: Words,
    out: Words,
    dtype: DType,
) -> None:
    """Write the fine-tune's words: the base's, changed at the kept positions.

    planes: [itemsize, nnz] uint8, least significant byte first; positions: [nnz] uint32 or None
    for all; base, out: [numel] words; ``out`` may be ``base``.
    """
    if positions is None:
        if codec is ValueCodec.REPLACE:
            out.view(np.uint8).reshape(-1, dtype.itemsize)[:] = planes.T
            return
        positions = np.arange(out.size, dtype=np.uint32)
    if dtype.itemsize == 2 and out is not base:
        _copy_apply16(int(codec), planes[0], planes[1], positions, base, out)
        return
    if out is not base:
        np.copyto(out, base)
    if dtype.itemsize == 2:
        _apply16(int(codec), planes[0], planes[1], positions, out)
    else:
        _apply(int(codec), planes, positions, out, np.uint64(8 * dtype.itemsize))


@jit
def _apply16(codec, low, high, positions, out):  # type: ignore[no-untyped-def]
    # Words are widened to int32 with their sign: `x >> 31` is then all ones for a negative float.
    low_bits = np.int32(0x7FFF)
    for i in range(positions.size):
        payload = np.uint16(low[i]) | (np.uint16(high[i]) << np.uint16(8))
        position = positions[i]
        if codec == 3:
            zigzag = (np.uint32(payload) + np.uint32(1)) & np.uint32(0xFFFF)
            step = (zigzag >> np.uint32(1)) ^ (np.uint32(0) - (zigzag & np.uint32(1)))
            word = np.int32(np.int16(out[position]))
            word ^= (word >> np.int32(31)) & low_bits
            word = np.int32(np.int16(np.uint32(word) + step))
            word ^= (word >> np.int32(31)) & low_bits
            out[position] = np.uint16(word)
        elif codec == 2:
            out[position] ^= payload
        else:
            out[position] = payload


@jit
def _copy_apply16(codec, low, high, positions, base, out):  # type: ignore[no-untyped-def]
    # Tile by tile, so that the words to change are still in the nearest cache.
    tile = 16384
    done = 0
    for start in range(0, out.size, tile):
        target, source = out[start : start + tile], base[start : start + tile]
        for i in range(target.size):
            target[i] = source[i]
        end = np.searchsorted(positions[done : done + tile], np.uint32(start + target.size))
        here = slice(done, done + end)
        _apply16(codec, low[here], high[here], positions[here], out)
        done = done + int(end)


@jit
def _apply(codec, planes, positions, out, bits):  # type: ignore[no-untyped-def]
    one = np.uint64(1)
    top = bits - one
    low_mask = (one << top) - one
    full_mask = low_mask | (one << top)
    for i in range(positions.size):
        payload = np.uint64(0)
        for plane in range(planes.shape[0]):
            payload |= np.uint64(planes[plane, i]) << np.uint64(8 * plane)
        position = positions[i]
        word = np.uint64(out[position])
        if codec == 3:
            zigzag = (payload + one) & full_mask
            step = zigzag >> one
            if zigzag & one:
                step ^= full_mask
            if word >> top:
                word ^= low_mask
            word = (word + step) & full_mask
            if word >> top:
                word ^= low_mask
        elif codec == 2:
            word ^= payload
        else:
            word = payload
        out[position] = word


def encode_planes(
    payload: npt.NDArray[np.unsignedinteger], level: int = DEFAULT_LEVEL
) -> tuple[int, tuple[bytes, ...]]:
    """Split words into byte planes, each a zstd frame where that is smaller. payload: [nnz]."""
    compressed, planes = 0, []
    for index, plane in enumerate(payload.view(np.uint8).reshape(-1, payload.itemsize).T):
        stored, smaller = compress_if_smaller(plane.tobytes(), level)
        compressed |= int(smaller) << index
        planes.append(stored)
    return compressed, tuple(planes)


def decode_planes(stored: Sequence[bytes], compressed: int, nnz: int) -> npt.NDArray[np.uint8]:
    """Stored planes -> [itemsize, nnz] uint8. Raises FormatError (P-ZSTD)."""
    planes = np.empty((len(stored), nnz), np.uint8)
    for index, data in enumerate(stored):
        raw = decompress(data, nnz) if compressed >> index & 1 else data
        planes[index] = np.frombuffer(raw, np.uint8)
    return planes


# -- chunks -----------------------------------------------------------------------------------


def encode_chunk(
    base: Words | None,
    new: Words,
    dtype: DType,
    codec: ValueCodec,
    level: int = DEFAULT_LEVEL,
    place: Place | None = None,
    bits: Bytes | None = None,
) -> EncodedChunk:
    """Encode what turns ``base`` into ``new``, [numel] words each; base None: keep all.

    place: of the chunk, where its mask may be a learned one; bits: [numel / 8] where they differ,
    if that is known.
    """
    if base is None:
        positions = None
        nnz = new.size
        mask: tuple[MaskCodec, int, bytes, bool]
        mask = (MaskCodec.FULL if nnz else MaskCodec.EMPTY, 0, b"", False)
    else:
        if bits is None:
            bits = np.packbits(base != new, bitorder="little")
        positions = _positions_of(bits)
        nnz = len(positions)
        mask = encode_mask(positions, new.size, level, place, bits)
    compressed, planes = _encode_values(codec, base, new, positions, dtype, level)
    work = learning_work(new.size) if mask[0] is MaskCodec.LEARNED else 0
    if codec is ValueCodec.CODED_ULP and planes:
        work += distances_work(len(planes[0]), dtype.itemsize, nnz)
    return EncodedChunk(nnz, mask[0], mask[1], mask[3], mask[2], compressed, planes, work)


def _encode_values(
    codec: ValueCodec,
    base: Words | None,
    new: Words,
    positions: Positions | None,
    dtype: DType,
    level: int,
) -> tuple[int, tuple[bytes, ...]]:
    """Value planes of kept words, and which of them are zstd frames. positions: None for all."""
    if base is None or positions is None:
        return encode_planes(payload_of(codec, base, new, dtype), level)
    if codec is not ValueCodec.CODED_ULP:
        return encode_planes(payload_of(codec, base[positions], new[positions], dtype), level)
    if not positions.size:
        return 0, ()
    return 0, ulp_coding.encode_distances(*ulp_coding.distances_of(base, new, positions, dtype))


def _positions_of(bits: Bytes) -> Positions:
    """Where a bitmask has bits set, ascending. bits: [n / 8] -> [nnz]."""
    nnz = int(np.bitwise_count(bits).sum(dtype=np.int64))
    positions = np.empty(nnz + 8, np.uint32)
    _bitmask_decode(bits, 8 * bits.size, BIT_COUNTS, BIT_POSITIONS, positions)
    return positions[:nnz]


def best_value_codec(
    base: Words, new: Words, dtype: DType, choices: Collection[ValueCodec] = EXACT_CODECS
) -> ValueCodec:
    """The value codec that stores this chunk in the fewest bytes. base, new: [numel] words.

    choices: REPLACE among them; those that the dtype rules out are passed over.
    """
    for stop in (1 << 14, 1 << 17, base.size):  # the first that are changed are mostly near
        changed = _positions_of(np.packbits(base[:stop] != new[:stop], bitorder="little"))
        if len(changed) >= _SAMPLE_OF_TABLES:
            break
    changed = changed[:_SAMPLE_OF_TABLES]
    if not len(changed):
        return ValueCodec.REPLACE
    allowed = {ValueCodec.REPLACE, ValueCodec.XOR}
    if dtype.is_float:
        allowed.add(ValueCodec.ULP)
    if dtype.name in PRUNABLE:
        allowed.add(ValueCodec.CODED_ULP)

    def size(codec: ValueCodec) -> float:
        sample = changed if codec is ValueCodec.CODED_ULP else changed[:_SAMPLE]
        _, planes = _encode_values(codec, base, new, sample, dtype, DEFAULT_LEVEL)
        return sum(map(len, planes)) / len(sample)

    return min((codec for codec in choices if codec in allowed), key=size)
