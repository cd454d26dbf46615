"""Candidates: groups of tensors, the factors of a recipe, and the model that becomes each."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import bits, write_checkpoint

import nps_compress
from nps_compress import CheckpointError, InvalidArgumentError, Recipe
from nps_compress import groups as groups_module
from nps_compress.candidates import Pruner
from nps_compress.checkpoint import open_checkpoint, pair
from nps_compress.dtypes import to_float32
from nps_compress.genotype import GENES, Genotype, check_genes
from nps_compress.groups import GROUPS, SMALL, group_of
from nps_compress.live import LiveModel, _LiveTensor
from nps_compress.prune import RULES
from nps_compress.rank_one import RankOne
from nps_compress.recipe import ROUNDED
from nps_compress.values import VALUES

BIG = (300, 200)
EMBEDDING, ATTENTION, MLP = "embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "mlp.weight"
LARGE, NORM, BIAS = "pooler", "layers.0.norm.weight", "layers.0.mlp.bias"


@pytest.mark.parametrize(
    ("group", "names"),
    [
        (
            "embedding",
            """
            bert.embeddings.word_embeddings.weight
            bert.embeddings.position_embeddings.weight
            model.embed_tokens.weight
            transformer.wte.weight
            transformer.wpe.weight
            shared.weight
            encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
            vit.embeddings.patch_embeddings.projection.weight
            text_model.embeddings.token_embedding.weight
            vision_model.embeddings.patch_embedding.weight
            """,
        ),
        (
            "attention",
            """
            bert.encoder.layer.0.attention.self.query.weight
            bert.encoder.layer.0.attention.output.dense.weight
            model.layers.3.self_attn.q_proj.weight
            model.layers.3.self_attn.o_proj.weight
            transformer.h.0.attn.c_attn.weight
            transformer.h.0.attn.c_proj.weight
            encoder.block.0.layer.0.SelfAttention.q.weight
            decoder.block.0.layer.1.EncDecAttention.o.weight
            vit.encoder.layer.0.attention.attention.key.weight
            vit.layers.0.attention.q_proj.weight
            text_model.encoder.layers.0.self_attn.out_proj.weight
            """,
        ),
        (
            "mlp",
            """
            bert.encoder.layer.0.intermediate.dense.weight
            bert.encoder.layer.0.output.dense.weight
            model.layers.3.mlp.gate_proj.weight
            model.layers.3.mlp.down_proj.weight
            transformer.h.0.mlp.c_fc.weight
            transformer.h.0.mlp.c_proj.weight
            encoder.block.0.layer.1.DenseReluDense.wi.weight
            decoder.block.0.layer.2.DenseReluDense.wi_0.weight
            decoder.block.0.layer.2.DenseReluDense.wo.weight
            vit.encoder.layer.0.intermediate.dense.weight
            text_model.encoder.layers.0.mlp.fc1.weight
            model.layers.0.block_sparse_moe.experts.0.w1.weight
            """,
        ),
        ("other", "lm_head.weight visual.weight model.monkeys.weight"),
    ],
)
def test_groups_of_known_models(group, names):
    for name in names.split():
        assert group_of(name, (512, 512)) == group, name
        assert group_of(name, (512,)) == "small"
        assert group_of(name, (SMALL // 64, 64)) == "small"
        assert group_of(name, (SMALL // 64 + 1, 64)) == group
    assert group_of("scalar", ()) == "small"
    assert group in GROUPS


class TestGenotype:
    RECIPE = Recipe.with_subspaces(3, "tail", density=0.1)

    def test_names_and_factors(self):
        genotype = Genotype(self.RECIPE, GENES, ["attention", "mlp"])
        assert genotype.names == [
            *("subspace 0", "subspace 1", "subspace 2"),
            *("density of subspace 0", "density of subspace 1", "density of subspace 2"),
            *("attention", "mlp", "density of attention", "density of mlp"),
        ]
        recipe = genotype.express([1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10])
        assert recipe.coefficients == (1.5, 2, 3)
        assert recipe.subspace_densities == (4, 5, 6)
        assert recipe.group_coefficients == {"attention": 7, "mlp": 8}
        assert recipe.group_densities == {"attention": 9, "mlp": 10}
        weighting = recipe.weighting(["mlp", "other"])
        assert np.array_equal(weighting.scale, [[12, 16, 24], [1.5, 2, 3]])
        assert np.array_equal(weighting.density, [[40, 50, 60], [4, 5, 6]])

    @pytest.mark.parametrize("gene", GENES)
    def test_each_by_itself(self, gene):
        genotype = Genotype(self.RECIPE, [gene], ["attention", "mlp"])
        size = len(genotype.names)
        changed = genotype.express([2.0] * size)
        same = genotype.express([1.0] * size)
        fields = {
            "subspaces": "coefficients",
            "subspace-density": "subspace_densities",
            "groups": "group_coefficients",
            "group-density": "group_densities",
        }
        for name, field in fields.items():
            assert (getattr(changed, field) != getattr(same, field)) == (name == gene)
        for groups in (["attention"], ["mlp", "small"]):
            plain, neutral = self.RECIPE.weighting(groups), same.weighting(groups)
            assert np.array_equal(plain.scale, neutral.scale)
            assert np.array_equal(plain.density, neutral.density)

    def test_factors_multiply_what_the_recipe_has(self):
        recipe = replace(
            self.RECIPE,
            coefficients=(1.0, 2.0, 3.0),
            group_densities={"mlp": 5.0, "small": 7.0},
        )
        found = Genotype(recipe, ["subspaces", "group-density"], ["mlp"]).express([2, 2, 2, 2])
        assert found.coefficients == (2, 4, 6)
        assert found.group_densities == {"mlp": 10, "small": 7}

    def test_factors_stay_in_the_range_of_a_recipe(self):
        found = Genotype(self.RECIPE, ["subspaces"], []).express([1e-30, 1, 1e30])
        assert found.coefficients == (1e-6, 1, 1e6)

    def test_check_genes(self):
        assert check_genes(["group-density", "subspaces"]) == ("subspaces", "group-density")
        assert check_genes(["groups", "groups"]) == ("groups",)
        for names in (["subspace"], ["groups", "heads"], [""], []):
            with pytest.raises(InvalidArgumentError, match="genes must be some of subspaces, "):
                check_genes(names)


def checkpoints(folder, tensors=None):
    """A base, a fine-tune in other dtypes, tensors of all groups, one longer than a slice."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape, scale):
        return torch.randn(*shape, generator=generator) * scale

    shapes = tensors or {
        EMBEDDING: (BIG, torch.float16, torch.float16),
        ATTENTION: (BIG, torch.bfloat16, torch.bfloat16),
        MLP: (BIG, torch.bfloat16, torch.float32),
        LARGE: ((300, 1000), torch.float32, torch.float32),
        NORM: ((256,), torch.float32, torch.float32),
        BIAS: ((100,), torch.bfloat16, torch.float32),
    }
    base, tuned = {}, {}
    for name, (shape, dtype, tuned_dtype) in shapes.items():
        base[name] = normal(shape, 0.02).to(dtype)
        noise = normal(shape, 0.01)
        tuned[name] = (base[name].float() + noise * noise.abs()).to(tuned_dtype)
    return write_checkpoint(folder / "base", base), write_checkpoint(folder / "tuned", tuned)


def pruner_of(folders, recipe=None, importance=None):
    pruner = Pruner(pair(*map(open_checkpoint, folders)), recipe or Recipe(), importance)
    pruner.count(1 << 30, rules=RULES)
    return pruner


def model_of(pruner):
    """The fine-tune's weights in float32; one of them can't be seen as a vector."""
    weights = {}
    for name in pruner.names:
        _, _, words, dtype = pruner.load(name)
        shape = pruner.pair.finetuned.tensors[name].shape
        weights[name] = torch.from_numpy(to_float32(words, dtype).copy()).view(*shape)
    strided = torch.empty(BIG[::-1]).t()
    strided.copy_(weights[ATTENTION])
    weights[ATTENTION] = strided
    assert not strided.is_contiguous()
    return weights


def stored(folders, recipe, importance):
    """What a file of this recipe holds, in float32."""
    pruner = pruner_of(folders, recipe, importance)
    shared, groups = pruner.selection(), pruner.pruned_groups()
    found = {}
    for name in pruner.names:
        loaded = pruner.load(name)
        if pruner.group(name) in groups:
            found[name] = to_float32(pruner.prune(name, loaded, shared), loaded[1])
        else:
            found[name] = to_float32(*loaded[2:])
    return found


def assert_is(weights, expected):
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert bits(tensor) == np.ascontiguousarray(expected[name]).tobytes(), name


class TestLiveModel:
    @pytest.fixture
    def folders(self, tmp_path):
        return checkpoints(tmp_path)

    @pytest.fixture
    def importance(self, rng):
        return {
            name: RankOne.of(*(np.exp2(rng.normal(0, 1, size)) for size in BIG))
            for name in (ATTENTION, MLP)
        }

    def candidate(self, rng, number):
        """Mostly a step from the last, as in a search; now and then something else."""
        kind = ("magnitude", "sampled", "signs", "random")[number // 4 % 4]
        density = (0.05, 0.06, 0.5)[number % 3]  # small tensors are exact at a half
        values = VALUES[number % len(VALUES)] if kind in ROUNDED else "exact"
        recipe = Recipe.with_subspaces(
            3, "tail", prune=kind, density=density, seed=number // 6, values=values
        )
        genes = [gene for gene in GENES if gene != "subspace-density" or kind != "sampled"]
        genotype = Genotype(recipe, genes, ["embedding", "attention", "mlp", "other", "small"])
        recipe = genotype.express(np.exp(rng.normal(0, 0.3, len(genotype.names))).tolist())
        return replace(recipe, scope="tensor") if number % 8 == 7 else recipe

    def test_every_candidate_is_what_would_be_stored(self, folders, importance, rng):
        pruner = pruner_of(folders, importance=importance)
        weights = model_of(pruner)
        live = LiveModel(pruner, weights)
        base = {name: to_float32(*pruner.load(name)[:2]) for name in pruner.names}
        exact = 0
        for number in range(36):
            recipe = self.candidate(rng, number)
            live.apply(recipe)
            assert_is(weights, stored(folders, recipe, importance))
            exact += "small" not in pruner.pruned_groups(recipe)
            if number % 5 == 4:
                live.apply_base()
                assert_is(weights, base)
        assert 3 < exact < 20
        pruner.recipe = Recipe(density=0.1)
        live.apply()
        assert_is(weights, stored(folders, pruner.recipe, importance))

    def test_the_short_list_is_made_again_only_where_it_must(self, folders, monkeypatch):
        made = []
        original = _LiveTensor._within
        monkeypatch.setattr(_LiveTensor, "_within", lambda *a: made.append(a[0]) or original(*a))
        pruner = pruner_of(folders)
        model = model_of(pruner)
        live, tensors = LiveModel(pruner, model), len(pruner.names)

        def count(recipe):
            made.clear()
            live.apply(recipe)
            return len(made)

        for rule in ("magnitude", "sampled"):
            recipe = Recipe(prune=rule, density=0.05)
            if rule == "sampled":  # vectors are rounded
                tensors = sum(len(model[name].shape) > 1 for name in pruner.names)
            assert count(recipe) == tensors
            assert count(recipe) == 0
            assert count(replace(recipe, density=0.055)) == 0  # within the room that is left
            assert count(replace(recipe, density=0.01)) == 0
            assert count(replace(recipe, density=0.14)) == tensors
            assert count(replace(recipe, density=0.05)) == 0
        sampled = Recipe(prune="sampled", density=0.05)
        assert count(replace(sampled, seed=1)) == tensors
        # Only what one group reaches further for.
        assert count(replace(sampled, seed=1, group_densities={"mlp": 3.0})) == 1
        live.apply_base()
        assert count(replace(sampled, seed=1)) == 0

    def test_few_weights_are_written(self, folders):
        """From one candidate to the next: the short list, and nothing else is touched."""
        pruner = pruner_of(folders)
        weights = model_of(pruner)
        live = LiveModel(pruner, weights)
        live.apply(Recipe(density=0.01))
        kept = weights[LARGE] != torch.from_numpy(to_float32(*pruner.load(LARGE)[:2])).view(300, -1)
        rest = ~kept
        weights[LARGE][rest] = 9.0  # where no candidate has been: is seen if written
        live.apply(Recipe(density=0.009))
        touched = (weights[LARGE][rest] != 9.0).float().mean()
        assert 0 < touched < 0.025
        live.apply_base()
        assert (weights[LARGE][rest] != 9.0).float().mean() == touched

    def test_a_model_without_the_parameter(self, folders):
        pruner = pruner_of(folders)
        weights = model_of(pruner)
        del weights[MLP]
        with pytest.raises(CheckpointError, match=r"'mlp\.weight' has no parameter of that name"):
            LiveModel(pruner, weights)


class TestSmallTensors:
    """Exact where that costs at most a hundredth of the file."""

    def folders(self, tmp_path, small):
        shapes = {
            MLP: ((400, 500), torch.float32, torch.float32),
            NORM: ((small,), torch.float32, torch.float32),
        }
        return checkpoints(tmp_path, shapes)

    def test_the_limit(self, tmp_path):
        # 10 % of 200,000 at 9.5 bits, and 0.469 bits of each position: a hundredth is 88 floats.
        for small, expected in ((88, ["mlp"]), (89, ["mlp", "small"])):
            pruner = pruner_of(self.folders(tmp_path / str(small), small))
            for density, groups in ((0.1, expected), (0.05, ["mlp", "small"]), (0.2, ["mlp"])):
                assert pruner.pruned_groups(Recipe(prune="magnitude", density=density)) == groups
        # 200,000 signs are 25,000 bytes.
        for small, expected in ((62, ["mlp"]), (63, ["mlp", "small"])):
            pruner = pruner_of(self.folders(tmp_path / str(small), small))
            assert pruner.pruned_groups(Recipe(prune="signs", density=1.0)) == expected

    @pytest.mark.parametrize("prune", ["magnitude", "sampled"])
    def test_in_a_file(self, tmp_path, prune):
        folders = self.folders(tmp_path, 64)
        for density, exact in ((0.3, True), (0.01, False)):
            out = tmp_path / f"{density}.nps"
            recipe = Recipe(prune=prune, density=density)
            report = nps_compress.pack(*folders, out, recipe=recipe)
            nps_compress.verify(folders[0], out)
            nps_compress.unpack(folders[0], out, tmp_path / f"{density}")
            rebuilt = open_checkpoint(tmp_path / f"{density}")
            same = np.array_equal(rebuilt.read(NORM), open_checkpoint(folders[1]).read(NORM))
            assert same == exact
            found = nps_compress.inspect(out)
            errors = found["metadata"]["quality_tensor_errors"].split(" ")
            by_name = dict(zip((t["name"] for t in found["tensors"]), errors, strict=True))
            assert (by_name[NORM] == "0") == exact
            assert float(by_name[MLP]) > 0.1
            if exact:  # the budget is that of the others
                assert report.nnz == pytest.approx(density * 200_000 + 64, rel=0.02)

    def test_nothing_but_small_tensors_is_pruned(self, tmp_path):
        pruner = pruner_of(checkpoints(tmp_path, {NORM: ((500,), torch.float32, torch.float32)}))
        assert pruner.pruned_groups() == ["small"]

    def test_nothing_to_prune_at_all(self, tmp_path):
        base = write_checkpoint(tmp_path / "a", {"n": torch.arange(9)})
        tuned = write_checkpoint(tmp_path / "b", {"n": torch.arange(9) + 1, "new": torch.ones(3)})
        for scope in ("global", "tensor"):
            for rule in ("magnitude", "sampled", "random"):
                recipe = Recipe(prune=rule, scope=scope)
                out = tmp_path / "t.nps"
                nps_compress.pack(base, tuned, out, recipe=recipe, force=True)
                nps_compress.verify(base, out)

    def test_factors_of_groups_reach_the_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(groups_module, "SMALL", 64)
        folders = checkpoints(tmp_path)
        densities = {}
        for factor in (1.0, 4.0):
            out = tmp_path / f"{factor}.nps"
            recipe = Recipe(density=0.05, group_densities={"mlp": factor})
            nps_compress.pack(*folders, out, recipe=recipe)
            found = nps_compress.inspect(out)
            densities[factor] = {t["name"]: t["density"] for t in found["tensors"]}
            assert json.loads(found["metadata"]["recipe"])["group_densities"] == {"mlp": factor}
        assert densities[4.0][MLP] > 2 * densities[1.0][MLP]
        assert densities[4.0][LARGE] < densities[1.0][LARGE]
