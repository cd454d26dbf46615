"""Searches on tiny real models: generations that are raced, drawn seeds, workers, interruptions."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest
from conftest import WORDS

import nps_compress
from nps_compress import InvalidArgumentError, Recipe, SearchInterruptedError, SearchOptions
from nps_compress import groups as groups_module
from nps_compress.calibration import read_examples
from nps_compress.candidates import Pruner
from nps_compress.checkpoint import open_checkpoint, pair
from nps_compress.evaluator import Evaluator
from nps_compress.fitness import Fitness
from nps_compress.genotype import Genotype
from nps_compress.report import Quality
from nps_compress.search import Memory, population_size


@pytest.fixture
def data(tmp_path):
    """More calibration data than one batch: seven of them."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(200)]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def pruner_of(base, tuned, recipe):
    pruner = Pruner(pair(open_checkpoint(base), open_checkpoint(tuned)), recipe)
    pruner.count(1 << 30)
    return pruner


def memory(saved=None):
    return Memory({} if saved is None else saved, {}, lambda: None)


def generation(recipe, size, spread):
    genotype = Genotype(recipe, ["subspaces"], [])
    rng = np.random.default_rng(0)
    return [genotype.express(np.exp(rng.normal(0, spread, 3)).tolist()) for _ in range(size)]


class TestEvaluator:
    RECIPE = Recipe.with_subspaces(3, "tail", prune="sampled", density=0.1)

    def evaluator(self, classifier_pair, data, name="kl", workers=1):
        base, tuned, _ = classifier_pair
        examples = read_examples(data)
        return Evaluator(pruner_of(base, tuned, self.RECIPE), examples, name, data, workers)

    def test_survivors_have_the_score_of_all_data(self, classifier_pair, data):
        evaluator = self.evaluator(classifier_pair, data)
        recipes = generation(self.RECIPE, 6, 1.0)
        shares: list[float] = []
        outcomes = evaluator.race(recipes, memory(), shares.append)
        assert 3 <= sum(outcome.share == 1 for outcome in outcomes) < 6
        assert sum(shares) == pytest.approx(sum(outcome.share for outcome in outcomes))
        full = [evaluator.measure(recipe) for recipe in recipes]
        assert all(len(found.counts) == 200 for found in full)
        for found, outcome in zip(full, outcomes, strict=True):
            if outcome.share == 1:
                assert outcome.score == found.score
        best = int(np.argmax([found.score for found in full]))
        assert best == np.argmax([outcome.score for outcome in outcomes])

    def test_any_number_of_workers(self, classifier_pair, data):
        recipes = generation(self.RECIPE, 5, 0.6)
        found = [
            self.evaluator(classifier_pair, data, workers=workers).race(recipes, memory())
            for workers in (1, 2, 3)
        ]
        for others in found[1:]:
            for one, other in zip(found[0], others, strict=True):
                assert other.share == one.share
                assert other.score == pytest.approx(one.score, rel=1e-5)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_what_is_in_memory_is_not_measured_again(
        self, classifier_pair, data, monkeypatch, workers
    ):
        evaluator = self.evaluator(classifier_pair, data, workers=workers)
        recipes = generation(self.RECIPE, 4, 0.5)
        known: dict[str, object] = {}
        first = evaluator.race(recipes, memory(known))
        known = json.loads(json.dumps(known))  # as a state on disk holds it
        gone = [known.pop(key) for key in list(known)[-2:]]
        asked = []
        original = Evaluator._measure
        monkeypatch.setattr(Evaluator, "_measure", lambda *a: asked.append(a[1:]) or original(*a))
        assert evaluator.race(recipes, memory(known)) == first
        assert len(asked) == len(gone)

    def test_the_yardstick(self, classifier_pair, data):
        evaluator = self.evaluator(classifier_pair, data, "agreement", 2)
        assert evaluator.yardstick.finetuned.score == 1
        everything = evaluator.measure(Recipe(prune="sampled", density=1.0))
        assert everything.score > 0.95  # vectors are rounded
        assert evaluator.yardstick.share(everything) == everything.score
        assert evaluator.yardstick.base.score < 0.9
        nearly_base = evaluator.measure(Recipe(prune="sampled", density=1e-5))
        assert nearly_base.score == pytest.approx(evaluator.yardstick.base.score, abs=0.15)

    def test_perplexity_is_measured_in_one_round(self, causal_pair, data):
        base, tuned, _ = causal_pair
        examples = read_examples(data)
        evaluator = Evaluator(pruner_of(base, tuned, self.RECIPE), examples, "perplexity", data)
        outcomes = evaluator.race(generation(self.RECIPE, 4, 2.0), memory())
        assert [outcome.share for outcome in outcomes] == [1] * 4


class TestDraws:
    def test_the_best_seed_is_stored(self, classifier_pair, data, tmp_path):
        base, tuned, _ = classifier_pair
        recipe = Recipe.with_subspaces(2, "tail", prune="sampled", density=0.05, seed=2**32 - 3)
        options = SearchOptions(draws=4, generations=1, population=2)
        report = nps_compress.pack(
            base, tuned, tmp_path / "t.nps", recipe=recipe, calibration=data, search=options
        )
        evaluator = Evaluator(pruner_of(base, tuned, recipe), read_examples(data), "kl", data)
        seeds = [(2**32 - 3 + n) % 2**32 for n in range(4)]
        scores = [
            evaluator.measure(
                Recipe.with_subspaces(2, "tail", prune="sampled", density=0.05, seed=s)
            ).score
            for s in seeds
        ]
        assert len(set(scores)) == 4
        assert np.argmax(scores) != 0
        found = report.recipe
        assert found.seed == seeds[int(np.argmax(scores))]
        assert found.search["start"] == pytest.approx(max(scores))
        assert found.search["best"] >= found.search["start"]
        assert found.search["evaluations"] == 4 + 2
        assert 0 < found.search["cost"] <= 6
        assert report.quality.seed == found.seed
        assert report.quality.packed == pytest.approx(evaluator.measure(found).score)
        stored = json.loads(nps_compress.inspect(tmp_path / "t.nps")["metadata"]["recipe"])
        assert stored["seed"] == found.seed
        assert stored["search"] == found.search

    def test_one_draw_keeps_the_seed(self, classifier_pair, data, tmp_path):
        base, tuned, _ = classifier_pair
        recipe = Recipe.with_subspaces(2, "tail", prune="sampled", density=0.05, seed=9)
        found = nps_compress.search_recipe(
            base, tuned, data, tmp_path / "r.json", recipe, SearchOptions(generations=1)
        )
        assert found.seed == 9
        assert found.search["evaluations"] == 1 + population_size(2)


class Interrupt:
    """Ctrl-C in the n-th measurement of this process."""

    def __init__(self, monkeypatch):
        self.calls, self.at = 0, math.inf
        original = Fitness._part

        def part(fitness, index):
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
            return original(fitness, index)

        monkeypatch.setattr(Fitness, "_part", part)


class TestInterruption:
    """Inside a generation, in any round of its race, with any number of workers."""

    OPTIONS = SearchOptions(
        genes=("subspaces", "group-density"), draws=2, generations=2, population=4
    )
    RECIPE = Recipe.with_subspaces(2, "tail", prune="sampled", density=0.1)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_resumed_pack_equals_the_uninterrupted_one(
        self, classifier_pair, data, tmp_path, monkeypatch, workers
    ):
        base, tuned, _ = classifier_pair
        monkeypatch.setattr(groups_module, "SMALL", 64)
        options = SearchOptions(**{**vars(self.OPTIONS), "workers": workers})
        counter = Interrupt(monkeypatch)

        def pack(name):
            counter.calls = 0
            out = tmp_path / name
            return nps_compress.pack(
                base, tuned, out, recipe=self.RECIPE, calibration=data, search=options
            )

        whole = pack("whole.nps")
        total = counter.calls
        names = set(whole.recipe.search["genes"])
        assert {"subspace 1", "density of attention", "density of mlp"} <= names
        for further in (6, 9, 8, 20):  # 14 parts are the fine-tune and the base
            counter.at = 14 + further
            with pytest.raises(SearchInterruptedError) as caught:
                pack("t.nps")
            state = json.loads(caught.value.state.read_text())
            assert state["begun"] or state["fitness"]
            assert not (tmp_path / "t.nps").exists()
        assert len(state["fitness"]) in (1, 2)  # in the middle of a generation
        assert state["begun"]
        counter.at = math.inf
        found = pack("t.nps")
        assert counter.calls < total
        assert found.recipe == whole.recipe
        assert (tmp_path / "t.nps").read_bytes() == (tmp_path / "whole.nps").read_bytes()
        assert not list(tmp_path.glob("*.search.json"))

    @pytest.mark.parametrize("stop_at", [3, 4, 5, 7, 10])
    def test_a_function_that_is_interrupted(self, classifier_pair, tmp_path, monkeypatch, stop_at):
        """The k-th call; of two before the search, of base and fine-tune."""
        base, tuned, calibration = classifier_pair
        own = types.ModuleType("own_interrupted")
        own.calls, own.stop_at = 0, 0

        def near(model, examples):
            own.calls += 1
            if own.calls == own.stop_at:
                raise KeyboardInterrupt
            return -float(model.bert.pooler.dense.weight.square().sum())

        own.near = near
        monkeypatch.setitem(sys.modules, "own_interrupted", own)
        options = SearchOptions(
            fitness="own_interrupted:near", draws=2, generations=2, population=3
        )

        def search(name):
            own.calls = 0
            return nps_compress.search_recipe(
                base, tuned, calibration, tmp_path / name, self.RECIPE, options
            )

        whole, calls = search("whole.json"), own.calls
        own.stop_at = stop_at
        with pytest.raises(SearchInterruptedError) as caught:
            search("r.json")
        assert (caught.value.state is None) == (stop_at == 3)
        own.stop_at = 0
        assert search("r.json") == whole
        assert own.calls == calls - (stop_at - 3)

    def test_another_start_is_another_search(self, classifier_pair, data, tmp_path, monkeypatch):
        base, tuned, _ = classifier_pair
        counter = Interrupt(monkeypatch)
        counter.at = 30
        call = (base, tuned, data, tmp_path / "r.json")
        with pytest.raises(SearchInterruptedError):
            nps_compress.search_recipe(*call, self.RECIPE, self.OPTIONS)
        counter.at = math.inf
        changes = [
            (Genotype(self.RECIPE, ["subspaces"], []).express([1.5, 1.0]), self.OPTIONS),
            (self.RECIPE, SearchOptions(**{**vars(self.OPTIONS), "draws": 3})),
            (self.RECIPE, SearchOptions(**{**vars(self.OPTIONS), "genes": ("subspaces",)})),
            (self.RECIPE, SearchOptions(**{**vars(self.OPTIONS), "fitness": "agreement"})),
        ]
        for recipe, options in changes:
            with pytest.raises(nps_compress.RecipeError, match="belongs to another search"):
                nps_compress.search_recipe(*call, recipe, options)
        # How it is done may change.
        options = SearchOptions(**{**vars(self.OPTIONS), "workers": 2, "generations": 1})
        assert nps_compress.search_recipe(*call, self.RECIPE, options).search["generations"] == 1


def test_exact_tensors_are_exact_in_every_candidate(classifier_pair, data, tmp_path, monkeypatch):
    """The best score is that of the file, where small tensors are not pruned."""
    base, tuned, _ = classifier_pair
    monkeypatch.setattr(groups_module, "SMALL", 40)  # heads of 32 stay small
    monkeypatch.setattr("nps_compress.candidates._EXACT_SHARE", 1.0)
    out = tmp_path / "t.nps"
    recipe = Recipe.with_subspaces(2, "tail", prune="sampled", density=0.8)
    options = SearchOptions(genes=("groups",), generations=1, population=3)
    report = nps_compress.pack(base, tuned, out, recipe=recipe, calibration=data, search=options)
    assert "small" not in report.recipe.search["genes"]
    nps_compress.unpack(base, out, tmp_path / "out")
    stored, wanted = (open_checkpoint(folder) for folder in (tmp_path / "out", tuned))
    norm = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert np.array_equal(stored.read(norm), wanted.read(norm))
    reference = Fitness(tuned, read_examples(data), "kl")
    packed = Fitness(tmp_path / "out", read_examples(data), "kl").model
    reference.model.load_state_dict(packed.state_dict())
    assert reference.score() == pytest.approx(report.quality.packed, abs=1e-7)
    assert report.quality.packed == pytest.approx(report.recipe.search["best"])
    metadata = nps_compress.inspect(out)["metadata"]
    assert Quality.from_metadata(metadata).evaluations == 4
    nps_compress.verify(base, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": ()}, "genes must be some of"),
        ({"genes": ("layers",)}, "genes must be some of subspaces, .*received 'layers'"),
        ({"draws": 0}, "draws must be from 1 to 1000, received 0"),
        ({"draws": 1001}, "draws must be"),
        ({"workers": 0}, "workers must be from 1 to 64, received 0"),
        ({"workers": 65}, "workers must be"),
        ({"generations": -1}, "generations must be at least 1"),
        ({"population": 1}, "population must be at least 2"),
    ],
)
def test_options(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        SearchOptions(**options)
