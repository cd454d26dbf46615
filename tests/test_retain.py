"""The least density that keeps a share of quality: the search for it, its report, its errors."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import nps_compress
from nps_compress import InvalidArgumentError, Recipe, RetainError, SearchOptions
from nps_compress import retain as retain_module
from nps_compress.calibration import read_examples
from nps_compress.cli import main
from nps_compress.fitness import Fitness, natural_metric
from nps_compress.measured import Measured
from nps_compress.models import load_model
from nps_compress.packing import RETAIN_RULES
from nps_compress.retain import Yardstick


def right(share: float) -> Measured:
    """1,000 examples, half of which the fine-tune has right, and this model a share of those."""
    values = np.zeros(1000)
    values[: round(500 * share)] = 1
    return Measured(values, np.ones(1000, np.int64))


def find_by_rule(curves, share=0.99):
    """curves: what each rule keeps at a density. -> the recipe and the report on it."""
    return retain_module.find_recipe(
        lambda recipe: right(curves[recipe.prune](recipe.density)),
        Yardstick("accuracy", right(0), right(1)),
        Recipe(prune="sampled"),
        tuple(curves),
        share,
    )


LARGEST = retain_module.LARGEST_DENSITY["sampled"]


def find(curve, share=0.99):
    recipe, quality = find_by_rule({"sampled": curve}, share)
    assert recipe.density == quality.density
    return quality


class TestSearch:
    """Against curves whose answer is known."""

    @pytest.mark.parametrize("edge", [0.4, 0.1, 0.0123, 0.0005])
    def test_finds_the_edge_of_a_step(self, edge):
        quality = find(lambda d: 1.0 if d >= edge else 0.5)
        # Three factors of sqrt(2), the last one halved twice: at most a fourth root of it off.
        assert edge <= quality.density <= edge * retain_module.STEP ** (1 / 4) * 1.0001
        assert quality.retained == 1
        assert len(quality.trials) < 30

    def test_a_dip_does_not_stop_it(self):
        steps = [LARGEST / retain_module.STEP**k for k in range(12)]
        quality = find(lambda d: 0.9 if d == steps[3] or d < steps[8] * 0.999 else 1.0)
        assert quality.density <= steps[8] * 1.0001

    def test_a_lucky_draw_far_down_is_not_believed(self):
        steps = [LARGEST / retain_module.STEP**k for k in range(12)]
        quality = find(lambda d: 1.0 if d >= 0.05 or d == steps[11] else 0.8)
        assert 0.05 <= quality.density < 0.06

    def test_what_cannot_be_kept(self):
        with pytest.raises(RetainError, match=r"density 0.9 keeps 90.00% .* not 99.00%"):
            find(lambda d: 0.9)

    def test_a_model_that_needs_nothing(self):
        quality = find(lambda d: 1.0)
        assert quality.density < 2e-5

    def test_a_broken_candidate_is_a_failure(self):
        quality = find(lambda d: 1.0 if d >= 0.1 else 0.0)
        assert quality.density >= 0.1


class TestRules:
    """The one that needs the least density is taken."""

    @pytest.mark.parametrize("best", ["sampled", "magnitude"])
    def test_both_are_tried(self, best):
        edges = {"sampled": 0.1, "magnitude": 0.1, best: 0.02}
        curves = {r: lambda d, e=e: 1.0 if d >= e else 0.5 for r, e in edges.items()}
        recipe, quality = find_by_rule(curves)
        assert recipe.prune == best
        assert recipe.density == quality.density == pytest.approx(0.02, rel=0.1)
        assert quality.evaluations == len(quality.trials)
        by_rule = {r: [t for t in quality.trials if t.prune == r] for r in edges}
        assert sum(map(len, by_rule.values())) == len(quality.trials)
        enough = {r: [t.density for t in ts if t.retained >= 0.99] for r, ts in by_rule.items()}
        for rule in ("sampled", best):
            assert min(enough[rule]) == pytest.approx(edges[rule], rel=0.1)
        # What is no cheaper than the best so far is not tried.
        least = min(enough["sampled"])
        assert all(trial.density < least for trial in by_rule["magnitude"])
        stored = json.loads(quality.to_metadata()["quality_trials"])
        assert {rule for _, _, rule in stored} == {"sampled", "magnitude"}

    def test_precisions_are_tried_where_the_recipe_leaves_them_open(self):
        """Of --prune magnitude; what keeps enough at the fewest bits is taken."""
        edges = {"sign": 0.3, "int2": 0.1, "int4": 0.09, "int8": 0.09, "exact": 0.09}
        asked = []

        def measure(recipe):
            asked.append((recipe.prune, recipe.values))
            enough = recipe.prune == "magnitude" and recipe.density >= edges[recipe.values]
            return right(1.0 if enough else 0.5)

        def found(values, rules=("magnitude",)):
            asked.clear()
            recipe, quality = retain_module.find_recipe(
                measure,
                Yardstick("accuracy", right(0), right(1)),
                Recipe(prune="magnitude", values=values),
                rules,
                0.99,
                cost=lambda r: r.density * {"sign": 1, "int2": 1.5, "int4": 3}.get(r.values, 8),
            )
            assert [(t.prune, t.values) for t in quality.trials] == asked
            return recipe

        assert found("auto").values == "int2"
        assert asked.index(("magnitude", "sign")) == 0
        assert sum(values == "int8" for _, values in asked) <= 4  # where that may pay
        assert found("int8").values == "int8"
        assert {values for _, values in asked} == {"int8"}
        assert found("exact").values == "exact"
        # Another rule rounds by itself.
        assert found("auto", ("sampled", "magnitude")).prune == "magnitude"
        assert ("sampled", "exact") in asked

    def test_the_first_wins_a_tie_and_one_may_fail(self):
        step = lambda d: 1.0 if d >= 0.1 else 0.5  # noqa: E731
        assert find_by_rule({"magnitude": step, "random": step})[0].prune == "magnitude"
        for lost in ("magnitude", "sampled"):
            curves = {"magnitude": step, "sampled": step, lost: lambda d: 0.9}
            assert find_by_rule(curves)[0].prune != lost
        with pytest.raises(
            RetainError, match=r"density 0\.5 keeps 90\.00% .*; pack with --lossless"
        ):
            find_by_rule(
                {"magnitude": lambda d: 0.9 if d == 0.5 else 0.2, "sampled": lambda d: 0.4}
            )

    def test_what_belongs_to_one_rule_stays_with_it(self):
        asked = []

        def measure(recipe):
            asked.append(recipe)
            return right(
                1.0 if recipe.density >= (0.2 if recipe.prune == "sampled" else 0.1) else 0
            )

        recipe, _ = retain_module.find_recipe(
            measure,
            Yardstick("accuracy", right(0), right(1)),
            Recipe(prune="sampled", seed=3),
            ("sampled", "magnitude"),
            0.99,
        )
        assert (recipe.prune, recipe.seed) == ("magnitude", 3)

    @pytest.mark.parametrize("scores", [(0.5, 0.5), (0.5, 0.4), (0.5, math.nan)])
    def test_nothing_gained(self, scores):
        base, tuned = (Measured(np.full(2, s), np.ones(2, np.int64)) for s in scores)
        with pytest.raises(RetainError, match="no better than its base"):
            retain_module.find_recipe(
                lambda recipe: pytest.fail("measured"),
                Yardstick("accuracy", base, tuned),
                Recipe(),
                ("sampled",),
                0.9,
            )

    def test_on_a_real_model(self, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair

        def pack(name, rules):
            return nps_compress.pack(
                base,
                tuned,
                tmp_path / name,
                retain=0.9,
                calibration=calibration,
                search=SearchOptions(fitness="agreement", generations=0),
                rules=rules,
            )

        each = [pack(rule, (rule,)) for rule in RETAIN_RULES]
        every = pack("all", ())
        first = each[0].quality.trials
        assert every.quality.trials[: len(first)] == first
        assert set(every.quality.trials) < set(first + each[1].quality.trials)
        least = min(each, key=lambda report: report.file_bytes)
        assert every.recipe == least.recipe
        for rule, report in zip(RETAIN_RULES, each, strict=True):
            assert {t.prune for t in report.quality.trials} == {report.recipe.prune} == {rule}

    def test_a_search_goes_on_below_the_least_density(self, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair

        def pack(name, generations):
            return nps_compress.pack(
                base,
                tuned,
                tmp_path / name,
                recipe=Recipe.with_subspaces(3, "tail", prune="magnitude"),
                retain=0.9,
                calibration=calibration,
                search=SearchOptions(fitness="agreement", generations=generations, population=4),
                rules=("magnitude",),
            )

        plain, searched = pack("plain", 0), pack("searched", 2)
        known = len(plain.quality.trials)
        assert searched.quality.trials[:known] == plain.quality.trials
        below = searched.quality.trials[known:]
        densities = [plain.quality.density, *(trial.density for trial in below)]
        assert below
        for larger, smaller in itertools.pairwise(densities):
            assert smaller == pytest.approx(larger / math.sqrt(2))
        # All but the last kept enough, and the smallest of those is what is stored.
        assert [trial.retained >= 0.9 for trial in below] == [True] * (len(below) - 1) + [False]
        assert searched.quality.density == densities[-2] == searched.recipe.density
        assert searched.quality.retained >= 0.9
        assert bool(searched.recipe.search) == (len(below) > 1)
        assert searched.quality.evaluations >= known + 9 * len(below)
        assert not list(tmp_path.glob("*.search.json"))


def test_interval_agrees_with_theory():
    """A packed model right on a random 95 % of what the fine-tune has right."""
    rng = np.random.default_rng(1)
    size = 4000
    ones = np.ones(size, np.int64)
    finetuned = Measured(np.ones(size), ones)
    found = Measured((rng.random(size) < 0.95).astype(float), ones)
    low, high = retain_module._interval(
        "accuracy", Measured(np.zeros(size), ones), finetuned, found
    )
    half = 1.96 * math.sqrt(0.95 * 0.05 / size)
    assert low == pytest.approx(found.score - half, abs=0.15 * half)
    assert high == pytest.approx(found.score + half, abs=0.15 * half)


def test_loss_counts_the_gain_over_the_base():
    one = np.ones(1, np.int64)
    base, tuned, found = (Measured(np.array([x]), one) for x in (-4.0, -2.0, -2.5))
    assert retain_module._retained("loss", base, tuned, found) == pytest.approx(0.75)
    base, tuned, found = (Measured(np.array([x]), one) for x in (0.1, 0.8, 0.6))
    assert retain_module._retained("accuracy", base, tuned, found) == pytest.approx(0.75)
    assert retain_module._retained("accuracy", found, base, tuned) == pytest.approx(8)
    assert retain_module._retained("hidden", found, base, tuned) == -math.inf  # nothing gained


@pytest.mark.parametrize("name", ["kl", "agreement", "accuracy", "loss"])
def test_measures_by_example_add_up(classifier_pair, name):
    _, tuned, calibration = classifier_pair
    fitness = Fitness(tuned, read_examples(calibration), name, batch_size=5)
    found = fitness.measure()
    assert found.counts.tolist() == [1] * 24
    assert found.score == fitness.score()
    if name == "agreement":
        assert found.score == 1
        with torch.no_grad():
            fitness.model.classifier.weight[:] = 0
            fitness.model.classifier.bias[:] = torch.tensor([1.0, 0.0, 0.0])
        assert fitness.score() < 1


def test_measures_of_texts_count_their_tokens(causal_pair):
    _, tuned, calibration = causal_pair
    rows = read_examples(calibration)
    fitness = Fitness(tuned, rows, "loss", batch_size=5)
    found = fitness.measure()
    loaded = load_model(tuned)
    model, tokenizer = loaded.model, loaded.processor
    expected = {}
    for row in rows:
        inputs = tokenizer(row.text, return_tensors="pt")
        with torch.inference_mode():
            loss = float(model(**inputs, labels=inputs["input_ids"]).loss)
        tokens = inputs["input_ids"].shape[1] - 1
        expected[round(-loss * tokens, 2)] = tokens
    measured = dict(zip(found.sums.round(2).tolist(), found.counts.tolist(), strict=True))
    assert measured == pytest.approx(expected)
    assert Fitness(tuned, rows, "agreement").score() == 1


class TestPack:
    """On tiny real models."""

    def test_what_is_promised_is_what_is_stored(self, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair
        out = tmp_path / "t.nps"
        report = nps_compress.pack(
            base,
            tuned,
            out,
            retain=0.9,
            calibration=calibration,
            search=SearchOptions(fitness="agreement", generations=1, population=2),
        )
        quality = report.quality
        assert quality is not None
        assert quality.retained >= 0.9
        assert quality.low <= quality.retained <= quality.high
        assert quality.finetuned == 1
        enough = [t for t in quality.trials if t.retained >= 0.9]
        rule = report.recipe.prune
        assert min(t.density for t in enough if t.prune == rule) == quality.density
        # The unpacked model has the score that the report states.
        nps_compress.unpack(base, out, tmp_path / "out")
        fitness = Fitness(tuned, read_examples(calibration), "agreement")
        packed = load_model(tmp_path / "out").model
        fitness.model.load_state_dict(packed.state_dict())
        assert fitness.score() == pytest.approx(quality.packed)
        stored = nps_compress.inspect(out)["metadata"]
        assert stored["quality_metric"] == "agreement"
        assert float(stored["quality_retained"]) == pytest.approx(quality.retained, abs=1e-5)
        assert json.loads(stored["quality_trials"])[0][0] == 1.0  # signs
        assert len(stored["quality_data_sha256"]) == 64
        assert json.loads(stored["recipe"])["density"] == quality.density
        nps_compress.verify(base, out)

    def test_a_causal_model_is_judged_by_its_loss(self, causal_pair, tmp_path):
        base, tuned, calibration = causal_pair
        assert natural_metric(tuned, read_examples(calibration)) == "loss"
        report = nps_compress.pack(  # not by loss: the tiny fine-tune is random, and no better
            base,
            tuned,
            tmp_path / "t",
            retain=0.5,
            calibration=calibration,
            search=SearchOptions(fitness="agreement"),
        )
        assert report.quality
        assert report.quality.finetuned == 1

    def test_metrics_that_suit_the_model(self, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair
        loaded = load_model(tuned)
        model, tokenizer = loaded.model, loaded.processor
        texts = [{"text": row.text} for row in read_examples(calibration)]
        labelled, bare = tmp_path / "labelled.jsonl", tmp_path / "bare.jsonl"
        bare.write_text("\n".join(map(json.dumps, texts)))
        for row in texts:  # what it says is right: the tiny fine-tune knows nothing of the labels
            row["label"] = int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())
        labelled.write_text("\n".join(map(json.dumps, texts)))
        asked = {"retain": 0.5, "search": SearchOptions(generations=0)}
        report = nps_compress.pack(base, tuned, tmp_path / "a", calibration=labelled, **asked)
        assert report.quality
        assert report.quality.metric == "accuracy"
        assert report.quality.finetuned == 1
        report = nps_compress.pack(base, tuned, tmp_path / "b", calibration=bare, **asked)
        assert report.quality
        assert report.quality.metric == "agreement"

    def test_nothing_to_keep(self, causal_pair, tmp_path):
        base, _, calibration = causal_pair
        with pytest.raises(RetainError, match="no better than its base"):
            nps_compress.pack(base, base, tmp_path / "t", retain=0.9, calibration=calibration)
        assert not (tmp_path / "t").exists()

    def test_arguments(self, tiny, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair
        for share in (0, 1.5, -1, math.nan, True):
            with pytest.raises(InvalidArgumentError, match=r"retain must be in \(0, 1\]"):
                nps_compress.pack(
                    base, tuned, tmp_path / "t", retain=share, calibration=calibration
                )
        with pytest.raises(InvalidArgumentError, match="fitness must be one of kl"):
            nps_compress.pack(
                base,
                tuned,
                tmp_path / "t",
                retain=0.9,
                calibration=calibration,
                search=SearchOptions(fitness="bleu"),
            )
        with pytest.raises(InvalidArgumentError, match="with calibration data"):
            nps_compress.pack(*tiny, tmp_path / "t", retain=0.9)

    def test_command_line(self, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair
        call = ["pack", base, tuned, "-o", tmp_path / "t.nps", "--retain", "0.9"]
        call += ["--generations", "0", "--importance", "magnitude"]

        def run(*more):
            return CliRunner().invoke(main, [str(a) for a in (*call, *more)])

        done = run("--calibration", calibration, "--fitness", "agreement")
        assert done.exit_code == 0, done.output
        assert re.search(r"kept by --prune (signs|sampled|magnitude) at density", done.stdout)
        assert "on other data of this kind expect" in done.stdout
        assert "are too few to promise 90.00%" in done.stderr
        done = run("--calibration", calibration, "--fitness", "agreement", "--force", "--json")
        assert json.loads(done.stdout)["quality"]["metric"] == "agreement"
        for option in (
            ("--density", 0.1),
            ("--recipe", "r.json"),
            ("--lossless",),
        ):
            done = run("--calibration", calibration, *option)
            assert done.exit_code == 2
            assert "can't be used with" in done.stderr
        done = run()
        assert done.exit_code == 2
        assert "--retain needs --calibration" in done.stderr
