"""Searches on tiny real models: the candidates scored are the bytes that are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nps_compress
from nps_compress import (
    CalibrationError,
    CheckpointError,
    InvalidArgumentError,
    Recipe,
    SearchOptions,
)
from nps_compress.calibration import read_examples
from nps_compress.fitness import Fitness
from nps_compress.models import load_model


def rows(path: Path):
    return read_examples(path)


def test_kl_of_the_finetune_with_itself_is_zero(classifier_pair):
    _, tuned, calibration = classifier_pair
    fitness = Fitness(tuned, rows(calibration), "kl")
    assert fitness.score() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        fitness.model.classifier.weight[0] += 0.5
    assert fitness.score() < -1e-3


def test_accuracy_and_loss_agree_with_transformers(classifier_pair):
    _, tuned, calibration = classifier_pair
    loaded = load_model(tuned)
    model, tokenizer = loaded.model, loaded.processor
    names = {"red": 0, "green": 1, "blue": 2}
    right, loss = 0, 0.0
    examples = rows(calibration)
    for row in examples:
        with torch.inference_mode():
            logits = model(**tokenizer(row.text, return_tensors="pt")).logits[0]
        label = names.get(row.label, row.label)
        right += int(logits.argmax()) == label
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(label)))
    accuracy = Fitness(tuned, examples, "accuracy").score()
    assert accuracy == pytest.approx(right / len(examples))
    score = Fitness(tuned, examples, "loss").score()
    assert score == pytest.approx(-loss / len(examples), abs=1e-5)


def test_causal_loss_agrees_with_transformers(causal_pair):
    _, tuned, calibration = causal_pair
    loaded = load_model(tuned)
    model, tokenizer = loaded.model, loaded.processor
    total, count = 0.0, 0
    for row in rows(calibration):
        inputs = tokenizer(row.text, return_tensors="pt")
        with torch.inference_mode():
            found = model(**inputs, labels=inputs["input_ids"])
        tokens = inputs["input_ids"].shape[1] - 1
        total, count = total + float(found.loss) * tokens, count + tokens
    score = Fitness(tuned, rows(calibration), "loss", batch_size=5).score()
    assert score == pytest.approx(-total / count, abs=1e-5)
    assert Fitness(tuned, rows(calibration), "kl").score() == pytest.approx(0, abs=1e-6)
    with pytest.raises(InvalidArgumentError, match="causal LM"):
        Fitness(tuned, rows(calibration), "accuracy")


@pytest.mark.parametrize("pair", ["classifier_pair", "causal_pair"])
@pytest.mark.parametrize("prune", ["magnitude", "sampled"])
def test_search_scores_what_is_stored(pair, prune, request, tmp_path):
    base, tuned, calibration = request.getfixturevalue(pair)
    recipe = Recipe.with_subspaces(3, "tail", prune=prune, density=0.1)
    report = nps_compress.pack(
        base,
        tuned,
        tmp_path / "t.nps",
        recipe=recipe,
        calibration=calibration,
        search=SearchOptions(generations=4),
    )
    found = report.recipe.search
    assert found["best"] >= found["start"]
    assert found["best_by_generation"] == sorted(found["best_by_generation"])
    assert found["evaluations"] == 1 + 4 * 7
    assert found["finetuned"] == pytest.approx(0, abs=1e-6)
    nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "out")
    reference = Fitness(tuned, rows(calibration), "kl")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    reference.model.load_state_dict(weights, strict=True)
    assert reference.score() == pytest.approx(found["best"], abs=1e-6)
    stored = json.loads(nps_compress.inspect(tmp_path / "t.nps")["metadata"]["recipe"])
    assert tuple(stored["coefficients"]) == report.recipe.coefficients
    assert not list(tmp_path.glob("*.search.json"))


def test_search_then_pack_equals_pack_with_calibration(classifier_pair, tmp_path):
    base, tuned, calibration = classifier_pair
    recipe = Recipe.with_subspaces(2, "equal", density=0.1)
    options = SearchOptions(fitness="loss", generations=2)
    found = nps_compress.search_recipe(
        base, tuned, calibration, tmp_path / "r.json", recipe, options
    )
    assert Recipe.read(tmp_path / "r.json") == found
    nps_compress.pack(base, tuned, tmp_path / "a.nps", recipe=found)
    nps_compress.pack(
        base, tuned, tmp_path / "b.nps", recipe=recipe, calibration=calibration, search=options
    )
    first, second = (nps_compress.inspect(tmp_path / f"{name}.nps") for name in "ab")
    for key in ("content_digest", "tensors", "files", "relative_error"):
        assert first[key] == second[key]
    # Only where it is searched, the file says what that found.
    scores = [key for key in second["metadata"] if key not in first["metadata"]]
    assert all(key.startswith("quality_") for key in scores)
    assert first["metadata"] == {k: v for k, v in second["metadata"].items() if k not in scores}


def test_labels_that_the_model_does_not_know(classifier_pair, tmp_path):
    _, tuned, _ = classifier_pair
    for label in ('"purple"', "3", "-1", "null"):
        path = tmp_path / "c.jsonl"
        path.write_text(f'{{"text": "the cat", "label": 1}}\n{{"text": "a", "label": {label}}}\n')
        with pytest.raises(CalibrationError, match="example 2 has label"):
            Fitness(tuned, rows(path), "accuracy", source=path)
        assert Fitness(tuned, rows(path), "kl").score() <= 1e-6  # needs none


def test_text_without_a_next_token(causal_pair, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "cat"}\n')
    with pytest.raises(CalibrationError, match="two tokens"):
        Fitness(causal_pair[1], rows(tmp_path / "c.jsonl"), "loss", source="c.jsonl")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(causal_pair, tmp_path, side):
    from transformers import GPT2Config, GPT2LMHeadModel

    _, tuned, calibration = causal_pair  # for its tokenizer
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=18, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wpe.weight *= 50  # learned positions, that it would hurt to shift
    model.save_pretrained(tmp_path / "gpt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gpt" / name).write_bytes((tuned / name).read_bytes())
    path = tmp_path / "gpt" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": side}))
    alone = Fitness(tmp_path / "gpt", rows(calibration), "loss", batch_size=1).score()
    together = Fitness(tmp_path / "gpt", rows(calibration), "loss", batch_size=24).score()
    assert together == pytest.approx(alone, abs=1e-4)


def test_line_separators_inside_a_text(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert [row.text for row in rows(tmp_path / "c.jsonl")] == ["a\u2028b\x85c"]


def test_state_of_another_finetune_is_refused(classifier_pair, tmp_path):
    base, tuned, calibration = classifier_pair
    recipe = Recipe.with_subspaces(2, "tail")
    out = tmp_path / "r.json"
    nps_compress.search_recipe(base, tuned, calibration, out, recipe, SearchOptions(generations=1))
    state = out.with_name("r.json.search.json")
    assert not state.exists()
    from nps_compress.fitness import Fitness as Original

    calls = []

    def stop(self, index):
        calls.append(self)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(self, index)

    original = Original._part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Original, "_part", stop)
        with pytest.raises(nps_compress.SearchInterruptedError):
            nps_compress.search_recipe(
                base, tuned, calibration, out, recipe, SearchOptions(generations=1), force=True
            )
    assert state.exists()
    weights = load_file(tuned / "model.safetensors")
    weights["classifier.weight"] *= -5  # a tensor that the base lacks
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(nps_compress.RecipeError, match="another search"):
        nps_compress.search_recipe(
            base, tuned, calibration, out, recipe, SearchOptions(generations=1), force=True
        )


def test_pack_with_calibration_searches_subspaces_by_default(classifier_pair, tmp_path):
    base, tuned, calibration = classifier_pair
    report = nps_compress.pack(
        base,
        tuned,
        tmp_path / "t.nps",
        calibration=calibration,
        search=SearchOptions(generations=1),
    )
    assert len(report.recipe.coefficients) == 8


def test_broken_finetune_is_refused(classifier_pair, tmp_path):
    base, tuned, calibration = classifier_pair
    weights = load_file(tuned / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    call = (base, tuned, tmp_path / "t.nps")
    with pytest.raises(CheckpointError, match="kl of nan"):
        nps_compress.pack(*call, recipe=Recipe(), calibration=calibration)
    with pytest.raises(CheckpointError, match="can't be run on the examples"):
        nps_compress.pack(*call, calibration=calibration)  # finds it as it measures importance
    assert not list(tmp_path.glob("t.nps*"))


def test_folder_without_a_tokenizer(classifier_pair):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (classifier_pair[1] / name).unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_model(classifier_pair[1])


def test_folder_without_a_model(tmp_path, causal_pair):
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load_model(tmp_path)
    config = json.loads((causal_pair[1] / "config.json").read_text())
    config["architectures"] = ["LlavaForConditionalGeneration"]
    (causal_pair[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is a LlavaForConditionalGeneration"):
        load_model(causal_pair[1])
