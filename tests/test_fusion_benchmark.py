"""What benchmarks/fusion.py makes of its rows, counted by hand."""

from __future__ import annotations

import pytest


@pytest.fixture
def fusion(benchmark, tmp_path, monkeypatch):
    module = benchmark("fusion")
    monkeypatch.setattr(module, "RESULT", tmp_path / "fusion.csv")
    return module


def add(fusion, method, setting, normalised, development="", seed=0, finetuned="0.9", **more):
    row = {
        "family": "digits",
        "finetuned": finetuned,
        "method": method,
        "setting": setting,
        "tuned": "accuracy" if development else "data-free",
        "seed": seed,
        "density": "0.2",
        "subspaces": "1",
        "calibration": "1",
        "normalised": normalised,
        "development": development,
    }
    fusion.rows.append(fusion.RESULT, fusion.FIELDS, row | more)


def test_development_data_choose_for_each_seed_and_set_of_fine_tunes(fusion):
    add(fusion, "ties", "lambda", 0.6, "0.71", density="0.1")
    add(fusion, "ties", "lambda", 0.5, "0.72", density="0.2")
    add(fusion, "ties", "lambda", 0.4, "0.73", seed=1)
    add(fusion, "ties", "lambda", 0.8, "0.60", finetuned="0.8")
    add(fusion, "task-arithmetic", "lambda", 0.55, "0.5")
    add(fusion, "task-arithmetic", "lambda, sampled", 0.45, "0.9")
    add(fusion, "evolver", "average", 0.7, "0.5")
    add(fusion, "evolver", "another", 0.9, "0.4")
    add(fusion, "evolver", "another", 0.1, "0.3", seed=1)
    assert fusion.as_chosen("digits") == {
        ("task-arithmetic, sampled", "accuracy"): {"0.9": pytest.approx([45])},
        ("task-arithmetic", "accuracy"): {"0.9": pytest.approx([55])},
        ("evolver", "accuracy"): {"0.9": pytest.approx([70, 70])},
        ("ties", "accuracy"): {"0.9": pytest.approx([50, 40]), "0.8": pytest.approx([80])},
    }
    found = [line.split("  ") for line in fusion.summary("digits").split("\n")]
    (line,) = [[cell.strip() for cell in cells if cell] for cells in found if cells[0] == "ties"]
    # Sets of fine-tunes weigh alike.
    assert line[:4] == ["ties", "accuracy", "62.5", "40.0 to 80.0"]


def test_without_data_it_is_the_defaults(fusion):
    add(fusion, "dare", "0.4", 0.3)
    add(fusion, "dare", "elected", 0.9)
    add(fusion, "dare", "0.4", 0.4, seed=1)
    add(fusion, "dare", "elected", 0.9, seed=2)
    assert fusion.as_chosen("digits") == {("dare", "data-free"): {"0.9": pytest.approx([30, 40])}}


def test_ablations_are_no_choice(fusion):
    main = {"subspaces": "8", "density": "0.1"}
    add(fusion, "nps", "lambda, coefficients", 0.6, "0.5", **main)
    for other in ({"subspaces": "4"}, {"calibration": "0.25"}, {"density": "0.3"}):
        add(fusion, "nps", "lambda, coefficients", 0.9, "0.9", **main | other)
    assert fusion.as_chosen("digits") == {("nps", "accuracy"): {"0.9": pytest.approx([60])}}
    assert fusion.summary("digits").split("\n")[1].split()[:3] == ["nps", "accuracy", "60.0"]


def test_an_ablation_is_of_seeds_that_have_all_of_it(fusion):
    base = {"density": "0.05", "subspaces": "8"}
    for seed, most in ((0, 4), (1, 2)):
        for number, subspaces in enumerate(("8", "1", "2", "4")[:most]):
            more = base | {"subspaces": subspaces, "seed": seed}
            add(fusion, "nps", "lambda, coefficients", 0.5 + number / 10, "0.5", **more)
    assert fusion.ablation("subspaces") == {"0.9": {1: [60.0], 2: [70.0], 4: [80.0], 8: [50.0]}}
    assert fusion.ablation("density") == fusion.ablation("calibration") == {}


def test_rows_of_other_fine_tunes_have_a_column_of_their_own(fusion):
    add(fusion, "ties", "lambda", 0.6)
    add(fusion, "ties", "lambda", 0.4, seed=1)
    add(fusion, "ties", "lambda", 0.7, finetuned="0.8")
    heads, line = (text.split("  ") for text in fusion.table("digits").split("\n"))
    heads, line = ([cell.strip() for cell in cells if cell] for cells in (heads, line))
    found = dict(zip(heads, line, strict=True))
    assert (found["0.8"], found["0.9"]) == ("70.0", "50.0 (2)")


def test_the_picture_is_drawn(fusion, tmp_path):
    add(fusion, "ties", "lambda", 0.6)
    more = {"density": "0.05", "subspaces": "8"}
    add(fusion, "nps", "lambda, coefficients", 0.6, "0.5", **more)
    fusion.plot(tmp_path / "fusion.png")
    assert (tmp_path / "fusion.png").stat().st_size > 10_000


def test_other_fine_tunes_are_measured_and_the_same_are_not_again(fusion, monkeypatch, capsys):
    measured = []

    class Bench:
        """Of fine-tunes that differ by training."""

        def __init__(self, family, training):
            self.finetuned = [0.9 - training / 10]

        def names(self):
            return ["one"]

        def base(self):
            return [0.3]

        def run(self, run):
            measured.append((self.finetuned, run.method))
            return {"normalised": "0.5", "seconds": 0}

    monkeypatch.setattr(fusion, "Bench", Bench)
    chosen = list(fusion.runs(False, range(1)))[:2]
    for training in (0, 1, 0, 1):
        fusion.measure("digits", chosen, training)
    assert measured == [([finetuned], run.method) for finetuned in (0.9, 0.8) for run in chosen]
    assert len(fusion.rows.read(fusion.RESULT)) == 2 * (1 + 2)  # the base has a row
