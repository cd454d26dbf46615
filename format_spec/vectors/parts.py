"""Building blocks of vectors: zstd frames, chunks, records, whole files, field by field.

Written from SPEC.md with struct and BLAKE3 alone. zstd frames are made block by block, so that the
bytes depend on no library's version. Every field can be set to what it should not be.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

MAGIC = b"\x89NPS\r\n\x1a\n"
DTYPES = {  # name: code, width
    **{"BOOL": (1, 1), "U8": (2, 1), "I8": (3, 1), "U16": (4, 2), "I16": (5, 2), "U32": (6, 4)},
    **{"I32": (7, 4), "U64": (8, 8), "I64": (9, 8), "F8_E4M3": (10, 1), "F8_E5M2": (11, 1)},
    **{"F8_E8M0": (12, 1), "F16": (13, 2), "BF16": (14, 2), "F32": (15, 4), "F64": (16, 8)},
    "C64": (17, 8),
}
FLOATS = ("F16", "BF16", "F32", "F64")
COPY, DELTA, NEW = 1, 2, 3
NONE, REPLACE, XOR, ULP, CODED_ULP, SIGNS, LEVELS, GRID = 0, 1, 2, 3, 4, 16, 17, 18
EMPTY, FULL, BITMASK, GAP8, GAP16, DRAWN, PARAMETERS, CODED, LEARNED = 0, 1, 2, 3, 4, 7, 8, 9, 10
NO_BASE = 0xFFFFFFFF


def digest_of(data: bytes) -> bytes:
    return blake3(data).digest()


def little(value: int, size: int) -> bytes:
    return (value % (1 << (8 * size))).to_bytes(size, "little")


# -- zstd frames (RFC 8878), of raw and run-length blocks ----------------------------------------


def frame(
    data: bytes, *, flags: int = 0x80, size: int | None = None, window: bytes = b"\x50"
) -> bytes:
    """One frame that states its size in 4 bytes. flags: the frame header descriptor's byte.

    window: the window descriptor; 0x50 is 1 MiB.
    """
    out = b"\x28\xb5\x2f\xfd" + bytes([flags])
    if not flags & 0x20:  # not a single segment
        out += window
    stated = len(data) if size is None else size
    width = {0: 1 if flags & 0x20 else 0, 1: 2, 2: 4, 3: 8}[flags >> 6]
    out += little(stated - 256 if width == 2 else stated, width) if width else b""
    runs = _runs(data) or [(b"", False)]
    for number, (part, constant) in enumerate(runs):
        last = number == len(runs) - 1
        out += little(int(last) | int(constant) << 1 | len(part) << 3, 3)
        out += part[:1] if constant else part
    return out


def _runs(data: bytes) -> list[tuple[bytes, bool]]:
    """Blocks of at most 128 KiB: long runs of one byte, and what lies between."""
    blocks: list[tuple[bytes, bool]] = []
    start = 0
    while start < len(data):
        end = start
        while end < len(data) and data[end] == data[start] and end - start < 1 << 17:
            end += 1
        if end - start >= 8:
            blocks.append((data[start:end], True))
        elif blocks and not blocks[-1][1]:
            blocks[-1] = (blocks[-1][0] + data[start:end], False)
        else:
            blocks.append((data[start:end], False))
        start = end
    return blocks


# A block that zstd itself compressed (level 19): 256 bytes, i * i mod 7 for i from 0 on.
SQUARES = bytes(i * i % 7 for i in range(256))
SQUARES_FRAME = bytes.fromhex("28b52ffd6000007d000040000104020204010001007551850b")

# -- chunks -------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """One chunk as it will be stored; every field can be set to what it should not be."""

    mask: bytes
    mask_raw: int
    nnz: int
    codec: int
    mask_zstd: int
    planes: list[bytes]
    planes_zstd: int
    reserved: int = 0
    digest: bytes | None = None
    padding: bytes | None = None
    sizes: list[int] | None = None  # of the planes, as recorded
    mask_stored: int | None = None

    @property
    def data(self) -> bytes:
        return self.mask + b"".join(self.planes)

    def stored(self) -> bytes:
        padding = bytes(-len(self.data) % 8) if self.padding is None else self.padding
        return self.data + padding

    def record(self) -> bytes:
        sizes = [len(p) for p in self.planes] if self.sizes is None else self.sizes
        return struct.pack(
            "<IIIBBBB8I8s",
            len(self.mask) if self.mask_stored is None else self.mask_stored,
            self.mask_raw,
            self.nnz,
            self.codec,
            self.mask_zstd,
            self.planes_zstd,
            self.reserved,
            *(sizes + [0] * (8 - len(sizes))),
            digest_of(self.data)[:8] if self.digest is None else self.digest,
        )


def mask_stream(codec: int, positions: Sequence[int], numel: int) -> bytes:
    if codec in (EMPTY, FULL):
        return b""
    if codec == BITMASK:
        bits = bytearray(-(-numel // 8))
        for position in positions:
            bits[position // 8] |= 1 << position % 8
        return bytes(bits)
    escape = 255 if codec == GAP8 else 65535
    gaps, previous = [], -1
    for position in positions:
        gap = position - previous - 1
        gaps += [escape] * (gap // escape) + [gap % escape]
        previous = position
    if codec == GAP8:
        return bytes(gaps)
    return bytes(gap % 256 for gap in gaps) + bytes(gap // 256 for gap in gaps)


def order(word: int, bits: int) -> int:
    return word ^ ((1 << (bits - 1)) - 1) if word >> (bits - 1) else word


def payload_word(codec: int, base: int, new: int, bits: int) -> int:
    if codec == REPLACE:
        return new
    if codec == XOR:
        return base ^ new
    step = (order(new, bits) - order(base, bits)) % (1 << bits)
    if step >> (bits - 1):
        step -= 1 << bits
    return ((2 * step if step >= 0 else -2 * step - 1) - 1) % (1 << bits)


def chunk_of(
    base: Sequence[int] | None,
    new: Sequence[int],
    width: int,
    mask_codec: int,
    value_codec: int,
    compress: bool = False,
    kept: Sequence[int] | None = None,
) -> Chunk:
    """What turns base into new. kept: positions to keep, changed or not."""
    if kept is None:
        kept = [i for i in range(len(new)) if base is None or base[i] != new[i]]
    if not kept:
        mask_codec = EMPTY
    elif len(kept) == len(new):
        mask_codec = FULL
    elif mask_codec == FULL:
        raise ValueError("not full")
    raw = mask_stream(mask_codec, kept, len(new))
    words = [
        payload_word(value_codec, 0 if base is None else base[i], new[i], 8 * width) for i in kept
    ]
    planes = [bytes(word >> 8 * plane & 255 for word in words) for plane in range(width)]
    mask, mask_zstd, planes_zstd = raw, 0, 0
    if compress:
        if raw and len(frame(raw)) < len(raw):
            mask, mask_zstd = frame(raw), 1
        for number, plane in enumerate(planes):
            if plane and len(frame(plane)) < len(plane):
                planes[number] = frame(plane)
                planes_zstd |= 1 << number
    return Chunk(mask, len(raw), len(kept), mask_codec, mask_zstd, planes, planes_zstd)


# -- files --------------------------------------------------------------------------------------


def identity(name: bytes, dtype: int, shape: Sequence[int], digest: bytes) -> bytes:
    """What sections 3.7 and 3.8 say of a tensor."""
    dims = b"".join(little(dim, 8) for dim in shape)
    return little(len(name), 2) + name + bytes([dtype, len(shape) % 256]) + dims + digest


@dataclass
class Base:
    name: bytes
    dtype: int
    shape: list[int]
    data: bytes
    digest: bytes | None = None
    rank: int | None = None
    reserved: int = 0
    name_bytes: int | None = None
    digest_field: bytes | None = None

    def identity(self) -> bytes:
        return identity(self.name, self.dtype, self.shape, self.digest or digest_of(self.data))

    def record(self, digest_bytes: int) -> bytes:
        field = (self.digest or digest_of(self.data))[:digest_bytes].ljust(32, b"\0")
        return struct.pack(
            "<HBBI8Q32s",
            len(self.name) if self.name_bytes is None else self.name_bytes,
            self.dtype,
            min(len(self.shape), 255) if self.rank is None else self.rank,
            self.reserved,
            *(self.shape + [0] * (8 - len(self.shape))),
            field if self.digest_field is None else self.digest_field,
        )


@dataclass
class Entry:
    """A tensor or file of the fine-tune. data: what it must be rebuilt to."""

    name: bytes
    dtype: int
    shape: list[int]
    op: int
    codec: int
    chunk_log2: int
    base_index: int
    data: bytes
    chunks: list[Chunk] = field(default_factory=list)
    digest: bytes | None = None  # whole
    rank: int | None = None
    reserved0: int = 0
    reserved1: int = 0
    reserved2: bytes = bytes(16)
    name_bytes: int | None = None
    digest_field: bytes | None = None

    def whole_digest(self) -> bytes:
        return digest_of(self.data) if self.digest is None else self.digest

    def identity(self) -> bytes:
        return identity(self.name, self.dtype, self.shape, self.whole_digest())

    def record(self, is_file: bool, digest_bytes: int) -> bytes:
        copied = self.op == COPY and not is_file
        field = bytes(32) if copied else self.whole_digest()[:digest_bytes].ljust(32, b"\0")
        return struct.pack(
            "<HBBBBBBII8Q32s16s",
            len(self.name) if self.name_bytes is None else self.name_bytes,
            self.dtype,
            len(self.shape) if self.rank is None else self.rank,
            self.op,
            self.codec,
            self.chunk_log2,
            self.reserved0,
            self.base_index,
            self.reserved1,
            *(self.shape + [0] * (8 - len(self.shape))),
            field if self.digest_field is None else self.digest_field,
            self.reserved2,
        )


@dataclass
class File:
    """A whole file; ``set_*`` overrides fields by name once all others are computed."""

    base: list[Base] = field(default_factory=list)
    tensors: list[Entry] = field(default_factory=list)
    files: list[Entry] = field(default_factory=list)
    metadata: bytes = b"{}"
    heap: bytes | None = None
    chunk_records: bytes | None = None
    after_chunks: bytes = b""
    missing: int = 0  # bytes of chunk data
    compress_index: bool = False
    dictionary: bytes = b""  # a raw index, to be used where the index is compressed
    index_frame: Callable[[bytes], bytes] | None = None
    digest_bytes: int = 32
    set_head: dict[str, Any] = field(default_factory=dict)
    set_header: dict[str, Any] = field(default_factory=dict)
    set_footer: dict[str, Any] = field(default_factory=dict)
    after_index: bytes = b""

    def build(self) -> bytes:
        entries = self.tensors + self.files
        chunks = [chunk for entry in entries for chunk in entry.chunks]
        data = b"".join(chunk.stored() for chunk in chunks) + self.after_chunks
        data = data[: len(data) - self.missing]
        index = self.index(chunks)
        stored = index
        if self.compress_index:
            stored = (self.index_frame or frame)(index)
        fields: dict[str, Any] = {
            "index_offset": 64 + len(data),
            "index_stored_bytes": len(stored),
            "index_raw_bytes": len(index),
            "file_bytes": 64 + len(data) + len(stored) + len(self.after_index) + 96,
            "index_digest": digest_of(
                stored + (digest_of(self.dictionary) if self.dictionary else b"")
            ),
            "major": 1,
            "minor": self.set_header.get("minor", 0),
            "index_compression": 2 if self.dictionary else int(self.compress_index),
            "reserved": bytes(3),
            "dictionary_bytes": len(self.dictionary),
            "dictionary_digest64": digest_of(self.dictionary)[:8] if self.dictionary else bytes(8),
            "magic_reversed": MAGIC[::-1],
            **self.set_footer,
        }
        order = ("index_offset", "index_stored_bytes", "index_raw_bytes", "file_bytes")
        footer = struct.pack("<4Q", *(fields[name] for name in order)) + fields["index_digest"]
        footer += struct.pack("<HHB", fields["major"], fields["minor"], fields["index_compression"])
        footer += fields["reserved"] + little(fields["dictionary_bytes"], 4)
        footer += fields["dictionary_digest64"]
        footer += little(fields.get("crc32", zlib.crc32(footer)), 4) + fields["magic_reversed"]
        return self.header() + data + stored + self.after_index + footer

    def header(self) -> bytes:
        fields: dict[str, Any] = {
            "magic": MAGIC,
            "major": 1,
            "minor": 0,
            "reserved0": 0,
            "required_features": 0,
            "optional_features": 0,
            "reserved1": bytes(28),
            **self.set_header,
        }
        crc = fields.pop("crc32", None)
        raw = struct.pack("<8sHHIQQ28s", *fields.values())
        return raw + little(zlib.crc32(raw) if crc is None else crc, 4)

    def base_root(self) -> bytes:
        return digest_of(b"".join(item.identity() for item in self.base))

    def content_digest(self) -> bytes:
        content = b"nps-content\n" + little(len(self.tensors), 4)
        content += b"".join(item.identity() for item in self.tensors)
        content += little(len(self.files), 4)
        for item in self.files:
            content += little(len(item.name), 2) + item.name + little((item.shape or [0])[0], 8)
            content += item.whole_digest()
        return digest_of(content)

    def raw_index(self) -> bytes:
        return self.index([chunk for entry in self.tensors + self.files for chunk in entry.chunks])

    def index(self, chunks: list[Chunk]) -> bytes:
        names = b"".join(item.name for item in (*self.base, *self.tensors, *self.files))
        heap = names if self.heap is None else self.heap
        records = b"".join(chunk.record() for chunk in chunks)
        if self.chunk_records is not None:
            records = self.chunk_records
        head = {
            "base_records": len(self.base),
            "tensor_records": len(self.tensors),
            "file_records": len(self.files),
            "digest_bytes": self.digest_bytes,
            "chunk_records": len(records) // 56,
            "heap_bytes": len(heap),
            "metadata_bytes": len(self.metadata),
            "base_root": self.base_root(),
            "content_digest": self.content_digest(),
            "reserved": bytes(24),
            **self.set_head,
        }
        parts = [struct.pack("<4I3Q32s32s24s", *head.values())]
        parts += [item.record(self.digest_bytes) for item in self.base]
        parts += [item.record(False, self.digest_bytes) for item in self.tensors]
        parts += [item.record(True, self.digest_bytes) for item in self.files]
        return b"".join((*parts, records, heap, self.metadata))


# -- tensors to build files from -----------------------------------------------------------------


def pack_words(words: Sequence[int], width: int) -> bytes:
    return b"".join(little(word, width) for word in words)


def random_words(seed: str, count: int, width: int) -> list[int]:
    source = random.Random(seed)
    return [source.getrandbits(8 * width) for _ in range(count)]


def base_tensor(name: str, dtype: str, shape: list[int], words: Sequence[int]) -> Base:
    code, width = DTYPES[dtype]
    return Base(name.encode(), code, shape, pack_words(words, width))


def words_of(base: Base) -> list[int]:
    width = next(width for code, width in DTYPES.values() if code == base.dtype)
    data = base.data
    return [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]


def delta(
    name: str,
    bases: list[Base],
    index: int,
    changes: dict[int, int],
    *,
    codec: int = REPLACE,
    masks: int | Sequence[int] = GAP8,
    chunk_log2: int = 10,
    compress: bool = False,
    kept: Iterable[int] | None = None,
) -> Entry:
    """The base tensor with some words changed. masks: the mask codec, or one for each chunk."""
    base = bases[index]
    before = words_of(base)
    after = list(before)
    for position, word in changes.items():
        after[position] = word
    width = len(base.data) // len(before) if before else 1
    chunks = []
    for number, start in enumerate(range(0, len(before), 1 << chunk_log2)):
        part = slice(start, start + (1 << chunk_log2))
        mask = masks if isinstance(masks, int) else masks[number]
        here = None
        if kept is not None:
            size = len(before[part])
            here = sorted(p - start for p in kept if start <= p < start + size)
        chunks.append(chunk_of(before[part], after[part], width, mask, codec, compress, here))
    return Entry(
        name.encode(),
        base.dtype,
        list(base.shape),
        DELTA,
        codec,
        chunk_log2,
        index,
        pack_words(after, width),
        chunks,
    )


def new(
    name: str,
    dtype: str,
    shape: list[int],
    words: Sequence[int],
    chunk_log2: int = 10,
    compress: bool = False,
) -> Entry:
    code, width = DTYPES[dtype]
    size = 1 << chunk_log2
    chunks = [
        chunk_of(None, words[start : start + size], width, FULL, REPLACE, compress)
        for start in range(0, len(words), size)
    ]
    data = pack_words(words, width)
    return Entry(name.encode(), code, shape, NEW, REPLACE, chunk_log2, NO_BASE, data, chunks)


def copy(name: str, bases: list[Base], index: int) -> Entry:
    base = bases[index]
    return Entry(name.encode(), base.dtype, list(base.shape), COPY, NONE, 0, index, base.data)


def side_file(name: str, data: bytes, chunk_log2: int = 24, compress: bool = False) -> Entry:
    return new(name, "U8", [len(data)], list(data), chunk_log2, compress)


def base_file(name: str, data: bytes) -> Entry:
    return Entry(name.encode(), 2, [len(data)], COPY, NONE, 0, NO_BASE, data)
