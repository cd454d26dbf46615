"""A minimal, strict reader of .nps 1.0 files, written from SPEC.md alone."""

import json
import math
import re
import shutil
import struct
import sys
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard
from blake3 import blake3

MAGIC = bytes.fromhex("894e50530d0a1a0a")
HEADER = struct.Struct("<8sHH4sQQ28sI")
FOOTER = struct.Struct("<QQQQ32sHHB3sI8sI8s")
HEAD = struct.Struct("<IIIIQQQ32s32s24s")
BASE = struct.Struct("<HBB4s8Q32s")
TENSOR = struct.Struct("<HBBBBBBI4s8Q32s16s")
CHUNK = struct.Struct("<IIIBBBB8I8s")
SUBSPACE = np.dtype("<i2, <u2, <f4, <f8")
NAMES = "BOOL U8 I8 U16 I16 U32 I32 U64 I64 F8_E4M3 F8_E5M2 F8_E8M0 F16 BF16 F32 F64 C64".split()
WIDTHS = dict(zip(NAMES, (1, 1, 1, 2, 2, 4, 4, 8, 8, 1, 1, 1, 2, 2, 4, 8, 8), strict=True))
COPY, DELTA, NEW = OPS = 1, 2, 3
REPLACE, XOR, ULP, CODED_ULP, SIGNS, LEVELS, GRID = 1, 2, 3, 4, 16, 17, 18
EMPTY, FULL, BITMASK, GAP8, GAP16 = range(5)
DRAWN, PARAMETERS, CODED, LEARNED = 7, 8, 9, 10
NO_BASE = 0xFFFFFFFF
EXPONENT_AT = {"F16": (10, 31), "BF16": (7, 255), "F32": (23, 255)}  # section 6.6
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
BaseDict = dict[str, tuple[str, tuple[int, ...], bytes]]
Kept = slice | np.ndarray  # which elements of a chunk are kept, as an index into it
# H(k) of section 6.1 is POWERS[k + 240]; shifts round down, so that odd k below 0 come out right.
EXPONENTS = np.arange(-240, 241, dtype=np.int32)
ROOT = np.array(0x3FB504F3, np.uint32).view(np.float32)
POWERS = np.ldexp(np.where(EXPONENTS & 1, ROOT, np.float32(1)), EXPONENTS >> 1)
NEVER = -1000  # a size exponent whose sums are below all others


class Refused(Exception):
    """The file breaks a rule of section 8."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule, self.detail = rule, detail


class WrongBase(Exception):
    """The base is not the one that the file was made against."""


class Record(NamedTuple):
    """A base, tensor or file record. What follows digest means nothing for a base tensor.

    digest: as many bytes of it as the file holds.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes
    op: int = 0
    value_codec: int = 0
    chunk_log2: int = 0
    base_index: int = NO_BASE
    chunks: range = range(0)  # the numbers of its chunk records


def check(good: bool, rule: str, detail: str) -> None:
    if not good:
        raise Refused(rule, detail)


def inflate(
    frame: memoryview, size: int, rule: str, what: str, dictionary: bytes | memoryview = b""
) -> bytes:
    """Section 7. Everything that the frame states is checked before it is decompressed."""
    try:
        stated = zstandard.get_frame_parameters(frame)
        good = frame[:4] == b"\x28\xb5\x2f\xfd" and stated.content_size == size  # not skippable
        good &= stated.window_size <= 1 << 23 and not (stated.dict_id or stated.has_checksum)
        check(good, rule, f"{what}: not the frame of section 7")
        how = zstandard.DICT_TYPE_RAWCONTENT
        before = zstandard.ZstdCompressionDict(dictionary, how) if dictionary else None
        raw = zstandard.ZstdDecompressor(before).decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Refused(rule, f"{what}: {error}") from None
    check(len(raw) == size, rule, f"{what}: another size than stated")
    return raw


def parse_metadata(raw: bytes) -> dict[str, str]:
    """M rules."""
    check(len(raw) <= 1 << 20, "M-SIZE", f"{len(raw)} bytes")
    try:
        # Nested objects become lists as well, so that only strings are str.
        pairs = json.loads(raw.decode(), object_pairs_hook=list)
        good = raw[:1] == b"{" and all(isinstance(value, str) for _, value in pairs)
        check(good, "M-JSON", "not a flat object of strings")
        "".join(map("".join, pairs)).encode()  # raises on an unpaired surrogate
    except (ValueError, RecursionError) as error:
        raise Refused("M-JSON", str(error)) from None
    check(len(dict(pairs)) == len(pairs), "M-KEYS", "a key is repeated")
    return dict(pairs)


def parse_starts(heap: bytes, tables: list[list[tuple]], size: int) -> list[list[Record]]:
    """N and S rules: what the rows of all tables have in common. size: of a digest."""
    total = sum(row[0] for rows in tables for row in rows)
    check(total == len(heap), "N-HEAP", f"names of {total} bytes, a heap of {len(heap)}")
    names, at = ([], [], []), 0
    for rows, found in zip(tables, names, strict=True):
        last = b""
        for row in rows:
            raw = heap[at : at + row[0]]
            check(1 <= len(raw) <= 512, "N-LENGTH", f"{len(raw)} bytes")
            name = raw.decode(errors="replace")
            check(name.encode() == raw, "N-UTF8", name)  # true only if nothing was replaced
            check(not CONTROL.search(name), "N-CONTROL", name)
            check(raw > last, "N-ORDER", name)
            found.append(name)
            at, last = at + len(raw), raw
    check("__metadata__" not in names[0] + names[1], "N-RESERVED", "__metadata__")
    for name in names[2]:
        check(bool(FILE_NAME.fullmatch(name)), "N-FILE", name)
    records: list[list[Record]] = [[], [], []]
    for i, at in enumerate((4, 9, 9)):
        for row, name in zip(tables[i], names[i], strict=True):
            code, rank, dims = row[1], row[2], row[at : at + 8]
            check(1 <= code <= len(NAMES), "S-DTYPE", name)
            check(rank <= 8, "S-RANK", name)
            check(not any(dims[rank:]), "S-DIM", name)
            check(math.prod(filter(None, dims)) <= 1 << 48, "S-NUMEL", name)
            records[i].append(Record(name, NAMES[code - 1], dims[:rank], row[at + 8][:size]))
    return records


def parse_record(record: Record, row: tuple, base: list[Record] | None, first: int) -> Record:
    """R rules; the whole record. A file has no base tensors."""
    name, dtype, shape, digest = record[:4]
    op, codec, log2, reserved0, index, reserved1, reserved2 = *row[3:9], row[18]
    check(not reserved0 and not any(reserved1 + reserved2), "R-RESERVED", name)
    check(op in OPS, "R-OP", name)
    is_small = dtype == "U8" and len(shape) == 1 and shape[0] <= 1 << 26
    check(base is not None or (op != DELTA and is_small), "R-FILE", name)
    has_base = base is not None and op != NEW
    check(index < len(base) if has_base else index == NO_BASE, "R-BASE", name)
    check(not has_base or (dtype, shape) == base[index][1:3], "R-SHAPE", name)
    check(not has_base or op != COPY or not any(digest), "R-COPY", name)
    is_float = dtype in ("F16", "BF16", "F32", "F64")
    changing = (REPLACE, XOR) + (ULP,) * is_float
    changing += (CODED_ULP, SIGNS, LEVELS, GRID) * (dtype in EXPONENT_AT)
    check(codec in {COPY: (0,), NEW: (REPLACE,), DELTA: changing}[op], "R-VALUES", name)
    check(log2 == 0 if op == COPY else 10 <= log2 <= 24, "R-CHUNKLOG", name)
    count = 0 if op == COPY else -(-math.prod(shape) >> log2) + (codec >= SIGNS)
    return Record(*record[:4], op, codec, log2, index, range(first, first + count))


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Section 3.9: rows and columns."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def chunk_starts(table: memoryview, records: list[Record], index_offset: int) -> np.ndarray:
    """C rules of the index; where each chunk starts."""
    counts = np.array([len(record.chunks) for record in records], np.int64)
    check(len(table) // CHUNK.size == counts.sum(), "C-COUNT", f"{counts.sum()} are needed")
    each = [(WIDTHS[r.dtype], *r[4:7], math.prod(r.shape), sum(matrix(r.shape))) for r in records]
    fields = np.repeat(np.array(each, np.int64).reshape(-1, 6), counts, axis=0)
    width, op, values, log2, numel, lines = fields.T
    place = np.arange(len(width)) - np.repeat(np.cumsum(counts) - counts, counts)
    place -= values >= SIGNS  # a parameter chunk is number -1
    n = np.where(place < 0, 0, np.minimum(1 << log2, numel - (place << log2)))
    words = np.frombuffer(table, "<u4").reshape(-1, 14).astype(np.int64)
    mask_stored, raw, nnz, flags, *planes, _, _ = words.T
    codec, mask_z, planes_z, reserved = (flags >> shift & 255 for shift in (0, 8, 16, 24))
    grid, has_bits = values == GRID, (values == SIGNS) | (values == GRID)
    special = [place < 0, values == SIGNS, grid & (nnz > 0)]
    special += [(values == LEVELS) | ((nnz == n) & ~grid), nnz == 0]
    some = np.where(codec == LEARNED, LEARNED, np.clip(codec, BITMASK, GAP16))
    wanted = np.select(special, [PARAMETERS, DRAWN, CODED, FULL, EMPTY], some)
    kinds = [codec == BITMASK, codec == GAP8, codec == GAP16, codec == CODED, codec == LEARNED]
    kinds += [(place < 0) & (values == code) for code in (SIGNS, LEVELS, GRID)]
    low = np.select(kinds, [(n + 7) // 8, nnz, 2 * nnz, 8, 8, 32 + 2 * lines, 2, 16 + 2 * lines])
    more = [(n - nnz) // 255, (n - nnz) // 65535 * 2, 60 * n, 4 * n, 16 * 63]
    high = low + np.select(kinds[1:6], more)
    step = np.select(kinds[2:6], [2, 4, 4, 16], 1)
    distances = values == CODED_ULP
    # Planes of a size that nnz implies.
    used = np.select([(place < 0) | distances, values >= SIGNS], [0, 1], width)
    size = np.where(has_bits, (nnz + 7) // 8, nnz)
    tokens, low_bits = planes[:2]
    good_size = (tokens >= 22) & (tokens <= 8401 + 2 * nnz)
    good_size &= low_bits <= (nnz * (8 * width - 2) + 7) // 8
    bad_size = distances & ~np.where(nnz > 0, good_size, tokens + low_bits == 0)
    wholes = [np.where(i < used, size, distances * planes[i] * (i < 2)) for i in range(8)]
    streams = [(wholes[i], planes_z >> i & 1, planes[i]) for i in range(8)]
    for whole, is_frame, stored in [(raw, mask_z, mask_stored), *streams]:
        bad_frame = (stored >= whole) | (stored * 32768 < whole)
        bad_size |= np.where(is_frame != 0, bad_frame, stored != whole)
    bad_z = (mask_z > ((codec != CODED) & (codec != LEARNED))) | (
        planes_z >> np.where(has_bits, 0, used) != 0
    )
    for rule, bad in (
        ("C-NNZ", nnz > n),
        ("C-CODEC", (codec != wanted) | ((values == LEVELS) & (nnz != n))),
        ("C-NEW", (op == NEW) & (codec != FULL)),
        ("C-FLAGS", (reserved != 0) | bad_z),
        ("C-MASKSIZE", (raw < low) | (raw > high) | ((raw - low) % step != 0)),
        ("C-STORED", bad_size),
    ):
        check(not bad.any(), rule, f"chunk record {np.flatnonzero(bad)[:1]}")
    starts = np.cumsum(np.append(64, (mask_stored + sum(planes) + 7) // 8 * 8))
    check(starts[-1] == index_offset, "C-LAYOUT", f"chunks end at {starts[-1]}")
    tables = 512 * np.clip((tokens - 17) // 5, 0, 64)
    works = [n // 32, n // 4 + 4 * nnz, n // 4]
    work = np.select([codec == DRAWN, codec == CODED, codec == LEARNED], works)
    work += distances * (nnz > 0) * (tables + width * nnz)
    total, limit = int((raw + sum(wholes) + work).sum()), 256 * (index_offset - 64) + (1 << 26)
    check(total <= limit, "C-EXPANSION", f"{total} bytes decoded, {limit} allowed")
    return starts


def decode_mask(codec: int, mask: bytes | memoryview, n: int, nnz: int, what: str) -> Kept:
    """Section 5."""
    if codec in (EMPTY, FULL, DRAWN, CODED):
        return slice(0, nnz)
    stream = np.frombuffer(mask, np.uint8)
    if codec == BITMASK:
        bits = np.unpackbits(stream, bitorder="little")
        check(np.count_nonzero(bits) == nnz, "P-POPCOUNT", what)
        check(not bits[n:].any(), "P-TAIL", what)
        return np.flatnonzero(bits)
    if codec == GAP16:
        stream = stream.reshape(2, -1).T.copy().view("<u2")[:, 0]
    escape = 255 if codec == GAP8 else 65535
    # What follows the first entry too many cannot be the stream's first fault.
    ends = np.flatnonzero(stream != escape)[: nnz + 1]
    kept = np.cumsum(stream, dtype=np.int64)[ends] + np.arange(len(ends))
    check(not len(kept) or kept[-1] < n, "P-GAP", what)  # they ascend: the last one tells
    check(len(kept) <= nnz, "P-POPCOUNT", what)
    check(stream[-1] != escape, "P-ESCAPE", what)
    check(len(kept) == nnz, "P-POPCOUNT", what)
    return kept


@np.errstate(all="ignore")
def parse_parameters(record: Record, raw: np.ndarray, what: str) -> tuple | np.float32:
    """Section 3.9: of levels H(e), of signs what ``draw`` takes, of a grid what ``step`` takes."""
    if record.value_codec == LEVELS:
        (exponent,) = struct.unpack("<h", raw)
        check(abs(exponent) <= 120, "P-PARAMETERS", what)
        return POWERS[exponent + 240]
    (rows, columns), start = matrix(record.shape), 16
    if record.value_codec == SIGNS:
        seed, gain, count, reserved = struct.unpack_from("<QfHH", raw)
        start += 16 * count
        check(start + 2 * (rows + columns) == len(raw), "P-PARAMETERS", what)
        parts = np.frombuffer(raw, SUBSPACE, count, 16)
        first, zeros, scale, rate = (parts[name] for name in SUBSPACE.names)
        good = not reserved and not zeros.any() and gain < np.inf and math.copysign(1, gain) > 0
        good &= first[0] == -32768 and bool((first[1:] > first[:-1]).all())
        good &= all(((part > 0) & (part < np.inf)).all() for part in (scale, rate))
    else:
        size, first, *zeros = struct.unpack_from("<dhHI", raw)
        good = 0 < size < np.inf and not any(zeros)
    exponents = np.frombuffer(raw, np.int8, offset=start).astype(np.int32).reshape(2, -1)
    exponents[0, exponents[0] == -128] = NEVER
    good &= bool(((np.abs(exponents) <= 60) | (exponents == NEVER)).all())
    check(good, "P-PARAMETERS", what)
    lines = exponents[:, :rows], exponents[:, rows:]
    if record.value_codec == GRID:
        return *lines, first, (size / POWERS.astype(np.float64)).astype(np.float32)
    m = np.searchsorted(first, EXPONENTS, "right") - 1
    score = (np.float32(gain) * POWERS).astype(np.float64)
    levels = np.minimum(65536, np.rint(65536 * (score * rate[m])))
    factors = scale[m].astype(np.float64) * 65536 / levels  # infinite where level is 0
    return seed, np.float32(gain), *lines, levels, factors.astype(np.float32)


def signed(change: np.ndarray, plane: np.ndarray, what: str) -> np.ndarray:
    """Section 6.2: minus where a bit of the plane says so."""
    minus = np.unpackbits(plane, bitorder="little")
    check(not minus[len(change) :].any(), "P-TAIL", what)
    return np.where(minus[: len(change)], -change, change)


@np.errstate(all="ignore")
def draw(p: tuple, place: slice, nnz: int, plane: np.ndarray, what: str) -> tuple[Kept, np.ndarray]:
    """Section 6.2: the elements of a chunk that are drawn, and what each is changed by.

    Rows and columns are exponents of size and importance; levels and factors go by u + 240.
    """
    seed, gain, rows, columns, levels, factors = p
    found = []
    for start in range(place.start, place.stop, 1 << 16):  # in parts, to save memory
        at = np.arange(start, min(start + (1 << 16), place.stop), dtype=np.uint64)
        row, column = np.divmod(at, np.uint64(columns.shape[1]))
        s, more = rows[:, row] + columns[:, column]
        z = np.uint64(seed) + ((at >> 2) + 1) * 0x9E3779B97F4A7C15
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
        z = (z ^ z >> 27) * 0x94D049BB133111EB
        z ^= z >> 31
        u = np.maximum(s + more, -240) + 240
        hit = ((z >> (at & 3) * 16 & 0xFFFF) < levels[u]) & (s >= -120)
        found.append((at[hit] - place.start, s[hit] + 240, u[hit]))
    kept, s, u = map(np.concatenate, zip(*found, strict=True))
    check(len(kept) == nnz, "P-POPCOUNT", what)
    return kept.astype(np.int64), signed(gain * POWERS[s] * factors[u], plane, what)


class Decisions:
    """Section 6.5: a stream of decisions."""

    def __init__(self, words: list[int], what: str) -> None:
        self._words, self._chances, self._what = iter(words), {}, what
        self._x = next(self._words) + (next(self._words) << 32)
        check(self._x >> 32 > 0, "P-CODE", what)

    def next(self, *name: int) -> bool:
        """By the chance of this name; further bits have none."""
        a, m = self._chances.get(name, (1 << 31, 0))
        f = min(max(a >> 16, 1), 65535)
        q, r = self._x >> 16, self._x & 0xFFFF
        bit = r < f
        self._x = f * q + r if bit else (65536 - f) * q + r - f
        if self._x >> 32 == 0:
            word = next(self._words, None)
            check(word is not None, "P-CODE", self._what)
            self._x = self._x << 32 | word
        if name:
            a += ((bit << 32) - bit - a) * ((1 << 17) // (2 * m + 3)) >> 16
            self._chances[name] = a, min(m + 1, 511)
        return bit

    def end(self) -> None:
        check(next(self._words, None) is None and self._x == 1 << 32, "P-CODE", self._what)


def decode_learned(words: list[int], place: slice, columns: int, nnz: int, what: str) -> list[int]:
    """Section 5.1: the elements of a chunk that are kept."""
    decisions, n, found, of_columns = Decisions(words, what), place.stop - place.start, [], {}
    prior = (nnz << 32) // n

    def h(y: int) -> int:
        return 2 * (y.bit_length() - 1) + (y >> y.bit_length() - 2 & 1 if y > 1 else 0)

    def odds(chance: int) -> int:
        return h((chance >> 20) + 1) - h(4096 - (chance >> 20))

    def moved(chance: int, bit: bool, m: int) -> int:
        return chance + (((bit << 32) - bit - chance) * (65536 // (min(m, 511) + 16)) >> 16)

    for i in range(n):
        above, k = divmod(i, columns)
        if i == 0 or (place.start + i) % columns == 0:
            row, before = prior, 0
        column = of_columns.get(k, prior)
        bit = decisions.next(min(max(odds(row) + odds(column) - odds(prior) + 32, 0), 63))
        if bit:
            check(len(found) < nnz, "P-POPCOUNT", what)
            found.append(i)
        row, of_columns[k] = moved(row, bit, before), moved(column, bit, above)
        before += 1
    check(len(found) == nnz, "P-POPCOUNT", what)
    decisions.end()
    return found


def decode_magnitudes(words: list[int], contexts: list[int], nnz: int, what: str) -> dict[int, int]:
    """Section 6.5: the magnitudes that are not 0. A negative context stands for no code."""
    decisions, found = Decisions(words, what), {}
    for i, context in enumerate(contexts):
        if context < 0:
            continue
        bits = 0
        while bits < 15 and decisions.next(context, bits):
            bits += 1
        magnitude = int(bits > 0)
        for below in range(bits - 1):
            name = (context, bits, magnitude) if below < 2 else ()
            magnitude = 2 * magnitude + decisions.next(*name)
        if magnitude:
            check(len(found) < nnz, "P-POPCOUNT", what)
            found[i] = magnitude
    check(len(found) == nnz, "P-POPCOUNT", what)
    decisions.end()
    return found


@np.errstate(all="ignore")
def step(
    p: tuple, place: slice, nnz: int, mask: np.ndarray, plane: np.ndarray, what: str
) -> tuple[Kept, np.ndarray]:
    """Section 6.4: the elements of a chunk that are kept, and what each is changed by."""
    rows, columns, first, steps = p
    row, column = np.divmod(np.arange(place.start, place.stop), columns.shape[1])
    s, v = rows[:, row] + columns[:, column]
    contexts = np.where(s < -120, -1, np.clip(s + v - first, 0, 63))
    found = decode_magnitudes(mask.view("<u4").tolist(), contexts.tolist(), nnz, what)
    kept = np.array(list(found), np.int64)
    change = np.array(list(found.values()), np.float32) * steps[v[kept] + 240]
    return kept, signed(change, plane, what)


def parse_contexts(stream: bytes, most: int, what: str) -> tuple[list[int], list, int]:
    """Section 6.6: of each context its first exponent, and its tokens' starts; the table's size.

    Starts are of all tokens, and of the one behind the last. most: tokens that a dtype has.
    """
    firsts, contexts, at = [-1], [], 1
    check(1 <= stream[0] <= 64, "P-TABLE", what)
    for _ in range(stream[0]):
        check(at + 3 <= len(stream), "P-TABLE", what)
        first, token, count = stream[at : at + 3]
        start, at = at + 3, at + 3 + 2 * count
        good = first > firsts[-1] if contexts else first == 0
        good &= count >= 1 and token + count <= most and at <= len(stream)
        check(good, "P-TABLE", what)
        shares = np.frombuffer(stream, "<u2", count, start).tolist()
        good = sum(shares) == 4096 and min(shares[0], shares[-1]) > 0
        shares = [0] * token + shares
        check(good and not any(shares[1:2]), "P-TABLE", what)
        firsts.append(first)
        contexts.append(list(accumulate(shares, initial=0)))
    check((len(stream) - at) % 2 == 0 and len(stream) - at >= 16, "P-TABLE", what)
    return firsts[1:], contexts, at


def decode_distances(dtype: str, stream: bytes, low: bytes, b: list[int], what: str) -> list[int]:
    """Section 6.6: the payload words, p = z - 1. b: the base's words that are kept."""
    shift, field = EXPONENT_AT[dtype]
    firsts, contexts, at = parse_contexts(stream, 16 * WIDTHS[dtype], what)
    states = list(struct.unpack_from("<4I", stream, at))
    check(min(states) >= 1 << 16, "P-CODE", what)
    words = iter(np.frombuffer(stream, "<u2", offset=at + 16).tolist())
    tokens = []
    for t, word in enumerate(b):
        starts = contexts[bisect_right(firsts, word >> shift & field) - 1]
        q, r = divmod(states[t % 4], 4096)
        token = bisect_right(starts, r) - 1
        x = (starts[token + 1] - starts[token]) * q + r - starts[token]
        if x < 1 << 16:
            more = next(words, None)
            check(more is not None, "P-CODE", what)
            x = x << 16 | more
        states[t % 4] = x
        tokens.append(token)
    check(next(words, None) is None and states == [1 << 16] * 4, "P-CODE", what)
    found, bit = [], 0
    for token in tokens:
        count = max(token // 2 - 1, 0)
        check(bit + count <= 8 * len(low), "P-TAIL", what)
        z = 1 if token == 0 else 2 + token % 2
        window = int.from_bytes(low[bit // 8 : (bit + count + 7) // 8], "little")
        z = z << count | window >> bit % 8 & (1 << count) - 1
        found.append(z - 1)
        bit += count
    left = int.from_bytes(low[bit // 8 :], "little") >> bit % 8
    check((bit + 7) // 8 == len(low) and left == 0, "P-TAIL", what)
    return found


@np.errstate(all="ignore")
def apply_change(dtype: str, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Section 6.1: words changed by float32 numbers."""
    if dtype == "BF16":
        x = (b.astype(np.uint32) << 16).view(np.float32)
        total = x + c
        v = total.view(np.uint32)
        v = ((v + 0x7FFF + (v >> 16 & 1)) >> 16).astype(np.uint16)
        y = (v.astype(np.uint32) << 16).view(np.float32)
    else:
        x = b.view("<f2" if dtype == "F16" else "<f4")
        total = x + c  # in float32, since c is
        y = total.astype(x.dtype)
        v = y.view(b.dtype)
    return np.where(np.isfinite(x) & np.isfinite(total) & np.isfinite(y) & (x != y), v, b)


def apply_payload(record: Record, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Section 6. Unsigned arrays wrap around, as it asks."""
    if record.value_codec >= SIGNS:
        return apply_change(record.dtype, b, p)
    if record.value_codec not in (ULP, CODED_ULP):
        return b ^ p if record.value_codec == XOR else p
    low, z = (1 << (8 * p.itemsize - 1)) - 1, p + 1
    v = np.where(b > low, b ^ low, b) + ((z >> 1) ^ -(z & 1))
    return np.where(v > low, v ^ low, v)


def describe(records: list[Record], digests: list[bytes], is_file: bool = False) -> bytes:
    """What sections 3.7 and 3.8 digest of some records. digests: whole."""
    parts = []
    for (name, dtype, shape, *_), digest in zip(records, digests, strict=True):
        kind = b"" if is_file else bytes((NAMES.index(dtype) + 1, len(shape)))
        dimensions = struct.pack(f"<{len(shape)}Q", *shape)
        parts += [struct.pack("<H", len(name.encode())), name.encode(), kind, dimensions, digest]
    return b"".join(parts)


class Nps:
    """A parsed file. Everything that header, footer and index show has been checked.

    base_nps: the file of this name in the same folder, of which a member of a bundle has need.
    """

    def __init__(self, data: bytes, base_nps: bytes = b"") -> None:
        self._data = memoryview(data)
        index, index_offset = self._open(base_nps)
        self.index = index
        bases, tensors, files, size, chunks, heap, metadata, *roots, zeros = HEAD.unpack_from(index)
        self.base_root, self.content_digest = roots
        check(max(bases, tensors) <= 1 << 20 and files <= 64, "I-COUNT", "too many records")
        sizes = (104 * bases, 128 * tensors, 128 * files, 56 * chunks, heap, metadata)
        ends = list(accumulate(sizes, initial=128))
        check(ends[-1] == len(index), "I-SIZE", f"the parts add up to {ends[-1]}")
        parts = [index[start:end] for start, end in pairwise(ends)]
        rows = [list(BASE.iter_unpack(parts[0])), *map(list, map(TENSOR.iter_unpack, parts[1:3]))]
        good = not any(zeros) and not any(any(row[3]) for row in rows[0])
        check(good, "I-RESERVED", "reserved bytes of the head or of a base record")
        rest = (row[12 if i == 0 else 17][size:] for i in range(3) for row in rows[i])
        check(size in (8, 32) and not any(map(any, rest)), "I-DIGESTS", f"of {size} bytes")
        self.base, *tables = parse_starts(bytes(parts[4]), rows, size)
        self._records, first = [], 0
        for i, base in enumerate((self.base, None)):
            for record, row in zip(tables[i], rows[i + 1], strict=True):
                self._records.append(parse_record(record, row, base, first))
                first = self._records[-1].chunks.stop
        self.tensors, self.files = self._records[:tensors], self._records[tensors:]
        if size == 32:
            origins = [self.base[t.base_index] if t.op == COPY else t for t in self.tensors]
            digests = [[r.digest for r in part] for part in (self.base, origins, self.files)]
            check(self._base_root(digests[0]) == roots[0], "I-ROOT", "of the base")
            check(self._content_digest(*digests[1:]) == roots[1], "I-ROOT", "of the content")
        self._chunk_table = parts[3]
        self._starts = chunk_starts(parts[3], self._records, index_offset)
        self.metadata = parse_metadata(bytes(parts[5]))

    def _base_root(self, digests: list[bytes]) -> bytes:
        return blake3(describe(self.base, digests)).digest()

    def _content_digest(self, tensors: list[bytes], files: list[bytes]) -> bytes:
        found = b"nps-content\n" + struct.pack("<I", len(tensors))
        found += describe(self.tensors, tensors) + struct.pack("<I", len(files))
        return blake3(found + describe(self.files, files, is_file=True)).digest()

    def _open(self, base_nps: bytes) -> tuple[memoryview, int]:
        """F, H and T rules, I-DIGEST and I-ZSTD; the index and where it starts."""
        data, size = self._data, len(self._data)
        check(size >= 160, "F-SIZE", f"{size} bytes")
        magic, *version, zeros, required, _, zeros1, crc = HEADER.unpack_from(data)
        check(magic == MAGIC, "H-MAGIC", "not an .nps file")
        check(crc == zlib.crc32(data[:60]), "H-CRC", "the header is damaged")
        check(version[0] == 1, "H-MAJOR", f"version {version[0]}.{version[1]}")
        check(required == 0, "H-FEATURE", f"required features {required:#x}")
        check(not any(zeros + zeros1), "H-RESERVED", "reserved bytes of the header")
        footer = FOOTER.unpack_from(data, size - 96)
        offset, stored, raw, stated, digest, *versions, how, zeros, more, known, crc, magic = footer
        check(magic == MAGIC[::-1], "T-MAGIC", "no footer: is the file cut short?")
        check(crc == zlib.crc32(data[size - 96 : size - 12]), "T-CRC", "the footer is damaged")
        check(versions == version, "T-VERSION", "header and footer state different versions")
        good = not any(zeros) and (how == 2 or not (more or any(known)))
        check(good, "T-RESERVED", "reserved bytes of the footer")
        check(stated == size, "T-SIZE", f"{stated} bytes stated, {size} found")
        good = 64 <= offset == size - 96 - stored and offset % 8 == 0
        check(good, "T-INDEX", f"an index of {stored} bytes at {offset}")
        good = (
            raw == stored if how == 0 else how > 2 or stored < raw <= 8 * stored + (1 << 20) + more
        )
        check(good and 128 <= raw <= 1 << 30, "T-INDEXSIZE", f"{raw} bytes stored in {stored}")
        check(how <= 2, "T-COMPRESSION", f"index_compression {how}")
        dictionary, whole = memoryview(b""), b""
        if how == 2:
            what = f"needs base.nps with an index of {more} bytes, BLAKE3 {known.hex()}..."
            try:
                dictionary = Nps(base_nps).index
            except Refused as refusal:
                raise Refused("T-DICTIONARY", f"{what}: {refusal}") from None
            whole = blake3(dictionary).digest()
            check((len(dictionary), whole[:8]) == (more, known), "T-DICTIONARY", what)
        index = data[offset : offset + stored]
        check(blake3(bytes(index) + whole).digest() == digest, "I-DIGEST", "the index is damaged")
        if how:
            index = memoryview(inflate(index, raw, "I-ZSTD", "index", dictionary))
        return index, offset

    def _chunks(
        self, record: Record, words: np.ndarray | None = None
    ) -> Iterator[tuple[slice, Kept, np.ndarray]]:
        """Each chunk's place in the tensor, the elements kept in it, and its payload.

        words: the base's, without which coded distances have no payload.
        """
        width, numel = WIDTHS[record.dtype], math.prod(record.shape)
        for i, number in enumerate(record.chunks, -1 if record.value_codec >= SIGNS else 0):
            what = f"{record.name}, chunk {i}" if i >= 0 else f"{record.name}, parameters"
            place = slice(i << record.chunk_log2, min((i + 1) << record.chunk_log2, numel))
            fields = CHUNK.unpack_from(self._chunk_table, number * CHUNK.size)
            mask_stored, mask_raw, nnz, codec, mask_z, planes_z, _, *planes, digest = fields
            start, padded = (int(at) for at in self._starts[number : number + 2])
            ends = list(accumulate((mask_stored, *planes[:width]), initial=start))
            check(not any(self._data[ends[-1] : padded]), "C-PADDING", what)
            found = blake3(self._data[start : ends[-1]])
            check(found.digest(8) == digest, "P-DIGEST", what)
            streams = []
            for j, (start, end) in enumerate(pairwise(ends)):
                stream = self._data[start:end]
                if (mask_z | planes_z << 1) >> j & 1:
                    stream = inflate(stream, nnz if j else mask_raw, "P-ZSTD", what)
                if j == 0 and codec == LEARNED:
                    code = np.frombuffer(stream, "<u4").tolist()
                    columns = matrix(record.shape)[1]
                    kept = np.array(decode_learned(code, place, columns, nnz, what), np.int64)
                elif j == 0 and i >= 0:
                    kept = decode_mask(codec, stream, place.stop - place.start, nnz, what)
                streams.append(np.frombuffer(stream, np.uint8))
            if i < 0:
                parameters = parse_parameters(record, streams[0], what)
            elif codec == CODED:
                yield place, *step(parameters, place, nnz, *streams[:2], what)
            elif record.value_codec == SIGNS:
                yield place, *draw(parameters, place, nnz, streams[1], what)
            elif record.value_codec == GRID:
                yield place, kept, np.zeros(0, np.float32)
            elif record.value_codec == LEVELS:
                yield place, kept, streams[1].view(np.int8).astype(np.float32) * parameters
            elif record.value_codec == CODED_ULP:
                payload = []
                tokens, low = bytes(streams[1]), bytes(streams[2])
                if words is None and nnz:
                    parse_contexts(tokens, 16 * width, what)
                elif nnz:
                    b = words[place][kept].tolist()
                    payload = decode_distances(record.dtype, tokens, low, b, what)
                yield place, kept, np.array(payload, f"<u{width}")
            else:
                yield place, kept, np.stack(streams[1:], axis=1).reshape(-1).view(f"<u{width}")

    def _content(self, record: Record, base: bytes) -> bytes:
        """A delta's or new tensor's bytes, compared with their digest."""
        if record.op == NEW:
            content = b"".join(payload for _, _, payload in self._chunks(record))
        else:
            words = np.frombuffer(base, f"<u{WIDTHS[record.dtype]}").copy()
            for place, kept, payload in self._chunks(record, words):
                part = words[place]
                part[kept] = apply_payload(record, part[kept], payload)
            content = words.tobytes()
        found = blake3(content).digest(len(record.digest))
        check(found == record.digest, "D-DIGEST", record.name)
        return content

    def verify(self, records: list[Record] | None = None) -> None:
        """Check everything that can be checked without the base."""
        for record in self._records if records is None else records:
            found = blake3()
            for _, _, payload in self._chunks(record):
                found.update(payload.tobytes())
            good = found.digest(len(record.digest)) == record.digest
            check(record.op != NEW or good, "D-DIGEST", record.name)

    def rebuild(self, base: BaseDict) -> dict[str, bytes]:
        """The fine-tune's tensors; base root, stored files and content are checked as well."""
        digests = []
        for name, dtype, shape, digest, *_ in self.base:
            found, found_shape, content = base.get(name, ("", (), b""))
            good = (found, tuple(found_shape)) == (dtype, shape)
            good = good and len(content) == math.prod(shape) * WIDTHS[dtype]
            digests.append(blake3(content).digest())
            if not good or not digests[-1].startswith(digest):
                raise WrongBase(f"{name} is missing, or has another dtype, shape or digest")
        if self._base_root(digests) != self.base_root:
            raise WrongBase("all together, the tensors have another base root")
        result = {}
        for tensor in self.tensors:
            old = b"" if tensor.op == NEW else base[self.base[tensor.base_index].name][2]
            result[tensor.name] = bytes(old) if tensor.op == COPY else self._content(tensor, old)
        files = [self._content(file, b"") for file in self.files if file.op == NEW]
        if len(files) == len(self.files):  # else some are the base's, which is not asked for them
            found = ([blake3(content).digest() for content in c] for c in (result.values(), files))
            check(self._content_digest(*found) == self.content_digest, "D-CONTENT", "all together")
        return result

    def read_file(self, name: str) -> bytes:
        """A stored side file; KeyError where there is none of this name."""
        return self._content({f.name: f for f in self.files if f.op == NEW}[name], b"")


def open_nps(path: str | Path) -> Nps:
    """A file, with base.nps beside it, if there is one."""
    beside = Path(path).with_name("base.nps")
    return Nps(Path(path).read_bytes(), beside.read_bytes() if beside.is_file() else b"")


def read_safetensors(path: str | Path) -> BaseDict:
    data = memoryview(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[start:][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def write_safetensors(path: str | Path, tensors: BaseDict) -> None:
    """Widest elements first, so that all are aligned. An existing file stays."""
    order = sorted(tensors.items(), key=lambda item: (-WIDTHS[item[1][0]], item[0]))
    header, at = {}, 0
    for name, (dtype, shape, content) in order:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + len(content))}
        at += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(content for _, (_, _, content) in order)


def main(command: str = "", path: str = "", *others: str) -> None:
    if (command, len(others)) not in (("list", 0), ("verify", 0), ("verify", 1), ("rebuild", 2)):
        raise ValueError("usage: list FILE | verify FILE [BASE] | rebuild FILE BASE OUT")
    nps = open_nps(path)
    if command == "list":
        print(nps.base_root.hex(), nps.content_digest.hex(), ascii(nps.metadata), sep="\n")
        for name, dtype, shape, _, op, codec, *_ in nps.tensors + nps.files:
            print(("copy", "delta", "new")[op - 1], codec, dtype, list(shape), ascii(name))
    elif command == "verify":
        nps.rebuild(read_safetensors(*others)) if others else nps.verify()
    else:
        base, out = others
        size = sum(math.prod(tensor.shape) * WIDTHS[tensor.dtype] for tensor in nps.tensors)
        if Path(out).exists() or size > shutil.disk_usage(Path(out).absolute().parent).free:
            raise OSError(f"{out} exists, or there is no space for {size} bytes")
        result = nps.rebuild(read_safetensors(base))
        write_safetensors(out, {t.name: (*t[1:3], result[t.name]) for t in nps.tensors})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (Refused, WrongBase, OSError, ValueError, LookupError, TypeError) as error:
        kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
        sys.exit(kind + ascii(str(error))[1:-1])  # no control characters for the terminal
