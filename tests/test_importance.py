"""Importance from gradients: against autograd done by hand, and what pruning makes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner
from pruning import prune
from safetensors.torch import load_file

import nps_compress
from nps_compress import InvalidArgumentError, Recipe, SearchOptions
from nps_compress import importance as importance_module
from nps_compress.calibration import read_examples
from nps_compress.cli import main
from nps_compress.dtypes import BY_NAME
from nps_compress.importance import DAMPING, POWER, activation, fisher, measure_importance
from nps_compress.models import load_model
from nps_compress.prune import plan, tensor_seed
from nps_compress.rank_one import RankOne
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
        expected = factors(square, every.double().mean())
        assert np.abs(found[name].rows - expected.rows).max() <= 1, name  # sums of another order
        assert np.abs(found[name].columns - expected.columns).max() <= 1, name
        assert np.mean(found[name].columns == expected.columns) > 0.9
        # The product is near the factor of each weight, where that is anything but noise.
        each = (square / every.mean() + DAMPING).reshape(-1).numpy() ** POWER
        ratio = np.log2(found[name].part(0, square.numel()) / each)
        assert np.median(np.abs(ratio)) < 1, name


def test_causal_models_have_one_draw_a_token(causal_pair):
    _, tuned, calibration = causal_pair
    found = fisher(tuned, read_examples(calibration))
    head = found["model.embed_tokens.weight"]
    assert head.rows.size == 18
    assert head.rows.max() - head.rows.min() > 2  # an octave
    again = fisher(tuned, read_examples(calibration))
    assert all(same(found[name], again[name]) for name in found)


def factors(squares, mean=None):
    """As the module makes them, of squares whose mean is known by hand."""
    matrix = squares.double().reshape(len(squares) if squares.ndim > 1 else 1, -1)
    both = matrix.mean(1) / matrix.mean(), matrix.mean(0) / (mean or matrix.mean())
    return RankOne.of(*((each + DAMPING).numpy() ** POWER for each in both))


def same(one, other):
    return np.array_equal(one.rows, other.rows) and np.array_equal(one.columns, other.columns)


def inputs_of(loaded, module, examples):
    """What a module is given, example by example, from outside of it."""
    found = []
    hook = module.register_forward_hook(lambda m, inputs, _: found.append(inputs[0].detach()))
    for encoded in loaded.encode(examples, "test", labelled=False):
        loaded.logits(loaded.collate([encoded]))
    hook.remove()
    return found


class TestActivation:
    def test_linear_and_embedding(self, classifier_pair):
        _, tuned, calibration = classifier_pair
        rows = read_examples(calibration)
        done = []
        found = activation(tuned, rows, lambda: done.append(1))
        assert len(done) == len(rows)
        loaded = load_model(tuned)
        stored = load_file(tuned / "model.safetensors")
        assert set(stored) <= set(found)
        for name, tensor in stored.items():
            assert found[name].rows.size * found[name].columns.size == tensor.numel()
        with torch.no_grad():
            for name in ("bert.encoder.layer.1.output.dense", "classifier"):
                module = loaded.model.get_submodule(name)
                given = torch.cat(
                    [x.reshape(-1, x.shape[-1]) for x in inputs_of(loaded, module, rows)]
                )
                each = given.square().sum(0).expand(module.weight.shape)
                assert same(found[f"{name}.weight"], factors(each)), name
                assert len(np.unique(found[f"{name}.weight"].columns)) > 1
                assert not found[f"{name}.weight"].rows.any()
                assert not found[f"{name}.bias"].columns.any()
        table = "bert.embeddings.word_embeddings"
        tokens = [token for row in rows for token in loaded.processor(row.text)["input_ids"]]
        counts = torch.bincount(torch.tensor(tokens), minlength=len(stored[f"{table}.weight"]))
        each = counts[:, None].expand(-1, 32).float()
        assert same(found[f"{table}.weight"], factors(each))
        assert len(np.unique(found[f"{table}.weight"].rows)) > 1
        assert not found["bert.embeddings.LayerNorm.weight"].columns.any()

    def test_convolution(self, tmp_path):
        folder = tiny_models.build("image", tmp_path / "m")
        examples = tiny_models.examples_of("image", folder)
        found = activation(folder, examples)
        loaded = load_model(folder)
        name = "vit.embeddings.patch_embeddings.projection"
        (module,) = (m for m in loaded.model.modules() if isinstance(m, torch.nn.Conv2d))
        pixels = torch.cat(inputs_of(loaded, module, examples))
        each = pixels.square().sum((0, 2, 3))[None, :, None, None].expand(module.weight.shape)
        assert same(found[f"{name}.weight"], factors(each))
        assert set(load_file(folder / "model.safetensors")) <= set(found)  # the names of the file

    @pytest.mark.parametrize("groups", [1, 2])
    def test_kernels_of_channels(self, groups):
        """By hand: an input of channels 1, 2, 3 and 4, each a constant."""
        module = torch.nn.Conv2d(4, 6, 3, groups=groups)
        squares = {"w": torch.zeros(0)}
        given = torch.arange(1.0, 5.0)[None, :, None, None].expand(2, 4, 5, 5)
        hook = importance_module._adds_inputs(squares, "w")
        hook(module, (given,), {})
        hook(module, (), {"input": given})
        each = importance_module._spread(module, module.weight, squares["w"])
        wanted = torch.arange(1.0, 5.0).square() * 2 * 2 * 25
        assert each.shape == module.weight.shape
        for row in range(6):
            mine = wanted if groups == 1 else wanted[2 * (row // 3) : 2 * (row // 3) + 2]
            assert torch.equal(each[row], mine[:, None, None].expand(-1, 3, 3))

    def test_transposed_weights_of_gpt2(self, causal_pair, tmp_path):
        from transformers import GPT2Config, GPT2LMHeadModel

        _, tuned, calibration = causal_pair
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=18, n_positions=32, n_embd=16, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "gpt" / name).write_bytes((tuned / name).read_bytes())
        rows = read_examples(calibration)
        found = activation(tmp_path / "gpt", rows)
        loaded = load_model(tmp_path / "gpt")
        name = "transformer.h.0.mlp.c_fc"
        module = loaded.model.get_submodule(name)
        assert module.weight.shape == (16, 64)  # inputs come first
        with torch.no_grad():
            given = torch.cat([x.reshape(-1, 16) for x in inputs_of(loaded, module, rows)])
        each = given.square().sum(0)[:, None].expand(16, 64)
        assert same(found[f"{name}.weight"], factors(each))
        assert set(load_file(tmp_path / "gpt" / "model.safetensors")) <= set(found)

    def test_by_name(self, classifier_pair):
        _, tuned, calibration = classifier_pair
        rows = read_examples(calibration)
        assert measure_importance("magnitude", tuned, rows) == {}
        for name, wanted in (
            ("activation", activation(tuned, rows)),
            ("fisher", fisher(tuned, rows, 5)),
        ):
            found = measure_importance(name, tuned, rows, 5)
            assert found.keys() == wanted.keys()
            assert all(same(found[key], wanted[key]) for key in wanted)

    def test_pack(self, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair
        contents = set()
        for importance in ("magnitude", "activation", "fisher"):
            recipe = Recipe(prune="sampled", density=0.2, importance=importance)
            out = tmp_path / f"{importance}.nps"
            options = SearchOptions(generations=0)
            nps_compress.pack(
                base, tuned, out, recipe=recipe, calibration=calibration, search=options
            )
            nps_compress.verify(base, out)
            found = nps_compress.inspect(out)
            contents.add(found["content_digest"])
            assert json.loads(found["metadata"]["recipe"])["importance"] == importance
        assert len(contents) == 3


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
        assert histogram.add(tuned - base, importance)
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
        histogram.add(tuned - base)
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
        contents = [nps_compress.inspect(tmp_path / f"{n}.nps")["content_digest"] for n in "ab"]
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
