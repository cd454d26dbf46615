"""Tuning on development data: merges and transfers of real, tiny models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import fails, ok

import nps_compress
import nps_compress.transferring
from nps_compress.errors import CalibrationError, InvalidArgumentError, SearchInterruptedError
from nps_compress.merging import exams, tuning
from nps_compress.merging.contract import Settings
from nps_compress.merging.driver import merge
from nps_compress.merging.tuning import TuningOptions
from nps_compress.models import load_model
from nps_compress.transferring import Balance, transfer

FEW = TuningOptions(2, 3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(tuning, "SCALE_GENERATIONS", 1)
    monkeypatch.setattr(nps_compress.transferring, "LAMBDAS", (0.0, 1.0))


@pytest.fixture
def tasks(classifier_pair, tmp_path) -> tuple[Path, list[Path], list[Path]]:
    """A base, two classifiers made from it, and development data for each."""
    base, first, data = classifier_pair
    second = tmp_path / "second"
    shutil.copytree(first, second)
    weights, start = load_file(first / "model.safetensors"), load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in weights.items():
        before = start.get(name.removeprefix("bert."), tensor)
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = before + 0.05 * noise * noise.abs()
    save_file(weights, second / "model.safetensors", {"format": "pt"})
    return base, [first, second], [data, data]


def test_lambda_is_tuned_and_what_is_written_has_it(tasks, tmp_path):
    base, finetuned, data = tasks
    report = merge(
        *(base, finetuned, tmp_path / "out"),
        method="task-arithmetic",
        calibration=data,
        tuning=TuningOptions(4),
    )
    assert report.tuned.best > report.tuned.start
    assert report.settings.scale != 0.4
    assert report.tuned.evaluations == 1 + 4 * 4
    mean = sum(report.scores.values()) / 2
    assert mean == pytest.approx(report.tuned.best)
    merge(
        *(base, finetuned, tmp_path / "again"),
        method="task-arithmetic",
        settings=Settings(scale=report.settings.scale),
    )
    found, again = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert sorted(p.name for p in tmp_path.iterdir() if "search" in p.name) == []


def test_scores_are_those_of_the_models_that_are_written(tasks, tmp_path):
    """The share that is reported, against the written model's own accuracy."""
    from nps_compress.calibration import read_examples
    from nps_compress.fitness import Fitness

    base, finetuned, data = tasks
    report = merge(
        *(base, finetuned, tmp_path / "out"),
        method="emr",
        calibration=data,
        fitness="accuracy",
    )
    examples = read_examples(data[0])
    for folder in finetuned:
        before = Fitness(folder, examples, "accuracy").score()
        after = Fitness(tmp_path / "out" / folder.name, examples, "accuracy").score()
        assert report.scores[folder.name] == pytest.approx(after / before)


@pytest.mark.parametrize(("method", "stop_at"), [("nps", 9), ("evolver", 3)])
def test_an_interrupted_search_goes_on_where_it_was(tasks, tmp_path, monkeypatch, method, stop_at):
    base, finetuned, data = tasks
    options = {"method": method, "calibration": data, "tuning": FEW, "settings": None}
    if method == "nps":
        options["settings"] = Settings(density=0.2, prune="magnitude", top_shares=(0.2, 0.05))
    measured, real = [], exams.Exams.measure

    def counted(self, plan):
        if len(measured) + 1 == stop_at and not (tmp_path / "resumed.search.json.done").exists():
            (tmp_path / "resumed.search.json.done").touch()
            raise KeyboardInterrupt
        measured.append(plan.settings)
        return real(self, plan)

    monkeypatch.setattr(exams.Exams, "measure", counted)
    with pytest.raises(SearchInterruptedError) as caught:
        merge(base, finetuned, tmp_path / "resumed", **options)
    assert caught.value.state.exists()
    assert not (tmp_path / "resumed").exists()
    resumed = merge(base, finetuned, tmp_path / "resumed", **options)
    monkeypatch.setattr(exams.Exams, "measure", real)
    again = merge(base, finetuned, tmp_path / "whole", **options)
    assert resumed.settings == again.settings
    assert resumed.tuned == again.tuned
    # Nothing twice, but what the report measures again at the end.
    assert len(measured) == resumed.tuned.evaluations + 1
    if method == "nps":
        assert len(again.settings.coefficients) == 2
        assert all(len(row) == 3 for row in again.settings.coefficients)
    assert again.tuned.best >= again.tuned.start


def test_evolver_keeps_what_gains(tasks, tmp_path):
    base, finetuned, data = tasks
    report = merge(
        *(base, finetuned, tmp_path / "out"), method="evolver", calibration=data, tuning=FEW
    )
    assert report.tuned.evaluations == 1 + 2 * 2
    mean = sum(report.scores.values()) / 2
    assert mean == pytest.approx(report.tuned.best)
    for exchange in report.settings.exchanges:
        assert {exchange.member, exchange.other} == {0, 1}


def test_a_search_of_other_data_is_not_taken_up(tasks, tmp_path, monkeypatch):
    base, finetuned, data = tasks

    def interrupted(self, plan):
        if plan.settings.scale != 0.4:
            raise KeyboardInterrupt
        return real(self, plan)

    real = exams.Exams.measure
    monkeypatch.setattr(exams.Exams, "measure", interrupted)
    options = {"method": "task-arithmetic", "calibration": data}
    with pytest.raises(SearchInterruptedError):
        merge(base, finetuned, tmp_path / "out", **options)
    with pytest.raises(nps_compress.RecipeError, match="belongs to another search"):
        merge(base, finetuned, tmp_path / "out", **options, fitness="loss")


def test_packed_tasks_are_tuned_as_plain_ones(tasks, tmp_path):
    base, finetuned, data = tasks
    packed = tmp_path / "tuned.nps"
    nps_compress.pack(base, finetuned[0], packed, lossless=True)
    options = {"method": "ties", "calibration": data, "tuning": TuningOptions(1)}
    plain = merge(base, finetuned, tmp_path / "plain", **options)
    mixed = merge(base, [packed, finetuned[1]], tmp_path / "mixed", **options)
    assert plain.settings == mixed.settings
    assert plain.tuned == mixed.tuned


def test_the_command_tunes(tasks, tmp_path):
    base, finetuned, data = tasks
    given = [word for path in data for word in ("--calibration", path)]
    options = ("--method", "neuromerging", "--generations", "1", "--population", "2", "--per-task")
    text = ok("merge", base, *finetuned, "-o", tmp_path / "out", *options, *given)
    assert "after 3 evaluations" in text
    assert "share kept" in text
    model = load_model(tmp_path / "out" / "second").model
    assert all(torch.isfinite(p).all() for p in model.parameters())
    emr = ("--method", "emr", "--generations", "1")
    line = fails("merge", base, *finetuned, "-o", tmp_path / "x", *emr, *given, code=2)
    assert "nothing to tune" in line


def test_harmonic_mean():
    assert Balance(0.5, 1.0).harmonic == pytest.approx(2 / 3)
    assert Balance(0.0, 1.0).harmonic == 0
    assert Balance(0.0, 0.0).harmonic == 0


def test_transfer_of_a_language_model(causal_pair, tmp_path):
    base, tuned, data = causal_pair
    general = tmp_path / "general.jsonl"
    general.write_text("".join(f'{{"text": "the {w} of a day"}}\n' for w in ("cat", "dog", "bird")))
    out, plot = tmp_path / "out", tmp_path / "plot.svg"
    options = {"subspaces": 3, "tuning": FEW, "settings": Settings(density=0.3, prune="magnitude")}
    report = transfer(base, tuned, out, data, general, plot=plot, **options)
    assert report.metric == "loss"
    assert report.found.harmonic == pytest.approx(report.tuned.best)
    assert report.found.harmonic >= report.pruned.harmonic == pytest.approx(report.tuned.start)
    # Against the written model itself, and the likelihood of a token by plain transformers.
    from nps_compress.calibration import read_examples
    from nps_compress.fitness import Fitness

    for folder, balance in ((out, report.found), (base, report.base), (tuned, report.finetuned)):
        for path, score in ((data, balance.target), (general, balance.general)):
            loss = Fitness(folder, read_examples(path), "loss").score()
            assert score == pytest.approx(math.exp(loss), rel=1e-4)
    before, after = (load_file(f / "model.safetensors") for f in (base, out))
    changed = sum(int((before[name] != after[name]).sum()) for name in after)
    total = sum(tensor.numel() for tensor in after.values())
    assert changed / total == pytest.approx(0.3, abs=0.01)
    assert report.curves.keys() == {"pruned", "searched"}
    at_zero = report.curves["pruned"][0]
    assert at_zero[0] == 0
    assert at_zero[1].target == pytest.approx(report.base.target)
    picture = ElementTree.parse(plot)
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 2

    packed = tmp_path / "out.nps"
    plain = transfer(base, tuned, packed, data, general, search=False, settings=report.settings)
    assert plain.tuned is None
    nps_compress.verify(base, packed)


def test_transfer_by_the_command(causal_pair, tmp_path):
    base, tuned, data = causal_pair
    out = tmp_path / "out.nps"
    options = ("--target", data, "--general", data, "--generations", "1", "--population", "2")
    found = json.loads(ok("transfer", base, tuned, "-o", out, *options, "--json"))
    assert found["tuned"]["evaluations"] > 3
    assert found["settings"]["density"] == 0.1
    text = ok(
        *("transfer", base, out, "-o", tmp_path / "again", "--target", data, "--general", data),
        *("--generations", "0", "--scale", "0.5"),
    )
    assert "no search, lambda 0.5" in text
    assert "fine-tune" in text


def test_transfer_refuses_data_without_answers(classifier_pair, tmp_path):
    base, tuned, data = classifier_pair
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text('{"text": "a red cat"}\n')
    with pytest.raises(CalibrationError, match="lacks the labels"):
        transfer(base, tuned, tmp_path / "out", data, unlabelled)
    with pytest.raises(InvalidArgumentError, match="kl"):
        transfer(base, tuned, tmp_path / "out", data, data, fitness="kl")
    line = fails(
        *("transfer", base, tuned, "-o", tmp_path / "out", "--target", data),
        *("--general", tmp_path / "missing.jsonl"),
    )
    assert "missing.jsonl" in line
    assert not (tmp_path / "out").exists()
