"""Files under 1 MB that ask for as much work as the rules allow: under 2 s, in little memory."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from nps_compress.codecs import (
    EncodedChunk,
    LearnedCodec,
    MaskCodec,
    ValueCodec,
    compress,
    decoding_work,
    distances_work,
    drawing_work,
    learning_work,
)
from nps_compress.dtypes import BY_NAME, DType
from nps_compress.entropy_coding import encode_magnitudes
from nps_compress.format import layout
from nps_compress.format.layout import Op
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.format.writer import NpsWriter, index_and_footer
from nps_compress.grid_codec import GridParameters
from nps_compress.mask_coding import Place
from nps_compress.rank_one import RankOne
from nps_compress.sign_codec import SignParameters, parameter_chunk

U8, BF16, F32, F64 = (BY_NAME[name] for name in ("U8", "BF16", "F32", "F64"))
LIMIT = 10**6


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def build(fill: Callable[[NpsWriter], list[BaseTensor]], padding: int, seed: int = 0) -> bytes:
    """A file; ``padding`` bytes of metadata that don't compress let the index shrink the more."""
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    writer.finish(fill(writer), {"x": base64.b64encode(noise(padding, seed)).decode()})
    return stream.getvalue()


def delta(writer: NpsWriter, dtype: DType, chunks: list[EncodedChunk], log2: int) -> list:
    writer.add_chunks(chunks)
    shape = (len(chunks) << log2,)
    values = ValueCodec.REPLACE
    writer.add_tensor(TensorEntry("t", dtype, shape, Op.DELTA, values, log2, 0, bytes(32)))
    return [BaseTensor("t", dtype, shape, bytes(32))]


def add_noise(writer: NpsWriter, size: int) -> None:
    """A new tensor that does not compress: what is stored sets how far the rest may expand."""
    data = noise(size)
    writer.add_chunks([EncodedChunk(size, MaskCodec.FULL, 0, False, b"", 0, (data,))])
    digest, values = blake3(data).digest(), ValueCodec.REPLACE
    writer.add_tensor(TensorEntry("noise", U8, (size,), Op.NEW, values, 20, None, digest))


def many_chunks(writer: NpsWriter) -> list[BaseTensor]:
    one = EncodedChunk(1, MaskCodec.GAP16, 2, False, b"\0\0", 0, (b"\1",))
    return delta(writer, U8, [one] * 52_000, 10)


def many_empty_chunks(writer: NpsWriter) -> list[BaseTensor]:
    empty = EncodedChunk(0, MaskCodec.EMPTY, 0, False, b"", 0, (b"",))
    return delta(writer, U8, [empty] * 95_000, 10)


def many_new_tensors(writer: NpsWriter) -> list[BaseTensor]:
    digest = blake3(b"\1").digest()
    one = EncodedChunk(1, MaskCodec.FULL, 0, False, b"", 0, (b"\1",))
    for number in range(24_000):
        writer.add_chunks([one])
        name, values = f"{number:05}", ValueCodec.REPLACE
        writer.add_tensor(TensorEntry(name, U8, (1,), Op.NEW, values, 10, None, digest))
    return []


def many_base_tensors(writer: NpsWriter) -> list[BaseTensor]:
    return [BaseTensor(f"{number:05}", U8, (1,), bytes(32)) for number in range(44_000)]


def large_planes(writer: NpsWriter) -> list[BaseTensor]:
    """One chunk of 2^24 elements of 8 bytes, all kept: 128 MiB from what is stored."""
    frame = compress(bytes(1 << 24), 19)
    full = EncodedChunk(1 << 24, MaskCodec.FULL, 0, False, b"", 255, (frame,) * 8)
    add_noise(writer, 850_000)
    return delta(writer, F64, [full] * 2, 24)


def dense_masks(writer: NpsWriter) -> list[BaseTensor]:
    """Bitmasks that keep all but one of 2^24 elements."""
    numel = 1 << 24
    bits = np.full(numel // 8, 255, np.uint8)
    bits[-1] = 127
    mask, plane = compress(bits.tobytes(), 19), compress(bytes(numel - 1), 19)
    chunk = EncodedChunk(numel - 1, MaskCodec.BITMASK, numel // 8, True, mask, 1, (plane,))
    add_noise(writer, 900_000)
    return delta(writer, U8, [chunk] * 14, 24)


def sparse_masks(writer: NpsWriter) -> list[BaseTensor]:
    """Bitmasks of 2 MiB that keep one element."""
    bits = np.zeros(1 << 21, np.uint8)
    bits[5] = 1
    mask = compress(bits.tobytes(), 19)
    chunk = EncodedChunk(1, MaskCodec.BITMASK, 1 << 21, True, mask, 0, (b"\1",))
    add_noise(writer, 900_000)
    return delta(writer, U8, [chunk] * 130, 24)


CASES = {
    "many chunks": (many_chunks, 480_000),
    "many empty chunks": (many_empty_chunks, 785_000),
    "many new tensors": (many_new_tensors, 720_000),
    "many base tensors": (many_base_tensors, 785_000),
    "large planes": (large_planes, 0),
    "dense masks": (dense_masks, 0),
    "sparse masks": (sparse_masks, 0),
}

MEASURE = """
import sys, time
from pathlib import Path
from nps_compress.errors import FormatError
from nps_compress.format.reader import NpsReader

def verify(path):
    with NpsReader(Path(path)) as reader:
        for entry in (*reader.tensors, *reader.files):
            reader.verify(entry)

def peak():  # ru_maxrss would begin with that of the process this one was forked from
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

verify(sys.argv[1])  # compiles, or loads what is compiled
before = peak()
start = time.process_time()
verify(sys.argv[2])
print(time.process_time() - start, peak() - before)
"""


# Beside a base of zeros, which takes no memory until it is read.
MEASURE_REBUILDING = MEASURE.replace(
    """    with NpsReader(Path(path)) as reader:
        for entry in (*reader.tensors, *reader.files):
            reader.verify(entry)
""",
    """    import numpy as np
    from nps_compress.reconstruct import Task
    with Task(path) as task:
        for entry in task.reader.tensors:
            task.rebuild_words(entry.name, np.zeros(entry.numel, entry.dtype.word))
""",
)
assert MEASURE_REBUILDING != MEASURE


def measured(small: Path, path: Path, script: str = MEASURE) -> tuple[float, float]:
    """Seconds of processor time and KiB that verifying ``path`` takes. small: of its kind."""
    arguments = [sys.executable, "-c", script, str(small), str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, kib = map(float, done.stdout.split())
    print(f"{path.stat().st_size:,} bytes, {seconds:.2f} s, {kib / 1024:.0f} MiB")
    return seconds, kib


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_work_is_bounded(tmp_path: Path, case: str) -> None:
    small, path = tmp_path / "small.nps", tmp_path / "x.nps"
    one = EncodedChunk(1, MaskCodec.BITMASK, 128, False, b"\1" + bytes(127), 0, (b"\1",))
    small.write_bytes(build(lambda writer: delta(writer, U8, [one], 10), 0))
    data = build(*CASES[case])
    assert 500_000 < len(data) < LIMIT
    path.write_bytes(data)
    seconds, kib = measured(small, path)
    assert seconds < 2
    assert kib < 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_work_of_a_bundle_is_bounded(tmp_path: Path) -> None:
    """Two files, each under 1 MB, whose indices shrink as much as they may."""
    bases = [BaseTensor(f"{number:05}", U8, (1,), bytes(32)) for number in range(20_000)]

    def identity(writer: NpsWriter) -> list[BaseTensor]:
        for number, tensor in enumerate(bases):
            copied = tensor.name, U8, (1,), Op.COPY, ValueCodec.NONE, 0, number, bytes(32)
            writer.add_tensor(TensorEntry(*copied))
        return bases

    def member(writer: NpsWriter) -> list[BaseTensor]:
        identity(writer)
        writer.add_chunks([EncodedChunk(0, MaskCodec.EMPTY, 0, False, b"", 0, (b"",))] * 123_000)
        shape, values = (123_000 << 10,), ValueCodec.REPLACE
        writer.add_tensor(TensorEntry("t", U8, shape, Op.DELTA, values, 10, len(bases), bytes(32)))
        return [*bases, BaseTensor("t", U8, shape, bytes(32))]

    small, path = tmp_path / "small" / "x.nps", tmp_path / "x.nps"
    small.parent.mkdir()
    small.write_bytes(build(lambda writer: [], 300))
    base = tmp_path / "base.nps"
    base.write_bytes(build(identity, 780_000))
    path.write_bytes(build(member, 780_000, seed=1))
    with NpsReader(base) as reader:
        dictionary = reader.raw_index
    with NpsReader(path) as reader:
        raw, offset = reader.raw_index, reader.index_offset
    path.write_bytes(path.read_bytes()[:offset] + index_and_footer(raw, offset, dictionary))
    assert path.read_bytes()[-28] == 2
    assert len(raw) > 0.95 * layout.max_index_bytes(path.stat().st_size, len(dictionary))
    assert all(500_000 < each.stat().st_size < LIMIT for each in (base, path))
    seconds, kib = measured(small, path)
    assert seconds < 2
    assert kib < 1 << 18


def nothing_drawn(sizes: RankOne, numel: int) -> tuple[ValueCodec, bytes, EncodedChunk]:
    known = SignParameters(1, 1e-30, (-(1 << 15),), (1e-30,), (1.0,), sizes, sizes)
    chunk = EncodedChunk(0, MaskCodec.DRAWN, 0, False, b"", 0, (), drawing_work(numel))
    return ValueCodec.SIGNS, known.to_bytes(), chunk


def next_to_nothing_coded(sizes: RankOne, numel: int) -> tuple[ValueCodec, bytes, EncodedChunk]:
    magnitudes = np.zeros(numel, np.int16)
    magnitudes[-1] = 1
    stream = encode_magnitudes(magnitudes, np.zeros(numel, np.int8))
    work = decoding_work(numel, 1)
    chunk = EncodedChunk(1, MaskCodec.CODED, len(stream), False, stream, 0, (b"\0",), work)
    return ValueCodec.GRID, GridParameters(1.0, 0, sizes, sizes).to_bytes(), chunk


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", [nothing_drawn, next_to_nothing_coded])
def test_what_elements_count_as_is_what_they_take(tmp_path: Path, kind: Callable) -> None:
    """C-EXPANSION allows 64 MiB beside 256 times a file; each byte of it takes little time."""

    def file(rows: int, columns: int, log2: int) -> bytes:
        sizes = RankOne(np.zeros(rows, np.int16), np.zeros(columns, np.int16))
        codec, known, chunk = kind(sizes, min(1 << log2, rows * columns))

        def fill(writer: NpsWriter) -> list[BaseTensor]:
            chunks = [chunk] * (-(-rows * columns >> log2))
            writer.add_chunks([parameter_chunk(known), *chunks])
            shape = (rows, columns)
            writer.add_tensor(TensorEntry("t", BF16, shape, Op.DELTA, codec, log2, 0, bytes(32)))
            return [BaseTensor("t", BF16, shape, bytes(32))]

        return build(fill, 0)

    small, path = tmp_path / "small.nps", tmp_path / "x.nps"
    small.write_bytes(file(8, 16, 10))
    numel = 1 << 26
    path.write_bytes(file(numel >> 13, 1 << 13, 22))
    assert path.stat().st_size < 5_000
    seconds, kib = measured(small, path)
    counted = drawing_work(numel) if kind is nothing_drawn else decoding_work(numel, 0)
    print(f"{1e9 * seconds / counted:.1f} ns a byte")
    assert seconds < (300e-9 if kind is nothing_drawn else 150e-9) * counted
    assert kib < 1 << 18


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("columns", [1, 1 << 11, 1 << 26])
def test_learned_masks_count_as_what_they_take(tmp_path: Path, columns: int) -> None:
    """Masks of next to no bytes that keep one of 2^24 elements; each byte takes under 150 ns."""

    def file(numel: int, columns: int, log2: int) -> bytes:
        size = min(1 << log2, numel)
        last = np.array([size - 1], np.uint32)
        stream = LearnedCodec.encode(last, size, Place(0, columns))
        work = learning_work(size)
        chunk = EncodedChunk(1, MaskCodec.LEARNED, len(stream), False, stream, 0, (b"\1",), work)

        def fill(writer: NpsWriter) -> list[BaseTensor]:
            writer.add_chunks([chunk] * (numel // size))
            shape, values = (numel // columns, columns), ValueCodec.REPLACE
            writer.add_tensor(TensorEntry("t", U8, shape, Op.DELTA, values, log2, 0, bytes(32)))
            return [BaseTensor("t", U8, shape, bytes(32))]

        return build(fill, 0)

    small, path = tmp_path / "small.nps", tmp_path / "x.nps"
    small.write_bytes(file(1024, 32, 10))
    numel = 1 << 26
    path.write_bytes(file(numel, columns, 24))
    assert path.stat().st_size < 5_000
    seconds, kib = measured(small, path)
    print(f"{1e9 * seconds / learning_work(numel):.1f} ns a byte")
    assert seconds < 150e-9 * learning_work(numel)
    assert kib < 1 << 18


def distances_of_no_bits(numel: int) -> EncodedChunk:
    """All kept, one token with a share of 4096: nothing is stored for an element."""
    table = bytes([1, 0, 0, 1]) + struct.pack("<H", 4096)
    tokens = table + struct.pack("<4I", *[1 << 16] * 4)
    work = distances_work(len(tokens), 4, numel)
    return EncodedChunk(numel, MaskCodec.FULL, 0, False, b"", 0, (tokens, b""), work)


def distances_of_64_contexts(_: int) -> EncodedChunk:
    """One kept element, and as many tables as fit."""
    contexts = b"".join(bytes([n, 0, 1]) + struct.pack("<H", 4096) for n in range(64))
    tokens = b"\x40" + contexts + struct.pack("<4I", *[1 << 16] * 4)
    work = distances_work(len(tokens), 4, 1)
    return EncodedChunk(1, MaskCodec.GAP16, 2, False, b"\0\0", 0, (tokens, b""), work)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("make", "log2", "count"),
    [
        (distances_of_no_bits, 24, 1),
        (distances_of_no_bits, 10, 11_500),
        (distances_of_64_contexts, 10, 2_000),
    ],
)
def test_distances_count_as_what_they_take(
    tmp_path: Path, make: Callable[[int], EncodedChunk], log2: int, count: int
) -> None:
    """Of a file under 1 MB; each byte that they count as takes under 30 ns."""

    def file(log2: int, count: int) -> bytes:
        chunk = make(1 << log2)

        def fill(writer: NpsWriter) -> list[BaseTensor]:
            writer.add_chunks([chunk] * count)
            shape, values = (count << log2,), ValueCodec.CODED_ULP
            writer.add_tensor(TensorEntry("t", F32, shape, Op.DELTA, values, log2, 0, bytes(32)))
            return [BaseTensor("t", F32, shape, bytes(32))]

        return build(fill, 0)

    small, path = tmp_path / "small.nps", tmp_path / "x.nps"
    small.write_bytes(file(10, 1))
    path.write_bytes(file(log2, count))
    assert path.stat().st_size < LIMIT
    chunk = make(1 << log2)
    counted = count * (chunk.raw_bytes + chunk.work)
    assert counted > 0.7 * layout.EXPANSION_SLACK
    seconds, kib = measured(small, path, MEASURE_REBUILDING)
    print(f"{1e9 * seconds / counted:.1f} ns a byte")
    assert seconds < 30e-9 * counted
    assert kib < 1 << 19


def test_one_step_further_is_refused(tmp_path):
    """The bounds are the format's, not this reader's luck: see the vectors of C-EXPANSION and
    T-INDEXSIZE; the writer, asked for more, stores what it must without zstd."""
    frame = compress(bytes(1 << 24), 19)
    full = EncodedChunk(1 << 24, MaskCodec.FULL, 0, False, b"", 255, (frame,) * 8)
    data = build(lambda writer: delta(writer, F64, [full], 24), 0)
    assert len(data) > 1 << 26
    assert layout.max_raw_bytes(len(data)) > 1 << 27
