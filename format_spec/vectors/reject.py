"""Files that a reader must refuse, by ``RULE-what``: ``REJECT``; and bases that are not theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from parts import (
    BITMASK,
    DELTA,
    EMPTY,
    FULL,
    GAP8,
    GAP16,
    MAGIC,
    NEW,
    NO_BASE,
    NONE,
    REPLACE,
    ULP,
    XOR,
    Base,
    Chunk,
    Entry,
    File,
    base_file,
    base_tensor,
    chunk_of,
    copy,
    delta,
    frame,
    little,
    new,
    random_words,
    sha,
    side_file,
)
from valid import VALID, expanding


def good() -> File:
    """A file with a delta of three chunks, a copy, a new tensor and both kinds of side files."""
    words = random_words("g", 2500, 2)
    bases = [base_tensor(name, "BF16", [50, 50], words) for name in ("a", "b")]
    changes = {i: words[i] ^ 5 for i in (3, 1500, 1501, 2499)}
    return File(
        base=bases,
        tensors=[
            delta("a", bases, 0, changes, codec=ULP),
            copy("b", bases, 1),
            new("c", "BF16", [7], list(range(7))),
        ],
        files=[side_file("config.json", b"{}"), base_file("vocab.txt", b"word")],
        metadata=b'{"k":"v"}',
    )


REJECT: dict[str, Callable[[], bytes]] = {}


def reject(name: str, change: Callable[[File], Any], start: Callable[[], File] = good) -> None:
    """The file of ``start`` with ``change`` made to it, every checksum right but where it says."""

    def build() -> bytes:
        file = start()
        change(file)
        return file.build()

    assert name not in REJECT, name
    REJECT[name] = build


def reject_bytes(name: str, change: Callable[[bytes], bytes]) -> None:
    assert name not in REJECT, name
    REJECT[name] = lambda: change(good().build())


def assign(target: Any, **values: Any) -> None:
    for name, value in values.items():
        assert hasattr(target, name), name
        setattr(target, name, value)


# F: size of the file
reject_bytes("F-SIZE-empty", lambda data: b"")
reject_bytes("F-SIZE-one-byte-short-of-header-and-footer", lambda data: data[:159])
reject_bytes("F-SIZE-header-alone", lambda data: data[:64])

# H: header
for _what, _magic in {
    "text-mode": b"\x89NPS\n\x1a\n\0",
    "unix-to-dos": b"\x89NPS\r\r\n\x1a",
    "seven-bits": b"\x09NPS\r\n\x1a\n",
    "another-format": b"\x89PNG\r\n\x1a\n",
}.items():
    reject(f"H-MAGIC-{_what}", lambda f, m=_magic: f.set_header.update(magic=m))
reject_bytes("H-MAGIC-leading-byte", lambda data: b"\0" + data)
reject("H-CRC-wrong", lambda f: f.set_header.update(crc32=1))
reject_bytes("H-CRC-flipped-bit", lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:])
reject("H-MAJOR-0", lambda f: f.set_header.update(major=0))
reject("H-MAJOR-2", lambda f: f.set_header.update(major=2))
reject("H-FEATURE-lowest", lambda f: f.set_header.update(required_features=1))
reject("H-FEATURE-highest", lambda f: f.set_header.update(required_features=1 << 63))
reject("H-RESERVED-first", lambda f: f.set_header.update(reserved0=1))
reject("H-RESERVED-last", lambda f: f.set_header.update(reserved1=bytes(27) + b"\1"))

# T: footer
reject_bytes("T-MAGIC-truncated", lambda data: data[:-1])
reject_bytes("T-MAGIC-tail", lambda data: data + b"\0")
reject("T-MAGIC-header-s", lambda f: f.set_footer.update(magic_reversed=MAGIC))
reject("T-CRC-wrong", lambda f: f.set_footer.update(crc32=0))
reject("T-VERSION-minor", lambda f: f.set_footer.update(minor=1))
reject("T-VERSION-major", lambda f: f.set_footer.update(major=2))
reject("T-RESERVED-last", lambda f: f.set_footer.update(reserved=bytes(14) + b"\1"))
reject_bytes("T-SIZE-two-files", lambda data: data + data)
reject("T-SIZE-less", lambda f: f.set_footer.update(file_bytes=226))
reject("T-SIZE-most", lambda f: f.set_footer.update(file_bytes=2**64 - 1))
reject("T-INDEX-in-header", lambda f: f.set_footer.update(index_offset=56))
reject("T-INDEX-past-end", lambda f: f.set_footer.update(index_offset=2**64 - 8))
reject("T-INDEX-unaligned", lambda f: assign(f, after_chunks=b"\0"))
reject("T-INDEX-gap-before-footer", lambda f: assign(f, after_index=bytes(8)))
reject(
    "T-INDEX-wraps", lambda f: f.set_footer.update(index_offset=2**64 - 64, index_stored_bytes=64)
)
reject("T-INDEXSIZE-below-head", lambda f: f.set_footer.update(index_raw_bytes=63))
reject("T-INDEXSIZE-over-limit", lambda f: f.set_footer.update(index_raw_bytes=2**30 + 1))
reject("T-INDEXSIZE-raw-differs", lambda f: f.set_footer.update(index_raw_bytes=2**20))
reject(
    "T-INDEXSIZE-frame-not-smaller",
    lambda f: assign(f, compress_index=True, index_frame=lambda raw: raw),
)
reject(
    "T-INDEXSIZE-bomb",
    lambda f: assign(f, compress_index=True, metadata=b'{"' + b"a" * 100_000 + b'":""}'),
)
for _what, _beyond, _rule in (
    ("ratio-by-one", 1, "T-INDEXSIZE"),
    ("garbage-at-the-ratio", 0, "I-ZSTD"),
):
    reject(
        f"{_rule}-{_what}",
        lambda f, b=_beyond: (
            assign(f, compress_index=True, index_frame=lambda raw: b"\x55" * 100),
            f.set_footer.update(index_raw_bytes=8 * 100 + 65536 + b),
        ),
    )
reject("T-COMPRESSION-unknown", lambda f: f.set_footer.update(index_compression=2))

# I: index
reject("I-DIGEST-wrong", lambda f: f.set_footer.update(index_sha256=bytes(32)))
for _what, _frame in {
    "trailing-byte": lambda raw: frame(raw) + b"\0",
    "second-frame": lambda raw: frame(raw) + frame(b"x"),
    "skippable-frame": lambda raw: frame(raw) + bytes.fromhex("502a4d1800000000"),
    "truncated": lambda raw: frame(raw)[:-1],
    "not-a-frame": lambda raw: raw[:100],
    "states-less": lambda raw: frame(raw, size=len(raw) - 1),
    "states-more": lambda raw: frame(raw, size=len(raw) + 1),
    "states-nothing": lambda raw: frame(raw, flags=0),
    "dictionary": lambda raw: frame(raw)[:4] + b"\x81\x50\x01" + frame(raw)[6:],
    "checksum": lambda raw: frame(raw, flags=0x84) + little(0, 4),
    "window": lambda raw: frame(raw, window=b"\x69"),
}.items():
    reject(f"I-ZSTD-{_what}", lambda f, z=_frame: assign(f, compress_index=True, index_frame=z))
for _table, _limit in (("base", 2**20), ("tensor", 2**20), ("file", 64)):
    reject(
        f"I-COUNT-{_table}-records",
        lambda f, t=_table, n=_limit: f.set_head.update({f"{t}_records": n + 1}),
    )
reject(
    "I-SIZE-as-many-records-as-allowed",
    lambda f: f.set_head.update(base_records=2**20, tensor_records=2**20, file_records=64),
)
reject("I-SIZE-chunk-records", lambda f: f.set_head.update(chunk_records=4))
reject("I-SIZE-wraps", lambda f: f.set_head.update(chunk_records=2**61))
reject("I-SIZE-heap", lambda f: f.set_head.update(heap_bytes=2**64 - 1))
reject("I-SIZE-metadata", lambda f: f.set_head.update(metadata_bytes=10))
reject("I-RESERVED-head", lambda f: f.set_head.update(reserved0=1))
reject("I-RESERVED-head-last", lambda f: f.set_head.update(reserved1=1 << 191))
reject("I-RESERVED-base-record", lambda f: assign(f.base[1], reserved=1))

# N: names
reject("N-HEAP-more", lambda f: assign(f, heap=b"ababcconfig.jsonvocab.txt!"))
reject("N-HEAP-less", lambda f: assign(f, heap=b"ababcconfig.jsonvocab.tx"))
reject("N-LENGTH-empty", lambda f: assign(f.base[0], name=b""))
reject("N-LENGTH-513", lambda f: assign(f.base[0], name=b"a" * 513))
reject("N-UTF8-byte", lambda f: assign(f.tensors[2], name=b"\xff"))
reject("N-UTF8-surrogate", lambda f: assign(f.tensors[2], name=b"\xed\xa0\x80"))
reject("N-UTF8-overlong", lambda f: assign(f.tensors[2], name=b"x\xc0\xaf"))
reject(
    "N-UTF8-split-between-names",
    lambda f: (assign(f.base[1], name=b"b\xc3"), assign(f.tensors[0], name=b"\xa9")),
)
for _what, _name in {
    "nul": b"c\0",
    "escape": b"c\x1b[31m",
    "newline": b"c\n",
    "delete": b"c\x7f",
    "c1": "c\u009b".encode(),
}.items():
    reject(f"N-CONTROL-{_what}", lambda f, n=_name: assign(f.tensors[2], name=n))
reject("N-ORDER-descending", lambda f: assign(f.base[0], name=b"c"))
reject("N-ORDER-twice", lambda f: assign(f.tensors[1], name=b"a"))
reject("N-ORDER-files", lambda f: f.files.reverse())
reject(
    "N-RESERVED-tensor",
    lambda f: f.tensors.insert(0, replace(f.tensors.pop(2), name=b"__metadata__", chunks=[])),
)
reject("N-RESERVED-base", lambda f: assign(f.base[0], name=b"__metadata__"))
for _what, _name in {
    "parent": b"../x",
    "absolute": b"/x",
    "folder": b"a/b",
    "backslash": b"a\\b",
    "dot": b".x",
    "space": b"a b",
    "long": b"a" * 129,
    "trailing-newline-form": "x\u00e9".encode(),
}.items():
    reject(f"N-FILE-{_what}", lambda f, n=_name: assign(f, files=[replace(f.files[0], name=n)]))

# S: shapes
for _what, _code in (("0", 0), ("18", 18), ("255", 255)):
    reject(f"S-DTYPE-{_what}", lambda f, c=_code: assign(f.base[0], dtype=c))
reject("S-DTYPE-tensor", lambda f: assign(f.tensors[0], dtype=99))
reject("S-RANK-9", lambda f: assign(f.base[0], rank=9))
reject("S-RANK-255", lambda f: assign(f.tensors[2], rank=255))
reject("S-DIM-past-rank", lambda f: assign(f.base[0], rank=1))
reject("S-NUMEL-overflow", lambda f: assign(f.base[0], shape=[2**63, 2]))
reject("S-NUMEL-just-over", lambda f: assign(f.base[0], shape=[2**48 + 1]))
reject("S-NUMEL-hidden-by-zero", lambda f: assign(f.base[0], shape=[2**40, 2**40, 0]))
reject("S-NUMEL-minus-one", lambda f: assign(f.tensors[0], shape=[2**64 - 1, 1]))

# R: records of tensors and files
reject("R-RESERVED-byte", lambda f: assign(f.tensors[0], reserved0=1))
reject("R-RESERVED-word", lambda f: assign(f.tensors[1], reserved1=1))
reject("R-RESERVED-tail", lambda f: assign(f.tensors[2], reserved2=bytes(15) + b"\1"))
reject("R-RESERVED-file", lambda f: assign(f.files[0], reserved1=1))
reject("R-OP-0", lambda f: assign(f.tensors[0], op=0))
reject("R-OP-4", lambda f: assign(f.tensors[0], op=4))
reject("R-FILE-delta", lambda f: assign(f.files[0], op=DELTA))
reject("R-FILE-dtype", lambda f: assign(f.files[0], dtype=3))
reject("R-FILE-rank-0", lambda f: assign(f.files[1], shape=[]))
reject("R-FILE-rank-2", lambda f: assign(f.files[1], shape=[2, 2]))
reject("R-FILE-size", lambda f: assign(f.files[1], shape=[2**26 + 1]))
reject("R-BASE-out-of-range", lambda f: assign(f.tensors[0], base_index=2))
reject("R-BASE-none-for-delta", lambda f: assign(f.tensors[0], base_index=NO_BASE))
reject("R-BASE-none-for-copy", lambda f: assign(f.tensors[1], base_index=NO_BASE))
reject("R-BASE-given-for-new", lambda f: assign(f.tensors[2], base_index=0))
reject("R-BASE-given-for-file", lambda f: assign(f.files[0], base_index=0))
reject("R-SHAPE-transposed", lambda f: assign(f.base[0], shape=[25, 100]))
reject("R-SHAPE-flattened", lambda f: assign(f.base[1], shape=[2500]))
reject("R-SHAPE-dtype", lambda f: assign(f.base[0], dtype=13))
reject("R-COPY-digest", lambda f: assign(f.tensors[1], sha256=sha(b"")))
for _what, _row, _codec in (
    ("none-for-delta", 0, NONE),
    ("unknown", 0, 4),
    ("quantised", 0, 16),
    ("copy", 1, REPLACE),
    ("new-none", 2, NONE),
    ("new-xor", 2, XOR),
):
    reject(f"R-VALUES-{_what}", lambda f, r=_row, c=_codec: assign(f.tensors[r], codec=c))
reject("R-VALUES-file", lambda f: assign(f.files[0], codec=XOR))
reject(
    "R-VALUES-ulp-of-integers",
    lambda f: (assign(f.base[0], dtype=5), assign(f.tensors[0], dtype=5)),
)
for _log2 in (0, 9, 25, 64, 255):
    reject(f"R-CHUNKLOG-{_log2}", lambda f, c=_log2: assign(f.tensors[0], chunk_log2=c))
reject("R-CHUNKLOG-copy", lambda f: assign(f.tensors[1], chunk_log2=10))
reject("R-CHUNKLOG-file", lambda f: assign(f.files[0], chunk_log2=25))

# C: chunk records
reject("C-COUNT-less", lambda f: f.tensors[0].chunks.pop())
reject("C-COUNT-more", lambda f: f.tensors[0].chunks.append(f.tensors[0].chunks[0]))
reject("C-COUNT-chunk-size", lambda f: assign(f.tensors[0], chunk_log2=11))
reject("C-COUNT-huge-shape", lambda f: assign(f.tensors[2], shape=[2**48]))
reject(
    "C-COUNT-copy", lambda f: assign(f.tensors[1], chunks=[chunk_of(None, [], 2, FULL, REPLACE)])
)


def first_chunk(name: str, **values: Any) -> None:
    reject(name, lambda f: assign(f.tensors[0].chunks[0], **values))


first_chunk("C-NNZ-over", nnz=1025)
first_chunk("C-NNZ-most", nnz=2**32 - 1)
reject("C-NNZ-short-chunk", lambda f: assign(f.tensors[0].chunks[2], nnz=453))
first_chunk("C-CODEC-reserved", codec=5)
first_chunk("C-CODEC-unknown", codec=255)
first_chunk("C-CODEC-empty-but-kept", codec=EMPTY)
first_chunk("C-CODEC-full-but-not-all", codec=FULL)
first_chunk("C-CODEC-gap8-of-nothing", nnz=0)
reject("C-CODEC-bitmask-of-all", lambda f: assign(f.tensors[2].chunks[0], codec=BITMASK))
reject(
    "C-NEW-not-full",
    lambda f: assign(f.tensors[2], chunks=[chunk_of([0] * 7, list(range(7)), 2, BITMASK, REPLACE)]),
)
first_chunk("C-FLAGS-reserved", reserved=1)
first_chunk("C-FLAGS-mask", mask_zstd=2)
first_chunk("C-FLAGS-plane-past-width", planes_zstd=4)
first_chunk("C-FLAGS-highest-plane", planes_zstd=0x80)
first_chunk("C-MASKSIZE-gap8-less", mask_raw=0)
first_chunk("C-MASKSIZE-gap8-more", mask_raw=1 + (1024 - 1) // 255 + 1)
first_chunk("C-MASKSIZE-bitmask", codec=BITMASK, mask_raw=127)
first_chunk("C-MASKSIZE-gap16-more", codec=GAP16, mask_raw=4)
first_chunk("C-MASKSIZE-gap16-odd", codec=GAP16, mask_raw=3)
reject("C-MASKSIZE-full", lambda f: assign(f.tensors[2].chunks[0], mask_raw=1))
first_chunk("C-STORED-mask-raw", mask_stored=2)
first_chunk("C-STORED-mask-not-smaller", mask_zstd=1)
first_chunk("C-STORED-mask-empty-frame", mask_zstd=1, mask=b"")
first_chunk("C-STORED-plane-raw", sizes=[2, 1])
first_chunk("C-STORED-plane-not-smaller", planes_zstd=1)
first_chunk("C-STORED-plane-past-width", sizes=[1, 1, 1])
first_chunk("C-STORED-plane-missing", sizes=[1, 0])


def stored_zeros(numel: int) -> File:
    """``numel`` zero bytes, new, in a plane said to be one frame of 31 bytes."""
    chunk = chunk_of(None, [0], 1, FULL, REPLACE)
    assign(chunk, nnz=numel, planes_zstd=1, planes=[bytes(31)])
    entry = Entry(b"w", 2, [numel], NEW, REPLACE, 20, NO_BASE, bytes(numel), [chunk])
    return File(tensors=[entry])


reject("C-STORED-beyond-zstd", lambda f: None, lambda: stored_zeros(31 * 2**15 + 1))
reject("P-ZSTD-as-small-as-zstd-can", lambda f: None, lambda: stored_zeros(31 * 2**15))
reject("C-LAYOUT-hole-at-end", lambda f: assign(f, after_chunks=bytes(8)))
reject("C-LAYOUT-past-index", lambda f: assign(f, missing=8))


reject("C-EXPANSION-by-one", lambda f: None, lambda: expanding(1))


def _expanding_masks() -> File:
    """Bitmasks of 2 MiB that keep one element each: masks count as planes do."""
    mask = b"\1" + bytes((1 << 21) - 1)
    chunk = Chunk(frame(mask), len(mask), 1, BITMASK, 1, [b"\1"], 0)
    shape = [40 << 24]
    base = Base(b"w", 2, shape, b"")
    return File([base], [Entry(b"w", 2, shape, DELTA, REPLACE, 24, 0, b"", [chunk] * 40)])


reject("C-EXPANSION-masks", lambda f: None, _expanding_masks)

# Two faults: the rule that comes first is the one that is reported.
reject("H-MAGIC-before-crc", lambda f: f.set_header.update(magic=b"\x89NPS\n\x1a\n\0", crc32=1))
reject("H-CRC-before-major", lambda f: f.set_header.update(major=2, crc32=1))
reject("H-MAJOR-before-feature", lambda f: f.set_header.update(major=2, required_features=1))
reject("H-FEATURE-before-reserved", lambda f: f.set_header.update(required_features=1, reserved0=1))
reject(
    "H-RESERVED-before-footer",
    lambda f: (f.set_header.update(reserved0=1), f.set_footer.update(crc32=0)),
)
reject("T-CRC-before-version", lambda f: f.set_footer.update(crc32=0, minor=1))
reject("T-VERSION-before-reserved", lambda f: f.set_footer.update(minor=1, reserved=b"\1" * 15))
reject("T-RESERVED-before-size", lambda f: f.set_footer.update(reserved=b"\1" * 15, file_bytes=1))
reject("T-SIZE-before-index", lambda f: f.set_footer.update(file_bytes=1, index_offset=0))
reject("T-INDEX-before-its-size", lambda f: f.set_footer.update(index_offset=0, index_raw_bytes=1))
reject(
    "T-INDEXSIZE-before-compression",
    lambda f: f.set_footer.update(index_raw_bytes=1, index_compression=2),
)
reject(
    "T-COMPRESSION-before-digest",
    lambda f: f.set_footer.update(index_compression=2, index_sha256=bytes(32)),
)
reject("I-COUNT-before-size", lambda f: f.set_head.update(base_records=2**20 + 1, heap_bytes=2**60))
reject("I-SIZE-before-reserved", lambda f: f.set_head.update(heap_bytes=0, reserved0=1))
reject("I-RESERVED-before-heap", lambda f: (assign(f.base[0], reserved=1), assign(f, heap=b"")))
reject("N-HEAP-before-length", lambda f: assign(f.base[0], name_bytes=0))
reject("N-CONTROL-before-order", lambda f: assign(f.base[0], name=b"z\x1b"))
reject("N-ORDER-before-reserved", lambda f: assign(f.base[1], name=b"__metadata__"))
reject(
    "N-RESERVED-before-file",
    lambda f: (assign(f.base[0], name=b"__metadata__"), assign(f.files[0], name=b".x")),
)
reject(
    "N-FILE-before-dtype", lambda f: (assign(f.files[0], name=b".x"), assign(f.base[0], dtype=0))
)
reject("S-DTYPE-before-rank", lambda f: assign(f.base[0], dtype=0, rank=9))
reject("S-RANK-before-dim", lambda f: assign(f.base[0], rank=9, shape=[1] * 8))
reject("S-DIM-before-numel", lambda f: assign(f.base[0], rank=1, shape=[2**60, 1]))
reject(
    "S-NUMEL-of-the-base-before-the-tensors",
    lambda f: (assign(f.base[1], shape=[2**49]), assign(f.tensors[0], dtype=0)),
)
reject("R-RESERVED-before-op", lambda f: assign(f.tensors[0], reserved0=1, op=9))
reject("R-OP-before-base", lambda f: assign(f.tensors[0], op=9, base_index=9))
reject("R-FILE-before-base", lambda f: assign(f.files[1], shape=[2**26 + 1], base_index=0))
reject("R-BASE-before-shape", lambda f: assign(f.tensors[0], base_index=9, shape=[25, 100]))
reject("R-SHAPE-before-copy", lambda f: assign(f.tensors[1], shape=[2500], sha256=sha(b"")))
reject("R-COPY-before-values", lambda f: assign(f.tensors[1], sha256=sha(b""), codec=1))
reject("R-VALUES-before-chunklog", lambda f: assign(f.tensors[0], codec=9, chunk_log2=9))
reject(
    "R-CHUNKLOG-of-one-before-the-next",
    lambda f: (assign(f.tensors[0], chunk_log2=9), assign(f.tensors[2], reserved0=1)),
)
reject(
    "C-COUNT-before-nnz",
    lambda f: (assign(f.tensors[0].chunks[0], nnz=2000), f.tensors[0].chunks.pop()),
)
first_chunk("C-NNZ-before-codec", nnz=1025, codec=5)
reject("C-CODEC-before-new", lambda f: assign(f.tensors[2].chunks[0], codec=9))
reject(
    "C-NEW-before-flags",
    lambda f: assign(
        f.tensors[2],
        chunks=[replace(chunk_of([0] * 7, list(range(7)), 2, BITMASK, REPLACE), reserved=1)],
    ),
)
first_chunk("C-FLAGS-before-masksize", reserved=1, mask_raw=0)
first_chunk("C-MASKSIZE-before-stored", mask_raw=0, sizes=[9, 9])
reject(
    "C-STORED-before-layout",
    lambda f: (assign(f.tensors[0].chunks[0], sizes=[9, 9]), assign(f, after_chunks=bytes(8))),
)
reject(
    "C-LAYOUT-before-expansion", lambda f: assign(f, after_chunks=bytes(8)), lambda: expanding(4000)
)
reject("C-EXPANSION-before-metadata", lambda f: assign(f, metadata=b"["), lambda: expanding(1))
reject("M-JSON-before-keys", lambda f: assign(f, metadata=b'{"a":"b","a":1}'))
reject(
    "C-PADDING-before-digest",
    lambda f: assign(f.tensors[0].chunks[0], padding=b"\1" * 5, digest=bytes(8)),
)

# M: metadata
for _what, _text in {
    "empty": b"",
    "array": b"[]",
    "pairs": b'[["a","b"]]',
    "number": b'{"a":1}',
    "null": b'{"a":null}',
    "nan": b'{"a":NaN}',
    "huge-integer": b'{"a":' + b"9" * 5000 + b"}",
    "nested": b'{"a":{"b":"c"}}',
    "deep": b'{"a":' * 2000,
    "not-utf8": b'{"a":"\xff"}',
    "unpaired-surrogate": b'{"a":"\\ud800"}',
    "tail": b'{"a":"b"}x',
    "leading-space": b' {"a":"b"}',
    "byte-order-mark": b'\xef\xbb\xbf{"a":"b"}',
    "raw-newline": b'{"a":"\n"}',
    "trailing-comma": b'{"a":"b",}',
    "single-quotes": b"{'a':'b'}",
    "unclosed": b'{"a":"b"',
    "surrogate-key": b'{"\\udfff":"b"}',
}.items():
    reject(f"M-JSON-{_what}", lambda f, m=_text: assign(f, metadata=m))
reject("M-SIZE-over", lambda f: assign(f, metadata=b"[" * (2**20 + 1)))
reject("M-KEYS-same-value", lambda f: assign(f, metadata=b'{"a":"b","a":"b"}'))
reject("M-KEYS-escaped", lambda f: assign(f, metadata=b'{"a":"b","\\u0061":"c"}'))


# P and C-PADDING: what a chunk holds
reject("C-PADDING-last-byte", lambda f: assign(f.tensors[0].chunks[0], padding=bytes(4) + b"\1"))
first_chunk("P-DIGEST-wrong", digest=bytes(8))
first_chunk("P-DIGEST-of-nothing", digest=sha(b"")[:8])
reject(
    "P-DIGEST-empty-chunk",
    lambda f: assign(f.tensors[0].chunks[0], digest=bytes(8)),
    lambda: VALID["none-kept"](),
)
reject("P-DIGEST-file", lambda f: assign(f.files[0].chunks[0], digest=bytes(8)))


def plane_frame(name: str, made: Callable[[bytes], bytes]) -> None:
    """A new tensor of 3,000 zeros whose plane is ``made(zeros)``."""

    def change(file: File) -> None:
        tensor = new("z", "U8", [3000], [0] * 3000, 12)
        assign(tensor.chunks[0], planes=[made(bytes(3000))], planes_zstd=1)
        file.tensors.append(tensor)

    reject(name, change)


for _what, _made in {
    "not-a-frame": lambda raw: b"\x28\xb5\x2f\xfe" + bytes(20),
    "nothing-but-magic": lambda raw: b"\x28\xb5\x2f\xfd",
    "truncated": lambda raw: frame(raw)[:-1],
    "trailing-byte": lambda raw: frame(raw) + b"\0",
    "second-frame": lambda raw: frame(raw[:1500]) + frame(raw[1500:]),
    "empty-second-frame": lambda raw: frame(raw) + frame(b"", flags=0x20),
    "skippable-first": lambda raw: bytes.fromhex("502a4d1800000000") + frame(raw),
    "states-0": lambda raw: frame(raw, size=0),
    "states-less": lambda raw: frame(raw, size=2999),
    "states-more": lambda raw: frame(raw + b"\0", size=3001),
    "states-exabytes": lambda raw: frame(raw, flags=0xC0, size=7 * 10**18),
    "states-nothing": lambda raw: frame(raw, flags=0),
    "holds-less": lambda raw: frame(raw[:-1], size=3000),
    "holds-more": lambda raw: frame(raw + b"\0", size=3000),
    "checksum": lambda raw: frame(raw, flags=0x84) + little(0, 4),
    "dictionary": lambda raw: frame(raw)[:4] + b"\x81\x50\x01" + frame(raw)[6:],
    "window-9-mib": lambda raw: frame(raw, window=b"\x69"),
    "reserved-bit": lambda raw: frame(raw, flags=0x88),
    "reserved-block": lambda raw: frame(raw)[:10] + b"\x07\0\0" + frame(raw)[13:],
}.items():
    plane_frame(f"P-ZSTD-plane-{_what}", _made)


def mask_stream_of(
    name: str, codec: int, numel: int, nnz: int, stream: bytes, zstd: bytes = b""
) -> None:
    """A delta of one chunk of ``numel`` bytes whose mask is ``stream``."""

    def change(file: File) -> None:
        file.base.append(base_tensor("z", "U8", [numel], [0] * numel))
        chunk = Chunk(zstd or stream, len(stream), nnz, codec, int(bool(zstd)), [b"\1" * nnz], 0)
        log2 = max(10, (numel - 1).bit_length())
        file.tensors.append(
            Entry(b"z", 2, [numel], DELTA, REPLACE, log2, len(file.base) - 1, bytes(numel), [chunk])
        )

    reject(name, change)


mask_stream_of("P-ZSTD-mask", BITMASK, 800, 1, bytes(100), b"\x28\xb5\x2f\xfd" + bytes(20))
mask_stream_of("P-ZSTD-mask-states-more", BITMASK, 800, 1, bytes(100), frame(bytes(101)))
mask_stream_of("P-GAP-gap8-at-end", GAP8, 8, 1, b"\x08")
mask_stream_of("P-GAP-gap8-after-escapes", GAP8, 600, 1, b"\xff\xff\x5a")
mask_stream_of("P-GAP-gap8-second", GAP8, 8, 2, b"\x07\x00")
mask_stream_of("P-GAP-gap8-before-too-many", GAP8, 300, 1, b"\xfe\xfe")
mask_stream_of("P-GAP-gap16", GAP16, 8, 1, b"\x08\x00")
mask_stream_of("P-GAP-gap16-high-byte", GAP16, 300, 1, b"\x00\x7f")
mask_stream_of("P-POPCOUNT-gap8-too-many", GAP8, 600, 1, b"\x00\x00")
mask_stream_of("P-POPCOUNT-gap8-too-few", GAP8, 600, 3, b"\xff\x00\x00")
mask_stream_of("P-POPCOUNT-gap16-too-many", GAP16, 70_000, 1, b"\x00\x00\x00\x00")
mask_stream_of("P-POPCOUNT-bitmask-less", BITMASK, 16, 3, b"\x01\x80")
mask_stream_of("P-POPCOUNT-bitmask-more", BITMASK, 16, 1, b"\x01\x80")
mask_stream_of("P-POPCOUNT-bitmask-counts-tail", BITMASK, 12, 1, b"\x01\xf0")
mask_stream_of("P-TAIL-next-bit", BITMASK, 12, 2, b"\x01\x10")
mask_stream_of("P-TAIL-last-bit", BITMASK, 9, 1, b"\x00\x80")
mask_stream_of("P-ESCAPE-gap8", GAP8, 600, 1, b"\x00\xff")
mask_stream_of("P-ESCAPE-gap8-alone", GAP8, 600, 1, b"\xff")
mask_stream_of("P-ESCAPE-gap16", GAP16, 70_000, 1, b"\x00\xff\x00\xff")

# D: digests of results
reject("D-DIGEST-new", lambda f: assign(f.tensors[2], sha256=sha(b"")))
reject("D-DIGEST-file", lambda f: assign(f.files[0], sha256=sha(b"")))
reject("D-DIGEST-delta", lambda f: assign(f.tensors[0], sha256=sha(b"")))
reject(
    "D-DIGEST-empty-new",
    lambda f: f.tensors.append(replace(new("z", "U8", [0], []), sha256=bytes(32))),
)

# The right file beside another base: name, and what is done to the base of ``good``.
WRONG_BASE: dict[str, Callable[[list[Base]], None]] = {
    "value-used": lambda base: assign(base[0], data=b"\xff" + base[0].data[1:]),
    "value-copied": lambda base: assign(base[1], data=base[1].data[:-1] + b"\x5a"),
    "shape": lambda base: assign(base[0], shape=[25, 100]),
    "dtype": lambda base: assign(base[0], dtype=13),
    "missing": lambda base: base.__delitem__(0),
    "renamed": lambda base: assign(base[1], name=b"c"),
}
