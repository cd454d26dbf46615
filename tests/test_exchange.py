"""Sparse safetensors out and back, verification without a base, digests, bounds of the output."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, bits, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nps_compress
from nps_compress.codecs import EncodedChunk, MaskCodec, ValueCodec
from nps_compress.dtypes import BY_NAME, digest
from nps_compress.errors import (
    BaseMismatchError,
    CheckpointError,
    FormatError,
    InvalidArgumentError,
    OutputExistsError,
    OutputTooLargeError,
    WriteError,
)
from nps_compress.format.layout import Op
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.format.writer import NpsWriter

REJECT = ROOT / "format_spec" / "vectors" / "reject"


def content(task: Path) -> str:
    return str(nps_compress.inspect(task)["content_digest"])


def applied(base: dict[str, torch.Tensor], patch: Path) -> dict[str, torch.Tensor]:
    """What a reader of the layout makes of it that has never heard of .nps."""
    result = {name: tensor.clone() for name, tensor in base.items()}
    with safe_open(patch, framework="pt") as file:
        assert file.metadata()["sparse"] == "True"
        for name in file.keys():  # noqa: SIM118
            if name.endswith(".indices"):
                changed = name.removesuffix(".indices")
                indices = file.get_tensor(name)
                assert indices.dtype == torch.int32
                assert bool((indices.diff() > 0).all())
                values = file.get_tensor(f"{changed}.values")
                result[changed].view(-1)[indices.long()] = values
            elif not name.endswith(".values"):
                result[name] = file.get_tensor(name)
    return result


class TestRoundTrip:
    @pytest.mark.parametrize("lossless", [True, False])
    def test_export_and_import(self, tiny, tmp_path, lossless):
        base, tuned = tiny
        task, patch, again = tmp_path / "t.nps", tmp_path / "p.safetensors", tmp_path / "t2.nps"
        nps_compress.pack(base, tuned, task, lossless=lossless)
        report = nps_compress.export_sparse(base, task, patch)
        assert report.file_bytes == patch.stat().st_size
        assert (report.changed_tensors, report.new_tensors) == (2, 3)
        with safe_open(patch, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        indices = [tensor for name, tensor in stored.items() if name.endswith(".indices")]
        assert report.nnz == sum(map(len, indices))
        length = int.from_bytes(patch.read_bytes()[:8], "little")
        for name, place in json.loads(patch.read_bytes()[8 : 8 + length]).items():
            if name != "__metadata__":
                assert place["data_offsets"][0] % stored[name].element_size() == 0, name
        nps_compress.import_sparse(base, patch, again)
        assert content(again) == content(task)
        assert nps_compress.inspect(again)["base_root"] == nps_compress.inspect(task)["base_root"]
        nps_compress.verify(base, again)
        nps_compress.unpack(base, again, tmp_path / "out")
        rebuilt = load_file(tmp_path / "out" / "model.safetensors")
        others = applied(load_file(base / "model.safetensors"), patch)
        del others["pooler"]  # the layout can't say that a tensor is gone
        assert {n: bits(t) for n, t in others.items()} == {n: bits(t) for n, t in rebuilt.items()}
        for file in ("config.json", "vocab.json"):
            assert (tmp_path / "out" / file).exists() == (tuned / file).exists()

    def test_names_with_a_prefix_tied_and_swapped(self, tmp_path):
        words = {name: torch.arange(4.0) + i for i, name in enumerate("abc")}
        base = write_checkpoint(tmp_path / "base", words)
        path, records = tmp_path / "t.nps", []
        for name in "abc":
            data = words[name].numpy()
            records.append(BaseTensor(name, BY_NAME["F32"], (4,), digest(data)))
        with path.open("wb") as stream:  # a is gone, b and c are swapped, d and e are both a
            writer = NpsWriter(stream)
            for name, index in (("b", 2), ("c", 1), ("d", 0), ("e", 0)):
                record = records[index]
                writer.add_tensor(
                    TensorEntry(
                        name, record.dtype, (4,), Op.COPY, ValueCodec.NONE, 0, index, record.digest
                    )
                )
            writer.finish(records, {"base_name": "base", "finetuned_name": "x"})
        nps_compress.export_sparse(base, path, tmp_path / "p.safetensors")
        nps_compress.import_sparse(base, tmp_path / "p.safetensors", tmp_path / "t2.nps")
        assert content(tmp_path / "t2.nps") == content(path)
        assert nps_compress.inspect(tmp_path / "t2.nps")["metadata"]["finetuned_name"] == "x"

    def test_the_command_line(self, tiny, tmp_path):
        base, tuned = tiny

        def run(*arguments: object) -> str:
            command = [sys.executable, "-m", "nps_compress.cli", *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            return done.stdout

        run("pack", base, tuned, "-o", "t.nps")
        said = run("export", "t.nps", "--base", base, "--to", "sparse-safetensors", "-o", "p.st")
        assert "elements of 2 tensors, 3 tensors whole" in said
        assert "bits per parameter" in run("import", "p.st", "--base", base, "-o", "u.nps")
        for name in ("t.nps", "u.nps"):
            assert content(tmp_path / name) in run("inspect", name)
        found = json.loads(run("import", "p.st", "--base", base, "-o", "v.nps", "--json"))
        assert found["nnz"] > 0
        assert (tmp_path / "v.nps").read_bytes() == (tmp_path / "u.nps").read_bytes()


class TestForeignPatches:
    """Files of other tools: no word about base, names or side files."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        tensors = {"w": torch.zeros(3, 4, dtype=torch.bfloat16), "v": torch.ones(2)}
        return write_checkpoint(tmp_path / "base", tensors, config="{}")

    def patch(self, tmp_path: Path, metadata: dict[str, str] | None = None, **tensors) -> Path:
        named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file(named, tmp_path / "p.safetensors", metadata)
        return tmp_path / "p.safetensors"

    def test_order_and_width_of_indices_do_not_matter(self, base, tmp_path):
        for kind in (torch.int32, torch.int64):
            patch = self.patch(
                tmp_path,
                w__indices=torch.tensor([11, 2], dtype=kind),
                w__values=torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
                new=torch.tensor([7.0]),
            )
            nps_compress.import_sparse(base, patch, tmp_path / "t.nps", force=True)
            nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "out", force=True)
            found = load_file(tmp_path / "out" / "model.safetensors")
            expected = torch.zeros(12, dtype=torch.bfloat16)
            expected[11], expected[2] = 1.5, -0.0
            assert bits(found["w"]) == bits(expected)
            assert bits(found["v"]) == bits(torch.ones(2))
            assert found["new"].tolist() == [7.0]
            assert not (tmp_path / "out" / "config.json").exists()

    @pytest.mark.parametrize(
        ("indices", "values", "message"),
        [
            ([12], [1.0], "has one outside of 12 elements"),
            ([-1], [1.0], "has one outside of 12 elements"),
            ([3, 3], [1.0, 2.0], "has one twice"),
            ([3], [1.0, 2.0], "is BF16 [2], expected BF16 [1]"),
            ([[3]], [[1.0]], "is I32 [1, 1], expected one row of I32"),
        ],
    )
    def test_bad_indices(self, base, tmp_path, indices, values, message):
        patch = self.patch(
            tmp_path,
            w__indices=torch.tensor(indices, dtype=torch.int32),
            w__values=torch.tensor(values, dtype=torch.bfloat16),
        )
        self.refuses(base, patch, tmp_path, message)

    def refuses(self, base: Path, patch: Path, tmp_path: Path, message: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            nps_compress.import_sparse(base, patch, tmp_path / "t.nps")
        assert message in str(caught.value)
        assert not list(tmp_path.glob("*t.nps*"))

    def test_what_is_no_patch(self, base, tmp_path):
        one, values = torch.tensor([1], dtype=torch.int32), torch.ones(1, dtype=torch.bfloat16)
        self.refuses(base, tmp_path / "none", tmp_path, "no such file")
        self.refuses(base, base / "model.safetensors", tmp_path, "holds no NAME.indices")
        cases = [
            ({"w__indices": one}, "no 'w.values'"),
            ({"w__indices": one.float(), "w__values": values}, "is F32 [1], expected one row"),
            ({"w__indices": one, "w__values": values.float()}, "is F32 [1], expected BF16 [1]"),
            ({"x__indices": one, "x__values": values}, "changes 'x', which"),
        ]
        for tensors, message in cases:
            self.refuses(base, self.patch(tmp_path, **tensors), tmp_path, message)
        whole = {"base_root": "", "renamed": {}, "deleted": [], "base_files": {}, "metadata": {}}
        for files in ({"config.json": "Q!Q=="}, {"config.json": 1}, []):
            text = json.dumps({**whole, "files": files})
            patch = self.patch(tmp_path, {"nps": text}, w__indices=one, w__values=values)
            self.refuses(base, patch, tmp_path, "is not what export writes")
        for known in ("00" * 7, "00" * 16, "zz" * 8):
            text = json.dumps({**whole, "files": {}, "base_files": {"config.json": known}})
            patch = self.patch(tmp_path, {"nps": text}, w__indices=one, w__values=values)
            self.refuses(base, patch, tmp_path, "is not what export writes")
        for text in ("{", "[]", "[" * 10_000, '{"renamed": 1}', '{"a": "\\ud800"}'):
            patch = self.patch(tmp_path, {"nps": text}, w__indices=one, w__values=values)
            self.refuses(base, patch, tmp_path, "is not what export writes")

    def test_a_side_file_with_a_path_is_not_taken(self, base, tmp_path):
        beyond = {
            "base_root": nps_compress.inspect(self.packed(base, tmp_path))["base_root"],
            "renamed": {},
            "deleted": [],
            "files": {"../evil": "QQ==", "config.json": "QQ=="},
            "base_files": {"../evil": "00" * 8},
            "metadata": {},
        }
        patch = self.patch(
            tmp_path,
            {"nps": json.dumps(beyond)},
            w__indices=torch.tensor([0], dtype=torch.int32),
            w__values=torch.ones(1, dtype=torch.bfloat16),
        )
        nps_compress.import_sparse(base, patch, tmp_path / "t.nps")
        files = nps_compress.inspect(tmp_path / "t.nps")["files"]
        assert [file["name"] for file in files] == ["config.json"]

    def packed(self, base: Path, tmp_path: Path) -> Path:
        nps_compress.pack(base, base, tmp_path / "same.nps", lossless=True)
        return tmp_path / "same.nps"


def test_side_files_of_the_base_stay_there(tiny, tmp_path):
    base, tuned = tiny  # vocab.json, 20,000 bytes, is the same on both sides
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    patch, again = tmp_path / "p.safetensors", tmp_path / "u.nps"
    nps_compress.export_sparse(base, tmp_path / "t.nps", patch)
    assert b"x" * 100 not in patch.read_bytes()
    nps_compress.import_sparse(base, patch, again)
    files = {file["name"]: file["from"] for file in nps_compress.inspect(again)["files"]}
    assert files == {"config.json": "file", "vocab.json": "base"}
    (base / "vocab.json").write_text("y")
    with pytest.raises(CheckpointError, match=r"vocab.json' is not the one that was exported"):
        nps_compress.import_sparse(base, patch, tmp_path / "v.nps")


def test_a_header_that_safetensors_would_refuse(tiny, tmp_path, monkeypatch):
    from nps_compress import sparse_safetensors

    base, tuned = tiny
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    monkeypatch.setattr(sparse_safetensors, "_MAX_HEADER_BYTES", 1000)
    with pytest.raises(InvalidArgumentError, match="at most 100 MB"):
        nps_compress.export_sparse(base, tmp_path / "t.nps", tmp_path / "p.safetensors")
    assert not list(tmp_path.glob("*p.safetensors*"))


def test_import_against_another_base(tiny, tmp_path):
    base, tuned = tiny
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    nps_compress.export_sparse(base, tmp_path / "t.nps", tmp_path / "p.safetensors")
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    tensors["layer.norm"][0] = 2.0  # a tensor that the patch does not touch
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(BaseMismatchError, match="is not the base this task was made from"):
        nps_compress.import_sparse(other, tmp_path / "p.safetensors", tmp_path / "u.nps")
    with pytest.raises(BaseMismatchError, match=r"tensor 'embed'|tensor 'layer"):
        nps_compress.export_sparse(tuned, tmp_path / "t.nps", tmp_path / "q.safetensors")
    assert not list(tmp_path.glob("*u.nps*"))
    assert not list(tmp_path.glob("*q.safetensors*"))


def test_an_import_does_not_replace_what_it_reads(tiny, tmp_path):
    base, tuned = tiny
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    patch = tmp_path / "p.safetensors"
    nps_compress.export_sparse(base, tmp_path / "t.nps", patch)
    for inputs, path in ((base, patch), (base / "model.safetensors", base / "model.safetensors")):
        with pytest.raises(OutputExistsError, match="would replace the input"):
            nps_compress.import_sparse(inputs, patch, path, force=True)


def test_what_keeps_nothing_is_not_exported(tmp_path):
    name = REJECT.parent / "valid" / "none-kept"
    patch = tmp_path / "p.safetensors"
    base, task = name.with_name("none-kept.base.safetensors"), name.with_suffix(".nps")
    assert nps_compress.export_sparse(base, task, patch).changed_tensors == 0
    with safe_open(patch, framework="np") as file:
        assert not list(file.keys())
    nps_compress.import_sparse(base, patch, tmp_path / "t.nps")
    assert content(tmp_path / "t.nps") == content(task)


def test_a_tensor_that_just_fits_int32():
    from nps_compress import sparse_safetensors

    entry = TensorEntry(
        "w", BY_NAME["U8"], (2**31 - 1,), Op.DELTA, ValueCodec.XOR, 24, 0, bytes(32)
    )
    task = SimpleNamespace(reader=SimpleNamespace(nnz=lambda _: 5))
    assert sparse_safetensors._blocks(task, [entry])["w.indices"][1] == (5,)


def test_a_tensor_too_large_for_int32(tmp_path):
    numel, dtype = 2**31, BY_NAME["U8"]
    header = json.dumps({"w": {"dtype": "U8", "shape": [numel], "data_offsets": [0, numel]}})
    base = tmp_path / "base.safetensors"
    with base.open("wb") as stream:  # sparse on disk
        stream.write(len(header).to_bytes(8, "little") + header.encode())
        stream.truncate(8 + len(header) + numel)
    empty = EncodedChunk(0, MaskCodec.EMPTY, 0, False, b"", 0, (b"",))
    one = EncodedChunk(1, MaskCodec.GAP8, 1, False, b"\0", 0, (b"\1",))
    with (tmp_path / "t.nps").open("wb") as stream:
        writer = NpsWriter(stream)
        writer.add_chunks([one] + [empty] * 127)
        writer.add_tensor(
            TensorEntry("w", dtype, (numel,), Op.DELTA, ValueCodec.XOR, 24, 0, bytes(32))
        )
        writer.finish([BaseTensor("w", dtype, (numel,), bytes(32))], {})
    with pytest.raises(InvalidArgumentError, match="2147483648"):
        nps_compress.export_sparse(base, tmp_path / "t.nps", tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize("name", ["w.indices", "w.values", "other.indices"])
def test_names_that_collide(tmp_path, name):
    base = write_checkpoint(tmp_path / "base", {"w": torch.zeros(4)})
    tuned = write_checkpoint(
        tmp_path / "tuned", {"w": torch.ones(4), name: torch.zeros(1, dtype=torch.int32)}
    )
    nps_compress.pack(base, tuned, tmp_path / "t.nps", lossless=True)
    with pytest.raises(InvalidArgumentError, match=repr(name)):
        nps_compress.export_sparse(base, tmp_path / "t.nps", tmp_path / "p.safetensors")


# -- verification without a base -----------------------------------------------------------------


class TestVerifyAlone:
    def test_a_good_file(self, tiny, tmp_path):
        base, tuned = tiny
        task = tmp_path / "t.nps"
        nps_compress.pack(base, tuned, task)
        seen = []
        report = nps_compress.verify(None, task, on_tensor=lambda entry: seen.append(entry.name))
        assert not report.with_base
        assert report.base_tensors == 0
        assert report.tensors == 8
        assert report.content_digest == content(task)
        assert report.files == 1  # the other one is the base's
        assert "empty" in seen
        assert "config.json" in seen
        whole = nps_compress.verify(base, task)
        assert whole.with_base
        assert whole.content_digest == report.content_digest

    def test_every_flipped_bit(self, tmp_path):
        data = (REJECT.parent / "valid" / "all-copied-renamed-and-shared.nps").read_bytes()
        for position in range(len(data)):
            for bit in range(8):
                damaged = bytearray(data)
                damaged[position] ^= 1 << bit
                (tmp_path / "x.nps").write_bytes(damaged)
                with pytest.raises(FormatError):
                    nps_compress.verify(None, tmp_path / "x.nps")

    @pytest.mark.parametrize(
        "name", ["P-DIGEST-wrong", "P-GAP-gap16", "P-ZSTD-plane-truncated", "D-DIGEST-new"]
    )
    def test_what_only_chunks_show(self, name):
        with pytest.raises(FormatError) as caught:
            nps_compress.verify(None, REJECT / f"{name}.nps")
        assert caught.value.rule == "-".join(name.split("-")[:2])


# -- what a signature covers ---------------------------------------------------------------------


def test_content_digest_outlives_the_encoding(tiny, tmp_path):
    base, tuned = tiny
    first, second = tmp_path / "a.nps", tmp_path / "b.nps"
    nps_compress.pack(base, tuned, first, lossless=True)
    # Another base, another encoding, other metadata: everything is new, nothing a change.
    other = write_checkpoint(tmp_path / "other", {"layer.norm": torch.zeros(16)})
    save_file({"layer.norm": torch.zeros(16, dtype=torch.bfloat16)}, other / "model.safetensors")
    nps_compress.pack(other, tuned, second, lossless=True)
    a, b = nps_compress.inspect(first), nps_compress.inspect(second)
    assert a["content_digest"] == b["content_digest"]
    assert a["base_root"] != b["base_root"]
    for found, path in ((a, first), (b, second)):
        assert found["file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    changed = load_file(tuned / "model.safetensors")
    changed["scalar"] += 1
    save_file(changed, tuned / "model.safetensors")
    nps_compress.pack(base, tuned, first, lossless=True, force=True)
    assert content(first) != a["content_digest"]


def test_digest_of_a_file_over_one_mib():
    path = REJECT.parent / "valid" / "metadata-of-1-mib.nps"
    assert path.stat().st_size > 1 << 20
    found = nps_compress.inspect(path)["file_sha256"]
    assert found == hashlib.sha256(path.read_bytes()).hexdigest()


def test_inspect_counts_bits_and_knows_what_is_deleted():
    valid = REJECT.parent / "valid"
    renamed = nps_compress.inspect(valid / "all-copied-renamed-and-shared.nps")["tensors"]
    assert [(t["name"], t["op"]) for t in renamed] == [
        ("head", "copy"),
        ("model.a", "copy"),
        ("model.b", "copy"),
        ("b", "deleted"),
    ]
    (tensor,) = nps_compress.inspect(valid / "mask-codec-of-each-chunk.nps")["tensors"]
    assert tensor["bits_per_param"] == 8 * tensor["stored_bytes"] / tensor["numel"] > 0


# -- bounds of the output ------------------------------------------------------------------------


class TestOutputSize:
    def test_over_the_limit(self, tiny, tmp_path):
        base, tuned = tiny
        nps_compress.pack(base, tuned, tmp_path / "t.nps")
        size = nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "out").nbytes
        nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "fits", max_bytes=size)
        with pytest.raises(OutputTooLargeError, match=f"{size - 1:,} were allowed"):
            nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "no", max_bytes=size - 1)
        assert not (tmp_path / "no").exists()

    def test_over_the_free_space(self, tiny, tmp_path, monkeypatch):
        base, tuned = tiny
        nps_compress.pack(base, tuned, tmp_path / "t.nps")
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OutputTooLargeError, match="the disk has 1,000 free") as caught:
            nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "no")
        exact = usage._replace(free=caught.value.nbytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: exact)
        nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "yes")
        assert not (tmp_path / "no").exists()
        with pytest.raises(WriteError):
            nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "none" / "no")


def test_the_writer_keeps_the_bound_on_expansion(tmp_path):
    """Zeros that would expand 10,000 times are stored so that they stay within 256 times."""
    numel = 200 << 20
    base = write_checkpoint(tmp_path / "base", {"w": torch.ones(1)})
    tuned = write_checkpoint(
        tmp_path / "tuned", {"w": torch.ones(1), "z": torch.zeros(numel, dtype=torch.int8)}
    )
    report = nps_compress.pack(base, tuned, tmp_path / "t.nps", lossless=True)
    assert report.file_bytes < 3 << 20
    nps_compress.verify(base, tmp_path / "t.nps")
    assert report.nnz == numel
