"""Write a ``.nps`` file in one pass, tensor by tensor, with bounded memory."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
from blake3 import blake3

from nps_compress.codecs import (
    EncodedChunk,
    MaskCodec,
    ValueCodec,
    compress,
    compress_if_smaller,
)
from nps_compress.dtypes import BY_NAME
from nps_compress.errors import InvalidArgumentError
from nps_compress.format import layout
from nps_compress.format.layout import IndexCompression, Op
from nps_compress.format.records import (
    BaseTensor,
    TensorEntry,
    base_root,
    content_digest,
    has_control_characters,
)

_DIGESTS_SHARE = 0.01  # of the file, that whole digests may take
_SMALL_INDEX_BYTES = 256  # below, an index that can be read in a hex dump is worth more

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class NpsWriter:
    """Appends tensors in ascending order of their UTF-8 names, then files, then the index.

    The caller owns the stream (see :func:`nps_compress.atomic.atomic_file`): an unfinished file
    has no footer and can't be taken for a whole one.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._offset = layout.HEADER_BYTES
        self._raw_bytes = 0  # of all streams so far
        self._tensors: list[TensorEntry] = []
        self._files: list[TensorEntry] = []
        self._chunks: list[bytes] = []
        header = np.zeros((), layout.HEADER)
        header["magic"] = np.void(layout.MAGIC)
        header["major"], header["minor"] = layout.MAJOR, layout.MINOR
        header["crc32"] = zlib.crc32(header.tobytes()[:-4])
        stream.write(header.tobytes())

    def add_chunks(self, chunks: Iterable[EncodedChunk]) -> None:
        """Write chunks of the tensor that the next ``add_tensor`` names."""
        for chunk in chunks:
            self._raw_bytes += chunk.raw_bytes + chunk.work
            end = self._offset + layout.aligned(len(chunk.data))
            if self._raw_bytes > layout.max_raw_bytes(end - layout.HEADER_BYTES):
                chunk = chunk.stored_raw()
            data = chunk.data
            record = np.zeros((), layout.CHUNK_RECORD)
            record["mask_stored_bytes"] = len(chunk.mask)
            record["mask_raw_bytes"] = chunk.mask_raw_bytes
            record["nnz"] = chunk.nnz
            record["mask_codec"] = chunk.mask_codec
            record["mask_compressed"] = chunk.mask_compressed
            record["planes_compressed"] = chunk.planes_compressed
            record["plane_stored_bytes"][: len(chunk.planes)] = [len(p) for p in chunk.planes]
            record["digest64"] = np.frombuffer(layout.digest64(data), np.uint8)
            self._chunks.append(record.tobytes())
            padded = layout.aligned(len(data))
            self._stream.write(data + bytes(padded - len(data)))
            self._offset += padded

    def add_tensor(self, entry: TensorEntry) -> None:
        """Record a tensor whose chunks have been written."""
        check_name(entry.name)
        _check_order([*self._tensors[-1:], entry])
        self._tensors.append(entry)

    def add_file(self, name: str, data: bytes) -> None:
        """Store a small side file (config, tokenizer) whole."""
        chunk_log2 = layout.MAX_CHUNK_LOG2
        words = np.frombuffer(data, np.uint8)
        for start in range(0, len(data), 1 << chunk_log2):
            part = words[start : start + (1 << chunk_log2)]
            stored, smaller = compress_if_smaller(part.tobytes(), level=9)
            self.add_chunks(
                [EncodedChunk(len(part), MaskCodec.FULL, 0, False, b"", smaller, (stored,))]
            )
        self._add_file(name, Op.NEW, len(data), blake3(data).digest(), chunk_log2)

    def add_base_file(self, name: str, data: bytes) -> None:
        """Record that a side file is the base's, by size and digest."""
        self._add_file(name, Op.COPY, len(data), blake3(data).digest(), 0)

    def _add_file(self, name: str, op: Op, size: int, digest: bytes, chunk_log2: int) -> None:
        if size > layout.MAX_FILE_BYTES:
            raise InvalidArgumentError(f"size of {name}", size, "at most 64 MiB")
        if len(self._files) == layout.MAX_FILES:
            raise InvalidArgumentError("files", len(self._files) + 1, f"{layout.MAX_FILES} at most")
        if not FILE_NAME.fullmatch(name):
            raise InvalidArgumentError("file name", name, "letters, digits, dot, dash, underscore")
        codec = ValueCodec.REPLACE if op is Op.NEW else ValueCodec.NONE
        entry = TensorEntry(name, BY_NAME["U8"], (size,), op, codec, chunk_log2, None, digest)
        _check_order([*self._files[-1:], entry])
        self._files.append(entry)

    def finish(
        self, base: Sequence[BaseTensor], metadata: Mapping[str, str], root: bytes | None = None
    ) -> int:
        """Write index and footer. Returns the size of the file in bytes.

        Of digests that would take more than a percent of the file, only the start is stored, and
        of all where the base root is given, since more need not be known of the base's.
        """
        _check_order(base)
        digests = layout.DIGEST_BYTES * (len(base) + len(self._tensors))
        knows_all = root is None
        short = not knows_all or digests > _DIGESTS_SHARE * self._offset
        root = root or base_root(base)
        raw = self._index(base, metadata, short, root)
        if len(raw) > layout.MAX_INDEX_BYTES:
            raise InvalidArgumentError("index", f"{len(raw):,} bytes", "at most 1 GiB")
        stored = _stored_index(raw)
        if short and knows_all and stored[0] is IndexCompression.RAW:
            # It may have shrunk too far: whole digests shrink less.
            whole = self._index(base, metadata, False, root)
            stored_whole = _stored_index(whole)
            if stored_whole[0] is not IndexCompression.RAW:
                raw, stored = whole, stored_whole
        end = _with_footer(raw, stored, self._offset)
        self._stream.write(end)
        return self._offset + len(end)

    def _index(
        self, base: Sequence[BaseTensor], metadata: Mapping[str, str], short: bool, root: bytes
    ) -> bytes:
        names = [
            record.name for records in (base, self._tensors, self._files) for record in records
        ]
        heap = "".join(names).encode()
        meta = json.dumps(
            dict(metadata), ensure_ascii=False, sort_keys=True, separators=(",", ":")
        ).encode()
        if len(meta) > layout.MAX_METADATA_BYTES:
            raise InvalidArgumentError("metadata", f"{len(meta)} bytes", "at most 1 MiB of JSON")
        for table in (base, self._tensors):
            if len(table) > layout.MAX_RECORDS:
                raise InvalidArgumentError("tensors", len(table), f"{layout.MAX_RECORDS} at most")
        head = np.zeros((), layout.INDEX_HEAD)
        head["base_records"], head["tensor_records"] = len(base), len(self._tensors)
        head["file_records"], head["chunk_records"] = len(self._files), len(self._chunks)
        head["heap_bytes"], head["metadata_bytes"] = len(heap), len(meta)
        content = content_digest(self._tensors, self._files)
        head["base_root"] = np.frombuffer(root, np.uint8)
        head["content_digest"] = np.frombuffer(content, np.uint8)
        size = layout.SHORT_DIGEST_BYTES if short else layout.DIGEST_BYTES
        head["digest_bytes"] = size
        return b"".join(
            (
                head.tobytes(),
                b"".join(_base_record(tensor, size) for tensor in base),
                b"".join(_tensor_record(entry, False, size) for entry in self._tensors),
                b"".join(_tensor_record(entry, True, size) for entry in self._files),
                b"".join(self._chunks),
                heap,
                meta,
            )
        )


def index_and_footer(
    raw: bytes, index_offset: int, dictionary: bytes = b"", minor: int = layout.MINOR
) -> bytes:
    """What follows the chunk data: the index as it is stored, and the footer.

    raw: the index. dictionary: the raw index that a reader will have; none where empty. It is left
    out where it does not help, so that nobody needs it.
    """
    return _with_footer(raw, _stored_index(raw, dictionary), index_offset, dictionary, minor)


def _with_footer(
    raw: bytes,
    stored_index: tuple[IndexCompression, bytes],
    index_offset: int,
    dictionary: bytes = b"",
    minor: int = layout.MINOR,
) -> bytes:
    how, stored = stored_index
    footer = np.zeros((), layout.FOOTER)
    footer["index_offset"] = index_offset
    footer["index_stored_bytes"] = len(stored)
    footer["index_raw_bytes"] = len(raw)
    footer["file_bytes"] = index_offset + len(stored) + layout.FOOTER_BYTES
    footer["major"], footer["minor"] = layout.MAJOR, minor
    footer["index_compression"] = how
    if how is IndexCompression.ZSTD_DICTIONARY:
        footer["dictionary_bytes"] = len(dictionary)
        footer["dictionary_digest64"] = np.void(layout.digest64(dictionary))
    else:
        dictionary = b""
    footer["index_digest"] = np.void(layout.index_digest(stored, dictionary))
    footer["crc32"] = zlib.crc32(footer.tobytes()[:-12])
    footer["magic_reversed"] = np.void(layout.MAGIC_REVERSED)
    return stored + footer.tobytes()


def _stored_index(raw: bytes, dictionary: bytes = b"") -> tuple[IndexCompression, bytes]:
    if len(raw) > _SMALL_INDEX_BYTES:
        if dictionary:
            frame = compress(raw, 19, dictionary)
            if len(frame) < len(raw) <= layout.max_index_bytes(len(frame), len(dictionary)):
                return IndexCompression.ZSTD_DICTIONARY, frame
        frame = compress(raw, 19)
        if len(frame) < len(raw) <= layout.max_index_bytes(len(frame), 0):
            return IndexCompression.ZSTD, frame
    return IndexCompression.RAW, raw


def _check_order(records: Sequence[BaseTensor | TensorEntry]) -> None:
    names = [record.name.encode() for record in records]
    for before, after in itertools.pairwise(names):
        if before >= after:
            raise InvalidArgumentError("name", after.decode(), f"greater than {before.decode()!r}")


def check_name(name: str) -> None:
    """Raise InvalidArgumentError for a tensor name that a reader would refuse."""
    size = len(name.encode())
    if not 0 < size <= layout.MAX_NAME_BYTES or has_control_characters(name):
        raise InvalidArgumentError(
            "tensor name", name, f"1 to {layout.MAX_NAME_BYTES} bytes without control characters"
        )
    if name == layout.RESERVED_NAME:
        raise InvalidArgumentError("tensor name", name, "another: safetensors reserves this one")


def _base_record(tensor: BaseTensor, digest_bytes: int) -> bytes:
    check_name(tensor.name)
    record = np.zeros((), layout.BASE_RECORD)
    record["name_bytes"] = len(tensor.name.encode())
    record["dtype"], record["rank"] = tensor.dtype.code, len(tensor.shape)
    record["shape"][: len(tensor.shape)] = tensor.shape
    record["digest"][:digest_bytes] = np.frombuffer(tensor.digest, np.uint8)[:digest_bytes]
    return record.tobytes()


def _tensor_record(entry: TensorEntry, is_file: bool, digest_bytes: int) -> bytes:
    record = np.zeros((), layout.TENSOR_RECORD)
    record["name_bytes"] = len(entry.name.encode())
    record["dtype"], record["rank"], record["op"] = entry.dtype.code, len(entry.shape), entry.op
    record["value_codec"], record["chunk_log2"] = entry.value_codec, entry.chunk_log2
    record["base_index"] = layout.NO_BASE if entry.base_index is None else entry.base_index
    record["shape"][: len(entry.shape)] = entry.shape
    if is_file or entry.op is not Op.COPY:
        record["digest"][:digest_bytes] = np.frombuffer(entry.digest, np.uint8)[:digest_bytes]
    return record.tobytes()
