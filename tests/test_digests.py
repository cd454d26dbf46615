"""Whole and short digests: the same roots, and what a reader notices by which of them."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import minimal_reader
import nps_compress
from nps_compress import BaseMismatchError, FormatError
from nps_compress.cli import main
from nps_compress.codecs import ValueCodec, decompress, encode_chunk
from nps_compress.dtypes import BY_NAME, digest
from nps_compress.format import layout, writer
from nps_compress.format.layout import Op
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.format.writer import NpsWriter

U16 = BY_NAME["U16"]
VECTORS = ROOT / "format_spec" / "vectors"
SHORT, WHOLE = 0.0, float("inf")  # the share of a file that whole digests may take

Tensors = dict[str, np.ndarray]


def write(path: Path, base: Tensors, tuned: Tensors, files: dict[str, bytes], share: float) -> None:
    """A file of 16-bit tensors: copied where equal, else changed or, without a base tensor, new."""
    stream = io.BytesIO()
    out = NpsWriter(stream)
    names = sorted(base, key=str.encode)
    for name in sorted(tuned, key=str.encode):
        after, before = tuned[name], base.get(name)
        op, codec, log2, chunks = Op.DELTA, ValueCodec.XOR, 10, []
        if before is None or before.shape != after.shape:
            op, codec, before = Op.NEW, ValueCodec.REPLACE, None
        elif np.array_equal(before, after):
            op, codec, log2 = Op.COPY, ValueCodec.NONE, 0
        if op is not Op.COPY and after.size:
            chunks = [encode_chunk(before, after, U16, codec)]
        out.add_chunks(chunks)
        index = None if op is Op.NEW else names.index(name)
        entry = TensorEntry(name, U16, after.shape, op, codec, log2, index, digest(after))
        out.add_tensor(entry)
    for name, data in sorted(files.items()):
        out.add_file(name, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_DIGESTS_SHARE", share)
        out.finish([BaseTensor(n, U16, base[n].shape, digest(base[n])) for n in names], {})
    path.write_bytes(stream.getvalue())


def index_of(data: bytes) -> tuple[bytearray, int]:
    """The index, decompressed, and where it starts."""
    start, stored, raw = struct.unpack_from("<3Q", data, len(data) - 96)
    index = data[start : start + stored]
    return bytearray(decompress(index, raw) if data[-28] else index), start


def with_head(path: Path, **fields: Any) -> None:
    """Set fields of the index head, and make every checksum right again."""
    data = path.read_bytes()
    index, start = index_of(data)
    head = np.frombuffer(index, layout.INDEX_HEAD, 1)
    for name, value in fields.items():
        head[0][name] = value
    sizes = struct.pack("<4Q", start, len(index), len(index), start + len(index) + 96)
    footer = sizes + blake3(index).digest() + data[-32:-28] + bytes(16)
    crc = struct.pack("<I", zlib.crc32(footer))
    path.write_bytes(data[:start] + index + footer + crc + data[-8:])


def digests_in(path: Path) -> tuple[int, list[bytes]]:
    """How many bytes of a digest records hold, and those of base, tensors and files, with rest."""
    index, _ = index_of(path.read_bytes())
    base, tensors, files, size = struct.unpack_from("<4I", index)
    rows = [(128 + 104 * i, 72) for i in range(base)]
    rows += [(128 + 104 * base + 128 * i, 80) for i in range(tensors + files)]
    return size, [bytes(index[row + at : row + at + 32]) for row, at in rows]


names = st.sampled_from(["a", "b", "c", "layer.0", "\u00e9"])
arrays = st.lists(st.integers(0, 3), max_size=5).map(lambda words: np.array(words, np.uint16))
tables = st.dictionaries(names, arrays, max_size=4)
contents = st.dictionaries(st.sampled_from(["config.json", "x.txt"]), st.binary(max_size=9))


def described(tensors: Tensors) -> bytes:
    """What sections 3.7 and 3.8 of SPEC.md say of tensors."""
    parts = []
    for name in sorted(tensors, key=str.encode):
        raw, words = name.encode(), tensors[name]
        typed = struct.pack("<BBQ", 4, 1, words.size)
        digested = blake3(words.tobytes()).digest()
        parts.append(struct.pack("<H", len(raw)) + raw + typed + digested)
    return b"".join(parts)


@settings(max_examples=60, deadline=None)
@given(tables, tables, contents)
def test_short_and_whole_digests_have_the_same_roots(base, tuned, files):
    content = b"nps-content\n" + struct.pack("<I", len(tuned)) + described(tuned)
    content += struct.pack("<I", len(files))
    for name, data in sorted(files.items()):
        content += struct.pack("<H", len(name)) + name.encode()
        content += struct.pack("<Q", len(data)) + blake3(data).digest()
    wanted = blake3(described(base)).digest(), blake3(content).digest()
    with tempfile.TemporaryDirectory() as folder:
        held = []
        for name, share in (("short", SHORT), ("whole", WHOLE)):
            path = Path(folder) / f"{name}.nps"
            write(path, base, tuned, files, share)
            with NpsReader(path) as reader:
                assert (reader.base_root, reader.content_digest) == wanted
                for entry in (*reader.tensors, *reader.files):
                    reader.verify(entry)
            held.append(digests_in(path))
            nps = minimal_reader.Nps(path.read_bytes())
            assert (nps.base_root, nps.content_digest) == wanted
            full = {n: ("U16", words.shape, words.tobytes()) for n, words in base.items()}
            rebuilt = nps.rebuild(full)
            assert rebuilt == {n: words.tobytes() for n, words in tuned.items()}
        (short_bytes, short), (whole_bytes, whole) = held
        assert whole_bytes == 32
        assert short_bytes == (8 if base or tuned else 32)  # none would be shorter for it
        if base or tuned:
            assert short == [field[:8] + bytes(24) for field in whole]


def test_whole_digests_take_a_percent_at_most():
    """Of the header and the chunks, with one tensor of the base and one of the fine-tune."""
    found = []
    for size in (6400 - 64, 6400 - 64 - 8):
        stream = io.BytesIO()
        out = NpsWriter(stream)
        words = np.frombuffer(np.random.default_rng(0).bytes(size), np.uint16)
        out.add_chunks([encode_chunk(None, words, U16, ValueCodec.REPLACE)])
        shape, log2 = words.shape, 12
        out.add_tensor(
            TensorEntry("w", U16, shape, Op.NEW, ValueCodec.REPLACE, log2, None, digest(words))
        )
        out.finish([BaseTensor("w", U16, shape, digest(words))], {})
        found.append(stream.getvalue())
    sizes = []
    for data in found:
        index, start = index_of(data)
        sizes.append((start, struct.unpack_from("<I", index, 12)[0]))
    assert sizes == [(6400, 32), (6392, 8)]


@pytest.mark.parametrize(
    ("copies", "alike", "digest_bytes", "compression"),
    [(4_000, False, 8, 1), (7_000, False, 32, 1), (7_000, True, 8, 0)],
)
def test_an_index_that_shrinks_too_far(copies, alike, digest_bytes, compression):
    """Whole digests hold it up, and where even these don't it is stored as it is."""
    rng = np.random.default_rng(0)
    digests = [bytes(32) if alike else rng.bytes(32) for _ in range(copies)]
    table = [BaseTensor(f"{i:06}", U16, (1,), found) for i, found in enumerate(digests)]
    stream = io.BytesIO()
    out = NpsWriter(stream)
    for number, tensor in enumerate(table):
        known = TensorEntry(
            tensor.name, U16, (1,), Op.COPY, ValueCodec.NONE, 0, number, tensor.digest
        )
        out.add_tensor(known)
    out.finish(table, {})
    data = stream.getvalue()
    index, _ = index_of(data)
    assert (struct.unpack_from("<I", index, 12)[0], data[-28]) == (digest_bytes, compression)
    minimal_reader.Nps(data)  # accepts it


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a file with short digests of a delta, a copy, a new tensor and a side file."""
    base = {name: np.arange(50, dtype=np.uint16) + i for i, name in enumerate("abc")}
    tuned = {"a": base["a"] ^ np.uint16(5), "b": base["b"], "n": base["a"][:7]}
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    path = tmp_path / "t.nps"
    write(path, base, tuned, {"config.json": b"{}"}, SHORT)
    assert digests_in(path)[0] == 8
    return folder, path


def unpacked(base: Path, task: Path) -> Path:
    return nps_compress.unpack(base, task, task.parent / "out", force=True).path


def other(found: bytes) -> np.ndarray:
    """A digest that differs in its last bit."""
    return np.frombuffer(found[:-1] + bytes([found[-1] ^ 1]), np.uint8)


class TestRoots:
    """What the start of each digest does not show."""

    def test_right_ones(self, files):
        base, task = files
        report = nps_compress.verify(base, task)
        assert nps_compress.inspect(task)["content_digest"] == report.content_digest
        said = CliRunner().invoke(main, ["inspect", str(task)]).stdout
        assert f"content digest {report.content_digest}\n" in said
        assert (unpacked(base, task) / "config.json").read_text() == "{}"

    def test_another_content_digest(self, files):
        base, task = files
        with NpsReader(task) as reader:
            with_head(task, content_digest=other(reader.content_digest))
        nps_compress.verify(None, task)  # single tensors don't show it
        for run in (nps_compress.verify, unpacked):
            with pytest.raises(FormatError) as caught:
                run(base, task)
            assert caught.value.rule == "D-CONTENT"
            assert caught.value.path == task
        assert not (task.parent / "out").exists()

    def test_another_base_root(self, files):
        base, task = files
        with NpsReader(task) as reader:
            with_head(task, base_root=other(reader.base_root))
        with pytest.raises(BaseMismatchError, match="one of the tensors has other values"):
            nps_compress.verify(base, task)
        unpacked(base, task)  # what it needs of the base is right, or D-CONTENT would show

    def test_of_a_base_whose_digests_only_begin_alike(self, files):
        """Two faults, of which the base is the one to name."""
        base, task = files
        with NpsReader(task) as reader:
            roots = reader.base_root, reader.content_digest
        with_head(task, base_root=other(roots[0]), content_digest=other(roots[1]))
        for run in (nps_compress.verify, unpacked):
            with pytest.raises(BaseMismatchError):
                run(base, task)

    @pytest.mark.parametrize("root", ["base_root", "content_digest"])
    def test_of_whole_digests_are_checked_when_a_file_is_opened(self, tmp_path, root):
        words = {"w": np.arange(9, dtype=np.uint16)}
        path = tmp_path / "t.nps"
        write(path, words, words, {}, WHOLE)
        with NpsReader(path) as reader:
            with_head(path, **{root: other(getattr(reader, root))})
        with pytest.raises(FormatError) as caught:
            NpsReader(path)
        assert caught.value.rule == "I-ROOT"

    def test_files_of_the_base_that_nobody_writes(self, tmp_path):
        """Their digests are unknown, so that nothing can be said of all together."""
        task = VECTORS / "valid" / "digests-short-with-files-of-the-base.nps"
        nps = minimal_reader.Nps(task.read_bytes())
        assert nps.rebuild({}) == {}
        assert nps.read_file("a.txt") == b"a"
