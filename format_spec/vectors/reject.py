"""Files that a reader must refuse, by ``RULE-what``: ``REJECT``; and bases that are not theirs."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bundles import bundled_base, dictionary_frame, member, swapped
from distances import LOWEST as LOWEST_STATE
from distances import (
    Context,
    Distances,
    coded_ulp,
    distances_of,
    expanding_chunk,
    moved,
    table,
    word_bytes,
    words_of_tokens,
)
from grids import (
    LOWEST,
    GridParameters,
    coded_stream,
    coded_words,
    decisions_of,
    grid,
    grid_parameters,
)
from learned import columns_of, kept_of, learned_stream, set_mask, with_learned_masks
from learned import decisions_of as mask_decisions
from parts import (
    BITMASK,
    CODED,
    CODED_ULP,
    DELTA,
    DRAWN,
    EMPTY,
    FULL,
    GAP8,
    GAP16,
    GRID,
    LEARNED,
    LEVELS,
    MAGIC,
    NEW,
    NO_BASE,
    NONE,
    PARAMETERS,
    REPLACE,
    SIGNS,
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
    digest_of,
    frame,
    little,
    new,
    random_words,
    side_file,
    words_of,
)
from signs import NEVER, Parameters, Subspace, levels, parameter_chunk, parameters, signs, weights
from valid import VALID, digests, expanding, integers


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
reject("T-RESERVED-last", lambda f: f.set_footer.update(reserved=bytes(2) + b"\1"))
for _what, _set in {
    "dictionary-bytes": lambda f: f.set_footer.update(dictionary_bytes=1 << 24),
    "dictionary-digest": lambda f: f.set_footer.update(dictionary_digest64=bytes(7) + b"\1"),
    "dictionary-of-a-frame": lambda f: (
        assign(f, compress_index=True),
        f.set_footer.update(dictionary_bytes=1),
    ),
    "dictionary-before-compression": lambda f: f.set_footer.update(
        index_compression=3, dictionary_bytes=1
    ),
}.items():
    reject(f"T-RESERVED-{_what}", _set)
reject_bytes("T-SIZE-two-files", lambda data: data + data)
reject("T-SIZE-less", lambda f: f.set_footer.update(file_bytes=290))
reject("T-SIZE-most", lambda f: f.set_footer.update(file_bytes=2**64 - 1))
reject("T-INDEX-in-header", lambda f: f.set_footer.update(index_offset=56))
reject("T-INDEX-past-end", lambda f: f.set_footer.update(index_offset=2**64 - 8))
reject("T-INDEX-unaligned", lambda f: assign(f, after_chunks=b"\0"))
reject("T-INDEX-gap-before-footer", lambda f: assign(f, after_index=bytes(8)))
reject(
    "T-INDEX-wraps", lambda f: f.set_footer.update(index_offset=2**64 - 64, index_stored_bytes=64)
)
reject("T-INDEXSIZE-below-head", lambda f: f.set_footer.update(index_raw_bytes=127))
reject("T-INDEXSIZE-over-limit", lambda f: f.set_footer.update(index_raw_bytes=2**30 + 1))
reject("T-INDEXSIZE-raw-differs", lambda f: f.set_footer.update(index_raw_bytes=2**20))
reject(
    "T-INDEXSIZE-frame-not-smaller",
    lambda f: assign(f, compress_index=True, index_frame=lambda raw: raw),
)
reject(
    "T-INDEXSIZE-bomb",
    lambda f: assign(f, compress_index=True, metadata=b'{"' + b"a" * 2_000_000 + b'":""}'),
)
for _what, _beyond, _rule in (
    ("ratio-by-one", 1, "T-INDEXSIZE"),
    ("garbage-at-the-ratio", 0, "I-ZSTD"),
):
    reject(
        f"{_rule}-{_what}",
        lambda f, b=_beyond: (
            assign(f, compress_index=True, index_frame=lambda raw: b"\x55" * 100),
            f.set_footer.update(index_raw_bytes=8 * 100 + 2**20 + b),
        ),
    )
reject("T-COMPRESSION-unknown", lambda f: f.set_footer.update(index_compression=3))

# I: index
reject("I-DIGEST-wrong", lambda f: f.set_footer.update(index_digest=bytes(32)))
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
reject("I-RESERVED-head", lambda f: f.set_head.update(reserved=b"\1" + bytes(23)))
reject("I-RESERVED-head-last", lambda f: f.set_head.update(reserved=bytes(23) + b"\1"))
reject("I-RESERVED-base-record", lambda f: assign(f.base[1], reserved=1))


def short_digests() -> File:
    return digests(8)


for _bytes in (0, 1, 7, 9, 31, 33, 2**32 - 8):
    reject(f"I-DIGESTS-of-{_bytes}-bytes", lambda f, n=_bytes: f.set_head.update(digest_bytes=n))
for _what, _place in (("first", 8), ("last", 31)):
    for _table in ("base", "tensors", "files"):
        reject(
            f"I-DIGESTS-{_what}-byte-past-a-short-one-of-{_table}",
            lambda f, t=_table, p=_place: assign(
                getattr(f, t)[0], digest_field=bytes(p) + b"\1" + bytes(31 - p)
            ),
            short_digests,
        )
reject("I-DIGESTS-whole-but-said-to-be-short", lambda f: f.set_head.update(digest_bytes=8))
reject(
    "I-DIGESTS-copy-has-a-long-one",
    lambda f: assign(f.tensors[1], digest_field=bytes(16) + b"\1" * 16),
    short_digests,
)
for _what, _root in (("base", "base_root"), ("content", "content_digest")):
    reject(f"I-ROOT-{_what}-zero", lambda f, r=_root: f.set_head.update({r: bytes(32)}))
    reject(
        f"I-ROOT-{_what}-last-byte",
        lambda f, r=_root: f.set_head.update(
            {r: getattr(f, r)()[:31] + bytes([getattr(f, r)()[31] ^ 1])}
        ),
    )
reject("I-ROOT-swapped", lambda f: f.set_head.update(base_root=f.content_digest()))
reject("I-ROOT-of-no-tensors", lambda f: f.set_head.update(content_digest=File().content_digest()))
reject(
    "I-ROOT-short-but-said-to-be-whole", lambda f: f.set_head.update(digest_bytes=32), short_digests
)
for _what, _list in (("base-tensor", "base"), ("tensor", "tensors"), ("file", "files")):
    reject(
        f"I-ROOT-other-digest-of-a-{_what}",
        lambda f, n=_list: assign(getattr(f, n)[0], digest_field=digest_of(b"another")),
    )

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
reject("R-COPY-digest", lambda f: assign(f.tensors[1], digest_field=digest_of(b"")))
reject(
    "R-COPY-short-digest",
    lambda f: assign(f.tensors[1], digest_field=bytes(7) + b"\1" + bytes(24)),
    short_digests,
)
for _what, _row, _codec in (
    ("none-for-delta", 0, NONE),
    ("unknown", 0, 5),
    ("quantised", 0, 19),
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
reject("T-VERSION-before-reserved", lambda f: f.set_footer.update(minor=1, reserved=b"\1" * 3))
reject("T-RESERVED-before-size", lambda f: f.set_footer.update(reserved=b"\1" * 3, file_bytes=1))
reject("T-SIZE-before-index", lambda f: f.set_footer.update(file_bytes=1, index_offset=0))
reject("T-INDEX-before-its-size", lambda f: f.set_footer.update(index_offset=0, index_raw_bytes=1))
reject(
    "T-INDEXSIZE-before-compression",
    lambda f: f.set_footer.update(index_raw_bytes=1, index_compression=3),
)
reject(
    "T-COMPRESSION-before-digest",
    lambda f: f.set_footer.update(index_compression=3, index_digest=bytes(32)),
)
reject("I-COUNT-before-size", lambda f: f.set_head.update(base_records=2**20 + 1, heap_bytes=2**60))
reject(
    "I-RESERVED-before-digests",
    lambda f: (assign(f.base[0], reserved=1), f.set_head.update(digest_bytes=9)),
)
reject(
    "I-DIGESTS-before-names", lambda f: (assign(f, heap=b"a"), f.set_head.update(digest_bytes=9))
)
reject(
    "R-CHUNKLOG-before-root",
    lambda f: (assign(f.files[1], chunk_log2=1), f.set_head.update(base_root=bytes(32))),
)
reject(
    "I-ROOT-before-count",
    lambda f: (f.tensors[0].chunks.pop(), f.set_head.update(base_root=bytes(32))),
)
reject("I-SIZE-before-reserved", lambda f: f.set_head.update(heap_bytes=0, reserved=b"\1" * 24))
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
reject(
    "R-SHAPE-before-copy", lambda f: assign(f.tensors[1], shape=[2500], digest_field=digest_of(b""))
)
reject("R-COPY-before-values", lambda f: assign(f.tensors[1], digest_field=digest_of(b""), codec=1))
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
reject("C-CODEC-before-new", lambda f: assign(f.tensors[2].chunks[0], codec=10))
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
first_chunk("P-DIGEST-of-nothing", digest=digest_of(b"")[:8])
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
reject("D-DIGEST-new", lambda f: assign(f.tensors[2], digest=digest_of(b"")))
reject("D-DIGEST-file", lambda f: assign(f.files[0], digest=digest_of(b"")))
reject("D-DIGEST-delta", lambda f: assign(f.tensors[0], digest=digest_of(b"")))
for _tensor, _what in ((0, "delta"), (3, "new")):
    reject(
        f"D-DIGEST-short-{_what}",
        lambda f, t=_tensor: assign(f.tensors[t], digest=digest_of(b"")),
        short_digests,
    )
    reject(
        f"D-CONTENT-only-the-start-of-a-digest-of-{_what}",
        lambda f, t=_tensor: assign(
            f.tensors[t], digest=f.tensors[t].whole_digest()[:8] + bytes(24)
        ),
        short_digests,
    )
reject("D-DIGEST-short-file", lambda f: assign(f.files[0], digest=digest_of(b"")), short_digests)
reject(
    "D-DIGEST-before-content",
    lambda f: (
        assign(f.tensors[0], digest=digest_of(b"")),
        f.set_head.update(content_digest=bytes(32)),
    ),
    short_digests,
)
reject(
    "D-CONTENT-only-the-start-of-a-digest-of-file",
    lambda f: assign(f.files[0], digest=f.files[0].whole_digest()[:8] + bytes(24)),
    short_digests,
)
reject(
    "D-CONTENT-copy", lambda f: assign(f.tensors[1], digest=digest_of(b"another")), short_digests
)
reject("D-CONTENT-zero", lambda f: f.set_head.update(content_digest=bytes(32)), short_digests)
reject(
    "D-CONTENT-of-no-tensors",
    lambda f: f.set_head.update(content_digest=File().content_digest()),
    short_digests,
)
reject(
    "D-CONTENT-base-root",
    lambda f: f.set_head.update(content_digest=f.base_root()),
    short_digests,
)
reject(
    "D-DIGEST-empty-new",
    lambda f: f.tensors.append(replace(new("z", "U8", [0], []), digest=bytes(32))),
)


# -- signs and levels ----------------------------------------------------------------------------

# Two data chunks, the second of 83 elements; rows of 27, so that random bits cross rows.
SHAPE = [41, 27]


def given() -> Parameters:
    """About a fifth of all elements, in three subspaces."""
    return parameters(
        SHAPE,
        2.0**-10,
        seed=7,
        subspaces=[Subspace(1.0, 200.0), Subspace(0.75, 150.0, 0), Subspace(1.25, 100.0, 2)],
        size_rows=(0, 1, -3, 2),
        size_columns=(1, 0, -2, NEVER, -1),
        rows=(0, -1, 1),
        columns=(2, 0, 0, -3),
    )


def good_signs() -> File:
    """A tensor in levels of two chunks, one compressed, and one in signs of two chunks."""
    bases = [
        base_tensor("levels", "F32", [1030], [0x3F800000] * 1030),
        base_tensor("signs", "BF16", SHAPE, weights("r", math.prod(SHAPE), "BF16")),
    ]
    tensors = [
        levels("levels", bases, 0, -20, [3] * 1024 + [1, -2, 3, 0, 127, -128], compress=True),
        signs("signs", bases, 1, given()),
    ]
    assert all(chunk.nnz % 8 for chunk in tensors[1].chunks[1:])
    return File(base=bases, tensors=tensors)


def with_signs(name: str, change: Callable[[File], Any]) -> None:
    reject(name, change, good_signs)


def levels_chunk(name: str, number: int, **values: Any) -> None:
    """Chunk 0 holds the parameters, 1 a frame, 2 six bytes."""
    with_signs(name, lambda f: assign(f.tensors[0].chunks[number], **values))


def signs_chunk(name: str, number: int, **values: Any) -> None:
    """Chunk 0 holds the parameters, 1 and 2 are raw."""
    with_signs(name, lambda f: assign(f.tensors[1].chunks[number], **values))


for _codec, _code in (("signs", SIGNS), ("levels", LEVELS), ("grid", GRID)):
    for _what, _dtype in (("f64", 16), ("i32", 7), ("c64", 17), ("u16", 4)):
        reject(
            f"R-VALUES-{_codec}-of-{_what}",
            lambda f, c=_code, d=_dtype: (
                assign(f.base[0], dtype=d),
                assign(f.tensors[0], dtype=d, codec=c),
            ),
        )
    reject(f"R-VALUES-{_codec}-copy", lambda f, c=_code: assign(f.tensors[1], codec=c))
    reject(f"R-VALUES-{_codec}-new", lambda f, c=_code: assign(f.tensors[2], codec=c))
    reject(f"R-VALUES-{_codec}-file", lambda f, c=_code: assign(f.files[0], codec=c))
    # the chunks are those of another codec
    reject(f"C-COUNT-{_codec}-parameters", lambda f, c=_code: assign(f.tensors[0], codec=c))
with_signs("R-CHUNKLOG-signs", lambda f: assign(f.tensors[1], chunk_log2=9))
with_signs("R-CHUNKLOG-levels", lambda f: assign(f.tensors[0], chunk_log2=25))
with_signs("C-COUNT-signs-data", lambda f: f.tensors[1].chunks.pop())
with_signs("C-COUNT-signs-more", lambda f: f.tensors[1].chunks.append(f.tensors[1].chunks[0]))
with_signs("C-COUNT-levels-data", lambda f: f.tensors[0].chunks.pop())
reject(
    "C-COUNT-signs-of-nothing",
    lambda f: f.tensors[-1].chunks.clear(),
    lambda: VALID["signs-and-levels-of-nothing"](),
)

signs_chunk("C-NNZ-signs-parameters", 0, nnz=1)
levels_chunk("C-NNZ-levels-parameters", 0, nnz=1)
signs_chunk("C-NNZ-signs-short-chunk", 2, nnz=84)
levels_chunk("C-NNZ-levels-over", 2, nnz=7)

first_chunk("C-CODEC-drawn-in-ulp", codec=DRAWN, mask=b"", mask_raw=0)
first_chunk("C-CODEC-parameters-in-ulp", codec=PARAMETERS)
reject("C-CODEC-drawn-in-new", lambda f: assign(f.tensors[2].chunks[0], codec=DRAWN))
for _what, _codec in (("drawn", DRAWN), ("parameters", PARAMETERS)):
    reject(
        f"C-CODEC-{_what}-of-nothing",
        lambda f, c=_codec: assign(f.tensors[0].chunks[0], codec=c),
        lambda: VALID["none-kept"](),
    )
for _what, _codec in (
    *(("empty", EMPTY), ("full", FULL), ("bitmask", BITMASK), ("gap8", GAP8), ("gap16", GAP16)),
    *(
        ("reserved", 6),
        ("parameters", PARAMETERS),
        ("coded", CODED),
        ("learned", LEARNED),
        ("unknown", 11),
    ),
):
    signs_chunk(f"C-CODEC-signs-{_what}", 1, codec=_codec)
for _what, _codec in (("empty", EMPTY), ("full", FULL), ("bitmask", BITMASK), ("drawn", DRAWN)):
    signs_chunk(f"C-CODEC-signs-parameters-{_what}", 0, codec=_codec)
    if _codec != FULL:
        levels_chunk(f"C-CODEC-levels-{_what}", 1, codec=_codec)
    levels_chunk(f"C-CODEC-levels-parameters-{_what}", 0, codec=_codec)
levels_chunk("C-CODEC-levels-parameters-twice", 1, codec=PARAMETERS)
levels_chunk("C-CODEC-levels-not-all", 2, nnz=5)
levels_chunk("C-CODEC-levels-of-nothing", 2, nnz=0, codec=EMPTY, planes=[b""] * 4)
with_signs(
    "C-CODEC-signs-empty-of-nothing",
    lambda f: assign(f.tensors[1].chunks[1], nnz=0, codec=EMPTY, planes=[b""] * 2),
)
with_signs(
    "C-CODEC-signs-full-of-all",
    lambda f: assign(f.tensors[1].chunks[1], nnz=1024, codec=FULL, planes=[bytes(128), b""]),
)
with_signs("C-CODEC-signs-in-levels", lambda f: assign(f.tensors[0], codec=SIGNS))


def _parameters_last(file: File) -> None:
    chunks = file.tensors[1].chunks
    assign(chunks[1], nnz=0, planes=[b""] * 2)
    chunks.append(chunks.pop(0))


with_signs("C-CODEC-signs-parameters-last", _parameters_last)

for _number, _what in enumerate(("signs-parameters", "signs")):
    signs_chunk(f"C-FLAGS-{_what}-reserved", _number, reserved=1)
    signs_chunk(f"C-FLAGS-{_what}-mask", _number, mask_zstd=2)
    signs_chunk(f"C-FLAGS-{_what}-plane", _number, planes_zstd=1)
    signs_chunk(f"C-FLAGS-{_what}-second-plane", _number, planes_zstd=2)
    signs_chunk(f"C-FLAGS-{_what}-plane-past-width", _number, planes_zstd=4)
levels_chunk("C-FLAGS-levels-parameters-plane", 0, planes_zstd=1)
levels_chunk("C-FLAGS-levels-second-plane", 1, planes_zstd=3)
levels_chunk("C-FLAGS-levels-last-plane", 2, planes_zstd=8)


def signs_stream(name: str, stream: Callable[[], bytes]) -> None:
    """Another parameter stream, with its own size and digest."""
    with_signs(
        name, lambda f: f.tensors[1].chunks.__setitem__(0, parameter_chunk(stream(), width=2))
    )


def levels_stream(name: str, stream: bytes) -> None:
    with_signs(name, lambda f: f.tensors[0].chunks.__setitem__(0, parameter_chunk(stream, width=4)))


signs_stream("C-MASKSIZE-signs-less", lambda: given().stream()[:-1])
signs_stream("C-MASKSIZE-signs-more", lambda: given().stream() + b"\0")
signs_stream("C-MASKSIZE-signs-half-a-subspace", lambda: given().stream() + bytes(8))
signs_stream("C-MASKSIZE-signs-nothing", lambda: b"")
signs_stream("C-MASKSIZE-signs-no-subspace", lambda: replace(given(), subspaces=[]).stream())
signs_stream(
    "C-MASKSIZE-signs-65-subspaces",
    lambda: replace(given(), subspaces=[Subspace(first=i - 32768) for i in range(65)]).stream(),
)
signs_chunk("C-MASKSIZE-signs-most", 0, mask_raw=2**32 - 1)
signs_chunk("C-MASKSIZE-signs-data", 1, mask_raw=1)
levels_stream("C-MASKSIZE-levels-nothing", b"")
levels_stream("C-MASKSIZE-levels-less", b"\1")
levels_stream("C-MASKSIZE-levels-more", b"\1\0\0")
levels_chunk("C-MASKSIZE-levels-data", 1, mask_raw=2)

signs_chunk("C-STORED-signs-parameters-raw", 0, mask_stored=199)
signs_chunk("C-STORED-signs-parameters-not-smaller", 0, mask_zstd=1)
signs_chunk("C-STORED-signs-parameters-plane", 0, planes=[b"\0", b""])
signs_chunk("C-STORED-signs-parameters-last-plane", 0, sizes=[0] * 7 + [1])
signs_chunk("C-STORED-signs-mask", 1, mask=b"\0")
signs_chunk("C-STORED-signs-mask-empty-frame", 1, mask_zstd=1)
for _what, _more in (("more", 1), ("less", -1)):
    with_signs(
        f"C-STORED-signs-plane-{_what}",
        lambda f, n=_more: assign(
            f.tensors[1].chunks[1], sizes=[len(f.tensors[1].chunks[1].planes[0]) + n, 0]
        ),
    )
with_signs(
    "C-STORED-signs-plane-a-byte-each",
    lambda f: assign(f.tensors[1].chunks[2], sizes=[f.tensors[1].chunks[2].nnz, 0]),
)
with_signs(
    "C-STORED-signs-second-plane",
    lambda f: assign(f.tensors[1].chunks[1], planes=[f.tensors[1].chunks[1].planes[0], b"\0"]),
)
levels_chunk("C-STORED-levels-parameters-not-smaller", 0, mask_zstd=1)
levels_chunk("C-STORED-levels-plane-less", 2, planes=[bytes(5)])
levels_chunk("C-STORED-levels-plane-not-smaller", 2, planes_zstd=1)
levels_chunk("C-STORED-levels-plane-raw", 1, planes_zstd=0)
levels_chunk("C-STORED-levels-second-plane", 2, planes=[bytes(6), bytes(6)])


def _expanding_parameters() -> File:
    """Parameters of 64 Mi rows, of which nothing is drawn: 128 MiB in 5,000 bytes."""
    shape = [1 << 26]
    base = Base(b"w", 14, [*shape, 1], b"")
    chunk = Chunk(bytes(5000), 32 + 2 * ((1 << 26) + 1), 0, PARAMETERS, 1, [b"", b""], 0)
    nothing = [Chunk(b"", 0, 0, DRAWN, 0, [b"", b""], 0)] * 4
    entry = Entry(b"w", 14, [*shape, 1], DELTA, SIGNS, 24, 0, b"", [chunk, *nothing])
    return File([base], [entry])


reject("C-EXPANSION-signs-parameters", lambda f: None, _expanding_parameters)


def _expanding_draws() -> File:
    """2^31 elements of which nothing is drawn: as 64 MiB, with the parameters too much."""
    shape = [1 << 16, 1 << 15]
    base = Base(b"w", 14, shape, b"")
    chunk = Chunk(bytes(8), 32 + 2 * sum(shape), 0, PARAMETERS, 1, [b"", b""], 0)
    nothing = [Chunk(b"", 0, 0, DRAWN, 0, [b"", b""], 0)] * 128
    entry = Entry(b"w", 14, shape, DELTA, SIGNS, 24, 0, b"", [chunk, *nothing])
    return File([base], [entry])


reject("C-EXPANSION-signs-draws", lambda f: None, _expanding_draws)

# What the parameters say, in the order of their fields
INF, NAN = math.inf, math.nan


def signs_parameters(name: str, **values: Any) -> None:
    signs_stream(name, lambda: replace(given(), **values).stream())


signs_parameters("P-PARAMETERS-no-subspaces", count=0)
signs_parameters("P-PARAMETERS-fewer-subspaces", count=2)
signs_parameters("P-PARAMETERS-more-subspaces", count=4)
signs_parameters("P-PARAMETERS-most-subspaces", count=65535)
signs_parameters("P-PARAMETERS-reserved", reserved=1)
signs_parameters("P-PARAMETERS-reserved-high-byte", reserved=0x8000)
for _what, _number in {
    "negative": -1.0,
    "minus-0": -0.0,
    "infinite": INF,
    "minus-infinite": -INF,
    "nan": NAN,
}.items():
    signs_parameters(f"P-PARAMETERS-gain-{_what}", gain=_number)


def subspace(name: str, number: int, **values: Any) -> None:
    def stream() -> bytes:
        changed = given()
        assign(changed.subspaces[number], **values)
        return changed.stream()

    signs_stream(name, stream)


for _field in ("scale", "rate"):
    for _what, _number in {
        "0": 0.0,
        "minus-0": -0.0,
        "negative": -1.0,
        "infinite": INF,
        "minus-infinite": -INF,
        "nan": NAN,
    }.items():
        subspace(f"P-PARAMETERS-{_field}-{_what}", 1, **{_field: _number})
    subspace(f"P-PARAMETERS-{_field}-of-the-last", 2, **{_field: 0.0})
subspace("P-PARAMETERS-subspace-reserved", 0, reserved=1)
subspace("P-PARAMETERS-subspace-reserved-last", 2, reserved=0x8000)
subspace("P-PARAMETERS-first-after-least", 0, first=-32767)
subspace("P-PARAMETERS-first-0", 0, first=0)
subspace("P-PARAMETERS-first-twice", 2, first=0)
subspace("P-PARAMETERS-first-descends", 2, first=-1)
subspace("P-PARAMETERS-first-least-twice", 1, first=-32768)
for _what, _array in (
    *(("size-row", "size_rows"), ("size-column", "size_columns")),
    *(("row", "rows"), ("column", "columns")),
):
    for _exponent in (61, -61, 127, -127, *(() if _what.startswith("size") else (NEVER,))):
        _text = str(_exponent).replace("-", "minus-")
        # the last one: rows end where columns begin
        signs_stream(
            f"P-PARAMETERS-{_what}-{_text}",
            lambda a=_array, e=_exponent: replace(
                given(), **{a: [*getattr(given(), a)[:-1], e]}
            ).stream(),
        )
for _exponent in (121, -121, 32767, -32768):
    _text = str(_exponent).replace("-", "minus-")
    levels_stream(f"P-PARAMETERS-levels-{_text}", struct.pack("<h", _exponent))
reject(
    "P-PARAMETERS-of-nothing",
    lambda f: assign(f.tensors[0], chunks=[parameter_chunk(struct.pack("<h", 121), width=2)]),
    lambda: VALID["signs-and-levels-of-nothing"](),
)


def compressed_parameters(name: str, made: Callable[[bytes], bytes]) -> None:
    """Parameters of which most are 0, as what is made of them."""

    def change(file: File) -> None:
        stream = parameters(SHAPE, 0.0).stream()
        file.tensors[1].chunks[0] = parameter_chunk(stream, 2, made(stream))

    with_signs(name, change)


for _what, _made in {
    "not-a-frame": lambda raw: b"\x28\xb5\x2f\xfe" + bytes(20),
    "truncated": lambda raw: frame(raw)[:-1],
    "trailing-byte": lambda raw: frame(raw) + b"\0",
    "states-more": lambda raw: frame(raw, size=len(raw) + 1),
    "holds-less": lambda raw: frame(raw[:-1], size=len(raw)),
    "checksum": lambda raw: frame(raw, flags=0x84) + little(0, 4),
    "window": lambda raw: frame(raw, window=b"\x69"),
}.items():
    compressed_parameters(f"P-ZSTD-parameters-{_what}", _made)
compressed_parameters("P-PARAMETERS-compressed", lambda raw: frame(raw[:14] + b"\1" + raw[15:]))
for _what, _made in {
    "not-a-frame": lambda raw: b"\x28\xb5\x2f\xfe" + bytes(20),
    "states-less": lambda raw: frame(raw, size=1023),
    "holds-more": lambda raw: frame(raw + b"\0", size=1024),
}.items():
    levels_chunk(f"P-ZSTD-levels-{_what}", 1, planes=[_made(b"\3" * 1024), b"", b"", b""])
signs_chunk("P-DIGEST-signs-parameters", 0, digest=bytes(8))
signs_chunk("P-DIGEST-signs", 2, digest=bytes(8))
levels_chunk("P-DIGEST-levels", 2, digest=bytes(8))
reject(
    "P-DIGEST-signs-of-nothing",
    lambda f: assign(f.tensors[0].chunks[5], digest=bytes(8)),
    lambda: VALID["signs-chunks-without-draws"](),
)
levels_chunk("C-PADDING-levels-parameters", 0, padding=bytes(5) + b"\1")
with_signs(
    "C-PADDING-signs",
    lambda f: assign(
        f.tensors[1].chunks[1], padding=b"\1" * (-len(f.tensors[1].chunks[1].data) % 8)
    ),
)


def other_count(name: str, count: Callable[[int], int], last: int = 0) -> None:
    """Another nnz of the last chunk, and the plane that it asks for. last: set in its last byte."""

    def change(file: File) -> None:
        chunk = file.tensors[1].chunks[2]
        nnz = count(chunk.nnz)
        size = -(-nnz // 8)
        plane = bytearray((chunk.planes[0] + bytes(size))[:size])
        if nnz % 8:
            plane[-1] &= (1 << nnz % 8) - 1
        if last:
            plane[-1] |= last
        assign(chunk, nnz=nnz, planes=[bytes(plane), b""])

    with_signs(name, change)


other_count("P-POPCOUNT-signs-one-less", lambda nnz: nnz - 1)
other_count("P-POPCOUNT-signs-one-more", lambda nnz: nnz + 1)
other_count("P-POPCOUNT-signs-none", lambda nnz: 0)
other_count("P-POPCOUNT-signs-all", lambda nnz: 83)
other_count("P-POPCOUNT-signs-before-tail", lambda nnz: nnz // 8 * 8 + 7 - (nnz % 8 == 7), 0x80)
other_count("P-TAIL-signs-last-bit", lambda nnz: nnz, 0x80)
with_signs(
    "P-TAIL-signs-next-bit",
    lambda f: assign(
        f.tensors[1].chunks[1],
        planes=[
            f.tensors[1].chunks[1].planes[0][:-1]
            + bytes([f.tensors[1].chunks[1].planes[0][-1] | 1 << f.tensors[1].chunks[1].nnz % 8]),
            b"",
        ],
    ),
)
signs_parameters("P-POPCOUNT-signs-gain-0", gain=0.0)
reject(
    "P-POPCOUNT-signs-nothing-drawn",
    lambda f: assign(f.tensors[0].chunks[2], nnz=1, planes=[b"\0", b""]),
    lambda: VALID["signs-chunks-without-draws"](),
)

# Two faults
with_signs(
    "P-PARAMETERS-before-data",
    lambda f: (
        f.tensors[1].chunks.__setitem__(
            0, parameter_chunk(replace(given(), reserved=1).stream(), width=2)
        ),
        assign(f.tensors[1].chunks[1], digest=bytes(8)),
    ),
)
with_signs(
    "P-DIGEST-before-parameters",
    lambda f: f.tensors[1].chunks.__setitem__(
        0, replace(parameter_chunk(replace(given(), reserved=1).stream(), 2), digest=bytes(8))
    ),
)
with_signs(
    "C-PADDING-before-popcount",
    lambda f: assign(f.tensors[1].chunks[2], nnz=83, planes=[bytes(11), b""], padding=b"\1" * 5),
)
with_signs(
    "P-DIGEST-before-popcount",
    lambda f: assign(f.tensors[1].chunks[2], nnz=83, planes=[bytes(11), b""], digest=bytes(8)),
)


def other_change(row: int, number: int) -> Callable[[File], None]:
    """The lowest bit of the chunk's plane is another: a sign, or a level."""

    def change(file: File) -> None:
        chunk = file.tensors[row].chunks[number]
        plane = chunk.planes[0]
        assign(chunk, planes=[bytes([plane[0] ^ 1]) + plane[1:], *chunk.planes[1:]])

    return change


with_signs("D-DIGEST-signs", other_change(1, 1))
with_signs("D-DIGEST-levels", other_change(0, 2))
reject(
    "D-DIGEST-signs-of-nothing",
    lambda f: assign(f.tensors[1], digest=bytes(32)),
    lambda: VALID["signs-and-levels-of-nothing"](),
)


# -- grids ---------------------------------------------------------------------------------------


def given_grid() -> GridParameters:
    """A dozen contexts; a column has no code."""
    return grid_parameters(
        SHAPE,
        2.0**-13,
        -5,
        size_rows=(0, 1, -3, 2),
        size_columns=(1, 0, -2, NEVER, -1),
        rows=(0, -1, 1),
        columns=(2, 0, 0, -3),
    )


def good_grid() -> File:
    """A tensor as a grid of four chunks: of many, no, one and some elements."""
    bases = [base_tensor("grid", "BF16", [3, *SHAPE], weights("q", 3 * math.prod(SHAPE), "BF16"))]
    given = replace(given_grid(), size_rows=[0, 1, -3], rows=[0, -1, 1])
    for columns in (given.size_columns, given.columns):
        columns.extend(columns * (SHAPE[0] - 1))
    some = integers("grid")

    def integer(position: int) -> int:
        return (some(position), 0, int(position == 2056), some(position))[position // 1024]

    file = File(base=bases, tensors=[grid("grid", bases, 0, given, integer)])
    chunks = file.tensors[0].chunks
    assert [chunk.nnz > 1 for chunk in chunks] == [False, True, False, False, True]
    assert all(chunks[number].nnz % 8 for number in (1, 3, 4))
    return file


def with_grid(name: str, change: Callable[[File], Any]) -> None:
    reject(name, change, good_grid)


def grid_chunk(name: str, number: int, **values: Any) -> None:
    """Chunk 0 holds the parameters, 1 and 4 are coded, 2 keeps nothing, 3 one element."""
    with_grid(name, lambda f: assign(f.tensors[0].chunks[number], **values))


with_grid("R-CHUNKLOG-grid", lambda f: assign(f.tensors[0], chunk_log2=9))
with_grid("C-COUNT-grid-data", lambda f: f.tensors[0].chunks.pop())
with_grid("C-COUNT-grid-more", lambda f: f.tensors[0].chunks.append(f.tensors[0].chunks[2]))
reject(
    "C-COUNT-grid-of-nothing",
    lambda f: f.tensors[-1].chunks.clear(),
    lambda: VALID["grid-of-nothing"](),
)
grid_chunk("C-NNZ-grid-parameters", 0, nnz=1)
grid_chunk("C-NNZ-grid-over", 1, nnz=1025)
grid_chunk("C-NNZ-grid-short-chunk", 4, nnz=3 * 1107 - 3 * 1024 + 1)

first_chunk("C-CODEC-coded-in-ulp", codec=CODED)
reject("C-CODEC-coded-in-new", lambda f: assign(f.tensors[2].chunks[0], codec=CODED))
reject(
    "C-CODEC-coded-of-nothing",
    lambda f: assign(f.tensors[0].chunks[0], codec=CODED),
    lambda: VALID["none-kept"](),
)
levels_chunk("C-CODEC-levels-coded", 1, codec=CODED)
levels_chunk("C-CODEC-levels-parameters-coded", 0, codec=CODED)
signs_chunk("C-CODEC-signs-parameters-coded", 0, codec=CODED)
for _what, _codec in (
    *(("empty", EMPTY), ("full", FULL), ("bitmask", BITMASK), ("gap8", GAP8), ("gap16", GAP16)),
    *(
        ("drawn", DRAWN),
        ("parameters", PARAMETERS),
        ("reserved", 6),
        ("learned", LEARNED),
        ("unknown", 11),
    ),
):
    grid_chunk(f"C-CODEC-grid-{_what}", 1, codec=_codec)
for _what, _codec in (("empty", EMPTY), ("full", FULL), ("drawn", DRAWN), ("coded", CODED)):
    grid_chunk(f"C-CODEC-grid-parameters-{_what}", 0, codec=_codec)
for _what, _codec in (("bitmask", BITMASK), ("drawn", DRAWN), ("coded", CODED), ("full", FULL)):
    grid_chunk(f"C-CODEC-grid-of-nothing-{_what}", 2, codec=_codec)
grid_chunk("C-CODEC-grid-coded-without-any", 1, nnz=0, planes=[b"", b""])
with_grid(
    "C-CODEC-grid-full-of-all",
    lambda f: assign(f.tensors[0].chunks[1], nnz=1024, codec=FULL, planes=[bytes(128), b""]),
)
with_grid("C-CODEC-grid-in-signs", lambda f: assign(f.tensors[0], codec=SIGNS))
with_grid("C-CODEC-grid-in-levels", lambda f: assign(f.tensors[0], codec=LEVELS))
with_signs("C-CODEC-signs-in-grid", lambda f: assign(f.tensors[1], codec=GRID))

for _number, _what in enumerate(("parameters", "coded", "empty")):
    grid_chunk(f"C-FLAGS-grid-{_what}-reserved", _number, reserved=1)
    grid_chunk(f"C-FLAGS-grid-{_what}-mask", _number, mask_zstd=2)
    grid_chunk(f"C-FLAGS-grid-{_what}-plane", _number, planes_zstd=1)
    grid_chunk(f"C-FLAGS-grid-{_what}-second-plane", _number, planes_zstd=2)
    grid_chunk(f"C-FLAGS-grid-{_what}-plane-past-width", _number, planes_zstd=4)
grid_chunk("C-FLAGS-grid-mask-compressed", 1, mask_zstd=1)
with_grid(
    "C-FLAGS-grid-mask-smaller-as-a-frame",
    lambda f: assign(f.tensors[0].chunks[1], mask_zstd=1, mask=frame(bytes(800)), mask_raw=800),
)


def grid_stream(name: str, stream: Callable[[File], bytes]) -> None:
    """Another parameter stream, with its own size and digest."""

    def change(file: File) -> None:
        chunks = file.tensors[0].chunks
        chunks[0] = parameter_chunk(stream(file), width=2)

    with_grid(name, change)


grid_stream("C-MASKSIZE-grid-parameters-less", lambda f: f.tensors[0].chunks[0].mask[:-1])
grid_stream("C-MASKSIZE-grid-parameters-more", lambda f: f.tensors[0].chunks[0].mask + b"\0")
grid_stream(
    "C-MASKSIZE-grid-parameters-of-signs", lambda f: f.tensors[0].chunks[0].mask + bytes(16)
)
grid_stream("C-MASKSIZE-grid-parameters-of-levels", lambda f: b"\0\0")
grid_stream("C-MASKSIZE-grid-parameters-nothing", lambda f: b"")
for _size in (0, 4, 7, 9, 10, 11):
    grid_chunk(f"C-MASKSIZE-grid-{_size}", 3, mask=bytes(_size), mask_raw=_size)
grid_chunk("C-MASKSIZE-grid-over", 1, mask_raw=8 + 60 * 1024 + 4)
grid_chunk("C-MASKSIZE-grid-most", 1, mask_raw=2**32 - 4)
grid_chunk("C-MASKSIZE-grid-short-chunk-over", 4, mask_raw=8 + 60 * 249 + 4)
grid_chunk("C-MASKSIZE-grid-empty", 2, mask_raw=8)

grid_chunk("C-STORED-grid-parameters-raw", 0, mask_stored=199)
grid_chunk("C-STORED-grid-parameters-not-smaller", 0, mask_zstd=1)
grid_chunk("C-STORED-grid-parameters-plane", 0, planes=[b"\0", b""])
grid_chunk("C-STORED-grid-mask-largest", 1, mask_raw=8 + 60 * 1024)
grid_chunk("C-STORED-grid-mask-less", 4, mask_stored=8)
grid_chunk("C-STORED-grid-empty-mask", 2, mask_stored=8)
grid_chunk("C-STORED-grid-empty-mask-frame", 2, mask_zstd=1)
grid_chunk("C-STORED-grid-empty-plane", 2, planes=[b"\0", b""])
grid_chunk("C-STORED-grid-second-plane", 3, planes=[b"\0", b"\0"])
grid_chunk("C-STORED-grid-last-plane", 3, sizes=[1] + [0] * 6 + [1])
for _what, _size in (("less", 0), ("more", 2)):
    grid_chunk(f"C-STORED-grid-plane-{_what}", 3, sizes=[_size, 0])


def _expanding_codes(shape: list[int], kept: Sequence[int], stored: int) -> File:
    """A tensor of which every chunk is coded. stored: bytes of its parameters."""
    base = Base(b"w", 14, shape, b"")
    chunk = Chunk(bytes(stored), 16 + 2 * sum(shape), 0, PARAMETERS, 1, [b"", b""], 0)
    coded = [Chunk(bytes(8), 8, nnz, CODED, 0, [b"\0", b""], 0) for nnz in kept]
    return File([base], [Entry(b"w", 14, shape, DELTA, GRID, 24, 0, b"", [chunk, *coded])])


# 2^28 elements count as 64 MiB; with the parameters that is too much.
reject(
    "C-EXPANSION-grid-codes", lambda f: None, lambda: _expanding_codes([2**15, 2**13], [1] * 16, 8)
)
# 2 bytes too much, of which each of 25 elements that are kept counts as 4.
reject(
    "C-EXPANSION-grid-kept",
    lambda f: None,
    lambda: _expanding_codes([32973, 8141], [8, 3] + [1] * 14, 64),
)


def parameter_fault(name: str, **values: Any) -> None:
    def stream(file: File) -> bytes:
        raw = file.tensors[0].chunks[0].mask
        head = {"step": 2.0**-13, "first": -5, "reserved": 0, "more": 0, **values}
        return struct.pack("<dhHI", *head.values()) + raw[16:]

    grid_stream(name, stream)


for _what, _number in {
    "0": 0.0,
    "minus-0": -0.0,
    "negative": -1.0,
    "infinite": INF,
    "minus-infinite": -INF,
    "nan": NAN,
}.items():
    parameter_fault(f"P-PARAMETERS-grid-step-{_what}", step=_number)
parameter_fault("P-PARAMETERS-grid-reserved", reserved=1)
parameter_fault("P-PARAMETERS-grid-reserved-high-byte", reserved=0x8000)
parameter_fault("P-PARAMETERS-grid-more-reserved", more=1)
parameter_fault("P-PARAMETERS-grid-more-reserved-high-byte", more=1 << 31)
for _what, _place in (
    *(("size-row", 16), ("size-column", 19 + math.prod(SHAPE) - 1)),
    *(("row", 19 + math.prod(SHAPE) + 2), ("column", 15 + 2 * (3 + math.prod(SHAPE)))),
):
    for _exponent in (61, -61, 127, -127, *(() if _what.startswith("size") else (NEVER,))):
        _text = str(_exponent).replace("-", "minus-")
        grid_stream(
            f"P-PARAMETERS-grid-{_what}-{_text}",
            lambda f, at=_place, e=_exponent: (
                f.tensors[0].chunks[0].mask[:at]
                + struct.pack("<b", e)
                + f.tensors[0].chunks[0].mask[at + 1 :]
            ),
        )
reject(
    "P-PARAMETERS-grid-of-nothing",
    lambda f: assign(
        f.tensors[0],
        chunks=[parameter_chunk(grid_parameters([0], math.nan).stream(), width=2)],
    ),
    lambda: VALID["grid-of-nothing"](),
)
with_grid(
    "P-ZSTD-grid-parameters",
    lambda f: assign(
        f.tensors[0].chunks[0],
        mask=frame(f.tensors[0].chunks[0].mask[:16] + bytes(2220))[:-1],
        mask_zstd=1,
    ),
)


def coded(file: File, number: int) -> list[tuple[int, int]]:
    """Magnitudes and contexts of a chunk of ``good_grid``."""
    given = replace(given_grid(), size_rows=[0, 1, -3], rows=[0, -1, 1])
    for columns in (given.size_columns, given.columns):
        columns.extend(columns * (SHAPE[0] - 1))
    some, start = integers("grid"), (number - 1) * 1024
    stop = min(start + 1024, 3 * math.prod(SHAPE))
    contexts = {p: given.context(p) for p in range(start, stop)}
    found = [(abs(some(p)), c) for p, c in contexts.items() if c is not None]
    assert coded_stream(found) == file.tensors[0].chunks[number].mask
    return found


def coded_as(
    name: str, number: int, made: Callable[[list[tuple[int, int]]], bytes], **values: Any
) -> None:
    """The magnitudes of a chunk, as another stream."""

    def change(file: File) -> None:
        stream = made(coded(file, number))
        assign(file.tensors[0].chunks[number], mask=stream, mask_raw=len(stream), **values)

    with_grid(name, change)


def words(numbers: Sequence[int]) -> bytes:
    return b"".join(little(number, 4) for number in numbers)


for _what, _state in (("one-more", LOWEST + 1), ("a-word-more", 2 * LOWEST), ("most", 2**64 - 1)):
    coded_as(f"P-CODE-ends-in-another-state-{_what}", 4, lambda m, x=_state: coded_stream(m, x))
for _number in (1, 4):
    coded_as(f"P-CODE-word-missing-{_number}", _number, lambda m: coded_stream(m)[:-4])
    coded_as(f"P-CODE-word-left-{_number}", _number, lambda m: coded_stream(m) + bytes(4))
    coded_as(
        f"P-CODE-begins-too-low-{_number}",
        _number,
        lambda m: coded_stream(m)[:4] + bytes(4) + coded_stream(m)[8:],
    )
coded_as("P-CODE-two-words-left", 4, lambda m: coded_stream(m) + words([5, 6]))
coded_as("P-CODE-more-than-half-missing", 4, lambda m: coded_stream(m)[:40])
coded_as("P-CODE-no-words-after-the-first", 4, lambda m: coded_stream(m)[:8])
coded_as(
    "P-CODE-missing-in-the-last-decision",
    4,
    lambda m: words(coded_words(decisions_of(m)[:-1], 65536 // 2)),
)
grid_chunk("P-CODE-zeros", 3, mask=bytes(8), mask_raw=8)
grid_chunk("P-CODE-one-element", 3, mask=words([0, 1]), mask_raw=8)


def other_integers(name: str, count: Callable[[int], int], number: int = 4, last: int = 0) -> None:
    """Another nnz, and the plane that it asks for. last: set in its last byte."""

    def change(file: File) -> None:
        chunk = file.tensors[0].chunks[number]
        nnz = count(chunk.nnz)
        size = -(-nnz // 8)
        plane = bytearray((chunk.planes[0] + bytes(size))[:size])
        if nnz % 8:
            plane[-1] &= (1 << nnz % 8) - 1
        plane[-1] |= last
        assign(chunk, nnz=nnz, planes=[bytes(plane), b""])

    with_grid(name, change)


other_integers("P-POPCOUNT-grid-one-less", lambda nnz: nnz - 1)
other_integers("P-POPCOUNT-grid-one-more", lambda nnz: nnz + 1)
other_integers("P-POPCOUNT-grid-one", lambda nnz: 1)
other_integers("P-POPCOUNT-grid-all", lambda nnz: 249)
other_integers("P-POPCOUNT-grid-one-less-in-the-first", lambda nnz: nnz - 1, 1)
other_integers("P-POPCOUNT-grid-two-of-one", lambda nnz: 2, 3)
other_integers("P-TAIL-grid-last-bit", lambda nnz: nnz, last=0x80)
other_integers("P-TAIL-grid-of-one", lambda nnz: nnz, 3, last=2)
coded_as("P-POPCOUNT-grid-nothing", 4, lambda m: coded_stream([(0, c) for _, c in m]))
coded_as("P-POPCOUNT-grid-everything", 4, lambda m: coded_stream([(1, c) for _, c in m]))

# Two faults
coded_as(
    "P-CODE-before-popcount-too-low",
    4,
    lambda m: coded_stream(m)[:4] + bytes(4) + coded_stream(m)[8:],
    nnz=249,
    planes=[bytes(32), b""],
)
coded_as(
    "P-POPCOUNT-before-word-missing",
    4,
    lambda m: coded_stream(m)[:-4],
    nnz=1,
    planes=[b"\0", b""],
)
coded_as(
    "P-CODE-word-missing-before-too-few",
    4,
    lambda m: coded_stream(m)[:-4],
    nnz=249,
    planes=[bytes(32), b""],
)
coded_as(
    "P-POPCOUNT-too-few-before-the-end",
    4,
    lambda m: coded_stream(m) + bytes(4),
    nnz=249,
    planes=[bytes(32), b""],
)
coded_as(
    "P-POPCOUNT-too-few-before-the-state",
    4,
    lambda m: coded_stream(m, LOWEST + 7),
    nnz=249,
    planes=[bytes(32), b""],
)


def _end_and_tail(file: File) -> None:
    chunk = file.tensors[0].chunks[3]
    stream = chunk.mask + bytes(4)
    assign(chunk, mask=stream, mask_raw=len(stream), planes=[b"\2", b""])


with_grid("P-CODE-before-tail", _end_and_tail)
other_integers("P-POPCOUNT-grid-before-tail", lambda nnz: nnz - 1, last=0x80)
with_grid(
    "P-PARAMETERS-grid-before-data",
    lambda f: (
        f.tensors[0].chunks.__setitem__(
            0, parameter_chunk(b"\0" * 8 + f.tensors[0].chunks[0].mask[8:], width=2)
        ),
        assign(f.tensors[0].chunks[1], digest=bytes(8)),
    ),
)
grid_chunk("P-DIGEST-grid-parameters", 0, digest=bytes(8))
grid_chunk("P-DIGEST-grid", 1, digest=bytes(8))
grid_chunk("P-DIGEST-grid-empty", 2, digest=bytes(8))
grid_chunk("P-DIGEST-grid-before-code", 3, digest=bytes(8), mask=bytes(8), mask_raw=8)
with_grid(
    "C-PADDING-grid",
    lambda f: assign(
        f.tensors[0].chunks[1], padding=b"\1" * (-len(f.tensors[0].chunks[1].data) % 8)
    ),
)


def _other_sign(file: File) -> None:
    chunk = file.tensors[0].chunks[1]
    assign(chunk, planes=[bytes([chunk.planes[0][0] ^ 1]) + chunk.planes[0][1:], b""])


with_grid("D-DIGEST-grid", _other_sign)
grid_chunk("C-NNZ-grid-before-codec", 1, nnz=1025, codec=FULL)
grid_chunk("C-CODEC-grid-before-flags", 1, codec=EMPTY, mask_zstd=1)
grid_chunk("C-FLAGS-grid-before-masksize", 1, mask_zstd=1, mask_raw=5)
grid_chunk("C-MASKSIZE-grid-before-stored", 1, mask_raw=5, sizes=[9, 9])

# -- learned masks ---------------------------------------------------------------------------------


def good_learned() -> File:
    """Chunks of which some, all, one or no elements are kept, with learned masks and without."""
    shape = [100, 40]
    bases = [base_tensor(name, "U8", shape, [0] * 4000) for name in ("bits", "learned")]
    some = {p: 1 + p % 99 for p in range(1024) if p % 40 in (3, 4) or p // 40 % 5 == 2}
    changes = some | dict.fromkeys(range(1024, 2048), 7) | {2600: 1}
    tensors = [
        delta("bits", bases, 0, some, masks=BITMASK),
        with_learned_masks(delta("learned", bases, 1, changes), bases[1]),
    ]
    assert [chunk.nnz for chunk in tensors[1].chunks] == [len(some), 1024, 1, 0]
    return File(base=bases, tensors=tensors)


def with_learned(name: str, change: Callable[[File], Any]) -> None:
    reject(name, change, good_learned)


def learned_chunk(name: str, number: int, **values: Any) -> None:
    """Chunk 0 keeps some, 1 all, 2 one, 3 none."""
    with_learned(name, lambda f: assign(f.tensors[1].chunks[number], **values))


reject("C-CODEC-learned-in-new", lambda f: assign(f.tensors[2].chunks[0], codec=LEARNED))
learned_chunk("C-CODEC-learned-of-all", 1, codec=LEARNED)
learned_chunk("C-CODEC-learned-of-nothing", 3, codec=LEARNED)
levels_chunk("C-CODEC-levels-learned", 1, codec=LEARNED)
levels_chunk("C-CODEC-levels-parameters-learned", 0, codec=LEARNED)
signs_chunk("C-CODEC-signs-parameters-learned", 0, codec=LEARNED)
grid_chunk("C-CODEC-grid-parameters-learned", 0, codec=LEARNED)
grid_chunk("C-CODEC-grid-of-nothing-learned", 2, codec=LEARNED)
learned_chunk("C-NNZ-learned", 0, nnz=1025)
learned_chunk("C-FLAGS-learned-compressed", 0, mask_zstd=1)
learned_chunk(
    "C-FLAGS-learned-smaller-as-a-frame", 0, mask_zstd=1, mask=frame(bytes(800)), mask_raw=800
)
for _size in (0, 4, 7, 9, 10, 11):
    learned_chunk(f"C-MASKSIZE-learned-{_size}", 0, mask=bytes(_size), mask_raw=_size)
learned_chunk("C-MASKSIZE-learned-over", 0, mask_raw=8 + 4 * 1024 + 4)
learned_chunk("C-MASKSIZE-learned-most", 0, mask_raw=2**32 - 4)
learned_chunk("C-STORED-learned-largest", 0, mask_raw=8 + 4 * 1024)
learned_chunk("C-STORED-learned-less", 0, mask_stored=8)


def _expanding_learned(more: int, digest: bytes | None = None) -> File:
    """16 chunks of 2^24 elements, which alone count for 64 MiB, and one of some."""
    shape = [(16 << 24) + more]
    base = Base(b"w", 2, shape, b"")
    chunks = [Chunk(bytes(8), 8, 1, LEARNED, 0, [b"\1"], 0) for _ in range(17)]
    chunks[0].digest = digest
    return File([base], [Entry(b"w", 2, shape, DELTA, REPLACE, 24, 0, b"", chunks)])


# Each chunk is stored in 16 bytes, of which 9 are streams: 17 (256 16 - 9) bytes are left.
_LEFT = 17 * (256 * 16 - 9)
reject("C-EXPANSION-learned", lambda f: None, lambda: _expanding_learned(4 * _LEFT + 4))
reject(
    "P-DIGEST-learned-as-many-as-may-be",
    lambda f: None,
    lambda: _expanding_learned(4 * _LEFT + 3, bytes(8)),
)


def learned_as(
    name: str, made: Callable[[list[int], Callable[[list[int]], Any]], bytes], **values: Any
) -> None:
    """Another mask of chunk 0. made: of what is kept, and what makes decisions of it."""

    def change(file: File) -> None:
        entry, base = file.tensors[1], file.base[1]
        kept = kept_of(entry, base, 0)

        def decide(found: list[int]) -> Any:
            return mask_decisions(found, 1024, 0, columns_of(entry))

        assert learned_stream(decide(kept)) == entry.chunks[0].mask
        set_mask(entry.chunks[0], made(kept, decide))
        assign(entry.chunks[0], **values)

    with_learned(name, change)


for _what, _state in (("one-more", LOWEST + 1), ("a-word-more", 2 * LOWEST), ("most", 2**64 - 1)):
    learned_as(
        f"P-CODE-learned-ends-in-another-state-{_what}",
        lambda kept, decide, x=_state: learned_stream(decide(kept), x),
    )
learned_as("P-CODE-learned-word-missing", lambda k, decide: learned_stream(decide(k))[:-4])
learned_as("P-CODE-learned-word-left", lambda k, decide: learned_stream(decide(k)) + bytes(4))
learned_as(
    "P-CODE-learned-begins-too-low",
    lambda k, decide: learned_stream(decide(k))[:4] + bytes(4) + learned_stream(decide(k))[8:],
)
learned_as(
    "P-CODE-learned-missing-in-the-last-decision",
    lambda k, decide: words(coded_words(decide(k)[:-1], 65536 // 2)),
)
learned_chunk("P-CODE-learned-zeros", 2, mask=bytes(8), mask_raw=8)


def other_count(name: str, nnz: int, less: int = 0) -> None:
    """Decisions that keep other than nnz, right in all else. less: bytes that are missing."""

    def made(kept: list[int], _: Callable[[list[int]], Any]) -> bytes:
        # As a reader that goes by nnz learns.
        stream = learned_stream(mask_decisions(kept, 1024, 0, 40, nnz))
        return stream[: len(stream) - less]

    learned_as(name, made, nnz=nnz, planes=[b"\1" * nnz])


_SOME = len([p for p in range(1024) if p % 40 in (3, 4) or p // 40 % 5 == 2])
for _what, _nnz in (("one-too-many", _SOME - 1), ("too-many", 1), ("one-too-few", _SOME + 1)):
    other_count(f"P-POPCOUNT-learned-{_what}", _nnz)
other_count("P-POPCOUNT-learned-too-few", 1023)
# Which comes first.
other_count("P-POPCOUNT-learned-too-many-before-word-missing", 1, less=4)
other_count("P-CODE-learned-word-missing-before-too-few", 1023, less=4)
with_learned(
    "P-POPCOUNT-learned-after-bitmask",
    lambda f: (
        assign(f.tensors[0].chunks[0], mask=bytes(128)),
        assign(f.tensors[1].chunks[0], mask=bytes(8), mask_raw=8),
    ),
)
learned_chunk("P-DIGEST-learned", 0, digest=bytes(8))

# -- coded distances -----------------------------------------------------------------------------


def good_distances() -> File:
    """In BF16 chunks of which many, no and five elements are kept; in F16 and F32 one of all."""
    shapes = {"bf16": ("BF16", [2100]), "f16": ("F16", [90]), "f32": ("F32", [90])}
    bases = [
        base_tensor(name, dtype, shape, weights(name, math.prod(shape), dtype))
        for name, (dtype, shape) in shapes.items()
    ]
    kept = [*range(3, 1024, 7), *range(2048, 2073, 5)]
    changes = {p: moved(words_of(bases[0])[p], 1 + p * p % 90, 16) for p in kept}
    each = [
        {p: moved(word, 1 + p * p * p % 900, bits) for p, word in enumerate(words_of(base))}
        for base, bits in zip(bases[1:], (16, 32), strict=True)
    ]
    tensors = [
        coded_ulp("bf16", bases, 0, changes, firsts=FIRSTS, masks=BITMASK),
        coded_ulp("f16", bases, 1, each[0]),
        coded_ulp("f32", bases, 2, each[1]),
    ]
    assert [chunk.nnz for chunk in tensors[0].chunks] == [146, 0, 5]
    return File(base=bases, tensors=tensors)


FIRSTS = (0, 118)
BESIDE_DISTANCES: list[str] = []


def with_distances(name: str, change: Callable[[File], Any]) -> None:
    reject(name, change, good_distances)
    if name[:2] in ("P-", "D-") and not name.startswith("P-TABLE"):  # found with the base
        BESIDE_DISTANCES.append(name)


def distances_chunk(name: str, number: int, tensor: int = 0, **values: Any) -> None:
    """A chunk of a tensor of ``good_distances``, changed."""
    with_distances(name, lambda f: assign(f.tensors[tensor].chunks[number], **values))


def given_distances(file: File, tensor: int, number: int) -> Distances:
    entry, base = file.tensors[tensor], file.base[tensor]
    part = slice(number * 1024, (number + 1) * 1024)
    after = words_of(replace(base, data=entry.data))
    firsts = FIRSTS if tensor == 0 else (0,)
    return distances_of(words_of(base)[part], after[part], base.dtype, firsts)


def planes_as(
    name: str,
    change: Callable[[Distances, bytes, bytes], tuple[bytes, bytes]],
    tensor: int = 0,
    number: int = 0,
) -> None:
    """Tokens and low bits as ``change`` makes them of what they say and are."""

    def made(file: File) -> None:
        chunk = file.tensors[tensor].chunks[number]
        tokens, low = chunk.planes[:2]
        given = given_distances(file, tensor, number)
        chunk.planes[:2] = change(given, tokens, low)

    with_distances(name, made)


def tokens_as(
    name: str, change: Callable[[Distances, bytes], bytes], tensor: int = 0, number: int = 0
) -> None:
    planes_as(name, lambda given, tokens, low: (change(given, tokens), low), tensor, number)


def recoded(
    name: str, change: Callable[[Distances], Any], tensor: int = 0, number: int = 0
) -> None:
    """Everything written anew from what ``change`` has done to it."""

    def made(given: Distances, tokens: bytes, low: bytes) -> tuple[bytes, bytes]:
        change(given)
        first, second = given.planes(2)
        return first, second

    planes_as(name, made, tensor, number)


def other_table(
    name: str, change: Callable[[list[Context]], Any], tensor: int = 0, number: int = 0
) -> None:
    """Another table before the same words."""

    def made(given: Distances, tokens: bytes) -> bytes:
        rest = tokens[len(table(given.contexts)) :]
        change(given.contexts)
        return table(given.contexts) + rest

    tokens_as(name, made, tensor, number)


for _what, _dtype, _width in (("f64", 16, 8), ("u16", 4, 2), ("i32", 7, 4)):
    reject(
        f"R-VALUES-distances-of-{_what}",
        lambda f: assign(f.tensors[0], codec=CODED_ULP),
        lambda d=_dtype, w=_width: File(
            base=[Base(b"a", d, [3], bytes(3 * w))],
            tensors=[
                delta("a", [Base(b"a", d, [3], bytes(3 * w))], 0, {1: 1}),
            ],
        ),
    )
reject("R-VALUES-distances-new", lambda f: assign(f.tensors[2], codec=CODED_ULP))
reject("R-VALUES-distances-copy", lambda f: assign(f.tensors[1], codec=CODED_ULP))
reject("R-VALUES-distances-file", lambda f: assign(f.files[0], codec=CODED_ULP))
with_distances("C-COUNT-distances", lambda f: f.tensors[0].chunks.pop())
distances_chunk("C-NNZ-distances", 2, nnz=2100 - 2048 + 1)
for _what, _codec in (("drawn", DRAWN), ("parameters", PARAMETERS), ("coded", CODED)):
    distances_chunk(f"C-CODEC-distances-{_what}", 0, codec=_codec)
for _what, _number in (("some", 0), ("nothing", 1)):
    for _plane in range(4):
        distances_chunk(
            f"C-FLAGS-distances-{_what}-plane-{_plane}", _number, planes_zstd=1 << _plane
        )
    distances_chunk(f"C-FLAGS-distances-{_what}-reserved", _number, reserved=1)
distances_chunk("C-FLAGS-distances-plane-of-f32", 0, 2, planes_zstd=8)
distances_chunk("C-MASKSIZE-distances", 0, mask_raw=129)
for _tensor, _what in enumerate(("bf16", "f16", "f32")):
    _nnz, _bits = (146, 14) if _tensor == 0 else (90, 14 if _tensor == 1 else 30)
    _most = -(-_nnz * _bits // 8)
    distances_chunk(f"C-STORED-distances-{_what}-no-tokens", 0, _tensor, sizes=[0, 9])
    distances_chunk(f"C-STORED-distances-{_what}-tokens-least", 0, _tensor, sizes=[21, 9])
    distances_chunk(
        f"C-STORED-distances-{_what}-tokens-most", 0, _tensor, sizes=[8402 + 2 * _nnz, 9]
    )
    distances_chunk(f"C-STORED-distances-{_what}-low-most", 0, _tensor, sizes=[99, _most + 1])
    distances_chunk(f"C-STORED-distances-{_what}-third-plane", 0, _tensor, sizes=[99, 9, 1])
    distances_chunk(
        f"C-STORED-distances-{_what}-last-plane", 0, _tensor, sizes=[99, 9, *[0] * 5, 1]
    )
distances_chunk("C-STORED-distances-of-nothing", 1, planes=[bytes(22), b""])
distances_chunk("C-STORED-distances-of-nothing-one-byte", 1, planes=[b"\0", b""])
distances_chunk("C-STORED-distances-of-nothing-low", 1, planes=[b"", b"\0"])
distances_chunk("C-STORED-distances-mask", 0, mask_stored=127)
distances_chunk("C-STORED-distances-mask-not-smaller", 0, mask_zstd=1)


def _expanding_distances(kept: int, tokens: int, low: int, digest: bytes | None = None) -> File:
    """Two chunks of 2^24 elements, which alone count for 64 MiB and 1,068 bytes, and a third."""
    shape = [(2 << 24) + kept]
    base = Base(b"w", 14, shape, b"")
    chunks = [expanding_chunk(n, t, 2) for n, t in ((1 << 24, 22), (1 << 24, 22), (kept, tokens))]
    chunks[2].planes[1] = bytes(low)
    chunks[0].digest = digest
    return File([base], [Entry(b"w", 14, shape, DELTA, CODED_ULP, 24, 0, b"", chunks)])


# At the limit, where the next fault is reported, and one byte beyond it.
for _what, _kept, _tokens, _low in (
    ("elements", 8415, 22, 0),
    ("a-second-context", 9180, 27, 1),
    ("64-contexts", 33087, 342, 0),
):
    reject(
        f"P-DIGEST-distances-as-many-{_what}-as-may-be",
        lambda f: None,
        lambda k=_kept, t=_tokens, n=_low: _expanding_distances(k, t, n, bytes(8)),
    )
    reject(
        f"C-EXPANSION-distances-{_what}",
        lambda f: None,
        lambda k=_kept, t=_tokens, n=_low: _expanding_distances(k, t, n + 1),
    )

other_table("P-TABLE-no-contexts", lambda c: c.clear())
tokens_as("P-TABLE-65-contexts", lambda given, _: table([Context(i, 0, [4096]) for i in range(65)]))
tokens_as("P-TABLE-255-contexts", lambda _, tokens: b"\xff" + tokens[1:])
tokens_as("P-TABLE-one-context-more", lambda _, tokens: b"\3" + tokens[1:])
tokens_as("P-TABLE-zeros", lambda _, tokens: bytes(len(tokens)))
other_table("P-TABLE-first-exponent-1", lambda c: assign(c[0], first_exponent=1))
other_table("P-TABLE-first-exponents-equal", lambda c: assign(c[1], first_exponent=0))
other_table(
    "P-TABLE-first-exponents-descend",
    lambda c: c.extend([Context(200, 0, [4096]), Context(199, 0, [4096])]),
)
other_table("P-TABLE-no-tokens", lambda c: c.insert(1, Context(100, 5, [])))
other_table("P-TABLE-sum-less", lambda c: c.append(Context(200, 2, [4095])))
other_table("P-TABLE-sum-more", lambda c: c.append(Context(200, 2, [4095, 2])))
other_table("P-TABLE-sum-0", lambda c: c.append(Context(200, 2, [0])))
other_table("P-TABLE-sum-wraps", lambda c: c.append(Context(200, 2, [4096, 65535, 1])))
other_table("P-TABLE-share-of-65535", lambda c: c.append(Context(200, 2, [65535])))
other_table("P-TABLE-first-share-0", lambda c: c.append(Context(200, 2, [0, 4096])))
other_table("P-TABLE-last-share-0", lambda c: c.append(Context(200, 2, [4096, 0])))
other_table("P-TABLE-token-1-alone", lambda c: c.append(Context(200, 1, [4096])))
other_table("P-TABLE-token-1-among-others", lambda c: c.append(Context(200, 0, [4000, 1, 95])))
for _tensor, _what, _most in ((0, "bf16", 32), (1, "f16", 32), (2, "f32", 64)):
    other_table(
        f"P-TABLE-{_what}-token-too-many",
        lambda c, n=_most: c.append(Context(200, n, [4096])),
        _tensor,
    )
    other_table(
        f"P-TABLE-{_what}-tokens-too-many",
        lambda c, n=_most: c.append(Context(200, 2, [1, *[0] * (n - 3), 4095])),
        _tensor,
    )
    other_table(
        f"P-TABLE-{_what}-tokens-255",
        lambda c: c.append(Context(200, 255, [4096] * 255)),
        _tensor,
    )
tokens_as(
    "P-TABLE-cut-after-a-context",
    lambda given, _: b"\2" + Context(0, 0, [4096 - 22, *[0], *[1] * 22]).stream(),
)
tokens_as(
    "P-TABLE-cut-in-a-head-of-3",
    lambda given, _: b"\2" + Context(0, 0, [4096 - 22, *[0], *[1] * 22]).stream() + b"\x76\0",
)
tokens_as(
    "P-TABLE-cut-in-shares",
    lambda given, _: b"\1" + Context(0, 0, [4096 - 22, *[0], *[1] * 22], 25).stream(),
)
tokens_as("P-TABLE-half-a-word", lambda given, tokens: tokens[:-1])
tokens_as("P-TABLE-half-a-word-more", lambda given, tokens: tokens + b"\0")
tokens_as("P-TABLE-no-words", lambda given, _: table(given.contexts))
tokens_as("P-TABLE-seven-words", lambda given, t: t[: len(table(given.contexts)) + 14])
tokens_as("P-TABLE-seven-words-and-a-half", lambda given, t: t[: len(table(given.contexts)) + 15])


def words_as(
    name: str, change: Callable[[list[int]], Any], tensor: int = 0, number: int = 0
) -> None:
    """Other words behind the same table."""

    def made(given: Distances, tokens: bytes) -> bytes:
        words = words_of_tokens(given.coded, given.contexts)
        change(words)
        return table(given.contexts) + word_bytes(words)

    tokens_as(name, made, tensor, number)


def lower_state(words: list[int], number: int) -> None:
    words[2 * number + 1] = 0


for _state in range(4):
    words_as(f"P-CODE-distances-begin-too-low-{_state}", lambda w, j=_state: lower_state(w, j))
    for _number in (0, 2):
        recoded(
            f"P-CODE-distances-end-in-another-state-{_state}-of-chunk-{_number}",
            lambda d, j=_state: assign(d, end=[LOWEST_STATE + (i == j) for i in range(4)]),
            number=_number,
        )


def _too_low_but_right(given: Distances, _: bytes) -> bytes:
    """State 1, of one element, begins as start + 1; after it is 1, and with a word of 0 2^16."""
    words = words_of_tokens(given.coded, given.contexts)
    exponent, token = given.coded[1]
    here = [each for each in given.contexts if each.first_exponent <= exponent][-1]
    index = token - here.first_token
    assert len(words) == 8
    assert here.shares[index] > 1
    words[2:4] = sum(here.shares[:index]) + 1, 0
    return table(given.contexts) + word_bytes([*words, 0])


tokens_as("P-CODE-distances-begin-too-low-but-end-right", _too_low_but_right, number=2)
words_as("P-CODE-distances-word-missing", lambda w: w.pop())
words_as("P-CODE-distances-words-missing", lambda w: w.__delitem__(slice(8, None)))
words_as("P-CODE-distances-word-left", lambda w: w.append(0))
words_as("P-CODE-distances-word-left-of-five", lambda w: w.append(1), number=2)
words_as("P-CODE-distances-words-left-of-f32", lambda w: w.extend([0, 0]), 2)
recoded(
    "P-CODE-distances-end-a-word-more",
    lambda d: assign(d, end=[2 * LOWEST_STATE] * 4),
)
recoded("P-CODE-distances-of-one-less", lambda d: d.coded.pop())
recoded("P-CODE-distances-of-one-more", lambda d: d.coded.append((0, d.contexts[0].first_token)))
other_table("P-CODE-distances-other-contexts", lambda c: assign(c[1], first_exponent=119))


def _largest(nnz: int, bits: int) -> tuple[bytes, bytes]:
    """Planes as large as they may be: 64 whole contexts, words for all, low bits for all."""
    contexts = [Context(i, 0, [4096 - 62, 0, *[1] * 62]) for i in range(64)]
    return table(contexts) + word_bytes([1] * (8 + nnz)), bytes(-(-nnz * bits // 8))


planes_as("P-CODE-distances-largest", lambda *_: _largest(90, 30), 2)
for _tensor, _what in enumerate(("bf16", "f16", "f32")):
    planes_as(
        f"P-TAIL-distances-{_what}-low-bits-missing", lambda _, t, low: (t, low[:-1]), _tensor
    )
    planes_as(f"P-TAIL-distances-{_what}-no-low-bits", lambda _, t, low: (t, b""), _tensor)
    planes_as(f"P-TAIL-distances-{_what}-byte-left", lambda _, t, low: (t, low + b"\0"), _tensor)
    planes_as(
        f"P-TAIL-distances-{_what}-byte-of-ones-left", lambda _, t, n: (t, n + b"\xff"), _tensor
    )
    planes_as(
        f"P-TAIL-distances-{_what}-last-bit",
        lambda _, t, low: (t, low[:-1] + bytes([low[-1] | 0x80])),
        _tensor,
    )
planes_as("P-TAIL-distances-of-five", lambda _, t, low: (t, low + b"\0"), number=2)

# Which comes first.
planes_as(
    "P-TABLE-before-state",
    lambda given, _, low: (table([*given.contexts, Context(200, 2, [4095])]) + bytes(16), low),
)
planes_as("P-TABLE-before-low-bits", lambda given, tokens, low: (b"\0" + tokens[1:], b""))
planes_as(
    "P-CODE-distances-state-before-low-bits",
    lambda given, _, low: (table(given.contexts) + bytes(16), b""),
)
planes_as(
    "P-CODE-distances-word-missing-before-low-bits-left",
    lambda _, tokens, low: (tokens[:-2], low + b"\0"),
)
planes_as(
    "P-CODE-distances-words-left-before-low-bits-missing",
    lambda _, tokens, low: (tokens + b"\0\0", low[:-1]),
)
planes_as(
    "P-CODE-distances-words-left-before-byte-left",
    lambda _, tokens, low: (tokens + b"\0\0", low + b"\0"),
)
planes_as(
    "P-CODE-distances-word-missing-before-no-low-bits",
    lambda _, tokens, low: (tokens[:-2], b""),
)
with_distances(
    "P-POPCOUNT-before-table",
    lambda f: assign(
        f.tensors[0].chunks[0],
        mask=b"\0" + f.tensors[0].chunks[0].mask[1:],
        planes=[bytes(40), b""],
    ),
)
with_distances(
    "P-TABLE-before-popcount-of-the-next-chunk",
    lambda f: (
        assign(f.tensors[0].chunks[0], planes=[bytes(40), b""]),
        assign(f.tensors[1], digest=digest_of(b"")),
    ),
)
distances_chunk("P-DIGEST-distances", 0, digest=bytes(8))
distances_chunk("P-DIGEST-distances-of-nothing", 1, digest=bytes(8))
distances_chunk("P-DIGEST-distances-before-table", 0, digest=bytes(8), planes=[bytes(40), b""])
with_distances(
    "C-PADDING-distances",
    lambda f: assign(
        f.tensors[0].chunks[2], padding=bytes(-len(f.tensors[0].chunks[2].data) % 8 - 1) + b"\1"
    ),
)
planes_as(
    "D-DIGEST-distances",
    lambda _, tokens, low: (tokens, bytes([low[0] ^ 1]) + low[1:]),
)
distances_chunk("C-FLAGS-distances-before-stored", 0, planes_zstd=1, sizes=[21, 9])
distances_chunk("C-MASKSIZE-distances-before-stored", 0, mask_raw=129, sizes=[21, 9])

# A member of a bundle, in a folder whose base.nps (BASE_NPS) is as good as need be.
BASE_NPS: dict[str, bytes] = {
    "bundle": bundled_base().build(),
    "bundle-in-need": member().build(),  # its own index takes a dictionary
    "bundle-of-no-file": b"",
    "bundle-damaged": bundled_base().build()[:60] + bytes(4) + bundled_base().build()[64:],
    "bundle-out-of-order": swapped(bundled_base()).build(),
}
reject("T-DICTIONARY-missing", lambda f: None, member)
for _what, _dictionary in {
    "bundle-in-need": member().raw_index(),
    "bundle-of-no-file": b"x" * 64,
    "bundle-damaged": bundled_base().raw_index(),
    "bundle-out-of-order": swapped(bundled_base()).raw_index(),
}.items():
    reject(f"{_what}/T-DICTIONARY-refused", lambda f: None, lambda d=_dictionary: member(d))
for _what, _change in {
    "T-DICTIONARY-of-another-size": lambda f: f.set_footer.update(
        dictionary_bytes=len(f.dictionary) + 1
    ),
    "T-DICTIONARY-of-no-size": lambda f: f.set_footer.update(dictionary_bytes=0),
    "T-DICTIONARY-another": lambda f: assign(f, dictionary=f.dictionary[:-1] + b"]"),
    "T-DICTIONARY-before-digest": lambda f: f.set_footer.update(
        dictionary_digest64=bytes(8), index_digest=bytes(32)
    ),
    "T-INDEXSIZE-before-dictionary": lambda f: f.set_footer.update(
        index_raw_bytes=2**30 + 1, dictionary_digest64=bytes(8)
    ),
    "T-RESERVED-of-a-member": lambda f: f.set_footer.update(reserved=b"\1\0\0"),
    "T-INDEXSIZE-not-smaller": lambda f: assign(f, index_frame=lambda raw: raw),
    "I-DIGEST-of-the-frame-alone": lambda f: f.set_footer.update(
        index_digest=digest_of(dictionary_frame(f.raw_index(), f.dictionary))
    ),
    "I-DIGEST-of-half-the-digest": lambda f: f.set_footer.update(
        index_digest=digest_of(
            dictionary_frame(f.raw_index(), f.dictionary) + digest_of(f.dictionary)[:8]
        )
    ),
    "I-ZSTD-before-the-dictionary": lambda f: assign(
        f, index_frame=lambda raw: dictionary_frame(raw, f.dictionary, further=len(f.dictionary))
    ),
    "I-ZSTD-dictionary-id": lambda f: assign(
        f, index_frame=lambda raw: dictionary_frame(raw, f.dictionary, flags=0xA1, more=b"\7")
    ),
    "I-ZSTD-checksum": lambda f: assign(
        f, index_frame=lambda raw: dictionary_frame(raw, f.dictionary, flags=0xA4) + bytes(4)
    ),
    "I-ZSTD-trailing-byte": lambda f: assign(
        f, index_frame=lambda raw: dictionary_frame(raw, f.dictionary) + b"\0"
    ),
    "M-KEYS-of-a-member": lambda f: assign(f, metadata=b'{"k":"","k":""}'),
}.items():
    reject(f"bundle/{_what}", _change, member)
for _what, _beyond in (("T-INDEXSIZE-ratio-by-one", 1), ("I-ZSTD-garbage-at-the-ratio", 0)):
    reject(
        f"bundle/{_what}",
        lambda f, b=_beyond: (
            assign(f, index_frame=lambda raw: b"\x55" * 100),
            f.set_footer.update(index_raw_bytes=8 * 100 + 2**20 + len(f.dictionary) + b),
        ),
        member,
    )

# Digests of deltas can only be compared beside the base.
BESIDE: dict[str, Callable[[], File]] = {
    "D-DIGEST-delta": good,
    **{n: short_digests for n in REJECT if n.startswith(("D-CONTENT-", "D-DIGEST-short-"))},
    "D-DIGEST-before-content": short_digests,
    "D-DIGEST-signs": good_signs,
    "D-DIGEST-levels": good_signs,
    "D-DIGEST-signs-of-nothing": lambda: VALID["signs-and-levels-of-nothing"](),
    "D-DIGEST-grid": good_grid,
    **dict.fromkeys(BESIDE_DISTANCES, good_distances),
}


def short_digest_of_the_base() -> File:
    """What has a digest that begins as that of a base tensor, which the fine-tune does not have."""
    file = short_digests()
    file.base[2].digest = digest_of(file.base[2].data)[:8] + bytes(24)
    return file


# The right file beside another base: the file, and what is done to its base.
WRONG_BASE: dict[str, tuple[Callable[[], File], Callable[[list[Base]], None]]] = {
    "value-used": (good, lambda base: assign(base[0], data=b"\xff" + base[0].data[1:])),
    "value-copied": (good, lambda base: assign(base[1], data=base[1].data[:-1] + b"\x5a")),
    "shape": (good, lambda base: assign(base[0], shape=[25, 100])),
    "dtype": (good, lambda base: assign(base[0], dtype=13)),
    "missing": (good, lambda base: base.__delitem__(0)),
    "renamed": (good, lambda base: assign(base[1], name=b"c")),
    "exponents-of-distances": (
        good_distances,
        lambda base: assign(base[0], data=base[0].data[:-1] + b"\x5a"),
    ),
    "value-of-short-digests": (
        short_digests,
        lambda base: assign(base[2], data=b"\xff" + base[2].data[1:]),
    ),
    "base-root-of-short-digests": (
        lambda: replace(short_digests(), set_head={"base_root": bytes(32)}),
        lambda base: None,
    ),
    "only-the-start-of-a-digest": (short_digest_of_the_base, lambda base: None),
    "no-distance-decodes": (good_distances, lambda base: assign(base[2], data=bytes(360))),
}
