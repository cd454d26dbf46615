"""Merging files: what comes in, what goes out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import fails, ok

import nps_compress
from nps_compress.checkpoint import open_checkpoint
from nps_compress.commands.merging import METHODS as NAMES
from nps_compress.dtypes import BY_NAME, to_float32
from nps_compress.errors import CheckpointError, InvalidArgumentError, OutputExistsError
from nps_compress.merging.contract import Settings
from nps_compress.merging.driver import merge
from nps_compress.merging.merger import Merger
from nps_compress.merging.methods import METHODS
from nps_compress.packed import open_finetuned

SHAPES = {"embed": (40, 16), "layer.mlp": (64, 48), "layer.norm": (16,), "scalar": ()}


def tensors(seed: int, scale: float, start: dict[str, torch.Tensor] | None = None):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        noise = scale * torch.randn(shape, generator=generator)
        found[name] = (start[name].float() + noise if start else noise).to(torch.bfloat16)
    return found


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base and three fine-tunes with heads: one with a prefix, one resized and wider."""
    base = tensors(0, 1.0)
    root = write_checkpoint(
        tmp_path / "base", {**base, "ids": torch.arange(4)}, config='{"of": "base"}'
    )
    tasks = []
    for number, name in enumerate(("law", "med", "art")):
        tuned = tensors(number + 1, 0.1, base)
        tuned |= {"ids": torch.arange(4), "head": torch.full((number + 2, 16), float(number))}
        if name == "med":
            tuned = {f"bert.{key}": value for key, value in tuned.items()}
        if name == "art":
            tuned["embed"] = torch.cat([tuned["embed"], torch.ones(2, 16, dtype=torch.bfloat16)])
            tuned["layer.mlp"] = tuned["layer.mlp"].float()
        tasks.append(write_checkpoint(tmp_path / name, tuned, config=f'{{"of": "{name}"}}'))
    return root, tasks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def own(name: str, key: str) -> str:
    return f"bert.{key}" if name == "med" else key


def vectors(base: Path, tasks: list[Path], key: str) -> torch.Tensor:
    before = weights(base)[key].float()
    return torch.stack([weights(task)[own(task.name, key)].float() - before for task in tasks])


def test_average_is_the_mean_of_the_weights(family, tmp_path):
    base, tasks = family
    report = merge(base, tasks, tmp_path / "out", method="average")
    found, before = weights(tmp_path / "out"), weights(base)
    assert found.keys() == before.keys()
    for key in ("layer.mlp", "layer.norm", "scalar"):
        wanted = before[key].float() + vectors(base, tasks, key).mean(0)
        assert torch.equal(found[key], wanted.to(torch.bfloat16)), key
    # Resized in one task, or no float: the base's.
    assert torch.equal(found["embed"], before["embed"])
    assert torch.equal(found["ids"], before["ids"])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"of": "base"}
    assert report.merged_params == 64 * 48 + 16 + 1
    assert report.left == {
        "law": ("embed", "head", "ids"),
        "med": ("bert.embed", "bert.head", "bert.ids"),
        "art": ("embed", "head", "ids"),
    }
    assert report.nbytes == sum(t.numel() * t.element_size() for t in found.values())


def test_per_task_keeps_what_was_not_merged(family, tmp_path):
    base, tasks = family
    merge(base, tasks, tmp_path / "one", method="ties")
    merge(base, tasks, tmp_path / "out", method="ties", per_task=True)
    one = weights(tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["art", "law", "med"]
    for task in tasks:
        found, before = weights(tmp_path / "out" / task.name), weights(task)
        assert found.keys() == before.keys()
        for key in ("embed", "head", "ids"):
            assert torch.equal(found[own(task.name, key)], before[own(task.name, key)])
        for key in ("layer.mlp", "layer.norm", "scalar"):
            assert torch.equal(found[own(task.name, key)], one[key])
        config = (tmp_path / "out" / task.name / "config.json").read_text()
        assert json.loads(config) == {"of": task.name}


def test_packed_and_plain_tasks_mix_and_give_the_same(family, tmp_path):
    base, tasks = family
    packed = tmp_path / "law.nps"
    nps_compress.pack(base, tasks[0], packed, lossless=True)
    for method in ("ties", "dare", "emr"):
        plain, mixed = tmp_path / f"{method}-plain", tmp_path / f"{method}-mixed"
        merge(base, tasks, plain, method=method)
        merge(base, [packed, *tasks[1:]], mixed, method=method)
        for file in sorted(plain.rglob("*")):
            if file.is_file():
                assert file.read_bytes() == (mixed / file.relative_to(plain)).read_bytes()


def test_a_packed_result_unpacks_to_the_checkpoint(family, tmp_path):
    base, tasks = family
    merge(base, tasks, tmp_path / "plain", method="nps")
    report = merge(base, tasks, tmp_path / "out.nps", method="nps")
    nps_compress.unpack(base, tmp_path / "out.nps", tmp_path / "out")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert report.nbytes == (tmp_path / "out.nps").stat().st_size
    said = nps_compress.inspect(tmp_path / "out.nps")["metadata"]["merge"]
    assert json.loads(said)["method"] == "nps"
    assert json.loads(said)["tasks"] == ["law", "med", "art"]


def test_masks_of_emr_are_a_bundle(family, tmp_path):
    base, tasks = family
    merge(base, tasks, tmp_path / "plain", method="emr")
    merge(base, tasks, tmp_path / "out", method="emr", form="nps")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["art.nps", "base.nps", "law.nps", "med.nps"]
    for task in tasks:
        nps_compress.verify(base, tmp_path / "out" / f"{task.name}.nps")
        folder = tmp_path / f"{task.name}-again"
        nps_compress.unpack(base, tmp_path / "out" / f"{task.name}.nps", folder)
        found, plain = weights(folder), weights(tmp_path / "plain" / task.name)
        assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_emr_of_one_task_is_the_task(family, tmp_path):
    base, tasks = family
    merge(base, tasks[:1], tmp_path / "out", method="emr")
    found, tuned = weights(tmp_path / "out" / "law"), weights(tasks[0])
    assert all(torch.equal(found[key], tuned[key]) for key in tuned)


def test_blocks_and_scopes_give_what_the_whole_tensor_gives(family, tmp_path, monkeypatch):
    """However tensors are cut for the work."""
    from nps_compress.merging import merger

    base, tasks = family
    opened = open_checkpoint(base), [open_checkpoint(task) for task in tasks]
    for scope in ("global", "tensor"):
        for name, method in METHODS.items():
            by = Settings(density=0.3, prune="magnitude" if method.prunes else None, scope=scope)
            found = []
            for size in (1 << 18, 50):
                monkeypatch.setattr(merger, "SLICE", size)
                merged = Merger(*opened)
                merged.count(by)
                plan = merged.plan(method, by)
                found.append(dict(merged.each_merged(plan)))
            assert found[0].keys() == found[1].keys() == set(SHAPES) - {"embed"}
            for key in found[0]:
                for first, second in zip(found[0][key], found[1][key], strict=True):
                    if method.measure is None:
                        assert np.array_equal(first, second), (name, scope, key)
                    else:  # sums over all tensors round differently
                        values = [to_float32(words, BY_NAME["BF16"]) for words in (first, second)]
                        np.testing.assert_allclose(*values, rtol=0.01, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(density=st.floats(0.05, 1), seed=st.integers(0, 5))
def test_ties_is_the_papers_algorithm(density, seed, tmp_path_factory):
    """Against a plain reading of it in torch, thresholds over the whole task vector."""
    folder = tmp_path_factory.mktemp("ties")
    generator = torch.Generator().manual_seed(seed)  # in float32 no two magnitudes are alike
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tuned = [
        {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        for _ in range(3)
    ]
    paths = [write_checkpoint(folder / f"t{n}", each) for n, each in enumerate(tuned)]
    merger = Merger(
        open_checkpoint(write_checkpoint(folder / "base", base)), list(map(open_checkpoint, paths))
    )
    by = Settings(density=density, prune="magnitude")
    merger.count(by)
    found = dict(merger.each_merged(merger.plan(METHODS["ties"], by)))
    flat = [
        torch.cat([(each[k].float() - base[k].float()).reshape(-1) for k in sorted(base)])
        for each in tuned
    ]
    keep = round(density * flat[0].numel())
    trimmed = []
    for tau in flat:
        threshold = tau.abs().sort(descending=True).values[keep - 1]
        trimmed.append(torch.where(tau.abs() >= threshold, tau, 0))
    stacked = torch.stack(trimmed)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = (stacked * sign > 0).float()
    mean = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
    wanted = torch.cat([base[k].float().reshape(-1) for k in sorted(base)]) + mean
    got = torch.cat([torch.from_numpy(found[k][0].view(np.float32)) for k in sorted(base)])
    # Those within a thousandth of the threshold are kept by a draw.
    apart = (got - wanted).abs() > 1e-5
    assert apart.float().mean() < 0.01


def test_tensors_that_are_not_finite_are_left_alone(family, tmp_path):
    base, tasks = family
    broken = weights(tasks[1])
    broken["bert.layer.norm"][3] = float("nan")
    write_checkpoint(tasks[1], broken)
    report = merge(base, tasks, tmp_path / "out", method="ties")
    assert torch.equal(weights(tmp_path / "out")["layer.norm"], weights(base)["layer.norm"])
    assert "bert.layer.norm" in report.left["med"]


def test_a_scale_that_leaves_the_range_writes_nothing(tmp_path):
    one = {"w": torch.full((8,), 100.0, dtype=torch.float16)}
    base = write_checkpoint(tmp_path / "base", {"w": torch.zeros(8, dtype=torch.float16)})
    task = write_checkpoint(tmp_path / "task", one)
    for out in ("out", "out.nps"):
        with pytest.raises(InvalidArgumentError, match="stays finite in F16"):
            merge(
                base, [task], tmp_path / out, method="task-arithmetic", settings=Settings(scale=1e4)
            )
        assert not (tmp_path / out).exists()


def test_what_is_refused(family, tmp_path):
    base, tasks = family
    with pytest.raises(InvalidArgumentError, match="agreement"):
        merge(base, tasks[:1], tmp_path / "out", method="consensus")
    with pytest.raises(InvalidArgumentError, match="one or more"):
        merge(base, [], tmp_path / "out", method="ties")
    with pytest.raises(InvalidArgumentError, match="called differently"):
        merge(base, [tasks[0], tasks[0]], tmp_path / "out", method="ties")
    other = write_checkpoint(tmp_path / "other", {"x": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="shares no tensor"):
        merge(base, [other], tmp_path / "out", method="ties")
    with pytest.raises(OutputExistsError):
        merge(base, tasks, tasks[0], method="ties", force=True)
    stranger = tmp_path / "full"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    for per_task in (False, True):
        with pytest.raises(OutputExistsError, match=r"notes\.txt"):
            merge(base, tasks, stranger, method="ties", per_task=per_task, force=True)
    assert not (tmp_path / "out").exists()
    wrong = write_checkpoint(tmp_path / "wrong", {**weights(base), "scalar": torch.tensor(9.0)})
    nps_compress.pack(wrong, tasks[0], tmp_path / "law.nps")
    with pytest.raises(nps_compress.BaseMismatchError):
        open_finetuned(open_checkpoint(base), tmp_path / "law.nps")


def test_names_of_methods_are_those_of_the_library():
    assert set(NAMES) == set(METHODS)


@pytest.mark.parametrize("method", NAMES)
def test_every_method_by_the_command(family, tmp_path, method):
    base, tasks = family
    said = json.loads(
        ok("merge", base, *tasks, "-o", tmp_path / "out", "--method", method, "--json")
    )
    assert said["method"] == method
    assert said["tasks"] == ["law", "med", "art"]
    folder = tmp_path / "out" / "law" if method == "emr" else tmp_path / "out"
    assert all(torch.isfinite(t.float()).all() for t in weights(folder).values())
    again = ok("merge", base, *tasks, "-o", tmp_path / "out", "--method", method, "--force")
    assert "3 tasks merged" in again
    assert "not merged of med: bert.embed and 2 more" in again


def test_bad_options_end_in_one_line(family, tmp_path):
    base, tasks = family
    out = tmp_path / "out"

    def wrong(*more, code=2):
        return fails("merge", base, *tasks, "-o", out, *more, code=code)

    assert "soup" in wrong("--method", "soup")
    assert "--scale can't be used" in wrong("--method", "average", "--scale", "2")
    assert "--prune can't be used" in wrong("--method", "della", "--prune", "sampled")
    assert "--window can't be used" in wrong("--method", "ties", "--window", "0.1")
    assert "needs --calibration" in wrong("--method", "ties", "--generations", "2")
    assert "need --prune" in wrong("--method", "task-arithmetic", "--density", "0.1")
    assert "received 2.0" in wrong("--method", "ties", "--density", "2", code=1)
    assert "1 files" in wrong("--method", "ties", "--calibration", base, code=1)
    missing = fails("merge", base, tmp_path / "no.nps", "-o", out, "--method", "ties")
    assert "no.nps" in missing
    assert not out.exists()


def test_rules_of_pruning_by_the_command(family, tmp_path):
    base, tasks = family
    found = {}
    for rule in ("magnitude", "sampled", "signs", "random"):
        out = tmp_path / rule
        options = ("--method", "task-arithmetic", "--scale", "1", "--prune", rule)
        ok("merge", base, *tasks, "-o", out, *options, "--density", "0.2", "--scope", "tensor")
        found[rule] = weights(out)["layer.mlp"]
    assert len({each.float().numpy().tobytes() for each in found.values()}) == 4
