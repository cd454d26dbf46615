"""Reads the structure of a .nps file with the parser that Kaitai Struct generated from nps.ksy.

Independent of the package's own reader: nps.ksy was written from format_spec/SPEC.md alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kaitaistruct import KaitaiStructError

import nps_zstd
from nps import Nps

# Rules of section 8 that the parser enforces: it refuses every file whose first broken rule is one
# of these. Not H-CRC, T-CRC, I-DIGEST, I-ROOT, P-DIGEST, D-DIGEST, D-CONTENT (it computes no
# checksums), T-DICTIONARY (so a dictionary may have been damaged; it finds where there is none of
# this digest), M-JSON (it asks for UTF-8 that begins with a brace, no more), M-KEYS, and what only
# a decoded stream shows, but for parameters and the contexts of distances, which it reads.
_RULES = """
F-SIZE H-MAGIC H-MAJOR H-FEATURE H-RESERVED
T-MAGIC T-VERSION T-RESERVED T-SIZE T-INDEX T-INDEXSIZE T-COMPRESSION
I-ZSTD I-COUNT I-SIZE I-RESERVED I-DIGESTS
N-HEAP N-LENGTH N-UTF8 N-CONTROL N-ORDER N-RESERVED N-FILE
S-DTYPE S-RANK S-DIM S-NUMEL
R-RESERVED R-OP R-FILE R-BASE R-SHAPE R-COPY R-VALUES R-CHUNKLOG
C-COUNT C-NNZ C-CODEC C-NEW C-FLAGS C-MASKSIZE C-STORED C-LAYOUT C-EXPANSION
M-SIZE C-PADDING P-PARAMETERS P-TABLE
"""
RULES = frozenset(_RULES.split())


class StructureError(Exception):
    """The parser does not accept the file."""


def _tensor(record: Any, name: Any) -> dict[str, Any]:
    return {
        "name": name.text,
        "dtype": int(record.dtype),
        "rank": record.rank,
        "shape": [dim.size for dim in record.shape.dims[: record.rank]],
        "digest": record.digest.hex(),
    }


def _changed(record: Any, name: Any) -> dict[str, Any]:
    return _tensor(record, name) | {
        "op": int(record.op),
        "value_codec": int(record.value_codec),
        "chunk_log2": record.chunk_log2,
        "base_index": record.base_index,
        "chunks": record.chunks,
    }


def _chunk(chunk: Any) -> dict[str, Any]:
    record = chunk.record
    return {
        "mask_codec": int(record.mask_codec),
        "nnz": record.nnz,
        "mask_raw_bytes": record.mask_raw_bytes,
        "mask_stored_bytes": record.mask_stored_bytes,
        "mask_compressed": record.mask_compressed,
        "planes_compressed": record.planes_compressed,
        "plane_stored_bytes": record.plane_stored_bytes[: record.tensor.width],
        "digest64": record.digest64.hex(),
    }


def _dictionaries(path: Path) -> list[bytes]:
    """The raw index of base.nps, if there is one that needs no dictionary itself."""
    if not path.is_file():
        return []
    try:
        file = Nps.from_bytes(path.read_bytes())
    except (KaitaiStructError, EOFError, ValueError):
        return []
    is_raw = int(file.footer.index_compression) == 0
    return [file._raw__m_index_raw if is_raw else file._raw__m_index_zstd]


def structure(path: str | Path) -> dict[str, Any]:
    """What the file consists of, as plain values; StructureError where the parser refuses it.

    "chunks" are those of all tensors, then of all files, in the order of their records.
    """
    stored = Path(path).read_bytes()
    nps_zstd.DICTIONARIES.clear()
    nps_zstd.DICTIONARIES.extend(_dictionaries(Path(path).with_name("base.nps")))
    try:
        file = Nps.from_bytes(stored)
    except (KaitaiStructError, EOFError, ValueError) as error:  # ValueError: UTF-8, zstd, seek
        raise StructureError(f"{type(error).__name__}: {error}") from error
    footer, index, heap = file.footer, file.index, file.index.heap
    tables = [*file.chunk_data.tensors, *file.chunk_data.files]
    return {
        "header": {
            "major": file.header.major,
            "minor": file.header.minor,
            "optional_features": file.header.optional_features,
            "crc32": file.header.crc32,
        },
        "footer": {
            "major": footer.major,
            "minor": footer.minor,
            "index_offset": footer.index_offset,
            "index_stored_bytes": footer.index_stored_bytes,
            "index_raw_bytes": footer.index_raw_bytes,
            "index_compression": int(footer.index_compression),
            "dictionary_bytes": footer.dictionary_bytes,
            "dictionary_digest64": footer.dictionary_digest64.hex(),
            "index_digest": footer.index_digest.hex(),
            "crc32": footer.crc32,
        },
        "head": {
            "digest_bytes": index.head.digest_bytes,
            "base_root": index.head.base_root.hex(),
            "content_digest": index.head.content_digest.hex(),
        },
        "base": list(map(_tensor, index.base_records, heap.base_names)),
        "tensors": list(map(_changed, index.tensor_records, heap.tensor_names)),
        "files": list(map(_changed, index.file_records, heap.file_names)),
        "chunks": [_chunk(chunk) for table in tables for chunk in table.chunks],
        "metadata": index.metadata.encode(),
    }
