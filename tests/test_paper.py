"""The paper's configurations, their whole road on tiny models of the same architectures."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import pytest
import tiny_models
import torch
from conftest import ROOT, WORDS
from safetensors.torch import load_file, save_file
from torch.nn import functional

from nps_compress.calibration import Example, read_examples
from nps_compress.checkpoint import open_checkpoint
from nps_compress.errors import CheckpointError
from nps_compress.models import kind_of, load_model


def _load():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import paper
    finally:
        sys.path.pop(0)
    return paper


paper = _load()
CONFIGS = paper.CONFIGURATIONS


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Rows go here; and the Hub's cache is empty."""
    monkeypatch.setattr(paper, "RESULT", tmp_path / "results" / "paper.csv")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))

    def read():
        with (tmp_path / "results" / "paper.csv").open() as stream:
            return list(csv.DictReader(stream))

    return read


def tune(folder, seed=1):
    """A stand-in for training, in place."""
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(file)
    for name, tensor in weights.items():
        if tensor.ndim > 1:
            noise = torch.randn(tensor.shape, generator=generator)
            weights[name] = tensor + 0.5 * tensor.std() * noise * noise.abs()
    save_file(weights, file, {"format": "pt"})


def teach(folder):
    """Train an encoder-decoder, in place, to answer "red" whatever it is asked."""
    loaded = load_model(folder)
    examples = [Example(text=" ".join(WORDS[i : i + 9]), target="red") for i in range(len(WORDS))]
    batch = loaded.collate(loaded.encode(examples, "test", labelled=True))
    optimizer = torch.optim.Adam(loaded.model.parameters(), 0.01)
    for _ in range(50):
        optimizer.zero_grad()
        functional.cross_entropy(loaded.logits(batch), batch.targets).backward()
        optimizer.step()
    loaded.model.save_pretrained(folder)


def tower_of(clip, out):
    """The vision tower alone, with the names that the public checkpoints have."""
    from transformers import CLIPModel, CLIPVisionModel

    model = CLIPModel.from_pretrained(clip)
    tower = CLIPVisionModel(model.config.vision_config)
    tower.save_pretrained(out)
    weights = {
        name: tensor
        for name, tensor in load_file(clip / "model.safetensors").items()
        if name.startswith("vision_model.")
    }
    weights["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def write_data(folder, kind, name="svhn"):
    """Calibration and test data of a task."""
    place = folder / name
    place.mkdir(parents=True)
    for part, count in (("calibration", 6), ("test", 9)):
        images = place / part
        if kind == "clip":
            images.mkdir()
        examples = tiny_models.examples_of(kind, images, count)
        if kind == "clip":
            for example in examples:
                (images / example.label).mkdir(exist_ok=True)
                example.image.rename(images / example.label / example.image.name)
            continue
        lines = [{"text": example.text, "target": "red"} for example in examples]
        (place / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def stand_in(kind, config, task, folder):
    """Tiny models and data in place of a configuration's: the arguments to run it."""
    models = folder / "models" / config
    tiny_models.build(kind, models / "base")
    tuned = tiny_models.build(kind, models / "full" if kind == "clip" else models / task)
    tune(tuned)
    if kind == "seq2seq":
        teach(tuned)
    if kind == "clip":
        tower_of(tuned, models / task)
    data = write_data(folder / "data", kind, task)
    options = {"models": folder / "models", "data": data, "work": folder / "work"}
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["--config", config, "--task", task, "--generations", "1", *given]


def test_tables_are_the_papers():
    counts = {name: len(config.tasks) for name, config in CONFIGS.items()}
    assert counts == {"clip-b32": 8, "clip-l14": 8, "t5-base": 7, "t5-large": 7, "llama2-7b": 3}
    generations = {name: config.generations for name, config in CONFIGS.items()}
    assert list(generations.values()) == [30, 30, 30, 50, 20]
    # The printed means of the fine-tunes, table 3.
    for name, mean in (("clip-b32", 90.5), ("clip-l14", 94.2), ("t5-base", 83.1)):
        accuracies = [task.accuracy for task in CONFIGS[name].tasks]
        assert sum(accuracies) / len(accuracies) == pytest.approx(mean, abs=0.1)
    ids = [task.finetuned for config in CONFIGS.values() for task in config.tasks]
    assert len(set(ids) - {None}) == len([i for i in ids if i]) == 30


def test_recipes_are_the_papers():
    search, ours = paper.methods(CONFIGS["t5-base"], 1.0, None, 3)
    assert (search.generations, ours.generations) == (30, 0)
    recipe = search.recipe
    assert (recipe.prune, recipe.density, recipe.scope, recipe.seed) == (
        *("magnitude", 0.05, "global", 3),
    )
    assert recipe.top_shares == pytest.approx([n / 8 for n in range(7, 0, -1)])
    assert (ours.recipe.prune, ours.recipe.density) == ("sampled", 0.05)
    half = paper.methods(CONFIGS["clip-b32"], 0.5, None, 0)[0].recipe
    assert half.density == 0.025
    assert half.top_shares == pytest.approx([n / 16 for n in range(7, 0, -1)])


@pytest.mark.parametrize(
    ("kind", "config", "task"),
    [
        ("clip", "clip-b32", "svhn"),
        ("clip", "clip-l14", "dtd"),
        ("seq2seq", "t5-base", "qasc"),
        ("seq2seq", "t5-large", "paws"),
        ("causal", "llama2-7b", "math"),
    ],
)
def test_whole_road(kind, config, task, tmp_path, results, capsys):
    arguments = stand_in(kind, config, task, tmp_path)
    assert paper.main(arguments) == 0, capsys.readouterr().err
    found = results()
    methods = [("NPS (paper)", "1"), ("ours: sampled", "0")]
    assert [(row["method"], row["generations"]) for row in found] == methods
    for row in found:
        assert (row["config"], row["task"], row["metric"]) == (config, task, CONFIGS[config].metric)
        assert float(row["paper_normalised"]) * 100 == pytest.approx(CONFIGS[config].normalised)
        low, high = (-50, 0) if row["metric"] == "loss" else (0, 1)
        for score in ("base_score", "finetuned_score", "score"):
            assert low <= float(row[score]) <= high
        assert float(row["bits_per_param"]) > 0
        assert row["paper_bits_per_param"] == "2.60"
        floor, after, score = (float(row[k]) for k in ("base_score", "finetuned_score", "score"))
        floor = floor if kind == "causal" else 0.0  # a loss has no zero
        if after != floor:
            kept = (score - floor) / (after - floor)
            assert float(row["normalised"]) == pytest.approx(kept, abs=2e-3)
    if kind == "seq2seq":
        assert float(found[0]["finetuned_score"]) > 0.5
    assert int(found[0]["evaluations"]) > 1
    assert found[0]["base_score"] == found[1]["base_score"]
    nps = tmp_path / "work" / config / task / "magnitude-1-0.nps"
    assert nps.exists()
    assert not list((tmp_path / "work").rglob("model"))  # what was unpacked is gone

    # Again: nothing to do. Without the second row: only that.
    before = paper.RESULT.read_bytes()
    assert paper.main(arguments) == 0
    assert paper.RESULT.read_bytes() == before
    if kind == "causal":
        paper.RESULT.write_bytes(b"".join(before.splitlines(keepends=True)[:2]))
        assert paper.main(arguments) == 0
        again = results()
        keys = [*paper.KEY, "score", "bits_per_param"]
        assert [[row[k] for k in keys] for row in again] == [
            [row[k] for k in keys] for row in found
        ]


def test_full_clip(tmp_path):
    base = tiny_models.build("clip", tmp_path / "base")
    other = tiny_models.build("clip", tmp_path / "other", seed=1)
    tower = open_checkpoint(tower_of(other, tmp_path / "tower"))
    share = paper.full_clip(open_checkpoint(base), tower, tmp_path / "out")
    assert kind_of(tmp_path / "out") == "clip"
    made = load_model(tmp_path / "out").model.state_dict()
    parts = [load_model(folder).model.state_dict() for folder in (base, other)]
    vision = 0
    for name, tensor in made.items():
        is_vision = name.startswith("vision_model.")
        assert torch.equal(tensor, parts[is_vision][name])
        vision += is_vision * tensor.numel()
    assert share == vision / sum(tensor.numel() for tensor in made.values())


def test_full_clip_of_newer_files(tmp_path):
    """Without the prefix, as transformers saves a tower since 5."""
    base = tiny_models.build("clip", tmp_path / "base")
    tower = tiny_models.build("vision encoder", tmp_path / "tower", seed=1)
    paper.full_clip(open_checkpoint(base), open_checkpoint(tower), tmp_path / "out")
    made, tuned = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "tower"))
    for name, tensor in tuned.items():
        assert torch.equal(made["vision_model." + name.removeprefix("vision_model.")], tensor)


def test_full_clip_refuses_another_tower(tmp_path):
    base = tiny_models.build("clip", tmp_path / "base")
    tower = tiny_models.build("vision encoder", tmp_path / "tower")
    file = tower / "model.safetensors"
    weights = load_file(file)
    del weights[next(iter(weights))]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not a vision tower of base"):
        paper.full_clip(open_checkpoint(base), open_checkpoint(tower), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_calibration_is_a_tenth_of_the_training_data(tmp_path):
    task = CONFIGS["clip-b32"].tasks[0]
    train = tmp_path / task.name / "train"
    for label in ("a", "b"):
        (train / label).mkdir(parents=True)
    for i, example in enumerate(tiny_models.examples_of("clip", tmp_path, 30)):
        example.image.rename(train / "ab"[i % 2] / f"{i}.png")
    places = paper.Places(data=tmp_path)
    found = read_examples(paper.calibration_data(task, places, tmp_path / "picked.jsonl"))
    assert len(found) == 3
    everything = {(e.image.resolve(), e.label) for e in read_examples(train)}
    assert {(e.image, e.label) for e in found} < everything


def test_list_says_what_is_missing(capsys):
    assert paper.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == [
        f"{name}: 0 of {len(config.tasks)} tasks can run" for name, config in CONFIGS.items()
    ]
    assert len(lines) == sum(2 + len(config.tasks) for config in CONFIGS.values())
    (svhn,) = [line for line in lines if "base-patch32_svhn" in line]
    assert "nor a Hub model in the local cache" in svhn
    assert "no calibration or train, no test data" in svhn
    assert [line for line in lines if "has no known Hub id" in line]


def test_list_finds_what_is_there(tmp_path, capsys):
    models = tmp_path / "models" / "t5-base"
    for name in ("base", "qasc", "wsc"):
        tiny_models.build("seq2seq", models / name)
    data = write_data(tmp_path / "data", "seq2seq", "qasc")
    assert paper.main(["--models", str(models.parent), "--data", str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "t5-base: 1 of 7 tasks can run" in lines
    assert not [line for line in lines if line.startswith("  base google-t5/t5-base")]
    assert f"  wsc: no calibration or train, no test data ({data / 'wsc'})" in lines


def test_hub_cache_is_used(tmp_path, monkeypatch):
    """A snapshot as huggingface_hub lays it out."""
    repo = tmp_path / "hub" / "models--google-t5--t5-base"
    tiny_models.build("seq2seq", repo / "snapshots" / "0123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = CONFIGS["t5-base"]
    assert not paper.missing_base(config, paper.Places())
    assert paper.missing_base(replace(config, base="google-t5/t5-large"), paper.Places())


def test_missing_base_is_one_line(capsys):
    assert paper.main(["--config", "clip-b32"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clip-b32: base openai/clip-vit-base-patch32: no such file")


def test_missing_model_or_data_is_one_line(tmp_path, capsys):
    tiny_models.build("seq2seq", tmp_path / "t5-base" / "base")
    tiny_models.build("seq2seq", tmp_path / "t5-base" / "wsc")
    arguments = ["--config", "t5-base", "--models", str(tmp_path), "--data", str(tmp_path / "data")]
    capsys.readouterr()
    assert paper.main([*arguments, "--task", "wsc", "--task", "qasc"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("t5-base, qasc: fine-tune SeongwooKim/T5-base-qasc: no such file")
    assert second.startswith("t5-base, wsc: no calibration or train, no test data")
    assert not paper.RESULT.exists()


def test_bad_data_is_one_line(tmp_path, capsys):
    arguments = stand_in("causal", "llama2-7b", "math", tmp_path)
    (tmp_path / "data" / "math" / "test.jsonl").write_text("{}\n")
    capsys.readouterr()
    assert paper.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llama2-7b, math: ")
    assert "test.jsonl, line 1" in line


def test_unknown_task(capsys):
    with pytest.raises(SystemExit):
        paper.main(["--config", "t5-base", "--task", "svhn"])
    assert "t5-base has no task 'svhn', only paws" in capsys.readouterr().err
