"""Parse and check an index. Pure: bytes in, tables out; the first rule broken is raised."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from nps_compress import codecs, entropy_coding, grid_codec, sign_codec, ulp_coding
from nps_compress.codecs import MaskCodec, ValueCodec
from nps_compress.dtypes import BY_CODE, PRUNABLE, DType
from nps_compress.errors import FormatError
from nps_compress.format import layout
from nps_compress.format.layout import Op
from nps_compress.format.records import (
    BaseTensor,
    TensorEntry,
    base_root,
    content_digest,
    has_control_characters,
)
from nps_compress.format.writer import FILE_NAME
from nps_compress.rank_one import rows_and_columns

Record = dict[str, int]

_CHANGING_CODECS: tuple[ValueCodec, ...] = (ValueCodec.REPLACE, ValueCodec.XOR, ValueCodec.ULP)
_LOSSY_CODECS = (ValueCodec.SIGNS, ValueCodec.LEVELS, ValueCodec.GRID)
_NEVER_COMPRESSED = (MaskCodec.CODED, MaskCodec.LEARNED)


@dataclass(frozen=True)
class Index:
    """The tables of a file. chunks: [n] chunk records; per chunk, [n] int64: the bytes stored,
    those with padding, and the offset in the file. Both digests are whole, those of the tensors
    and files perhaps only their start."""

    base: tuple[BaseTensor, ...]
    tensors: tuple[TensorEntry, ...]
    files: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    chunks: npt.NDArray[np.void]
    stored_bytes: npt.NDArray[np.int64]
    padded_bytes: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    base_root: bytes
    content_digest: bytes


def _fail(rule: str, detail: str) -> NoReturn:
    raise FormatError(rule, detail)


def parse_index(index: bytes, index_offset: int) -> Index:
    """Check a decompressed index against every rule from I-COUNT to M-KEYS.

    index_offset: where the chunk data must end. Raises FormatError.
    """
    head = np.frombuffer(index, layout.INDEX_HEAD, 1)[0]
    counts = {
        name: int(head[name])
        for name in ("base_records", "tensor_records", "file_records", "chunk_records")
    }
    heap_bytes, metadata_bytes = int(head["heap_bytes"]), int(head["metadata_bytes"])
    limits = (layout.MAX_RECORDS, layout.MAX_RECORDS, layout.MAX_FILES)
    for name, limit in zip(counts, limits, strict=False):
        if counts[name] > limit:
            _fail("I-COUNT", f"{counts[name]} {name.replace('_', ' ')}")
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
        _fail("I-SIZE", f"tables of {sum(sizes)} bytes in an index of {len(index)}")
    if any(head["reserved"].tobytes()):
        _fail("I-RESERVED", "reserved bytes of the index head are not zero")
    starts = np.cumsum((0, *sizes)).tolist()

    def table(number: int, dtype: np.dtype[Any], count: int) -> npt.NDArray[np.void]:
        return np.frombuffer(index, dtype, count, starts[number])

    base = table(1, layout.BASE_RECORD, counts["base_records"])
    tensors = table(2, layout.TENSOR_RECORD, counts["tensor_records"])
    files = table(3, layout.TENSOR_RECORD, counts["file_records"])
    chunks = table(4, layout.CHUNK_RECORD, counts["chunk_records"])
    heap = index[starts[5] : starts[6]]

    if base["reserved"].any():
        _fail("I-RESERVED", "reserved bytes of a base record are not zero")

    digest_bytes = int(head["digest_bytes"])
    if digest_bytes not in (layout.DIGEST_BYTES, layout.SHORT_DIGEST_BYTES):
        _fail("I-DIGESTS", f"digests of {digest_bytes} bytes")
    records = (base, tensors, files)
    if any(table["digest"][:, digest_bytes:].any() for table in records):
        _fail("I-DIGESTS", f"a digest is longer than the {digest_bytes} bytes that it may have")
    names = _names(heap, records)
    _check_shapes(records, names)
    base_tensors = tuple(
        BaseTensor(name, dtype, shape, digest)
        for name, (dtype, shape), digest in zip(
            names[0], _dtypes_and_shapes(base), _digests(base, digest_bytes), strict=True
        )
    )
    own = _check_tensors(tensors, names[1], base_tensors, digest_bytes)
    side_files = _check_files(files, names[2], digest_bytes)
    root, content = head["base_root"].tobytes(), head["content_digest"].tobytes()
    if digest_bytes == layout.DIGEST_BYTES:
        if base_root(base_tensors) != root:
            _fail("I-ROOT", "the digests of the base's tensors don't make up the base root")
        if content_digest(own, side_files) != content:
            _fail("I-ROOT", "the digests of the tensors don't make up the content digest")
    entries = _place((*own, *side_files), len(chunks))
    raw_bytes = _check_chunks(entries, chunks)
    stored = layout.stored_chunk_bytes(chunks)
    alignment = layout.CHUNK_ALIGNMENT
    padded = (stored + alignment - 1) // alignment * alignment
    end = layout.HEADER_BYTES + int(padded.sum())
    if end != index_offset:
        _fail("C-LAYOUT", f"chunks end at {end}, the index starts at {index_offset}")
    if raw_bytes > layout.max_raw_bytes(end - layout.HEADER_BYTES):
        _fail("C-EXPANSION", f"{end - layout.HEADER_BYTES} bytes of chunks hold {raw_bytes}")
    return Index(
        base_tensors,
        entries[: len(tensors)],
        entries[len(tensors) :],
        _parse_metadata(index[starts[6] :]),
        chunks,
        stored,
        padded,
        layout.HEADER_BYTES + np.cumsum(padded) - padded,
        root,
        content,
    )


def _names(heap: bytes, tables: tuple[npt.NDArray[np.void], ...]) -> tuple[list[str], ...]:
    lengths = [table["name_bytes"].astype(np.int64) for table in tables]
    if sum(int(part.sum()) for part in lengths) != len(heap):
        _fail("N-HEAP", f"names do not add up to the {len(heap)} bytes of the heap")
    result, position = [], 0
    for part in lengths:
        names: list[str] = []
        previous = b""
        for length in part.tolist():
            if not 0 < length <= layout.MAX_NAME_BYTES:
                _fail("N-LENGTH", f"name of {length} bytes")
            raw = heap[position : position + length]
            position += length
            try:
                name = raw.decode()
            except UnicodeDecodeError:
                _fail("N-UTF8", f"name {raw!r} is not UTF-8")
            if has_control_characters(name):
                _fail("N-CONTROL", f"name {name!r} holds control characters")
            if raw <= previous:
                _fail("N-ORDER", f"name {name!r} is out of order or there twice")
            names.append(name)
            previous = raw
        result.append(names)
    for name in (*result[0], *result[1]):
        if name == layout.RESERVED_NAME:
            _fail("N-RESERVED", f"a tensor has the reserved name {name!r}")
    for name in result[2]:
        if not FILE_NAME.fullmatch(name):
            _fail("N-FILE", f"file name {name!r}")
    return tuple(result)


def _check_shapes(tables: tuple[npt.NDArray[np.void], ...], names: tuple[list[str], ...]) -> None:
    for table, table_names in zip(tables, names, strict=True):
        columns = (table[field].tolist() for field in ("dtype", "rank", "shape"))
        for name, code, rank, dims in zip(table_names, *columns, strict=True):
            if code not in BY_CODE:
                _fail("S-DTYPE", f"{name!r} has unknown dtype {code}")
            if rank > layout.MAX_RANK:
                _fail("S-RANK", f"{name!r} has rank {rank}")
            if any(dims[rank:]):
                _fail("S-DIM", f"{name!r} has dimensions past its rank")
            if math.prod(max(dim, 1) for dim in dims[:rank]) > layout.MAX_NUMEL:
                _fail("S-NUMEL", f"{name!r} has shape {dims[:rank]}")


def _check_tensors(
    table: npt.NDArray[np.void],
    names: list[str],
    base_tensors: tuple[BaseTensor, ...],
    digest_bytes: int,
) -> tuple[TensorEntry, ...]:
    entries = []
    for name, record, (dtype, shape), digest in _rows(table, names, digest_bytes):
        op = _op(record, name)
        index: int | None = record["base_index"]
        if op is Op.NEW:
            if index != layout.NO_BASE:
                _fail("R-BASE", f"new tensor {name!r} names a base tensor")
            index = None
        else:
            assert index is not None
            if index >= len(base_tensors):
                _fail("R-BASE", f"{name!r} names base tensor {index} of {len(base_tensors)}")
            base = base_tensors[index]
            if (base.dtype, base.shape) != (dtype, shape):
                _fail("R-SHAPE", f"{name!r} differs from {base.name!r} in dtype or shape")
        if op is Op.COPY:
            if any(digest):
                _fail("R-COPY", f"copied tensor {name!r} has a digest of its own")
            assert index is not None
            digest = base_tensors[index].digest
        codec = _value_codec(record, name, op, dtype)
        entries.append(
            TensorEntry(name, dtype, shape, op, codec, record["chunk_log2"], index, digest)
        )
    return tuple(entries)


def _check_files(
    table: npt.NDArray[np.void], names: list[str], digest_bytes: int
) -> tuple[TensorEntry, ...]:
    entries = []
    for name, record, (dtype, shape), digest in _rows(table, names, digest_bytes):
        op = _op(record, name)
        if op is Op.DELTA or dtype.name != "U8" or len(shape) != 1:
            _fail("R-FILE", f"file {name!r} must be one row of bytes, new or the base's")
        if shape[0] > layout.MAX_FILE_BYTES:
            _fail("R-FILE", f"file {name!r} has {shape[0]} bytes")
        if record["base_index"] != layout.NO_BASE:
            _fail("R-BASE", f"file {name!r} names a base tensor")
        codec = _value_codec(record, name, op, dtype)
        chunk_log2 = record["chunk_log2"]
        entries.append(TensorEntry(name, dtype, shape, op, codec, chunk_log2, None, digest))
    return tuple(entries)


def _op(record: Record, name: str) -> Op:
    if record["reserved"]:
        _fail("R-RESERVED", f"reserved bytes of {name!r} are not zero")
    try:
        return Op(record["op"])
    except ValueError:
        _fail("R-OP", f"{name!r} has unknown op {record['op']}")


def _value_codec(record: Record, name: str, op: Op, dtype: DType) -> ValueCodec:
    code, chunk_log2 = record["value_codec"], record["chunk_log2"]
    changing = _CHANGING_CODECS if dtype.is_float else _CHANGING_CODECS[:2]
    if dtype.name in PRUNABLE:
        changing += (ValueCodec.CODED_ULP, *_LOSSY_CODECS)
    allowed: tuple[ValueCodec, ...] = {
        Op.COPY: (ValueCodec.NONE,),
        Op.NEW: (ValueCodec.REPLACE,),
        Op.DELTA: changing,
    }[op]
    if code not in allowed:
        _fail("R-VALUES", f"{name!r} has value codec {code}")
    low, high = layout.MIN_CHUNK_LOG2, layout.MAX_CHUNK_LOG2
    if (chunk_log2 != 0) if op is Op.COPY else not low <= chunk_log2 <= high:
        _fail("R-CHUNKLOG", f"{name!r} has chunks of 2^{chunk_log2} elements")
    return ValueCodec(code)


def _place(entries: tuple[TensorEntry, ...], chunk_records: int) -> tuple[TensorEntry, ...]:
    """The entries, each with the number of its first chunk."""
    counts = [entry.chunk_count for entry in entries]
    if sum(counts) != chunk_records:
        _fail("C-COUNT", f"{chunk_records} chunk records, shapes ask for {sum(counts)}")
    firsts = itertools.accumulate(counts, initial=0)
    return tuple(
        dataclasses.replace(entry, first_chunk=first)
        for entry, first in zip(entries, firsts, strict=False)
    )


def _check_chunks(entries: tuple[TensorEntry, ...], chunks: npt.NDArray[np.void]) -> int:
    """Check every chunk record. Returns the bytes of all streams once zstd is undone, and work."""
    counts = [entry.chunk_count for entry in entries]

    def spread(values: list[int]) -> npt.NDArray[np.int64]:
        return np.repeat(np.array(values, np.int64), counts)

    def has(codec: ValueCodec) -> npt.NDArray[np.bool_]:
        return spread([int(entry.value_codec is codec) for entry in entries]).astype(bool)

    number = np.arange(len(chunks)) - spread([entry.first_chunk for entry in entries])
    of_signs, of_levels = has(ValueCodec.SIGNS), has(ValueCodec.LEVELS)
    of_grid = has(ValueCodec.GRID)
    has_parameters = of_signs | of_levels | of_grid
    is_parameters = has_parameters & (number == 0)
    is_signs, is_levels = of_signs & ~is_parameters, of_levels & ~is_parameters
    is_grid = of_grid & ~is_parameters
    number -= has_parameters
    length = np.int64(1) << spread([entry.chunk_log2 for entry in entries])
    ends = spread([entry.numel for entry in entries])
    length = np.where(is_parameters, 0, np.minimum(length, ends - number * length))
    itemsize = spread([entry.dtype.itemsize for entry in entries])
    is_new = spread([int(entry.op is Op.NEW) for entry in entries]).astype(bool)
    nnz = chunks["nnz"].astype(np.int64)
    codec = chunks["mask_codec"]
    raw = chunks["mask_raw_bytes"].astype(np.int64)
    stored = chunks["mask_stored_bytes"].astype(np.int64)

    _check(nnz <= length, "C-NNZ", "keeps more elements than it has")
    _check(np.isin(codec, [kind.value for kind in MaskCodec]), "C-CODEC", "has an unknown codec")
    special = is_parameters | is_signs | is_levels | is_grid
    _check(
        (is_parameters == (codec == MaskCodec.PARAMETERS))
        & (is_signs == (codec == MaskCodec.DRAWN))
        & (~is_levels | ((codec == MaskCodec.FULL) & (nnz == length)))
        & (is_grid | (codec != MaskCodec.CODED))
        & (~is_grid | (codec == np.where(nnz > 0, MaskCodec.CODED, MaskCodec.EMPTY))),
        "C-CODEC",
        "has a mask codec that its tensor's value codec contradicts",
    )
    _check(
        special
        | ((codec == MaskCodec.EMPTY) == (nnz == 0))
        & ((codec == MaskCodec.FULL) == ((nnz == length) & (nnz > 0))),
        "C-CODEC",
        "has a mask codec that its count of kept elements contradicts",
    )
    _check(~is_new | (codec == MaskCodec.FULL), "C-NEW", "of a new tensor is not full")
    has_signs = is_signs | is_grid
    is_coded = has(ValueCodec.CODED_ULP)
    unpacked = is_parameters | has_signs | is_coded
    planes = np.where(is_levels, 1, np.where(unpacked, 0, itemsize))
    _check(
        (chunks["reserved"] == 0)
        & (chunks["mask_compressed"] <= ~np.isin(codec, _NEVER_COMPRESSED))
        & ((chunks["planes_compressed"].astype(np.int64) >> planes) == 0),
        "C-FLAGS",
        "has unknown flags",
    )
    factors = spread([sum(rows_and_columns(entry.shape)) for entry in entries])
    for kind in MaskCodec:
        here = np.flatnonzero(codec == kind)
        if kind is MaskCodec.PARAMETERS:
            for_signs = sign_codec.is_sign_parameter_bytes(raw[here], factors[here])
            for_levels = raw[here] == sign_codec.LEVELS_PARAMETER_BYTES
            for_grid = raw[here] == grid_codec.grid_parameter_bytes(factors[here])
            fits = np.select([of_signs[here], of_grid[here]], [for_signs, for_grid], for_levels)
        elif kind is MaskCodec.CODED:
            low, high = entropy_coding.stream_bytes_range(length[here])
            fits = (raw[here] >= low) & (raw[here] <= high) & (raw[here] % 4 == 0)
        else:
            low, high = codecs.mask_raw_bytes_range(kind, length[here], nnz[here])
            fits = (raw[here] >= low) & (raw[here] <= high)
        if kind is MaskCodec.GAP16:
            fits &= raw[here] % 2 == 0
        if kind is MaskCodec.LEARNED:
            fits &= raw[here] % 4 == 0
        right_size = np.ones(len(chunks), bool)
        right_size[here] = fits
        _check(right_size, "C-MASKSIZE", "has a mask of an impossible size")
    _check(
        np.where(chunks["mask_compressed"] == 1, _plausible(stored, raw), stored == raw),
        "C-STORED",
        "has a mask stored in an impossible size",
    )
    plane_raw_bytes = np.where(has_signs, -(-nnz // 8), nnz)
    planes[has_signs] = 1
    planes[is_coded] = 0
    coded = chunks["plane_stored_bytes"][:, :2].astype(np.int64)
    most = ulp_coding.most_token_bytes(nnz), ulp_coding.most_low_bytes(itemsize, nnz)
    fits = (coded[:, 0] >= ulp_coding.LEAST_TOKEN_BYTES) & (coded[:, 0] <= most[0])
    fits &= coded[:, 1] <= most[1]
    coded_bytes = coded.sum(axis=1) * is_coded
    _check(
        ~is_coded | np.where(nnz > 0, fits, coded_bytes == 0),
        "C-STORED",
        "has distances stored in an impossible size",
    )
    for plane in range(8):
        size = chunks["plane_stored_bytes"][:, plane].astype(np.int64)
        used = plane < planes
        shrunk = (chunks["planes_compressed"] >> plane & 1).astype(bool)
        expected = np.where(shrunk, _plausible(size, nnz), size == plane_raw_bytes)
        _check(
            np.where(used, expected, (size == 0) | (is_coded & (plane < 2))),
            "C-STORED",
            "has values stored in an impossible size",
        )
    work = np.where(is_signs, codecs.drawing_work(length), 0)
    work += np.where(codec == MaskCodec.CODED, codecs.decoding_work(length, nnz), 0)
    work += np.where(codec == MaskCodec.LEARNED, codecs.learning_work(length), 0)
    work += np.where(is_coded, codecs.distances_work(coded[:, 0], itemsize, nnz), 0)
    return int((raw + plane_raw_bytes * planes + coded_bytes + work).sum())


def _check(holds: npt.NDArray[np.bool_], rule: str, fault: str) -> None:
    if not holds.all():
        _fail(rule, f"chunk {int(np.argmin(holds))} {fault}")


def _parse_metadata(raw: bytes) -> Mapping[str, str]:
    if len(raw) > layout.MAX_METADATA_BYTES:
        _fail("M-SIZE", f"{len(raw)} bytes of metadata")
    try:
        pairs = json.loads(raw.decode(), object_pairs_hook=list, parse_constant=_refuse)
        raw_text_is_valid = all(
            isinstance(item, str) and item.encode() is not None for pair in pairs for item in pair
        )
    except (ValueError, RecursionError, TypeError):
        _fail("M-JSON", "metadata is not a flat JSON object of strings in UTF-8")
    if not raw.startswith(b"{") or not raw_text_is_valid:
        _fail("M-JSON", "metadata is not a flat JSON object of strings in UTF-8")
    if len(dict(pairs)) != len(pairs):
        _fail("M-KEYS", "metadata holds a key twice")
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
    table: npt.NDArray[np.void], names: list[str], digest_bytes: int
) -> Iterator[tuple[str, Record, tuple[DType, tuple[int, ...]], bytes]]:
    """Tensor or file records as Python values, a table at a time: a scalar at a time is slow."""
    reserved = (
        (table["reserved0"] != 0) | (table["reserved1"] != 0) | table["reserved2"].any(axis=1)
    )
    fields = ("op", "value_codec", "chunk_log2", "base_index")
    columns = [*(table[field].tolist() for field in fields), reserved.tolist()]
    typed = _dtypes_and_shapes(table)
    digests = _digests(table, digest_bytes)
    for name, values, type_, digest in zip(
        names, zip(*columns, strict=True), typed, digests, strict=True
    ):
        yield name, dict(zip((*fields, "reserved"), values, strict=True)), type_, digest


def _digests(table: npt.NDArray[np.void], digest_bytes: int) -> Iterator[bytes]:
    raw = table["digest"][:, :digest_bytes].tobytes()
    return (raw[start : start + digest_bytes] for start in range(0, len(raw), digest_bytes))


def _plausible(stored: npt.NDArray[np.int64], raw: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether zstd can have made ``stored`` bytes of ``raw``."""
    return (stored > 0) & (stored < raw) & (raw <= layout.MAX_ZSTD_RATIO * stored)
