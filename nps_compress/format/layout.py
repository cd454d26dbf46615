"""Byte geometry of a ``.nps`` file. The tables of format_spec/SPEC.md, as numpy records.

File: header (64) | chunk data | index | footer (96), all little-endian.
Index, once decompressed: head (128) | base records | tensor records | file records | chunk records
| string heap | metadata.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt
from blake3 import blake3

MAGIC = b"\x89NPS\r\n\x1a\n"
MAGIC_REVERSED = MAGIC[::-1]
MAJOR, MINOR = 1, 0

CHUNK_ALIGNMENT = 8
MIN_CHUNK_LOG2, MAX_CHUNK_LOG2 = 10, 24
MAX_RANK = 8
MAX_NAME_BYTES = 512
MAX_NUMEL = 2**48
MAX_RECORDS = 2**20  # of the base and tensor tables each
MAX_INDEX_BYTES = 2**30
MAX_METADATA_BYTES = 2**20
MAX_FILES, MAX_FILE_BYTES = 64, 2**26
# A zstd block of 128 KiB takes at least 4 bytes.
MAX_ZSTD_RATIO = 2**15
DICTIONARY_FILE = "base.nps"  # beside a file whose index needs its index to be undone
RESERVED_NAME = "__metadata__"  # safetensors keeps its own metadata under this name
# Digests do not compress, so a large honest index shrinks less than this; a bomb would shrink more.
MAX_INDEX_RATIO, INDEX_RATIO_SLACK = 8, 2**20
# Bounds the work and memory of decoding by the size of the file.
MAX_EXPANSION, EXPANSION_SLACK = 256, 2**26
NO_BASE = 0xFFFFFFFF
# Of a tensor's digest an index holds all, or only so much as tells tensors apart; the roots in its
# head are whole.
DIGEST_BYTES, SHORT_DIGEST_BYTES = 32, 8

SUPPORTED_REQUIRED_FEATURES = 0


class Op(IntEnum):
    """How a tensor of the fine-tune comes to be."""

    COPY = 1  # the bytes of a base tensor
    DELTA = 2  # a base tensor with some elements changed
    NEW = 3  # stored whole


class IndexCompression(IntEnum):
    """How the index is stored."""

    RAW = 0
    ZSTD = 1
    ZSTD_DICTIONARY = 2  # with the index of DICTIONARY_FILE, once decompressed


HEADER = np.dtype(
    [
        ("magic", "V8"),
        ("major", "<u2"),
        ("minor", "<u2"),
        ("reserved0", "<u4"),
        ("required_features", "<u8"),
        ("optional_features", "<u8"),
        ("reserved1", "V28"),
        ("crc32", "<u4"),
    ]
)
FOOTER = np.dtype(
    [
        ("index_offset", "<u8"),
        ("index_stored_bytes", "<u8"),
        ("index_raw_bytes", "<u8"),
        ("file_bytes", "<u8"),
        ("index_digest", "V32"),
        ("major", "<u2"),
        ("minor", "<u2"),
        ("index_compression", "u1"),
        ("reserved", "V3"),
        ("dictionary_bytes", "<u4"),
        ("dictionary_digest64", "V8"),
        ("crc32", "<u4"),
        ("magic_reversed", "V8"),
    ]
)
INDEX_HEAD = np.dtype(
    [
        ("base_records", "<u4"),
        ("tensor_records", "<u4"),
        ("file_records", "<u4"),
        ("digest_bytes", "<u4"),
        ("chunk_records", "<u8"),
        ("heap_bytes", "<u8"),
        ("metadata_bytes", "<u8"),
        ("base_root", "u1", (DIGEST_BYTES,)),
        ("content_digest", "u1", (DIGEST_BYTES,)),
        ("reserved", "V24"),
    ]
)
BASE_RECORD = np.dtype(
    [
        ("name_bytes", "<u2"),
        ("dtype", "u1"),
        ("rank", "u1"),
        ("reserved", "<u4"),
        ("shape", "<u8", (MAX_RANK,)),
        ("digest", "u1", (DIGEST_BYTES,)),
    ]
)
TENSOR_RECORD = np.dtype(
    [
        ("name_bytes", "<u2"),
        ("dtype", "u1"),
        ("rank", "u1"),
        ("op", "u1"),
        ("value_codec", "u1"),
        ("chunk_log2", "u1"),
        ("reserved0", "u1"),
        ("base_index", "<u4"),
        ("reserved1", "<u4"),
        ("shape", "<u8", (MAX_RANK,)),
        ("digest", "u1", (DIGEST_BYTES,)),
        ("reserved2", "u1", (16,)),
    ]
)
CHUNK_RECORD = np.dtype(
    [
        ("mask_stored_bytes", "<u4"),
        ("mask_raw_bytes", "<u4"),
        ("nnz", "<u4"),
        ("mask_codec", "u1"),
        ("mask_compressed", "u1"),
        ("planes_compressed", "u1"),
        ("reserved", "u1"),
        ("plane_stored_bytes", "<u4", (8,)),
        ("digest64", "u1", (SHORT_DIGEST_BYTES,)),
    ]
)

HEADER_BYTES, FOOTER_BYTES = HEADER.itemsize, FOOTER.itemsize
MIN_FILE_BYTES = HEADER_BYTES + FOOTER_BYTES


def stored_chunk_bytes(chunks: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Bytes each chunk takes before padding: its mask stream and its value planes. [n] int64."""
    planes = chunks["plane_stored_bytes"].astype(np.int64).sum(axis=1)
    return chunks["mask_stored_bytes"].astype(np.int64) + planes


def max_raw_bytes(chunk_data_bytes: int) -> int:
    """Most bytes that all streams may have once zstd is undone (SPEC.md, C-EXPANSION)."""
    return MAX_EXPANSION * chunk_data_bytes + EXPANSION_SLACK


def max_index_bytes(stored_bytes: int, dictionary_bytes: int) -> int:
    """Most bytes that a compressed index may have (SPEC.md, T-INDEXSIZE)."""
    return MAX_INDEX_RATIO * stored_bytes + INDEX_RATIO_SLACK + dictionary_bytes


def index_digest(stored: bytes, dictionary: bytes) -> bytes:
    """BLAKE3 of a stored index; with a dictionary, which is not empty, it depends on that too."""
    digest = blake3(stored)
    if dictionary:
        digest.update(blake3(dictionary).digest())
    return digest.digest()


def aligned(size: int) -> int:
    """``size`` rounded up to the chunk alignment."""
    return -(-size // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT


def digest64(data: bytes) -> bytes:
    """The first 8 bytes of BLAKE3, the check on a chunk's stored bytes."""
    return blake3(data).digest(SHORT_DIGEST_BYTES)
