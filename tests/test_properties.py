"""Properties over dtypes, ranks, densities, chunk sizes, codecs, bit patterns, and damage."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import minimal_reader
import targets
from nps_compress import codecs
from nps_compress.atomic import atomic_file
from nps_compress.codecs import EncodedChunk, MaskCodec, ValueCodec
from nps_compress.dtypes import DTYPES, PRUNABLE, DType, Words, digest
from nps_compress.errors import OutputExistsError
from nps_compress.format import layout
from nps_compress.format.layout import Op
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.format.writer import NpsWriter
from nps_compress.grid_codec import GridParameters, encode_grid
from nps_compress.mask_coding import Place
from nps_compress.rank_one import LARGEST, ZERO, RankOne, rows_and_columns
from nps_compress.reconstruct import Task
from nps_compress.sign_codec import parameter_chunk

VALID = ROOT / "format_spec" / "vectors" / "valid"
SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=4),
    st.lists(st.integers(1, 3), min_size=8, max_size=8),
    st.lists(st.integers(0, 5000), min_size=1, max_size=1),
)


@st.composite
def words(draw: st.DrawFn, dtype: DType, numel: int) -> Words:
    """Random bits, or few bit patterns: zeros, ones, the signs and edges of each width."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        return np.frombuffer(rng.bytes(numel * dtype.itemsize), dtype.word)
    top = 1 << (8 * dtype.itemsize - 1)
    edges = [0, 1, top - 1, top, top + 1, 2 * top - 1]
    chosen = draw(st.lists(st.sampled_from(edges), min_size=1, max_size=4))
    return np.array(chosen, dtype.word)[rng.integers(0, len(chosen), numel)]


@st.composite
def deltas(draw: st.DrawFn) -> tuple[DType, list[int], Words, Words]:
    """A tensor before and after: dtype, shape, words."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(SHAPES)
    numel = math.prod(shape)
    before, other = draw(words(dtype, numel)), draw(words(dtype, numel))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]))
    return dtype, shape, before, np.where(rng.random(numel) < density, other, before)


def encode(
    before: Words,
    after: Words,
    dtype: DType,
    mask: MaskCodec,
    values: ValueCodec,
    level: int,
    place: Place,
) -> EncodedChunk:
    """One chunk by the mask codec asked for, where it can hold this mask."""
    chunk = codecs.encode_chunk(before, after, dtype, values, max(level, 1))
    chunk = chunk if level else chunk.stored_raw()
    assert chunk.planes_compressed == 0 or values is not ValueCodec.CODED_ULP
    if chunk.mask_codec in (MaskCodec.EMPTY, MaskCodec.FULL):
        return chunk
    positions = np.flatnonzero(before != after).astype(np.uint32)
    if mask is MaskCodec.LEARNED:
        raw, level = codecs.LearnedCodec.encode(positions, before.size, place), 0
    else:
        raw = codecs.MASK_CODECS[mask].encode(positions, before.size)
    stored, smaller = codecs.compress_if_smaller(raw, level) if level else (raw, False)
    return EncodedChunk(
        chunk.nnz, mask, len(raw), smaller, stored, chunk.planes_compressed, chunk.planes
    )


@settings(deadline=None, max_examples=300)
@given(
    delta=deltas(),
    mask=st.sampled_from(list(codecs.MASK_CODECS)),
    values=st.sampled_from([ValueCodec.REPLACE, *codecs.EXACT_CODECS]),
    chunk_log2=st.integers(layout.MIN_CHUNK_LOG2, layout.MAX_CHUNK_LOG2),
    level=st.sampled_from([0, 1, 3, 19]),
)
def test_round_trip(tmp_path_factory, delta, mask, values, chunk_log2, level):
    dtype, shape, before, after = delta
    if values is ValueCodec.CODED_ULP and dtype.name not in PRUNABLE:
        values = ValueCodec.ULP
    if values is ValueCodec.ULP and not dtype.is_float:
        values = ValueCodec.XOR
    size = 1 << chunk_log2
    parts = [slice(start, start + size) for start in range(0, before.size, size)]
    base = [BaseTensor("w", dtype, tuple(shape), digest(before))]
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    columns = rows_and_columns(tuple(shape))[1]
    for p in parts:
        place = Place(p.start, columns)
        writer.add_chunks([encode(before[p], after[p], dtype, mask, values, level, place)])
    writer.add_tensor(
        TensorEntry("w", dtype, tuple(shape), Op.DELTA, values, chunk_log2, 0, digest(after))
    )
    writer.add_chunks(codecs.encode_chunk(None, after[p], dtype, ValueCodec.REPLACE) for p in parts)
    writer.add_tensor(
        TensorEntry(
            "x", dtype, tuple(shape), Op.NEW, ValueCodec.REPLACE, chunk_log2, None, digest(after)
        )
    )
    writer.finish(base, {})
    path = tmp_path_factory.getbasetemp() / "property.nps"
    path.write_bytes(stream.getvalue())
    with Task(path) as task:
        for name, source in (("w", before.copy()), ("x", None)):
            assert np.array_equal(task.rebuild_words(name, source), after)
        for entry in task.reader.tensors:
            task.reader.verify(entry)
        content = task.reader.content_digest
    minimal = minimal_reader.Nps(stream.getvalue())
    source = {"w": (dtype.name, tuple(shape), before.tobytes())}
    assert minimal.rebuild(source) == {"w": after.tobytes(), "x": after.tobytes()}
    # However it is encoded, it is the same content.
    assert minimal.content_digest == content
    other = io.BytesIO()
    again = NpsWriter(other)
    for name in "wx":
        again.add_chunks(
            codecs.encode_chunk(None, after[start : start + 1024], dtype, ValueCodec.REPLACE)
            for start in range(0, after.size, 1024)
        )
        again.add_tensor(
            TensorEntry(
                name, dtype, tuple(shape), Op.NEW, ValueCodec.REPLACE, 10, None, digest(after)
            )
        )
    again.finish([], {"tool": "another"})
    assert minimal_reader.Nps(other.getvalue()).content_digest == content


@st.composite
def factors(draw: st.DrawFn, rows: int, columns: int, may_be_zero: bool) -> RankOne:
    """Exponents near each other, or of all that are allowed; some of size 0."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = draw(st.sampled_from([0, 3, LARGEST]))
    found = [rng.integers(-most, most + 1, size).astype(np.int16) for size in (rows, columns)]
    if may_be_zero:
        for each in found:
            each[rng.random(each.size) < draw(st.sampled_from([0, 0.1, 1]))] = ZERO
    return RankOne(*found)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_round_trip_of_grids(tmp_path_factory, data):
    """Any words, factors, steps and integers, by the package and by the minimal reader."""
    dtype = data.draw(st.sampled_from([dtype for dtype in DTYPES if dtype.name in PRUNABLE]))
    shape = tuple(data.draw(SHAPES))
    numel, (rows, columns) = math.prod(shape), rows_and_columns(shape)
    before = data.draw(words(dtype, numel))
    known = GridParameters(
        data.draw(st.sampled_from([1e-3, 1 / 3, 1.0, 1e-45, 1e30, 1e300])),
        data.draw(st.sampled_from([-(1 << 15), -60, -5, 0, 5, (1 << 15) - 1])),
        data.draw(factors(rows, columns, may_be_zero=True)),
        data.draw(factors(rows, columns, may_be_zero=False)),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mean = data.draw(st.sampled_from([1e-9, 0.02, 1.0, 30.0, 1e4]))
    sizes = np.minimum(np.floor(rng.exponential(mean, numel) + rng.random(numel)), 32767)
    levels = (sizes * rng.choice([-1, 1], numel)).astype(np.int16)
    levels[known.contexts(0, numel) < 0] = 0
    log2 = data.draw(st.integers(layout.MIN_CHUNK_LOG2, layout.MAX_CHUNK_LOG2))
    chunks, after = [parameter_chunk(known.to_bytes())], before.copy()
    for start in range(0, numel, 1 << log2):
        part = slice(start, start + (1 << log2))
        chunks.append(encode_grid(known, start, levels[part]))
        positions = np.flatnonzero(levels[part]).astype(np.uint32)
        known.apply(start, positions, levels[part][positions], before[part], after[part], dtype)
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    writer.add_chunks(chunks)
    writer.add_tensor(
        TensorEntry("w", dtype, shape, Op.DELTA, ValueCodec.GRID, log2, 0, digest(after))
    )
    writer.finish([BaseTensor("w", dtype, shape, digest(before))], {})
    path = tmp_path_factory.getbasetemp() / "grid.nps"
    path.write_bytes(stream.getvalue())
    with Task(path) as task:
        assert np.array_equal(task.rebuild_words("w", before.copy()), after)
        (entry,) = task.reader.tensors
        task.reader.verify(entry)
        assert task.reader.nnz(entry) == np.count_nonzero(levels)
    minimal = minimal_reader.Nps(stream.getvalue())
    assert minimal.rebuild({"w": (dtype.name, shape, before.tobytes())}) == {"w": after.tobytes()}


# -- hostile fields with every checksum made right ------------------------------------------------

SMALL = [
    path.read_bytes()
    for path in sorted(VALID.glob("*.nps"))
    if path.stat().st_size < 20_000 and path.read_bytes()[-28] == 0  # an index that is raw
]


def regions(data: bytes) -> list[tuple[int, np.dtype]]:
    """Where each record of a file with a raw index lies, and what it is."""
    footer = np.frombuffer(data[-96:], layout.FOOTER)[0]
    place = int(footer["index_offset"])
    head = np.frombuffer(data, layout.INDEX_HEAD, 1, place)[0]
    found = [(0, layout.HEADER), (len(data) - 96, layout.FOOTER), (place, layout.INDEX_HEAD)]
    place += layout.INDEX_HEAD.itemsize
    for field, dtype in (
        ("base_records", layout.BASE_RECORD),
        ("tensor_records", layout.TENSOR_RECORD),
        ("file_records", layout.TENSOR_RECORD),
        ("chunk_records", layout.CHUNK_RECORD),
    ):
        for _ in range(int(head[field])):
            found.append((place, dtype))
            place += dtype.itemsize
    return found


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A valid vector with one to three integers set to what they should not be."""
    data = bytearray(draw(st.sampled_from(SMALL)))
    places = regions(bytes(data))
    for _ in range(draw(st.integers(1, 3))):
        start, record = draw(st.sampled_from(places))
        name = draw(st.sampled_from(record.names))
        dtype, offset = record.fields[name][:2]
        shape = dtype.shape or (1,)
        width = dtype.base.itemsize if dtype.base.kind == "u" else 1
        position = start + offset + width * draw(st.integers(0, shape[0] - 1))
        old = int.from_bytes(data[position : position + width], "little")
        neighbour = int.from_bytes(data[position + width : position + 2 * width], "little")
        most = (1 << 8 * width) - 1
        values = [0, 1, 2, most, most - 1, most >> 1, (most >> 1) + 1, old + 1, old - 1, neighbour]
        value = draw(st.sampled_from(values)) & most
        data[position : position + width] = value.to_bytes(width, "little")
    return targets.repaired(bytes(data), draw(st.sampled_from([1, 3, 7, 15, 31])))


@settings(deadline=None, max_examples=1500)
@given(data=hostile())
def test_hostile_fields(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "hostile.nps"
    path.write_bytes(data)
    targets.compare_readers(path, data)


def test_hostile_fields_reach_the_rules_behind_the_checksums(tmp_path):
    """One deterministic sweep: every field of every record of one file, set to all ones."""
    data = (VALID / "side-files.nps").read_bytes()
    rules = set()
    for start, record in regions(data):
        for name in record.names:
            dtype, offset = record.fields[name][:2]
            changed = bytearray(data)
            changed[start + offset : start + offset + dtype.itemsize] = b"\xff" * dtype.itemsize
            for flags in (1, 15, 31):
                file = targets.repaired(bytes(changed), flags)
                path = tmp_path / "x.nps"
                path.write_bytes(file)
                rules.add(targets.compare_readers(path, file)[1])
    assert len(rules) > 25, rules


# -- a writer that dies ----------------------------------------------------------------------------

KILLER = """
import os, signal, sys
from pathlib import Path
from nps_compress.atomic import atomic_file

out, new, step = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3])

class Dying:
    # Passes bytes on one by one and dies when `left` of them have been written.
    def __init__(self, stream, left):
        self.stream, self.left = stream, left
    def write(self, data):
        self.stream.write(data[: self.left])
        if len(data) >= self.left:
            self.stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= len(data)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def child(point):
    if point == "sync":
        os.fsync = die
    if point == "replace":
        Path.replace = die
    if point == "replaced":
        replace = Path.replace
        Path.replace = lambda *a: (replace(*a), die())
    with atomic_file(out, force=True) as stream:
        dying = Dying(stream, point if isinstance(point, int) else len(new) + 1)
        for start in range(0, len(new), 7):
            dying.write(new[start : start + 7])
    os._exit(0)

old = b"the old file"
for point in [*range(1, len(new) + 1, step), "sync", "replace", "replaced", "never"]:
    out.write_bytes(old)
    pid = os.fork()
    if pid == 0:
        child(point)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) == (point != "never"), point
    content = out.read_bytes()
    if point in ("sync", "replace"):  # what is synced, and put in place, is the whole file
        (partial,) = out.parent.glob(".*.partial")
        assert partial.read_bytes() == new, point
    assert content == (new if point in ("replaced", "never") else old), point
    for left in out.parent.glob(".*.partial"):
        left.unlink()
print("ok")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_writer_killed_at_any_byte_leaves_the_old_file(tmp_path):
    new = VALID / "side-files.nps"
    folder = tmp_path / "out"
    folder.mkdir()
    arguments = [str(folder / "t.nps"), str(new), "1"]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True
    )
    assert done.stdout == "ok\n", done.stderr


def test_file_then_folder_are_synced(tmp_path, monkeypatch):
    synced = []
    fsync, replace = os.fsync, Path.replace

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def put(source: Path, target: Path) -> Path:
        synced.append("put in place")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", put)
    with atomic_file(tmp_path / "t.nps") as stream:
        stream.write(b"x")
    assert synced[0].endswith(".partial")
    assert synced[1:] == ["put in place", tmp_path.name]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    def write() -> None:
        with atomic_file(tmp_path / "t.nps") as stream:
            stream.write(b"new")
            (tmp_path / "t.nps").write_bytes(b"theirs")

    with pytest.raises(OutputExistsError):
        write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"theirs"]


def test_an_unfinished_file_is_refused_at_any_byte(tmp_path):
    """What a writer leaves that wrote in place, or a copy that was cut off."""
    data = (VALID / "mask-codec-of-each-chunk.nps").read_bytes()
    for size in range(len(data)):
        path = tmp_path / "x.nps"
        path.write_bytes(data[:size])
        outcome = targets.compare_readers(path, data[:size])
        assert outcome[0] == "refused"
        path.write_bytes(data[:size] + bytes(len(data) - size))
        if data[size:] != bytes(len(data) - size):
            assert targets.package_outcome(path)[0] == "refused"
