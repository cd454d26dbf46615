"""What is fuzzed: functions of bytes that return quietly or raise where a promise is broken.

Each target compares the package with a second opinion: the standard's minimal reader, or a
reference written for clarity. An input that the package refuses must be refused by the second
opinion under the same rule.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard

import minimal_reader
from nps_compress import codecs
from nps_compress.codecs import MaskCodec, ValueCodec
from nps_compress.dtypes import DTYPES, DType
from nps_compress.errors import FormatError
from nps_compress.format.layout import Op
from nps_compress.format.reader import NpsReader

# -- masks ------------------------------------------------------------------------------------


def reference_mask(codec: MaskCodec, data: bytes, numel: int, nnz: int) -> list[int] | str:
    """Positions kept, or the rule broken: SPEC.md sections 5 and 8, word by word."""
    if codec is MaskCodec.BITMASK:
        bits = [8 * i + k for i, byte in enumerate(data) for k in range(8) if byte >> k & 1]
        if len(bits) != nnz:
            return "P-POPCOUNT"
        return "P-TAIL" if any(bit >= numel for bit in bits) else bits
    if codec is MaskCodec.GAP8:
        gaps, escape = list(data), 255
    else:
        half = len(data) // 2
        gaps, escape = [a | b << 8 for a, b in zip(data[:half], data[half:], strict=True)], 65535
    positions: list[int] = []
    position = 0
    for gap in gaps:
        position += gap
        if gap != escape:
            if position >= numel:
                return "P-GAP"
            if len(positions) == nnz:
                return "P-POPCOUNT"
            positions.append(position)
            position += 1
    if gaps and gaps[-1] == escape:
        return "P-ESCAPE"
    return positions if len(positions) == nnz else "P-POPCOUNT"


def masks(data: bytes) -> None:
    """One byte of codec, numel (4), nnz (2), then a stream of a size that the index allows."""
    if len(data) < 7:
        return
    codec = MaskCodec(2 + data[0] % 3)
    numel = 1 + int.from_bytes(data[1:5], "little") % (1 << 24)
    nnz = 1 + int.from_bytes(data[5:7], "little") % min(numel, 4096)
    stream = data[7:]
    if codec is MaskCodec.BITMASK:
        numel = max(1, 8 * len(stream) - data[1] % 8)
        nnz = min(nnz, numel)
    low, high = codecs.mask_raw_bytes_range(codec, numel, nnz)
    stream = stream[:high]
    if codec is MaskCodec.GAP16:
        stream = stream[: len(stream) // 2 * 2]
    if len(stream) < low:
        return
    expected = reference_mask(codec, stream, numel, nnz)
    found: list[int] | str
    try:
        positions = codecs.decode_mask(codec, stream, numel, nnz)
        assert positions is not None
        assert positions.dtype == np.uint32
        found = positions.tolist()
    except FormatError as error:
        found = error.rule
    assert found == expected, (codec, found, expected)


# -- zstd -------------------------------------------------------------------------------------


def zstd(data: bytes) -> None:
    """The size expected (2), then what claims to be a frame."""
    if len(data) < 2:
        return
    expected, frame = int.from_bytes(data[:2], "little"), data[2:]
    try:
        found = codecs.decompress(frame, expected)
    except FormatError as error:
        if error.rule != "P-ZSTD":
            raise
        return
    assert len(found) == expected > 0
    parameters = zstandard.get_frame_parameters(frame)
    assert parameters.content_size == expected
    assert not parameters.has_checksum
    assert not parameters.dict_id
    # The streaming interface, which knows nothing of the stated size, sees the same and no more.
    stream = zstandard.ZstdDecompressor().decompressobj()
    assert stream.decompress(frame) == found
    assert stream.eof
    assert not stream.unused_data


# -- values -----------------------------------------------------------------------------------


def reference_value(codec: ValueCodec, payload: int, base: int, dtype: DType) -> int:
    """SPEC.md section 6 in unbounded integers."""
    if codec is ValueCodec.REPLACE:
        return payload
    if codec is ValueCodec.XOR:
        return base ^ payload
    bits = 8 * dtype.itemsize

    def order(word: int) -> int:
        return word ^ ((1 << (bits - 1)) - 1) if word >> (bits - 1) else word

    zigzag = (payload + 1) % (1 << bits)
    step = -(zigzag + 1) // 2 if zigzag % 2 else zigzag // 2
    return order((order(base) + step) % (1 << bits))


def values(data: bytes) -> None:
    """Dtype, codec, places (2 bytes), then base words and as many payload words."""
    if len(data) < 4:
        return
    dtype = DTYPES[data[0] % len(DTYPES)]
    codec = ValueCodec(1 + data[1] % (3 if dtype.is_float else 2))
    kept = int.from_bytes(data[2:4], "little")
    words = np.frombuffer(data[4 : 4 + (len(data) - 4) // 8 * 8], dtype.word)
    base, payload = words[: len(words) // 2], words[len(words) // 2 :]
    if not len(base):
        return
    chosen = np.array([i for i in range(len(base)) if kept >> (i % 16) & 1], np.uint32)
    positions = None if len(chosen) == len(base) else chosen
    payload = np.ascontiguousarray(payload[: len(chosen)])
    _, stored = codecs.encode_planes(payload)
    planes = payload.view(np.uint8).reshape(-1, dtype.itemsize).T.copy()
    assert len(stored) == dtype.itemsize
    expected = base.tolist()
    for position, p in zip(chosen.tolist(), payload.tolist(), strict=True):
        expected[position] = reference_value(codec, p, expected[position], dtype)
    out = np.full_like(base, 0x5A)
    codecs.apply_payload(codec, planes, positions, base, out, dtype)
    assert out.tolist() == expected
    if codec is ValueCodec.ULP:  # the encoder inverts the decoder, but for "no step"
        changed = base[chosen] != out[chosen]
        again = codecs.payload_of(codec, base[chosen][changed], out[chosen][changed], dtype)
        assert np.array_equal(again, payload[changed])


# -- files ------------------------------------------------------------------------------------

Outcome = tuple[str, ...]


def repaired(data: bytes, flags: int) -> bytes:
    """The file with its checksums made right again, so that the checks behind them are reached.

    Bit 0 of flags: CRCs, sizes and digest of the index; bit 1: sizes of heap and metadata; bit 2:
    digests of chunks; bit 3: where the index starts. What makes no sense is left as it is.
    """
    if len(data) < 160 or not flags & 1:
        return data
    header, body, footer = data[:64], data[64:-96], bytearray(data[-96:])
    start = min(max(int.from_bytes(footer[:8], "little") - 64, 0), len(body))
    chunks, index = body[:start], bytearray(body[start:])
    if footer[68] == 0 and len(index) >= 64:
        index, used = _repaired_index(index, chunks, flags)
        if flags & 8 and used <= 1 << 16:
            chunks = chunks[:used].ljust(used, b"\0")
    raw = int.from_bytes(footer[16:24], "little") if footer[68] else len(index)
    size = 64 + len(chunks) + len(index) + 96
    footer[:32] = struct.pack("<4Q", 64 + len(chunks), len(index), raw, size)
    footer[32:64] = hashlib.sha256(index).digest()
    footer[84:88] = zlib.crc32(footer[:84]).to_bytes(4, "little")
    header = header[:60] + zlib.crc32(header[:60]).to_bytes(4, "little")
    return header + chunks + bytes(index) + bytes(footer)


def _repaired_index(index: bytearray, chunks: bytes, flags: int) -> tuple[bytearray, int]:
    base, tensors, files, _, records, _, _ = struct.unpack_from("<4I3Q", index)
    place = 64 + 104 * base + 128 * (tensors + files)
    heap_start = place + 56 * records
    if heap_start > len(index):
        return index, len(chunks)
    if flags & 2:
        rows = [64 + 104 * i for i in range(base)]
        rows += [64 + 104 * base + 128 * i for i in range(tensors + files)]
        heap = sum(int.from_bytes(index[row : row + 2], "little") for row in rows)
        heap = min(heap, len(index) - heap_start)
        struct.pack_into("<QQ", index, 24, heap, len(index) - heap_start - heap)
    offset = 0
    for row in range(place, heap_start, 56):
        (mask,), planes = (
            struct.unpack_from("<I", index, row),
            struct.unpack_from("<8I", index, row + 16),
        )
        size = mask + sum(planes)
        if flags & 4 and offset + size <= len(chunks):
            digest = hashlib.sha256(chunks[offset : offset + size]).digest()[:8]
            index[row + 48 : row + 56] = digest
        offset += -(-size // 8) * 8
    return index, offset


def package_outcome(path: Path) -> Outcome:
    """What the package makes of a file without its base."""
    try:
        with NpsReader(path) as reader:
            found = [
                *(tensor.name for tensor in (*reader.base, *reader.tensors, *reader.files)),
                reader.base_root.hex(),
                reader.content_digest.hex(),
                repr(sorted(reader.metadata.items())),
            ]
            for entry in (*reader.tensors, *reader.files):
                reader.verify(entry)
            return tuple(found)
    except FormatError as error:
        return ("refused", error.rule)


def minimal_outcome(data: bytes) -> Outcome:
    """What the standard's minimal reader makes of the same bytes."""
    try:
        nps = minimal_reader.Nps(data)
        found = [
            *(tensor.name for tensor in (*nps.base, *nps.tensors, *nps.files)),
            nps.base_root.hex(),
            nps.content_digest.hex(),
            repr(sorted(nps.metadata.items())),
        ]
        nps.verify()
        return tuple(found)
    except minimal_reader.Refused as error:
        return ("refused", error.rule)


def compare_readers(path: Path, data: bytes) -> Outcome:
    """The outcome on which both readers agree. Raises AssertionError where they do not."""
    mine, theirs = package_outcome(path), minimal_outcome(data)
    assert mine == theirs, (mine, theirs)
    return mine


def reader(data: bytes) -> None:
    """Flags (see :func:`repaired`), then a file."""
    if not data:
        return
    file = repaired(data[1:], data[0])
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, file)
        path = Path(f"/proc/self/fd/{descriptor}")
        outcome = compare_readers(path, file)
        if outcome[0] != "refused":
            _rebuild(path)
    finally:
        os.close(descriptor)


def _rebuild(path: Path) -> None:
    """Apply an accepted file to a base of zeros: every write must stay inside its tensor."""
    with NpsReader(path) as nps:
        for entry in nps.tensors:
            if entry.op is not Op.DELTA or entry.numel > 1 << 16:
                continue
            out = np.zeros(entry.numel, entry.dtype.word)
            for number in range(entry.chunk_count):
                chunk = nps.read_chunk(entry, number)
                start = number << entry.chunk_log2
                part = out[start : start + chunk.numel]
                codecs.apply_payload(
                    entry.value_codec, chunk.planes, chunk.positions, part, part, entry.dtype
                )


TARGETS: dict[str, Callable[[bytes], None]] = {
    "reader": reader,
    "masks": masks,
    "zstd": zstd,
    "values": values,
}
