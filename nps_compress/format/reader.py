"""Read a ``.nps`` file. Every byte is hostile until a rule of format_spec/SPEC.md has passed it.

Rules are checked in the order of the specification's validation algorithm; the first one broken
is raised as a :class:`FormatError` that carries its id.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from nps_compress import codecs, grid_codec, sign_codec, ulp_coding
from nps_compress.codecs import MaskCodec, Positions, ValueCodec
from nps_compress.errors import FormatError
from nps_compress.format import layout
from nps_compress.format.index import parse_index
from nps_compress.format.layout import IndexCompression, Op
from nps_compress.format.records import BaseTensor, TensorEntry, has_digest
from nps_compress.grid_codec import GridParameters
from nps_compress.mask_coding import Place
from nps_compress.rank_one import rows_and_columns
from nps_compress.sign_codec import SignParameters

Parameters = SignParameters | GridParameters | int
_DIGEST_OF_NOTHING = np.frombuffer(layout.digest64(b""), np.uint8)


@dataclass(frozen=True)
class Chunk:
    """One chunk, verified and decoded as far as is possible without the base.

    positions: [nnz] uint32, ascending, or None where all ``numel`` elements are kept;
    planes: [itemsize, nnz] uint8, the value payload, least significant byte first; for signs one
    plane of 0 or 1 (minus), for levels one of int8 bytes, for a grid [1, 2 * nnz], int16 integers.
    streams: of distances, which only decode with the base; ``planes`` is then [0, nnz].
    """

    numel: int
    positions: Positions | None
    planes: npt.NDArray[np.uint8]
    streams: tuple[bytes, ...] = ()


class NpsReader:
    """An open ``.nps`` file: its tables, checked, and its chunks on demand.

    Opening reads header, footer and index only, and those of ``base.nps`` in the same folder where
    the index needs that one's to be undone (SPEC.md, bundles). Reading chunks is thread-safe.
    ``raw_index`` is the index once it is undone, ``index_offset`` where the chunk data end.

    Raises:
        FormatError: a rule is broken. OSError: the file can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seek_lock = threading.Lock()
        # Of the tensor that was read last, by its first chunk: one may have very many chunks.
        self._last_parameters: tuple[int, Parameters] | None = None
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            self.file_bytes = os.fstat(self._descriptor).st_size
            self.minor = layout.MINOR
            self.index_offset, self.raw_index = self._read_envelope()
            try:
                self._index = parse_index(self.raw_index, self.index_offset)
            except FormatError as error:
                self._fail(error.rule, error.detail)
        except BaseException:
            self.close()
            raise

    @property
    def base(self) -> tuple[BaseTensor, ...]:
        """The base's tensors, by name."""
        return self._index.base

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """The fine-tune's tensors, by name."""
        return self._index.tensors

    @property
    def files(self) -> tuple[TensorEntry, ...]:
        """The fine-tune's side files, by name."""
        return self._index.files

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the writer noted; nothing in it changes how the file is decoded."""
        return self._index.metadata

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
        """The digest that identifies the whole base (SPEC.md, base root)."""
        return self._index.base_root

    @property
    def content_digest(self) -> bytes:
        """The digest that identifies the fine-tune however it is encoded (SPEC.md, the same)."""
        return self._index.content_digest

    def file_digest(self) -> bytes:
        """SHA-256 of the whole file."""
        digest = hashlib.sha256()
        for part in self.stored(self.file_bytes):
            digest.update(part)
        return digest.digest()

    def stored(self, end: int) -> Iterator[bytes]:
        """The first ``end`` bytes of the file, a piece at a time. Raises FormatError (F-SIZE)."""
        for offset in range(0, end, 1 << 20):
            yield self._pread(offset, min(1 << 20, end - offset))

    def stored_bytes(self, entry: TensorEntry) -> int:
        """Bytes the tensor's chunks take in the file, padding included."""
        span = slice(entry.first_chunk, entry.first_chunk + entry.chunk_count)
        return int(self._index.padded_bytes[span].sum())

    def nnz(self, entry: TensorEntry) -> int:
        """Elements the file keeps for the tensor."""
        span = slice(entry.first_chunk, entry.first_chunk + entry.chunk_count)
        return int(self._index.chunks["nnz"][span].astype(np.int64).sum())

    def mask_codecs(self, entry: TensorEntry) -> list[MaskCodec]:
        """The mask codecs that occur in the tensor's chunks, ascending."""
        span = slice(entry.first_chunk, entry.first_chunk + entry.chunk_count)
        return [MaskCodec(code) for code in np.unique(self._index.chunks["mask_codec"][span])]

    def read_chunk(self, entry: TensorEntry, number: int) -> Chunk:
        """Chunk ``number`` of a tensor's elements, decoded. Raises FormatError (C-PADDING, P-*)."""
        parameters = self.parameters(entry)
        record, data = self._chunk_data(entry, number + entry.has_parameters)
        nnz, position = int(record["nnz"]), int(record["mask_stored_bytes"])
        start = number << entry.chunk_log2
        numel = min(1 << entry.chunk_log2, entry.numel - start)
        positions: Positions | None
        try:
            if isinstance(parameters, SignParameters):
                span = range(start, start + numel)
                positions, minus = sign_codec.decode_signs(data, parameters, span, nnz)
                return Chunk(numel, positions, minus[None])
            if isinstance(parameters, GridParameters) and nnz:
                span = range(start, start + numel)
                positions, levels = grid_codec.decode_grid(data, position, parameters, span, nnz)
                return Chunk(numel, positions, levels.view(np.uint8)[None])
            mask = self._mask(record, data)
            place = Place(start, rows_and_columns(entry.shape)[1])
            kind = MaskCodec(record["mask_codec"])
            positions = codecs.decode_mask(kind, mask, numel, nnz, place)
            stored = []
            is_coded = entry.value_codec is ValueCodec.CODED_ULP
            expected = 1 if entry.has_parameters else 2 if is_coded else entry.dtype.itemsize
            for plane in range(expected):
                end = position + int(record["plane_stored_bytes"][plane])
                stored.append(data[position:end])
                position = end
            if is_coded:
                nothing = np.empty((0, nnz), np.uint8)
                return Chunk(numel, positions, nothing, tuple(stored))
            planes = codecs.decode_planes(stored, int(record["planes_compressed"]), nnz)
        except FormatError as error:
            self._fail(error.rule, f"chunk {number} of {entry.name!r}: {error.detail}")
        return Chunk(numel, positions, planes)

    def parameters(self, entry: TensorEntry) -> Parameters | None:
        """Those of signs or a grid, the exponent of the step of levels; None for other tensors.

        Raises:
            FormatError: C-PADDING, P-DIGEST, P-ZSTD, P-PARAMETERS.
        """
        if not entry.has_parameters:
            return None
        known = self._last_parameters
        if known and known[0] == entry.first_chunk:
            return known[1]
        record, data = self._chunk_data(entry, 0)
        found: Parameters
        try:
            stream = self._mask(record, data)
            if entry.value_codec is ValueCodec.SIGNS:
                found = SignParameters.parse(stream, *rows_and_columns(entry.shape))
            elif entry.value_codec is ValueCodec.GRID:
                found = GridParameters.parse(stream, *rows_and_columns(entry.shape))
            else:
                found = sign_codec.parse_levels_parameters(stream)
        except FormatError as error:
            self._fail(error.rule, f"{entry.name!r}: {error.detail}")
        self._last_parameters = entry.first_chunk, found
        return found

    def _chunk_data(self, entry: TensorEntry, number: int) -> tuple[np.void, bytes]:
        """Record and stored bytes of one of a tensor's chunk records."""
        index = entry.first_chunk + number
        record = self._index.chunks[index]
        data = self._pread(int(self._index.offsets[index]), int(self._index.padded_bytes[index]))
        size = int(self._index.stored_bytes[index])
        if any(data[size:]):
            self._fail("C-PADDING", f"non-zero padding behind chunk {number} of {entry.name!r}")
        data = data[:size]
        if layout.digest64(data) != record["digest64"].tobytes():
            self._fail("P-DIGEST", f"chunk {number} of {entry.name!r} is damaged")
        return record, data

    def _mask(self, record: np.void, data: bytes) -> bytes:
        mask = data[: int(record["mask_stored_bytes"])]
        if record["mask_compressed"]:
            return codecs.decompress(mask, int(record["mask_raw_bytes"]))
        return mask

    def chunks_to_read(self, entry: TensorEntry) -> list[int]:
        """Numbers of the chunks that hold anything; a file may have very many that don't."""
        if entry.value_codec is ValueCodec.SIGNS:  # what is drawn shows when they are read
            return list(range(entry.chunks))
        first = entry.first_chunk + entry.has_parameters
        records = self._index.chunks[first : first + entry.chunks]
        intact = (records["digest64"] == _DIGEST_OF_NOTHING).all(axis=1)
        found: list[int] = np.flatnonzero(~(intact & (records["nnz"] == 0))).tolist()
        return found

    def read_file(self, entry: TensorEntry) -> bytes:
        """A stored side file. Raises FormatError (C-PADDING, P-*, D-DIGEST)."""
        data = b"".join(
            self.read_chunk(entry, number).planes.tobytes() for number in range(entry.chunks)
        )
        if not has_digest(data, entry.digest):
            self._fail_digest(entry)
        return data

    def verify(self, entry: TensorEntry) -> None:
        """Check all of a tensor or file that needs no base: every chunk, and the digest if new.

        Raises:
            FormatError: C-PADDING, P-*, D-DIGEST.
        """
        digest = blake3()
        self.parameters(entry)
        for number in self.chunks_to_read(entry):
            chunk = self.read_chunk(entry, number)
            if chunk.streams and chunk.streams[0]:
                try:
                    ulp_coding.read_table(chunk.streams[0], entry.dtype.itemsize)
                except FormatError as error:
                    self._fail(error.rule, f"chunk {number} of {entry.name!r}: {error.detail}")
            if entry.op is Op.NEW:
                digest.update(np.ascontiguousarray(chunk.planes.T).data)
        if entry.op is Op.NEW and digest.digest(len(entry.digest)) != entry.digest:
            self._fail_digest(entry)

    # -- validation ---------------------------------------------------------------------------

    def _fail_digest(self, entry: TensorEntry) -> NoReturn:
        self._fail("D-DIGEST", f"{entry.name!r} does not have the digest it promises")

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
        self.minor = int(header["minor"])

        raw = self._pread(self.file_bytes - layout.FOOTER_BYTES, layout.FOOTER_BYTES)
        footer = np.frombuffer(raw, layout.FOOTER)[0]
        if raw[-8:] != layout.MAGIC_REVERSED:
            self._fail("T-MAGIC", "footer is missing: the file is truncated or has a tail")
        if zlib.crc32(raw[:-12]) != footer["crc32"]:
            self._fail("T-CRC", "footer is damaged")
        if (footer["major"], footer["minor"]) != (header["major"], header["minor"]):
            self._fail("T-VERSION", "header and footer state different versions")
        compression = int(footer["index_compression"])
        has_dictionary = compression == IndexCompression.ZSTD_DICTIONARY
        reserved = footer["reserved"].tobytes()
        if not has_dictionary:
            reserved += footer["dictionary_bytes"].tobytes()
            reserved += footer["dictionary_digest64"].tobytes()
        if any(reserved):
            self._fail("T-RESERVED", "reserved bytes of the footer are not zero")
        if footer["file_bytes"] != self.file_bytes:
            self._fail("T-SIZE", f"footer states {footer['file_bytes']} bytes of {self.file_bytes}")
        offset, stored = int(footer["index_offset"]), int(footer["index_stored_bytes"])
        raw_bytes = int(footer["index_raw_bytes"])
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
        elif compression != IndexCompression.ZSTD and not has_dictionary:
            self._fail("T-COMPRESSION", f"unknown index compression {compression}")
        elif (
            not stored
            < raw_bytes
            <= layout.max_index_bytes(stored, int(footer["dictionary_bytes"]))
        ):
            self._fail("T-INDEXSIZE", f"index of {raw_bytes} bytes stored in {stored}")
        dictionary = self._dictionary(footer) if has_dictionary else b""
        index = self._pread(offset, stored)
        if layout.index_digest(index, dictionary) != footer["index_digest"].tobytes():
            self._fail("I-DIGEST", "index is damaged")
        if compression != IndexCompression.RAW:
            try:
                index = codecs.decompress(index, raw_bytes, "I-ZSTD", dictionary)
            except FormatError as error:
                self._fail(error.rule, f"index: {error.detail}")
        return offset, index

    def _dictionary(self, footer: np.void) -> bytes:
        """The raw index without which this file's can't be undone. Raises FormatError."""
        size, digest = int(footer["dictionary_bytes"]), footer["dictionary_digest64"].tobytes()
        if self.path.name == layout.DICTIONARY_FILE:  # so that looking for one ends
            self._fail("T-DICTIONARY", "a dictionary can't need one itself")
        path = self.path.with_name(layout.DICTIONARY_FILE)
        needed = f"needs {path} with an index of {size} bytes and BLAKE3 {digest.hex()}..."
        try:
            with NpsReader(path) as reader:
                index = reader.raw_index
        except OSError as error:
            self._fail("T-DICTIONARY", f"{needed}, which can't be read ({error.strerror})")
        except FormatError as error:
            self._fail("T-DICTIONARY", f"{needed}, which is refused: {error.detail} [{error.rule}]")
        if (len(index), layout.digest64(index)) != (size, digest):
            found = f"{len(index)} bytes and BLAKE3 {layout.digest64(index).hex()}..."
            self._fail("T-DICTIONARY", f"{needed}, not {found}")
        return index
