"""What is fuzzed: functions of bytes that return quietly or raise where a promise is broken.

Each target compares the package with a second opinion: the standard's minimal reader, or a
reference written for clarity. An input that the package refuses must be refused by the second
opinion under the same rule.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard
from blake3 import blake3

import minimal_reader
from nps_compress import codecs, entropy_coding, grid_codec, mask_coding, sign_codec, ulp_coding
from nps_compress.codecs import MaskCodec, ValueCodec
from nps_compress.dtypes import BY_NAME, DTYPES, PRUNABLE, DType, Words
from nps_compress.errors import FormatError
from nps_compress.format.layout import Op
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.format.writer import NpsWriter, index_and_footer
from nps_compress.grid_codec import GridParameters
from nps_compress.mask_coding import Place
from nps_compress.rank_one import RankOne
from nps_compress.reconstruct import Task
from nps_compress.sign_codec import SignParameters

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
    codec = MaskCodec(2 + data[0] % 3)  # a learned one has a target of its own
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


# -- coded magnitudes ---------------------------------------------------------------------------

_RULES = {
    entropy_coding.ENDS_EARLY: "P-CODE",
    entropy_coding.ENDS_LATE: "P-CODE",
    entropy_coding.MISCOUNTED: "P-POPCOUNT",
}


def magnitudes(data: bytes) -> None:
    """nnz, number of elements, a context each (over 63: none), then words."""
    if len(data) < 2 or len(data) < 2 + data[1] + 8:
        return
    contexts = np.array([byte if byte < 64 else -1 for byte in data[2 : 2 + data[1]]], np.int8)
    nnz = min(data[0], contexts.size)
    stream = data[2 + data[1] :]
    words = np.frombuffer(stream[: len(stream) // 4 * 4], "<u4")
    positions, found = np.empty(nnz, np.uint32), np.empty(nnz, np.int16)
    status = entropy_coding.decode_magnitudes(words.tobytes(), contexts, positions, found)
    wanted: dict[int, int] | str
    try:
        wanted = minimal_reader.decode_magnitudes(words.tolist(), contexts.tolist(), nnz, "")
    except minimal_reader.Refused as refusal:
        wanted = refusal.rule
    if status != entropy_coding.OK:
        assert _RULES[status] == wanted, (status, wanted)
        return
    assert dict(zip(positions.tolist(), found.tolist(), strict=True)) == wanted
    whole = np.zeros(contexts.size, np.int16)
    whole[positions] = found
    assert entropy_coding.encode_magnitudes(whole, contexts) == words.tobytes()  # its one form


def magnitude_seeds() -> list[bytes]:
    """Streams of few and of many elements, in one context and in many."""
    rng, out = np.random.default_rng(0), []
    for numel, mean, kinds in ((0, 1, 1), (1, 1, 1), (40, 1, 1), (200, 0.1, 70), (90, 3000, 9)):
        contexts = rng.integers(0, kinds, numel)
        coded = np.where(contexts < 64, contexts, -1).astype(np.int8)
        found = (rng.exponential(mean, numel) * (coded >= 0)).clip(0, 32767).astype(np.int16)
        head = bytes([np.count_nonzero(found), numel, *contexts.tolist()])
        out.append(head + entropy_coding.encode_magnitudes(found, coded))
    return out


# -- learned masks --------------------------------------------------------------------------------


def learned(data: bytes) -> None:
    """Columns, start, elements and nnz (2 bytes each), then words."""
    if len(data) < 16:
        return
    columns, start, numel, nnz = struct.unpack_from("<4H", data)
    place, numel = Place(start, 1 + columns % 400), 2 + numel % 300
    nnz = 1 + nnz % (numel - 1)
    words = np.frombuffer(data[8 : 8 + (len(data) - 8) // 4 * 4], "<u4")
    span = slice(start, start + numel)
    wanted: list[int] | str
    try:
        wanted = minimal_reader.decode_learned(words.tolist(), span, place.columns, nnz, "")
    except minimal_reader.Refused as refusal:
        wanted = refusal.rule
    positions = np.empty(nnz, np.uint32)
    status = mask_coding.decode_positions(words.tobytes(), numel, place, positions)
    if status != entropy_coding.OK:
        assert _RULES[status] == wanted, (status, wanted)
        return
    assert positions.tolist() == wanted
    again = mask_coding.encode_positions(positions, numel, place)
    assert again == words.tobytes()  # its one form


def learned_seeds() -> list[bytes]:
    """Masks of few and of many elements, of one row, of several, and of part of one."""
    rng, out = np.random.default_rng(0), []
    for numel, columns, density in ((2, 1, 0.5), (30, 7, 0.1), (200, 300, 0.9), (300, 40, 0.05)):
        kept = rng.random(numel) < density
        kept[:2] = True, False
        positions = np.flatnonzero(kept).astype(np.uint32)
        head = struct.pack("<4H", columns - 1, 5, numel - 2, positions.size - 1)
        out.append(head + mask_coding.encode_positions(positions, numel, Place(5, columns)))
    return out


# -- coded distances ----------------------------------------------------------------------------


_DTYPES = tuple(BY_NAME[name] for name in sorted(PRUNABLE))


def distances(data: bytes) -> None:
    """Dtype, number of elements, size of the tokens (2), then base words, tokens and low bits."""
    if len(data) < 4:
        return
    dtype = _DTYPES[data[0] % len(_DTYPES)]
    start = 4 + (1 + data[1] % 200) * dtype.itemsize
    end = start + max(int.from_bytes(data[2:4], "little"), ulp_coding.LEAST_TOKEN_BYTES)
    if len(data) < end:
        return
    base = np.frombuffer(data[4:start], dtype.word)
    tokens = data[start:end][: ulp_coding.most_token_bytes(base.size)]
    low = data[end:][: ulp_coding.most_low_bytes(dtype.itemsize, base.size)]
    wanted: list[int] | str
    try:
        wanted = minimal_reader.decode_distances(dtype.name, tokens, low, base.tolist(), "")
    except minimal_reader.Refused as refusal:
        wanted = refusal.rule
    try:
        after = base.copy()
        ulp_coding.apply_distances(tokens, low, None, after, dtype)
        payload = codecs.payload_of(ValueCodec.ULP, base, after, dtype)
        found: list[int] | str = payload.tolist()
    except FormatError as error:
        found = error.rule
    assert found == wanted, (found, wanted)
    if isinstance(found, str):
        return
    exponents = ulp_coding.exponents_of(base, dtype)
    again = ulp_coding.encode_distances(payload.astype(np.uint32) + np.uint32(1), exponents)
    moved = base.copy()
    ulp_coding.apply_distances(*again, None, moved, dtype)
    assert np.array_equal(moved, after)


def distance_seeds() -> list[bytes]:
    """Few and many, of one length and of all, in one context and in several, in each dtype."""
    rng, out = np.random.default_rng(0), []
    for number, dtype in enumerate(_DTYPES):
        bits = 8 * dtype.itemsize
        for size, length in ((1, 1), (3, bits), (200, 1), (200, 6), (200, bits)):
            base = np.frombuffer(rng.bytes(size * dtype.itemsize), dtype.word)
            found = (rng.integers(1, 1 << length, size) >> rng.integers(0, length, size)) | 1
            exponents = ulp_coding.exponents_of(base, dtype)
            tokens, low = ulp_coding.encode_distances(found.astype(np.uint32), exponents)
            head = bytes([number, size - 1]) + len(tokens).to_bytes(2, "little")
            out.append(head + base.tobytes() + tokens + low)
            if tokens[0] == 1 and size == 200:  # another context like it, for some of the words
                end = 4 + 2 * tokens[3]
                two = b"\2" + tokens[1:end] + b"\x0f" + tokens[2:end] + tokens[end:]
                head = head[:2] + len(two).to_bytes(2, "little")
                out.append(head + base.tobytes() + two + low)
    return out


# -- signs, levels and grids ---------------------------------------------------------------------

_QUANTISED = (ValueCodec.SIGNS, ValueCodec.LEVELS, ValueCodec.GRID)
_SIDE = 12


class Quantised(NamedTuple):
    """A chunk that is a whole tensor. base: [numel] words."""

    codec: ValueCodec
    dtype: DType
    shape: tuple[int, int]
    parameters: bytes
    plane: bytes
    mask: bytes
    nnz: int
    base: Words


def quantised(data: bytes) -> None:
    """Codec, dtype, rows, columns, nnz, subspaces; then parameters, plane 0 and mask."""
    if len(data) < 6:
        return
    codec, dtype = _QUANTISED[data[0] % 3], _DTYPES[data[1] % len(_DTYPES)]
    rows, columns = 1 + data[2] % _SIDE, 1 + data[3] % _SIDE
    numel = rows * columns
    nnz = numel if codec is ValueCodec.LEVELS else min(data[4], numel)
    known = {
        ValueCodec.SIGNS: sign_codec.sign_parameter_bytes(1 + data[5] % 4, rows, columns),
        ValueCodec.LEVELS: sign_codec.LEVELS_PARAMETER_BYTES,
        ValueCodec.GRID: int(grid_codec.grid_parameter_bytes(rows + columns)),
    }
    end = 6 + known[codec]
    start = end + (nnz if codec is ValueCodec.LEVELS else -(-nnz // 8))
    parameters, plane, mask = data[6:end], data[end:start], data[start:]
    if len(data) < start:
        return
    if codec is ValueCodec.GRID:
        mask = mask[: len(mask) // 4 * 4]
        if not nnz or len(mask) < entropy_coding.stream_bytes_range(numel)[0]:
            return
    base = np.frombuffer(np.random.default_rng(data[1]).bytes(numel * dtype.itemsize), dtype.word)
    case = Quantised(codec, dtype, (rows, columns), parameters, plane, mask, nnz, base)
    mine: object
    theirs: object
    try:
        mine = _changed(case).tolist()
    except FormatError as error:
        mine = error.rule
    try:
        theirs = _changed_too(case).tolist()
    except minimal_reader.Refused as refusal:
        theirs = refusal.rule
    assert mine == theirs, (mine, theirs)


def _changed(case: Quantised) -> Words:
    """By the package."""
    codec, dtype, shape, parameters, plane, mask, nnz, base = case
    out, span = np.full_like(base, 0x5A), range(base.size)
    if codec is ValueCodec.SIGNS:
        signs = SignParameters.parse(parameters, *shape)
        signs.apply(0, *sign_codec.decode_signs(plane, signs, span, nnz), base, out, dtype)
    elif codec is ValueCodec.GRID:
        grid = GridParameters.parse(parameters, *shape)
        found = grid_codec.decode_grid(mask + plane, len(mask), grid, span, nnz)
        grid.apply(0, *found, base, out, dtype)
    else:
        exponent = sign_codec.parse_levels_parameters(parameters)
        changes = sign_codec.level_changes(np.frombuffer(plane, np.int8), exponent)
        sign_codec.add_changes(np.arange(base.size, dtype=np.uint32), changes, base, out, dtype)
    return out


def _changed_too(case: Quantised) -> Words:
    """By the minimal reader."""
    codec, dtype, shape, parameters, plane, mask, nnz, base = case
    record = minimal_reader.Record("w", dtype.name, shape, b"", value_codec=int(codec))
    bits, stream = np.frombuffer(plane, np.uint8), np.frombuffer(mask, np.uint8)
    known = minimal_reader.parse_parameters(record, np.frombuffer(parameters, np.uint8), "")
    place, out = slice(0, base.size), base.copy()
    kept, change = place, bits.view(np.int8).astype(np.float32)
    if codec is ValueCodec.SIGNS:
        kept, change = minimal_reader.draw(known, place, nnz, bits, "")
    elif codec is ValueCodec.GRID:
        kept, change = minimal_reader.step(known, place, nnz, stream, bits, "")
    else:
        change = change * known
    out[kept] = minimal_reader.apply_change(dtype.name, out[kept], change)
    return out


def quantised_seeds() -> list[bytes]:
    """A tensor in each codec and dtype."""
    rng, out = np.random.default_rng(0), []
    rows, columns = 7, 9
    numel = rows * columns

    def factors() -> RankOne:
        return RankOne(*(rng.integers(-4, 5, n).astype(np.int16) for n in (rows, columns)))

    for number in range(len(_DTYPES)):
        head = [number, rows - 1, columns - 1]
        integers = rng.integers(-4, 5, numel)
        out.append(
            bytes([1, *head, 0, 0]) + struct.pack("<h", -9) + integers.astype("i1").tobytes()
        )
        signs = SignParameters(
            5, 0.25, (-(1 << 15), 1), (1.0, 0.5), (1.0, 2.0), factors(), factors()
        )
        chunk = sign_codec.encode_signs(signs, 0, integers.astype(np.float32))
        out.append(bytes([0, *head, chunk.nnz, 1]) + signs.to_bytes() + chunk.data)
        grid = GridParameters.of(0.01, factors(), factors())
        chunk = grid_codec.encode_grid(grid, 0, integers.astype(np.int16))
        stored = chunk.planes[0] + chunk.mask
        out.append(bytes([2, *head, chunk.nnz, 0]) + grid.to_bytes() + stored)
    return out


# -- files ------------------------------------------------------------------------------------

Outcome = tuple[str, ...]


def repaired(data: bytes, flags: int) -> bytes:
    """The file with its checksums made right again, so that the checks behind them are reached.

    Bit 0 of flags: CRCs, sizes and digest of the index; bit 1: sizes of heap and metadata; bit 2:
    digests of chunks; bit 3: where the index starts; bit 4: digests of records are short, so that
    the roots need not fit them. What makes no sense is left as it is.
    """
    if len(data) < 160 or not flags & 1:
        return data
    header, body, footer = data[:64], data[64:-96], bytearray(data[-96:])
    start = min(max(int.from_bytes(footer[:8], "little") - 64, 0), len(body))
    chunks, index = body[:start], bytearray(body[start:])
    if footer[68] == 0 and len(index) >= 128:
        index, used = _repaired_index(index, chunks, flags)
        if flags & 8 and used <= 1 << 16:
            chunks = chunks[:used].ljust(used, b"\0")
    raw = int.from_bytes(footer[16:24], "little") if footer[68] else len(index)
    size = 64 + len(chunks) + len(index) + 96
    footer[:32] = struct.pack("<4Q", 64 + len(chunks), len(index), raw, size)
    footer[32:64] = blake3(index).digest()
    footer[84:88] = zlib.crc32(footer[:84]).to_bytes(4, "little")
    header = header[:60] + zlib.crc32(header[:60]).to_bytes(4, "little")
    return header + chunks + bytes(index) + bytes(footer)


def _repaired_index(index: bytearray, chunks: bytes, flags: int) -> tuple[bytearray, int]:
    base, tensors, files, _, records, _, _ = struct.unpack_from("<4I3Q", index)
    place = 128 + 104 * base + 128 * (tensors + files)
    heap_start = place + 56 * records
    if heap_start > len(index):
        return index, len(chunks)
    rows = [(128 + 104 * i, 72) for i in range(base)]
    rows += [(128 + 104 * base + 128 * i, 80) for i in range(tensors + files)]
    if flags & 16:
        struct.pack_into("<I", index, 12, 8)
        for row, digest_at in rows:
            index[row + digest_at + 8 : row + digest_at + 32] = bytes(24)
    if flags & 2:
        heap = sum(int.from_bytes(index[row : row + 2], "little") for row, _ in rows)
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
            index[row + 48 : row + 56] = blake3(chunks[offset : offset + size]).digest(8)
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


def minimal_outcome(data: bytes, base_nps: bytes = b"") -> Outcome:
    """What the standard's minimal reader makes of the same bytes."""
    try:
        nps = minimal_reader.Nps(data, base_nps)
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


def compare_readers(path: Path, data: bytes, base_nps: bytes = b"") -> Outcome:
    """The outcome on which both readers agree. Raises AssertionError where they do not."""
    mine, theirs = package_outcome(path), minimal_outcome(data, base_nps)
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
        if _examined(path) > MOST_EXAMINED:
            return  # allowed, but the minimal reader would take minutes
        outcome = compare_readers(path, file)
        if outcome[0] != "refused":
            _rebuild(path, file)
    finally:
        os.close(descriptor)


MOST_EXAMINED = 1 << 13


def _examined(path: Path) -> int:
    """Elements that are drawn or coded, or have learned masks; 0 for what is refused at once."""
    slow = (ValueCodec.SIGNS, ValueCodec.GRID, ValueCodec.CODED_ULP)
    try:
        with NpsReader(path) as nps:
            return sum(
                entry.numel
                for entry in nps.tensors
                if entry.value_codec in slow or MaskCodec.LEARNED in nps.mask_codecs(entry)
            )
    except FormatError:
        return 0


def _rebuild(path: Path, data: bytes) -> None:
    """Apply an accepted file to any base: both readers must make the same of it."""
    minimal = minimal_reader.Nps(data)
    with Task(path) as task:
        for entry, record in zip(task.reader.tensors, minimal.tensors, strict=True):
            if entry.op is not Op.DELTA or entry.numel > 1 << 16:
                continue
            size = entry.numel * entry.dtype.itemsize
            base = np.frombuffer(np.random.default_rng(0).bytes(size), entry.dtype.word).copy()
            wanted = base.copy()
            rules = [""] * 2  # distances may be refused beside a base
            try:
                for place, kept, payload in minimal._chunks(record, wanted):
                    part = wanted[place]
                    part[kept] = minimal_reader.apply_payload(record, part[kept], payload)
            except minimal_reader.Refused as refusal:
                rules[0] = refusal.rule
            try:
                found = task.rebuild_words(entry.name, base)
            except FormatError as error:
                rules[1], found = error.rule, wanted
            assert rules[0] == rules[1], (entry, rules)
            assert not rules[0] or entry.value_codec is ValueCodec.CODED_ULP
            assert np.array_equal(found, wanted), entry


# -- bundles ----------------------------------------------------------------------------------


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    shared = Path("/dev/shm")  # files in memory, where there are any
    return tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)


def members(data: bytes) -> None:
    """Flags of a base.nps and of a member (half a byte each), size of the first (2), both files."""
    if len(data) < 3:
        return
    flags, end = data[0], 3 + int.from_bytes(data[1:3], "little")
    base = repaired(data[3:end], flags & 15)
    file = repaired(data[end:], flags >> 4)
    if flags >> 4 & 1:
        file = in_need_of(file, base)
    path = Path(_folder().name) / "member.nps"
    path.write_bytes(file)
    path.with_name("base.nps").write_bytes(base)
    if _examined(path) <= MOST_EXAMINED:
        compare_readers(path, file, base)


def in_need_of(file: bytes, base: bytes) -> bytes:
    """The member with what its footer says of its dictionary made right."""
    if len(file) < 160 or file[-28] != 2:
        return file
    try:
        dictionary = bytes(minimal_reader.Nps(base).index)
    except minimal_reader.Refused:
        return file
    footer, digest = bytearray(file[-96:]), blake3(dictionary).digest()
    index = file[int.from_bytes(footer[:8], "little") : -96]
    footer[32:64] = blake3(index + digest).digest()
    footer[72:84] = len(dictionary).to_bytes(4, "little") + digest[:8]
    footer[84:88] = zlib.crc32(footer[:84]).to_bytes(4, "little")
    return file[:-96] + bytes(footer)


def member_seeds() -> list[bytes]:
    """A base of three tensors, by itself or compressed, with members that copy, drop and add."""
    shared = [BaseTensor(f"layer.{i}", BY_NAME["BF16"], (4,), bytes([i]) * 32) for i in range(3)]

    def file(names: list[str], metadata: dict[str, str]) -> tuple[bytes, bytes]:
        """What comes before the index, and the index."""
        stream = io.BytesIO()
        writer = NpsWriter(stream)
        for name in names:
            index = int(name[-1]) % 3
            copied = Op.COPY, ValueCodec.NONE, 0, index, shared[index].sha256
            writer.add_tensor(TensorEntry(name, BY_NAME["BF16"], (4,), *copied))
        writer.add_file("config.json", b"{}")
        writer.finish(shared, metadata)
        path = Path(_folder().name) / "seed.nps"
        path.write_bytes(stream.getvalue())
        with NpsReader(path) as nps:
            return stream.getvalue()[: nps.index_offset], nps.raw_index

    start, dictionary = file([tensor.name for tensor in shared], {})
    footer = index_and_footer(dictionary, len(start))
    seeds = []
    for names in (["layer.0", "layer.1", "layer.2"], ["layer.2"], ["head.1", "layer.1", "x.2"]):
        before, raw = file(names, {"base_name": "base"})
        for known in (dictionary, b""):
            member = before + index_and_footer(raw, len(before), known)
            base = start + footer
            for flags in (0, 0x10, 0xF1):
                size = len(base).to_bytes(2, "little")
                seeds.append(bytes([flags]) + size + base + member)
    return seeds


TARGETS: dict[str, Callable[[bytes], None]] = {
    "reader": reader,
    "members": members,
    "masks": masks,
    "zstd": zstd,
    "values": values,
    "magnitudes": magnitudes,
    "learned": learned,
    "distances": distances,
    "quantised": quantised,
}
SEEDS = {
    "members": member_seeds,
    "magnitudes": magnitude_seeds,
    "learned": learned_seeds,
    "distances": distance_seeds,
    "quantised": quantised_seeds,
}
