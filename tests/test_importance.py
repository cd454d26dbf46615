"""Importance from gradients: against autograd done by hand, and what pruning makes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import nps_compress
from nps_compress import InvalidArgumentError, Recipe, SearchOptions
from nps_compress.calibration import read_examples
from nps_compress.cli import main
from nps_compress.dtypes import BY_NAME
from nps_compress.importance import DAMPING, POWER, fisher
from nps_compress.models import load_model
from nps_compress.prune import plan, prune, tensor_seed
from nps_compress.task_vector import Histogram, Ranking

F32 = BY_NAME["F32"]


def test_fisher_is_the_mean_square_of_sampled_gradients(classifier_pair):
    _, tuned, calibration = classifier_pair
    rows = read_examples(calibration)
    found = fisher(tuned, rows, seed=3)
    loaded = load_model(tuned)
    model, tokenizer = loaded.model, loaded.processor
    generator = torch.Generator().manual_seed(3)
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        logits = model(**tokenizer(row.text, return_tensors="pt")).logits
        label = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[0]
        model.zero_grad()
        (-logits.log_softmax(-1)[0, label].sum()).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad**2
    every = torch.cat([square.reshape(-1) for square in squares.values()])
    for name, square in squares.items():
        expected = (square / every.mean() + DAMPING).reshape(-1).numpy() ** POWER
        ratio = found[name] / expected
        assert found[name].shape == expected.shape
        assert (np.abs(np.log2(ratio)) < 0.26).all()  # rounded to halves of an octave
    assert len(np.unique(np.concatenate(list(found.values())))) < 60


def test_causal_models_have_one_draw_a_token(causal_pair):
    _, tuned, calibration = causal_pair
    found = fisher(tuned, read_examples(calibration))
    head = found["model.embed_tokens.weight"]
    assert np.isfinite(head).all()
    assert head.max() > 2 * head.min()
    again = fisher(tuned, read_examples(calibration))
    assert all(np.array_equal(found[name], again[name]) for name in found)


class TestPruning:
    """Pure functions on random weights."""

    @pytest.fixture
    def weights(self, rng):
        base = rng.normal(0, 0.05, 200_000).astype(np.float32)
        tau = (rng.normal(0, 1e-3, 200_000) * rng.random(200_000)).astype(np.float32)
        importance = np.exp2(np.rint(rng.normal(0, 2, 200_000)) / 2).astype(np.float32)
        return base, base + tau, importance

    def select(self, weights, rule, density, seed=0):
        base, tuned, importance = weights
        histogram = Histogram.empty()
        assert histogram.add(base, tuned, importance)
        selection = plan(Ranking.of([histogram]), rule, density)
        seed = tensor_seed(seed, "w")
        words = prune(
            selection, base.view(np.uint32), F32, tuned.view(np.uint32), F32, seed, 0, importance
        )
        return words.view(np.float32)

    def test_magnitude_keeps_the_largest_scores(self, weights):
        base, tuned, importance = weights
        kept = self.select(weights, "magnitude", 0.05) != base
        score = np.abs(tuned - base) * importance
        assert kept.mean() == pytest.approx(0.05, abs=2e-4)
        # A key is a thousandth of an octave wide: below it nothing is ranked.
        assert score[kept].min() >= score[~kept].max() * 0.998

    def test_sampled_is_unbiased_and_keeps_the_density(self, weights):
        base, tuned, importance = weights
        tau = (tuned - base).astype(np.float64)
        total, kept = np.zeros(base.size), []
        for seed in range(60):
            found = self.select(weights, "sampled", 0.05, seed).astype(np.float64) - base
            total += found
            kept.append(np.mean(found != 0))
        assert np.mean(kept) == pytest.approx(0.05, rel=0.02)
        for group in (importance < 0.5, importance > 2):
            # Along the sign of tau the mean of 60 draws agrees within four standard errors.
            along = total[group] / 60 * np.sign(tau[group])
            error = along.std() * np.sqrt(group.sum())
            assert abs(along.sum() - np.abs(tau[group]).sum()) < 4 * error

    def test_what_matters_is_kept_more_often_and_nearer(self, weights):
        base, _, importance = weights
        change = np.abs(self.select(weights, "sampled", 0.05) - base)
        low, high = importance < 0.5, importance > 2
        assert (change[high] > 0).mean() > 3 * (change[low] > 0).mean()
        assert np.median(change[high & (change > 0)]) < np.median(change[low & (change > 0)]) / 3

    def test_a_neutral_importance_changes_nothing(self, weights):
        base, tuned, importance = weights
        ones = (base, tuned, np.ones_like(importance))
        histogram = Histogram.empty()
        histogram.add(base, tuned)
        for rule in ("magnitude", "sampled"):
            words = prune(
                plan(Ranking.of([histogram]), rule, 0.05),
                base.view(np.uint32),
                F32,
                tuned.view(np.uint32),
                F32,
                tensor_seed(0, "w"),
            )
            assert np.array_equal(words.view(np.float32), self.select(ones, rule, 0.05))


class TestPack:
    """On tiny real models."""

    def test_with_and_without_a_search(self, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair
        recipe = Recipe(prune="sampled", density=0.2, importance="fisher")
        plain = nps_compress.pack(
            base,
            tuned,
            tmp_path / "a.nps",
            recipe=recipe,
            calibration=calibration,
            search=SearchOptions(generations=0),
        )
        assert plain.recipe
        assert not plain.recipe.search
        nps_compress.verify(base, tmp_path / "a.nps")
        other = Recipe(prune="sampled", density=0.2)
        nps_compress.pack(base, tuned, tmp_path / "b.nps", recipe=other)
        contents = [nps_compress.inspect(tmp_path / f"{n}.nps")["content_sha256"] for n in "ab"]
        assert contents[0] != contents[1]
        searched = Recipe.with_subspaces(2, "tail", density=0.2, importance="fisher")
        report = nps_compress.pack(
            base,
            tuned,
            tmp_path / "c.nps",
            recipe=searched,
            calibration=calibration,
            search=SearchOptions(generations=1, population=2),
        )
        assert report.recipe
        assert report.recipe.search["evaluations"] == 3

    def test_it_needs_data(self, tiny, tmp_path):
        with pytest.raises(InvalidArgumentError, match="with calibration data"):
            nps_compress.pack(*tiny, tmp_path / "t.nps", recipe=Recipe(importance="fisher"))
        with pytest.raises(InvalidArgumentError, match="importance must be one of"):
            Recipe(importance="hessian")  # type: ignore[arg-type]

    def test_command_line_and_recipes(self, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair

        def run(*arguments):
            return CliRunner().invoke(main, [str(a) for a in arguments])

        out, recipe, again = tmp_path / "t.nps", tmp_path / "r.json", tmp_path / "u.nps"
        call = ("pack", base, tuned, "-o", out, "--importance", "fisher", "--density", 0.2)
        done = run(*call)
        assert done.exit_code == 2
        assert "--importance needs --calibration" in done.stderr
        done = run(*call, "--calibration", calibration, "--generations", 0)
        assert done.exit_code == 0, done.output
        assert "evaluations" not in done.output
        stored = json.loads(nps_compress.inspect(out)["metadata"]["recipe"])
        assert stored["importance"] == "fisher"
        recipe.write_text(json.dumps(stored))
        call = ("pack", base, tuned, "-o", again, "--recipe", recipe)
        assert "importance must be used with calibration data" in run(*call).stderr
        done = run(*call, "--calibration", calibration)
        assert done.exit_code == 0, done.output
        assert again.read_bytes() == out.read_bytes()
        del stored["importance"]  # as 0.1.0 wrote it
        recipe.write_text(json.dumps(stored))
        assert Recipe.read(recipe).importance == "magnitude"
