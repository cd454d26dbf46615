"""pack, verify, unpack: exact where exactness is promised, and refusals that lose nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import bits, write_checkpoint
from safetensors.torch import load_file, save_file

import nps_compress
from nps_compress import (
    BaseMismatchError,
    CheckpointError,
    FormatError,
    InvalidArgumentError,
    OutputExistsError,
    PickleRefusedError,
    Recipe,
    RecipeError,
    WriteError,
)
from nps_compress.checkpoint import open_checkpoint
from nps_compress.format.reader import NpsReader


def load(folder: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def test_lossless_restores_the_exact_set_of_tensors(tiny, tmp_path):
    base, tuned = tiny
    report = nps_compress.pack(base, tuned, tmp_path / "t.nps", lossless=True)
    assert report.file_bytes == (tmp_path / "t.nps").stat().st_size
    verified = nps_compress.verify(base, tmp_path / "t.nps")
    assert verified.base_root == report.base_root
    nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "out")
    assert_same(load(tmp_path / "out"), load(tuned))
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 2}'
    assert (tmp_path / "out" / "vocab.json").read_text() == "x" * 20_000


def test_every_dtype_survives(tmp_path):
    generator = torch.Generator().manual_seed(0)
    dtypes = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.uint16,
        torch.int16,
        torch.uint32,
        torch.int32,
        torch.uint64,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
    ]
    base, tuned = {}, {}
    for dtype in dtypes:
        width = torch.empty(0, dtype=dtype).element_size()
        high = 2 if dtype is torch.bool else 256
        raw = torch.randint(0, high, (777 * width,), dtype=torch.uint8, generator=generator)
        other = raw.clone()
        other[5 * width : 100 * width] ^= 1
        base[str(dtype)], tuned[str(dtype)] = raw.view(dtype), other.view(dtype)
    a, b = write_checkpoint(tmp_path / "a", base), write_checkpoint(tmp_path / "b", tuned)
    nps_compress.pack(a, b, tmp_path / "t.nps", lossless=True)
    nps_compress.verify(a, tmp_path / "t.nps")
    nps_compress.unpack(a, tmp_path / "t.nps", tmp_path / "out")
    assert_same(load(tmp_path / "out"), tuned)
    for tensor in open_checkpoint(tmp_path / "out").tensors.values():
        assert tensor.offset % tensor.dtype.itemsize == 0, tensor


@pytest.mark.parametrize("prune", ["magnitude", "sampled"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_lossy_keeps_the_asked_density(tiny, tmp_path, prune, scope):
    base, tuned = tiny
    recipe = Recipe(prune=prune, density=0.1, scope=scope)
    nps_compress.pack(base, tuned, tmp_path / "t.nps", recipe=recipe)
    nps_compress.verify(base, tmp_path / "t.nps")
    nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "out")
    found, old, new = load(tmp_path / "out"), load(base), load(tuned)
    assert found.keys() == new.keys()
    for name in ("embed", "head", "empty"):  # resized or new: exact
        assert bits(found[name]) == bits(new[name])
    shared = (new.keys() & old.keys()) - {"embed"}
    pruned = [name for name in shared if new[name].is_floating_point()]
    changed = {name: int((found[name] != old[name]).sum()) for name in pruned}
    if scope == "global":
        total = sum(new[name].numel() for name in pruned)
        assert sum(changed.values()) == pytest.approx(0.1 * total, rel=0.05)
    else:
        for name in ("layer.attention", "layer.mlp"):
            assert changed[name] == pytest.approx(0.1 * new[name].numel(), rel=0.15)
    if prune == "magnitude":
        mlp = found["layer.mlp"]
        moved = mlp != old["layer.mlp"]
        assert torch.allclose(mlp[moved], new["layer.mlp"][moved])


def test_same_seed_same_bytes(tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        recipe = Recipe(prune="sampled", density=0.05, seed=seed)
        nps_compress.pack(*tiny, tmp_path / name, recipe=recipe)
    first, second, third = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second
    assert first != third


def test_identical_checkpoints_cost_almost_nothing(tiny, tmp_path):
    base, _ = tiny
    report = nps_compress.pack(base, base, tmp_path / "t.nps")
    assert report.nnz == 0
    assert {t["op"] for t in nps_compress.inspect(tmp_path / "t.nps")["tensors"]} == {"copy"}
    nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "out")
    assert_same(load(tmp_path / "out"), load(base))


def test_names_that_differ_by_a_prefix_are_paired(tiny, tmp_path):
    base, tuned = tiny
    for source, target, rename in (
        (tuned, "long", lambda name: f"bert.{name}"),
        (base, "long_base", lambda name: f"bert.{name}"),
    ):
        write_checkpoint(tmp_path / target, {rename(n): t for n, t in load(source).items()})
    for pair in ((base, tmp_path / "long"), (tmp_path / "long_base", tuned)):
        nps_compress.pack(*pair, tmp_path / "t.nps", lossless=True, force=True)
        ops = [t["op"] for t in nps_compress.inspect(tmp_path / "t.nps")["tensors"]]
        assert ops.count("delta") == 2
        nps_compress.unpack(pair[0], tmp_path / "t.nps", tmp_path / "out", force=True)
        assert_same(load(tmp_path / "out"), load(pair[1]))


def test_finetune_in_another_float_type(tiny, tmp_path):
    base, tuned = tiny
    wide = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in load(tuned).items()}
    wide_folder = write_checkpoint(tmp_path / "wide", wide)
    nps_compress.pack(base, wide_folder, tmp_path / "t.nps", lossless=True)
    nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "exact")
    assert_same(load(tmp_path / "exact"), wide)
    nps_compress.pack(base, wide_folder, tmp_path / "lossy.nps", recipe=Recipe(density=1.0))
    nps_compress.unpack(base, tmp_path / "lossy.nps", tmp_path / "lossy")
    assert load(tmp_path / "lossy")["layer.norm"].dtype == torch.bfloat16


def test_not_finite_values_are_kept_exactly(tiny, tmp_path):
    base, tuned = tiny
    tensors = load(tuned)
    tensors["layer.mlp"][3, 3] = float("nan")
    tensors["layer.mlp"][4, 4] = float("inf")
    broken = write_checkpoint(tmp_path / "broken", tensors)
    nps_compress.pack(base, broken, tmp_path / "t.nps")
    nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "out")
    assert bits(load(tmp_path / "out")["layer.mlp"]) == bits(tensors["layer.mlp"])


def test_shards_in_and_out(tiny, tmp_path):
    base, tuned = tiny
    tensors = load(base)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[:3], sorted(tensors)[3:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, sharded / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / "vocab.json").write_bytes((base / "vocab.json").read_bytes())
    nps_compress.pack(base, tuned, tmp_path / "t.nps", lossless=True)
    nps_compress.verify(sharded, tmp_path / "t.nps")  # the same base, laid out otherwise
    nps_compress.unpack(sharded, tmp_path / "t.nps", tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert_same(load(tmp_path / "out"), load(tuned))
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(written["weight_map"]) == set(load(tuned))
    nps_compress.pack(tmp_path / "out", tuned, tmp_path / "again.nps", lossless=True)
    assert nps_compress.inspect(tmp_path / "again.nps")["nnz"] == 0


def test_files_of_weights_alone(tiny, tmp_path):
    base, tuned = tiny
    weights = base / "model.safetensors", tuned / "model.safetensors"
    nps_compress.pack(*weights, tmp_path / "t.nps", lossless=True)
    nps_compress.unpack(weights[0], tmp_path / "t.nps", tmp_path / "out")
    assert_same(load(tmp_path / "out"), load(tuned))


def test_one_tensor_at_a_time(tiny, tmp_path):
    base, tuned = tiny
    nps_compress.pack(base, tuned, tmp_path / "t.nps", lossless=True)
    old, new = load(base), load(tuned)
    with nps_compress.open(tmp_path / "t.nps") as task:
        assert task.names == sorted(new)
        assert task.base_name == "base"
        for name in task.names:
            source = task.base_tensor_name(name)
            before = None if source is None else old[source].clone()
            found = nps_compress.rebuild(before, task, name)
            assert_same({name: found}, {name: new[name]})
            if source is not None:
                assert bits(before) == bits(old[source])
        with pytest.raises(BaseMismatchError, match="other values"):
            task.rebuild("layer.mlp", old["layer.mlp"] + 1)
        with pytest.raises(BaseMismatchError, match="is F16"):
            task.rebuild("layer.mlp", old["layer.mlp"].half())
        with pytest.raises(InvalidArgumentError, match="base tensor"):
            task.rebuild("layer.mlp")
        with pytest.raises(InvalidArgumentError, match="nope"):
            task.rebuild("nope")


def test_inspect_holds_what_scripts_read(tiny, tmp_path):
    base, tuned = tiny
    report = nps_compress.pack(base, tuned, tmp_path / "t.nps")
    found = nps_compress.inspect(tmp_path / "t.nps")
    total = sum(tensor.numel() for tensor in load(tuned).values())
    size = (tmp_path / "t.nps").stat().st_size
    assert found["total_params"] == total == report.total_params
    assert found["nnz"] == report.nnz == sum(t["nnz"] for t in found["tensors"])
    assert found["file_bytes"] == size
    assert found["bits_per_param"] == pytest.approx(8 * size / total)
    assert found["density"] == pytest.approx(found["nnz"] / total)
    assert found["base_root"] == report.base_root
    by_name = {t["name"]: t for t in found["tensors"]}
    assert {n: t["op"] for n, t in by_name.items()} == {
        "embed": "new",
        "empty": "new",
        "head": "new",
        "layer.attention": "delta",
        "layer.mlp": "delta",
        "layer.norm": "copy",
        "pooler": "deleted",
        "positions": "copy",
        "scalar": "copy",
    }
    assert by_name["layer.mlp"]["shape"] == [300, 101]
    assert sum(t["stored_bytes"] for t in found["tensors"]) < size
    assert {f["name"]: f["from"] for f in found["files"]} == {
        "config.json": "file",
        "vocab.json": "base",
    }


class TestWrongBase:
    @pytest.fixture
    def packed(self, tiny, tmp_path):
        nps_compress.pack(*tiny, tmp_path / "t.nps")
        return tiny[0], tmp_path / "t.nps"

    def refuse(self, base: Path, task: Path, tmp_path: Path, message: str) -> None:
        with pytest.raises(BaseMismatchError, match=message) as caught:
            nps_compress.verify(base, task)
        assert "made from (base)" in str(caught.value)

    def changed(self, base: Path, tmp_path: Path, change) -> Path:
        tensors = load(base)
        change(tensors)
        return write_checkpoint(tmp_path / "other", tensors, vocab="x" * 20_000)

    def test_one_bit_of_a_used_tensor(self, packed, tmp_path):
        def flip(tensors):
            tensors["layer.mlp"].view(torch.int32)[-1, -1] ^= 1

        other = self.changed(packed[0], tmp_path, flip)
        self.refuse(other, packed[1], tmp_path, "'layer.mlp' has other values")
        with pytest.raises(BaseMismatchError, match=r"'layer.mlp' has other values"):
            nps_compress.unpack(other, packed[1], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_the_first_differing_tensor_is_named(self, packed, tmp_path):
        def move(tensors):
            for name in ("layer.mlp", "layer.attention", "scalar"):
                tensors[name] += 1

        other = self.changed(packed[0], tmp_path, move)
        self.refuse(other, packed[1], tmp_path, "'layer.attention' has other values")

    def test_an_unused_tensor(self, packed, tmp_path):
        other = self.changed(packed[0], tmp_path, lambda t: t["pooler"].zero_())
        self.refuse(other, packed[1], tmp_path, "'pooler' has other values")

    def test_missing_extra_and_resized(self, packed, tmp_path):
        other = self.changed(packed[0], tmp_path, lambda t: t.pop("layer.mlp"))
        self.refuse(other, packed[1], tmp_path, "'layer.mlp' is missing")
        other = self.changed(packed[0], tmp_path, lambda t: t.pop("pooler"))
        self.refuse(other, packed[1], tmp_path, "'pooler' is missing")
        other = self.changed(packed[0], tmp_path, lambda t: t.update(more=torch.ones(1)))
        self.refuse(other, packed[1], tmp_path, "'more' is not in the base")
        other = self.changed(packed[0], tmp_path, lambda t: t.update(scalar=torch.ones(2)))
        self.refuse(other, packed[1], tmp_path, r"'scalar' is F32 \[2\], not F32 \[\]")

    def test_side_file(self, packed, tmp_path):
        base, task = packed
        (base / "vocab.json").write_text("y" * 20_000)
        with pytest.raises(BaseMismatchError, match=r"'vocab.json' has another content"):
            nps_compress.unpack(base, task, tmp_path / "out")
        (base / "vocab.json").unlink()
        with pytest.raises(BaseMismatchError, match=r"'vocab.json' is missing"):
            nps_compress.verify(base, task)


class TestBadInput:
    def test_checkpoints_that_share_nothing(self, tiny, tmp_path):
        other = write_checkpoint(tmp_path / "other", {"x": torch.ones(3)})
        with pytest.raises(CheckpointError, match="shares no tensor"):
            nps_compress.pack(tiny[0], other, tmp_path / "t.nps")
        assert not list(tmp_path.glob("*.nps*"))

    def test_pickles_are_refused_with_a_hint(self, tiny, tmp_path):
        (tmp_path / "pickled").mkdir()
        torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
        for path in (tmp_path / "pickled", tmp_path / "pickled" / "pytorch_model.bin"):
            with pytest.raises(PickleRefusedError, match="save_pretrained"):
                nps_compress.pack(tiny[0], path, tmp_path / "t.nps")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("model.safetensors", b"garbage!", "not a readable safetensors"),
            ("model.safetensors", b"", "not a readable safetensors"),
            ("model.safetensors.index.json", b"{}", "not a shard index"),
            ("model.safetensors.index.json", b'{"weight_map": {"a": "../x"}}', "outside"),
            ("model.safetensors.index.json", b'{"weight_map": {"a": "x"}}', "not a readable"),
            ("readme.md", b"", "holds no .safetensors"),
        ],
    )
    def test_broken_checkpoints(self, tiny, tmp_path, name, content, message):
        folder = tmp_path / "broken"
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            nps_compress.pack(tiny[0], folder, tmp_path / "t.nps")

    def test_no_such_checkpoint(self, tmp_path):
        for source in (tmp_path / "nowhere", "someone/some-model"):
            with pytest.raises(CheckpointError, match="local cache"):
                nps_compress.pack(source, source, tmp_path / "t.nps")

    def test_unknown_dtype_is_named(self, tiny, tmp_path):
        header = b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
        (tmp_path / "f4.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + b"\0"
        )
        with pytest.raises(CheckpointError, match="F4"):
            nps_compress.pack(tiny[0], tmp_path / "f4.safetensors", tmp_path / "t.nps")

    @pytest.mark.parametrize("density", [0, -1, 1.01, float("nan")])
    def test_density(self, density):
        with pytest.raises(InvalidArgumentError, match="density"):
            Recipe(density=density)

    def test_output_exists(self, tiny, tmp_path):
        task = tmp_path / "t.nps"
        task.write_text("precious")
        with pytest.raises(OutputExistsError, match="--force"):
            nps_compress.pack(*tiny, task)
        assert task.read_text() == "precious"
        nps_compress.pack(*tiny, task, force=True)
        out = tmp_path / "out"
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
        for force in (False, True):
            with pytest.raises(OutputExistsError):
                nps_compress.unpack(tiny[0], task, out, force=force)
        assert (out / "thesis.txt").read_text() == "precious"
        (out / "thesis.txt").unlink()
        nps_compress.unpack(tiny[0], task, out)
        nps_compress.unpack(tiny[0], task, out, force=True)

    def test_failure_keeps_the_old_file(self, tiny, tmp_path):
        task = tmp_path / "t.nps"
        nps_compress.pack(*tiny, task)
        before = task.read_bytes()
        (tiny[1] / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(CheckpointError):
            nps_compress.pack(*tiny, task, force=True)
        assert task.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "t.nps", "tuned"]

    def test_damaged_task(self, tiny, tmp_path):
        task = tmp_path / "t.nps"
        nps_compress.pack(*tiny, task)
        data = bytearray(task.read_bytes())
        data[100] ^= 1
        task.write_bytes(data)
        for call in (
            lambda: nps_compress.verify(tiny[0], task),
            lambda: nps_compress.unpack(tiny[0], task, tmp_path / "out"),
        ):
            with pytest.raises(FormatError, match="P-DIGEST"):
                call()
        assert not (tmp_path / "out").exists()
        task.write_bytes(data[:-10])
        with pytest.raises(FormatError, match="T-MAGIC"):
            nps_compress.inspect(task)

    @pytest.mark.skipif(os.name != "posix", reason="needs ulimit")
    def test_disk_that_takes_no_more(self, tiny, tmp_path):
        nps_compress.pack(*tiny, tmp_path / "t.nps", lossless=True)
        code = (
            "import resource, sys, nps_compress as n\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "base, tuned, task, out = sys.argv[1:]\n"
            "for call in (lambda: n.pack(base, tuned, out), lambda: n.unpack(base, task, out)):\n"
            "    try:\n"
            "        call()\n"
            "    except n.WriteError as error:\n"
            "        print(error)\n"
        )
        arguments = [*tiny, tmp_path / "t.nps", tmp_path / "out"]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
        )
        assert done.stdout.count("can't be written: File too large") == 2, done.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "t.nps", "tuned"]

    def test_no_folder_to_write_to(self, tiny, tmp_path):
        with pytest.raises(WriteError, match=r"folder .*missing does not exist"):
            nps_compress.pack(*tiny, tmp_path / "missing" / "t.nps")

    def test_lossless_with_a_recipe(self, tiny, tmp_path):
        with pytest.raises(InvalidArgumentError, match="lossless"):
            nps_compress.pack(*tiny, tmp_path / "t.nps", recipe=Recipe(), lossless=True)


class TestRecipe:
    def test_round_trip(self, tmp_path):
        recipe = Recipe.with_subspaces(4, "equal", prune="sampled", density=0.02, seed=7)
        recipe.write(tmp_path / "r.json")
        assert Recipe.read(tmp_path / "r.json") == recipe

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "JSON"),
            ("[]", "version 1"),
            ('{"nps_recipe": 2}', "version 1"),
            ('{"nps_recipe": 1, "density": 0.1}', "missing or unknown"),
        ],
    )
    def test_unreadable(self, tmp_path, text, message):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(RecipeError, match=message):
            Recipe.read(tmp_path / "r.json")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("density", 2),
            ("density", True),
            ("density", "x"),
            ("prune", "best"),
            ("scope", "row"),
            ("coefficients", [1, 2]),
            ("coefficients", ["1"]),
            ("coefficients", "1"),
            ("coefficients", 1),
            ("coefficients", [0]),
            ("coefficients", [-1]),
            ("coefficients", [float("nan")]),
            ("coefficients", [1e300]),
            ("coefficients", [10**400]),
            ("top_shares", [0.5, 0.1]),
            ("seed", "abc"),
            ("seed", -1),
            ("seed", 2**32),
            ("seed", True),
            ("search", "hi"),
        ],
    )
    def test_bad_values(self, tmp_path, field, value):
        stored = Recipe().to_dict() | {field: value}
        (tmp_path / "r.json").write_text(json.dumps(stored))
        with pytest.raises(RecipeError):
            Recipe.read(tmp_path / "r.json")

    @pytest.mark.parametrize("shares", [(0.1, 0.5), (0.5, 0.5), (1.0,), (0.0,), ("x",)])
    def test_shares_descend_within_0_and_1(self, shares):
        with pytest.raises(InvalidArgumentError, match="top_shares"):
            Recipe(top_shares=shares, coefficients=(1.0,) * (len(shares) + 1))

    def test_too_many_subspaces(self):
        shares = tuple(0.9 / (i + 1) for i in range(64))
        with pytest.raises(InvalidArgumentError, match="top_shares"):
            Recipe(top_shares=shares, coefficients=(1.0,) * 65)
        with pytest.raises(InvalidArgumentError, match="subspaces"):
            Recipe.with_subspaces(65, "tail")

    def test_deeply_nested(self, tmp_path):
        (tmp_path / "r.json").write_text("[" * 100_000)
        with pytest.raises(RecipeError):
            Recipe.read(tmp_path / "r.json")


class TestOutputIsInput:
    def test_unpack_over_its_base_or_task(self, tiny, tmp_path):
        base, tuned = tiny
        nps_compress.pack(base, tuned, tmp_path / "t.nps")
        before = (base / "model.safetensors").read_bytes()
        (tmp_path / "link").symlink_to(base)
        for out in (base, tmp_path / "link", tmp_path):
            with pytest.raises(OutputExistsError):
                nps_compress.unpack(base, tmp_path / "t.nps", out, force=True)
        assert (base / "model.safetensors").read_bytes() == before

    def test_pack_and_search_over_an_input(self, tiny, tmp_path):
        base, tuned = tiny
        calibration = tmp_path / "c.jsonl"
        calibration.write_text('{"text": "a"}\n')
        for out in (base / "model.safetensors", tuned / "config.json", calibration):
            before = out.read_bytes()
            with pytest.raises(OutputExistsError, match="would replace the input"):
                nps_compress.pack(base, tuned, out, calibration=calibration, force=True)
            with pytest.raises(OutputExistsError, match="would replace the input"):
                nps_compress.search_recipe(base, tuned, calibration, out, Recipe(), force=True)
            assert out.read_bytes() == before

    def test_output_behind_a_link(self, tiny, tmp_path):
        real = tmp_path / "real"
        real.mkdir()
        (tmp_path / "link").symlink_to(real)
        nps_compress.pack(*tiny, tmp_path / "t.nps", lossless=True)
        nps_compress.unpack(tiny[0], tmp_path / "t.nps", tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert_same(load(real), load(tiny[1]))
        assert not list(tmp_path.glob("*.partial*")) + list(tmp_path.glob(".*.partial"))


def test_prefix_on_most_names_only(tiny, tmp_path):
    base, tuned = tiny
    renamed = {n if n == "scalar" else f"model.{n}": t for n, t in load(tuned).items()}
    folder = write_checkpoint(tmp_path / "renamed", renamed)
    nps_compress.pack(base, folder, tmp_path / "t.nps", lossless=True)
    tensors = nps_compress.inspect(tmp_path / "t.nps")["tensors"]
    by_name = {tensor["name"]: tensor for tensor in tensors}
    assert by_name["model.layer.mlp"]["base_tensor"] == "layer.mlp"
    assert by_name["scalar"]["base_tensor"] == "scalar"


def test_side_file_that_the_base_lacks_is_missing_even_if_empty(tiny, tmp_path):
    base, tuned = tiny
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    (base / "vocab.json").write_text("")
    with pytest.raises(BaseMismatchError, match="has another content"):
        nps_compress.verify(base, tmp_path / "t.nps")


def test_checkpoints_that_cannot_be_stored(tiny, tmp_path):
    deep = write_checkpoint(tmp_path / "deep", {"w": torch.ones((1,) * 9)})
    with pytest.raises(CheckpointError, match="rank 9"):
        nps_compress.pack(tiny[0], deep, tmp_path / "t.nps")
    with pytest.raises(CheckpointError, match="too long"):
        nps_compress.pack("x" * 300, tiny[1], tmp_path / "t.nps")
    with pytest.raises(WriteError, match="too long"):
        nps_compress.pack(*tiny, tmp_path / ("x" * 300))


@pytest.mark.parametrize("check", [nps_compress.unpack, nps_compress.verify])
def test_of_two_faults_the_first_in_the_file_is_told(tmp_path, check):
    base = {"a": torch.zeros(64), "b": torch.zeros(4096)}
    paths = {}
    for name, tensors in (("base", base), ("tuned", {n: torch.randn_like(base[n]) for n in base})):
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, paths[name])
    task, out = tmp_path / "t.nps", tmp_path / "out"
    nps_compress.pack(paths["base"], paths["tuned"], task, lossless=True)
    data = bytearray(task.read_bytes())
    with NpsReader(task) as reader:
        for entry in reader.tensors:
            data[int(reader._index.offsets[entry.first_chunk]) + 20] ^= 1
    task.write_bytes(data)
    arguments = [paths["base"], task, *([out] if check is nps_compress.unpack else [])]
    with pytest.raises(FormatError, match="of 'a' is damaged"):
        check(*arguments)
    assert not out.exists()
