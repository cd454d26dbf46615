"""Read a ``.nps`` file. Every byte is hostile until a rule of format_spec/SPEC.md has passed it.

Rules are checked in the order of the specification's validation algorithm; the first one broken
is raised as a :class:`FormatError` that carries its id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from nps_compress import codecs
from nps_compress.codecs import MaskCodec, Positions, ValueCodec
from nps_compress.dtypes import BY_CODE, DType
from nps_compress.errors import FormatError
from nps_compress.format import layout
from nps_compress.format.layout import IndexCompression, Op
from nps_compress.format.records import (
    BaseTensor,
    TensorEntry,
    base_root,
    has_control_characters,
)
from nps_compress.format.writer import FILE_NAME

Record = dict[str, int]

_CHANGING_CODECS = (ValueCodec.REPLACE, ValueCodec.XOR, ValueCodec.ULP)


@dataclass(frozen=True)
class Chunk:
    """One chunk, verified and decoded as far as is possible without the base.

    positions: [nnz] uint32, ascending, or None where all ``numel`` elements are kept;
    planes: [itemsize, nnz] uint8, the value payload, least significant byte first.
    """

    numel: int
    positions: Positions | None
    planes: npt.NDArray[np.uint8]


class NpsReader:
    """An open ``.nps`` file: its tables, checked, and its chunks on demand.

    Opening reads header, footer and index only. Reading chunks is thread-safe.

    Raises:
        FormatError: a rule is broken. OSError: the file can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seek_lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            self.file_bytes = os.fstat(self._descriptor).st_size
            index_offset, index = self._read_envelope()
            self._parse_index(index_offset, index)
        except BaseException:
            self.close()
            raise

    base: tuple[BaseTensor, ...]
    tensors: tuple[TensorEntry, ...]
    files: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]

    def __enter__(self) -> NpsReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def base_root(self) -> bytes:
        """SHA-256 that identifies the whole base (SPEC.md, base root)."""
        return base_root(self.base)

    def stored_bytes(self, entry: TensorEntry) -> int:
        """Bytes the tensor's chunks take in the file, padding included."""
        span = slice(entry.first_chunk, entry.first_chunk + entry.chunk_count)
        return int(self._padded[span].sum())

    def nnz(self, entry: TensorEntry) -> int:
        """Elements the file keeps for the tensor."""
        span = slice(entry.first_chunk, entry.first_chunk + entry.chunk_count)
        return int(self._chunks["nnz"][span].astype(np.int64).sum())

    def mask_codecs(self, entry: TensorEntry) -> list[MaskCodec]:
        """The mask codecs that occur in the tensor's chunks, ascending."""
        span = slice(entry.first_chunk, entry.first_chunk + entry.chunk_count)
        return [MaskCodec(code) for code in np.unique(self._chunks["mask_codec"][span])]

    def read_chunk(self, entry: TensorEntry, number: int) -> Chunk:
        """Chunk ``number`` of a tensor, decoded. Raises FormatError (C-PADDING, P-*)."""
        index = entry.first_chunk + number
        record = self._chunks[index]
        data = self._pread(int(self._offsets[index]), int(self._padded[index]))
        size = int(self._stored[index])
        if any(data[size:]):
            self._fail("C-PADDING", f"non-zero padding behind chunk {number} of {entry.name!r}")
        data = data[:size]
        if layout.sha256_64(data) != record["sha256_64"].tobytes():
            self._fail("P-DIGEST", f"chunk {number} of {entry.name!r} is damaged")
        nnz, position = int(record["nnz"]), int(record["mask_stored_bytes"])
        numel = min(1 << entry.chunk_log2, entry.numel - (number << entry.chunk_log2))
        try:
            mask = data[:position]
            if record["mask_compressed"]:
                mask = codecs.decompress(mask, int(record["mask_raw_bytes"]))
            positions = codecs.decode_mask(MaskCodec(record["mask_codec"]), mask, numel, nnz)
            stored = []
            for plane in range(entry.dtype.itemsize):
                end = position + int(record["plane_stored_bytes"][plane])
                stored.append(data[position:end])
                position = end
            planes = codecs.decode_planes(stored, int(record["planes_compressed"]), nnz)
        except FormatError as error:
            self._fail(error.rule, f"chunk {number} of {entry.name!r}: {error.detail}")
        return Chunk(numel, positions, planes)

    def read_file(self, entry: TensorEntry) -> bytes:
        """A stored side file. Raises FormatError (C-PADDING, P-*, D-DIGEST)."""
        data = b"".join(
            self.read_chunk(entry, number).planes.tobytes() for number in range(entry.chunk_count)
        )
        if hashlib.sha256(data).digest() != entry.sha256:
            self._fail("D-DIGEST", f"file {entry.name!r} does not have the digest it promises")
        return data

    # -- validation ---------------------------------------------------------------------------

    def _fail(self, rule: str, detail: str) -> NoReturn:
        raise FormatError(rule, detail, self.path)

    def _pread(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            data = os.pread(self._descriptor, size, offset)
        else:  # Windows
            with self._seek_lock:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                data = os.read(self._descriptor, size)
        if len(data) != size:
            self._fail(
                "F-SIZE", f"file ends at {offset + len(data)}, {offset + size} were promised"
            )
        return data

    def _read_envelope(self) -> tuple[int, bytes]:
        if self.file_bytes < layout.MIN_FILE_BYTES:
            self._fail("F-SIZE", f"{self.file_bytes} bytes are too few for a .nps file")
        raw = self._pread(0, layout.HEADER_BYTES)
        header = np.frombuffer(raw, layout.HEADER)[0]
        if raw[:8] != layout.MAGIC:
            self._fail("H-MAGIC", f"not a .nps file, it starts with {raw[:8]!r}")
        if zlib.crc32(raw[:-4]) != header["crc32"]:
            self._fail("H-CRC", "header is damaged")
        if header["major"] != layout.MAJOR:
            self._fail("H-MAJOR", f"format version {header['major']}, this reader knows 1")
        unknown = int(header["required_features"]) & ~layout.SUPPORTED_REQUIRED_FEATURES
        if unknown:
            self._fail("H-FEATURE", f"needs features {unknown:#x}, unknown to this reader")
        if header["reserved0"] or any(header["reserved1"].tobytes()):
            self._fail("H-RESERVED", "reserved bytes of the header are not zero")

        raw = self._pread(self.file_bytes - layout.FOOTER_BYTES, layout.FOOTER_BYTES)
        footer = np.frombuffer(raw, layout.FOOTER)[0]
        if raw[-8:] != layout.MAGIC_REVERSED:
            self._fail("T-MAGIC", "footer is missing: the file is truncated or has a tail")
        if zlib.crc32(raw[:-12]) != footer["crc32"]:
            self._fail("T-CRC", "footer is damaged")
        if (footer["major"], footer["minor"]) != (header["major"], header["minor"]):
            self._fail("T-VERSION", "header and footer state different versions")
        if any(footer["reserved"].tobytes()):
            self._fail("T-RESERVED", "reserved bytes of the footer are not zero")
        if footer["file_bytes"] != self.file_bytes:
            self._fail("T-SIZE", f"footer states {footer['file_bytes']} bytes of {self.file_bytes}")
        offset, stored = int(footer["index_offset"]), int(footer["index_stored_bytes"])
        raw_bytes, compression = int(footer["index_raw_bytes"]), int(footer["index_compression"])
        if (
            offset < layout.HEADER_BYTES
            or offset % layout.CHUNK_ALIGNMENT
            or offset + stored + layout.FOOTER_BYTES != self.file_bytes
        ):
            self._fail("T-INDEX", f"index of {stored} bytes at {offset} does not fit the file")
        if not layout.INDEX_HEAD.itemsize <= raw_bytes <= layout.MAX_INDEX_BYTES:
            self._fail("T-INDEXSIZE", f"index of {raw_bytes} bytes")
        if compression == IndexCompression.RAW:
            if raw_bytes != stored:
                self._fail("T-INDEXSIZE", f"raw index of {raw_bytes} bytes stored in {stored}")
        elif compression != IndexCompression.ZSTD:
            self._fail("T-COMPRESSION", f"unknown index compression {compression}")
        elif not (stored < raw_bytes <= layout.MAX_INDEX_RATIO * stored + layout.INDEX_RATIO_SLACK):
            self._fail("T-INDEXSIZE", f"index of {raw_bytes} bytes stored in {stored}")
        index = self._pread(offset, stored)
        if hashlib.sha256(index).digest() != footer["index_sha256"].tobytes():
            self._fail("I-DIGEST", "index is damaged")
        if compression == IndexCompression.ZSTD:
            try:
                index = codecs.decompress(index, raw_bytes, rule="I-ZSTD")
            except FormatError as error:
                self._fail(error.rule, f"index: {error.detail}")
        return offset, index

    def _parse_index(self, index_offset: int, index: bytes) -> None:
        head = np.frombuffer(index, layout.INDEX_HEAD, 1)[0]
        counts = {
            name: int(head[name])
            for name in ("base_records", "tensor_records", "file_records", "chunk_records")
        }
        heap_bytes, metadata_bytes = int(head["heap_bytes"]), int(head["metadata_bytes"])
        limits = (layout.MAX_RECORDS, layout.MAX_RECORDS, layout.MAX_FILES)
        for name, limit in zip(counts, limits, strict=False):
            if counts[name] > limit:
                self._fail("I-COUNT", f"{counts[name]} {name.replace('_', ' ')}")
        sizes = (
            layout.INDEX_HEAD.itemsize,
            counts["base_records"] * layout.BASE_RECORD.itemsize,
            counts["tensor_records"] * layout.TENSOR_RECORD.itemsize,
            counts["file_records"] * layout.TENSOR_RECORD.itemsize,
            counts["chunk_records"] * layout.CHUNK_RECORD.itemsize,
            heap_bytes,
            metadata_bytes,
        )
        if sum(sizes) != len(index):
            self._fail("I-SIZE", f"tables of {sum(sizes)} bytes in an index of {len(index)}")
        if head["reserved0"] or any(head["reserved1"].tobytes()):
            self._fail("I-RESERVED", "reserved bytes of the index head are not zero")
        starts = np.cumsum((0, *sizes)).tolist()

        def table(number: int, dtype: np.dtype[Any], count: int) -> npt.NDArray[np.void]:
            return np.frombuffer(index, dtype, count, starts[number])

        base = table(1, layout.BASE_RECORD, counts["base_records"])
        tensors = table(2, layout.TENSOR_RECORD, counts["tensor_records"])
        files = table(3, layout.TENSOR_RECORD, counts["file_records"])
        self._chunks = table(4, layout.CHUNK_RECORD, counts["chunk_records"])
        heap = index[starts[5] : starts[6]]

        if base["reserved"].any():
            self._fail("I-RESERVED", "reserved bytes of a base record are not zero")

        records = (base, tensors, files)
        names = self._names(heap, records)
        self._check_shapes(records, names)
        self.base = tuple(
            BaseTensor(name, dtype, shape, sha256)
            for name, (dtype, shape), sha256 in zip(
                names[0], _dtypes_and_shapes(base), _digests(base), strict=True
            )
        )
        self.tensors = self._check_tensors(tensors, names[1])
        self.files = self._check_files(files, names[2])
        self._place_chunks(index_offset)
        self.metadata = self._parse_metadata(index[starts[6] :])

    def _names(
        self, heap: bytes, tables: tuple[npt.NDArray[np.void], ...]
    ) -> tuple[list[str], ...]:
        lengths = [table["name_bytes"].astype(np.int64) for table in tables]
        if sum(int(part.sum()) for part in lengths) != len(heap):
            self._fail("N-HEAP", f"names do not add up to the {len(heap)} bytes of the heap")
        result, position = [], 0
        for part in lengths:
            names: list[str] = []
            previous = b""
            for length in part.tolist():
                if not 0 < length <= layout.MAX_NAME_BYTES:
                    self._fail("N-LENGTH", f"name of {length} bytes")
                raw = heap[position : position + length]
                position += length
                try:
                    name = raw.decode()
                except UnicodeDecodeError:
                    self._fail("N-UTF8", f"name {raw!r} is not UTF-8")
                if has_control_characters(name):
                    self._fail("N-CONTROL", f"name {name!r} holds control characters")
                if raw <= previous:
                    self._fail("N-ORDER", f"name {name!r} is out of order or there twice")
                names.append(name)
                previous = raw
            result.append(names)
        for name in (*result[0], *result[1]):
            if name == layout.RESERVED_NAME:
                self._fail("N-RESERVED", f"a tensor has the reserved name {name!r}")
        for name in result[2]:
            if not FILE_NAME.fullmatch(name):
                self._fail("N-FILE", f"file name {name!r}")
        return tuple(result)

    def _check_shapes(
        self, tables: tuple[npt.NDArray[np.void], ...], names: tuple[list[str], ...]
    ) -> None:
        for table, table_names in zip(tables, names, strict=True):
            columns = (table[field].tolist() for field in ("dtype", "rank", "shape"))
            for name, code, rank, dims in zip(table_names, *columns, strict=True):
                if code not in BY_CODE:
                    self._fail("S-DTYPE", f"{name!r} has unknown dtype {code}")
                if rank > layout.MAX_RANK:
                    self._fail("S-RANK", f"{name!r} has rank {rank}")
                if any(dims[rank:]):
                    self._fail("S-DIM", f"{name!r} has dimensions past its rank")
                if math.prod(max(dim, 1) for dim in dims[:rank]) > layout.MAX_NUMEL:
                    self._fail("S-NUMEL", f"{name!r} has shape {dims[:rank]}")

    def _check_tensors(
        self, table: npt.NDArray[np.void], names: list[str]
    ) -> tuple[TensorEntry, ...]:
        entries = []
        for name, record, (dtype, shape), sha256 in _rows(table, names):
            op = self._op(record, name)
            index: int | None = record["base_index"]
            if op is Op.NEW:
                if index != layout.NO_BASE:
                    self._fail("R-BASE", f"new tensor {name!r} names a base tensor")
                index = None
            else:
                assert index is not None
                if index >= len(self.base):
                    self._fail("R-BASE", f"{name!r} names base tensor {index} of {len(self.base)}")
                base = self.base[index]
                if (base.dtype, base.shape) != (dtype, shape):
                    self._fail("R-SHAPE", f"{name!r} differs from {base.name!r} in dtype or shape")
            if op is Op.COPY:
                if any(sha256):
                    self._fail("R-COPY", f"copied tensor {name!r} has a digest of its own")
                assert index is not None
                sha256 = self.base[index].sha256
            codec = self._value_codec(record, name, op, dtype)
            entries.append(
                TensorEntry(name, dtype, shape, op, codec, record["chunk_log2"], index, sha256)
            )
        return tuple(entries)

    def _check_files(
        self, table: npt.NDArray[np.void], names: list[str]
    ) -> tuple[TensorEntry, ...]:
        entries = []
        for name, record, (dtype, shape), sha256 in _rows(table, names):
            op = self._op(record, name)
            if op is Op.DELTA or dtype.name != "U8" or len(shape) != 1:
                self._fail("R-FILE", f"file {name!r} must be one row of bytes, new or the base's")
            if shape[0] > layout.MAX_FILE_BYTES:
                self._fail("R-FILE", f"file {name!r} has {shape[0]} bytes")
            if record["base_index"] != layout.NO_BASE:
                self._fail("R-BASE", f"file {name!r} names a base tensor")
            codec = self._value_codec(record, name, op, dtype)
            chunk_log2 = record["chunk_log2"]
            entries.append(TensorEntry(name, dtype, shape, op, codec, chunk_log2, None, sha256))
        return tuple(entries)

    def _op(self, record: Record, name: str) -> Op:
        if record["reserved"]:
            self._fail("R-RESERVED", f"reserved bytes of {name!r} are not zero")
        try:
            return Op(record["op"])
        except ValueError:
            self._fail("R-OP", f"{name!r} has unknown op {record['op']}")

    def _value_codec(self, record: Record, name: str, op: Op, dtype: DType) -> ValueCodec:
        code, chunk_log2 = record["value_codec"], record["chunk_log2"]
        allowed: tuple[ValueCodec, ...] = {
            Op.COPY: (ValueCodec.NONE,),
            Op.NEW: (ValueCodec.REPLACE,),
            Op.DELTA: _CHANGING_CODECS if dtype.is_float else _CHANGING_CODECS[:2],
        }[op]
        if code not in allowed:
            self._fail("R-VALUES", f"{name!r} has value codec {code}")
        low, high = layout.MIN_CHUNK_LOG2, layout.MAX_CHUNK_LOG2
        if (chunk_log2 != 0) if op is Op.COPY else not low <= chunk_log2 <= high:
            self._fail("R-CHUNKLOG", f"{name!r} has chunks of 2^{chunk_log2} elements")
        return ValueCodec(code)

    def _place_chunks(self, index_offset: int) -> None:
        entries = (*self.tensors, *self.files)
        counts = np.array([entry.chunk_count for entry in entries], np.int64)
        if int(sum(counts.tolist())) != len(self._chunks):
            self._fail(
                "C-COUNT", f"{len(self._chunks)} chunk records, shapes ask for {sum(counts)}"
            )
        firsts = np.cumsum(counts) - counts
        placed = [
            dataclasses.replace(entry, first_chunk=int(first))
            for entry, first in zip(entries, firsts, strict=True)
        ]
        self.tensors = tuple(placed[: len(self.tensors)])
        self.files = tuple(placed[len(self.tensors) :])

        def spread(values: list[int]) -> npt.NDArray[np.int64]:
            return np.repeat(np.array(values, np.int64), counts)

        chunks = self._chunks
        length = np.int64(1) << spread([entry.chunk_log2 for entry in entries])
        ends = spread([entry.numel for entry in entries])
        number = np.arange(len(chunks)) - spread(firsts.tolist())
        length = np.minimum(length, ends - number * length)
        itemsize = spread([entry.dtype.itemsize for entry in entries])
        is_new = spread([int(entry.op is Op.NEW) for entry in entries]).astype(bool)
        nnz = chunks["nnz"].astype(np.int64)
        codec = chunks["mask_codec"]
        raw = chunks["mask_raw_bytes"].astype(np.int64)
        stored = chunks["mask_stored_bytes"].astype(np.int64)

        self._check(nnz <= length, "C-NNZ", "keeps more elements than it has")
        self._check(codec <= max(MaskCodec), "C-CODEC", "has an unknown mask codec")
        self._check(
            ((codec == MaskCodec.EMPTY) == (nnz == 0))
            & ((codec == MaskCodec.FULL) == ((nnz == length) & (nnz > 0))),
            "C-CODEC",
            "has a mask codec that its count of kept elements contradicts",
        )
        self._check(~is_new | (codec == MaskCodec.FULL), "C-NEW", "of a new tensor is not full")
        self._check(
            (chunks["reserved"] == 0)
            & (chunks["mask_compressed"] <= 1)
            & ((chunks["planes_compressed"].astype(np.int64) >> itemsize) == 0),
            "C-FLAGS",
            "has unknown flags",
        )
        for kind in MaskCodec:
            here = np.flatnonzero(codec == kind)
            low, high = codecs.mask_raw_bytes_range(kind, length[here], nnz[here])
            fits = (raw[here] >= low) & (raw[here] <= high)
            if kind is MaskCodec.GAP16:
                fits &= raw[here] % 2 == 0
            self._check(fits, "C-MASKSIZE", "has a mask of an impossible size")
        self._check(
            np.where(chunks["mask_compressed"] == 1, _plausible(stored, raw), stored == raw),
            "C-STORED",
            "has a mask stored in an impossible size",
        )
        for plane in range(8):
            size = chunks["plane_stored_bytes"][:, plane].astype(np.int64)
            used = plane < itemsize
            shrunk = (chunks["planes_compressed"] >> plane & 1).astype(bool)
            expected = np.where(shrunk, _plausible(size, nnz), size == nnz)
            self._check(
                np.where(used, expected, size == 0),
                "C-STORED",
                "has values stored in an impossible size",
            )
        self._stored = layout.stored_chunk_bytes(chunks)
        alignment = layout.CHUNK_ALIGNMENT
        self._padded = (self._stored + alignment - 1) // alignment * alignment
        self._offsets = layout.HEADER_BYTES + np.cumsum(self._padded) - self._padded
        end = layout.HEADER_BYTES + int(self._padded.sum())
        if end != index_offset:
            self._fail("C-LAYOUT", f"chunks end at {end}, the index starts at {index_offset}")

    def _check(self, holds: npt.NDArray[np.bool_], rule: str, fault: str) -> None:
        if not holds.all():
            self._fail(rule, f"chunk {int(np.argmin(holds))} {fault}")

    def _parse_metadata(self, raw: bytes) -> Mapping[str, str]:
        if len(raw) > layout.MAX_METADATA_BYTES:
            self._fail("M-SIZE", f"{len(raw)} bytes of metadata")
        try:
            pairs = json.loads(raw.decode(), object_pairs_hook=list, parse_constant=_refuse)
            raw_text_is_valid = all(
                isinstance(item, str) and item.encode() is not None
                for pair in pairs
                for item in pair
            )
        except (ValueError, RecursionError, TypeError):
            self._fail("M-JSON", "metadata is not a flat JSON object of strings in UTF-8")
        if not raw.startswith(b"{") or not raw_text_is_valid:
            self._fail("M-JSON", "metadata is not a flat JSON object of strings in UTF-8")
        if len(dict(pairs)) != len(pairs):
            self._fail("M-KEYS", "metadata holds a key twice")
        return dict(pairs)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _dtypes_and_shapes(
    table: npt.NDArray[np.void],
) -> Iterator[tuple[DType, tuple[int, ...]]]:
    columns = (table[field].tolist() for field in ("dtype", "rank", "shape"))
    for code, rank, dims in zip(*columns, strict=True):
        yield BY_CODE[code], tuple(dims[:rank])


def _rows(
    table: npt.NDArray[np.void], names: list[str]
) -> Iterator[tuple[str, Record, tuple[DType, tuple[int, ...]], bytes]]:
    """Tensor or file records as Python values, a table at a time: a scalar at a time is slow."""
    reserved = (
        (table["reserved0"] != 0) | (table["reserved1"] != 0) | table["reserved2"].any(axis=1)
    )
    fields = ("op", "value_codec", "chunk_log2", "base_index")
    columns = [*(table[field].tolist() for field in fields), reserved.tolist()]
    for name, values, typed, sha256 in zip(
        names, zip(*columns, strict=True), _dtypes_and_shapes(table), _digests(table), strict=True
    ):
        yield name, dict(zip((*fields, "reserved"), values, strict=True)), typed, sha256


def _digests(table: npt.NDArray[np.void]) -> Iterator[bytes]:
    raw = table["sha256"].tobytes()
    return (raw[start : start + 32] for start in range(0, len(raw), 32))


def _plausible(stored: npt.NDArray[np.int64], raw: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether zstd can have made ``stored`` bytes of ``raw``."""
    return (stored > 0) & (stored < raw) & (raw <= layout.MAX_ZSTD_RATIO * stored)
