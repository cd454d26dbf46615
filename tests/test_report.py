"""The quality report in a file: what it states is true, and a hostile one does no harm."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import write_checkpoint
from safetensors.torch import load_file

import nps_compress
from nps_compress import Quality, Recipe, SearchOptions
from nps_compress.calibration import data_digest, read_examples
from nps_compress.checkpoint import open_checkpoint
from nps_compress.cli import main
from nps_compress.codecs import ValueCodec
from nps_compress.distortion import _SLICE, Distortion, distortion, total
from nps_compress.dtypes import BY_NAME, round_float32
from nps_compress.fitness import Fitness
from nps_compress.format.layout import Op
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.format.writer import NpsWriter
from nps_compress.measured import Measured
from nps_compress.models import load_model
from nps_compress.report import (
    Trial,
    errors_from_metadata,
    errors_to_metadata,
    recipe_words,
    task_of,
)
from nps_compress.retain import Yardstick

FULL = Quality(
    metric="accuracy",
    examples=240,
    target=0.99,
    density=0.0125,
    base=0.17,
    finetuned=0.6,
    packed=0.596,
    retained=0.99375,
    low=0.97,
    high=1.01,
    trials=(Trial(0.5, 1.0, "sampled"), Trial(0.25, 0.9, "magnitude")),
    task="sequence-classification",
    seed=7,
    evaluations=2,
    data_sha256="ab" * 32,
)
# Text that drives a terminal, a browser, a shell, YAML and a Markdown table.
EVIL = "\x1b[31m`</code><script>x</script>|\n---\nbase_model: evil\n# $(reboot) ‮"
NO_NUMBERS = ("nan", "inf", "-inf", "1e999", "1_000", " 1", "\u0661", "0x1", "", "9" * 400, EVIL)


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def write_file(path: Path, metadata: dict[str, str], name: str = "w") -> Path:
    """A file of one copied tensor that says of itself what is given."""
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    dtype = BY_NAME["F32"]
    base = BaseTensor(name, dtype, (4,), bytes(32))
    writer.add_tensor(TensorEntry(name, dtype, (4,), Op.COPY, ValueCodec.NONE, 0, 0, bytes(32)))
    writer.finish([base], metadata)
    path.write_bytes(stream.getvalue())
    return path


class TestMetadata:
    def test_trials_of_rounded_values(self):
        tried = (Trial(0.5, 1.0, "magnitude", "int4"), Trial(0.25, 0.9, "magnitude"))
        texts = Quality("kl", trials=tried).to_metadata()
        assert texts["quality_trials"] == (
            '[[0.5, 1.0, "magnitude", "int4"], [0.25, 0.9, "magnitude"]]'
        )
        found = Quality.from_metadata(texts)
        assert found is not None
        assert found.trials == tried
        assert [trial.how for trial in tried] == ["magnitude int4", "magnitude"]
        texts["quality_trials"] = '[[0.5, 1, "magnitude", "int5"], [0.5, 1, "random", [1]]]'
        found = Quality.from_metadata(texts)
        assert found is not None
        assert [trial.values for trial in found.trials] == ["exact", "exact"]

    def test_round_trip(self):
        assert Quality.from_metadata(FULL.to_metadata()) == FULL
        assert Quality.from_metadata(Quality("kl").to_metadata()) == Quality("kl")

    def test_strings_are_flat_and_named(self):
        texts = FULL.to_metadata()
        assert texts["quality_interval"] == "0.97 to 1.01"
        assert texts["quality_examples"] == "240"
        assert texts["quality_seed"] == "7"
        assert json.loads(texts["quality_trials"]) == [
            [0.5, 1.0, "sampled"],
            [0.25, 0.9, "magnitude"],
        ]
        assert set(texts) == {
            f"quality_{name}"
            for name in (
                *("task", "metric", "base", "finetuned", "packed", "retained", "interval"),
                *("examples", "target", "density", "trials", "seed", "evaluations", "data_sha256"),
            )
        }

    def test_integers_stay_whole(self):
        quality = Quality("loss", examples=12_345_678, seed=2**32 - 1)
        assert Quality.from_metadata(quality.to_metadata()) == quality

    def test_what_is_not_finite_is_not_written(self):
        quality = Quality("loss", base=-math.inf, packed=math.nan, low=-math.inf, high=math.inf)
        assert quality.to_metadata() == {"quality_metric": "loss"}

    def test_absent(self):
        assert Quality.from_metadata({}) is None
        assert Quality.from_metadata({"quality_base": "0.5", "tool": "x"}) is None

    @pytest.mark.parametrize("bad", NO_NUMBERS)
    def test_malformed_numbers_are_left_out(self, bad):
        texts = dict.fromkeys(FULL.to_metadata(), bad)
        texts |= {"quality_metric": "loss", "quality_task": EVIL}
        assert Quality.from_metadata(texts) == Quality("loss")

    @pytest.mark.parametrize("bad", ["", EVIL, "a" * 65, "\x1b", "accuracy\n", "ä"])
    def test_malformed_metric(self, bad):
        assert Quality.from_metadata({**FULL.to_metadata(), "quality_metric": bad}) is None

    @pytest.mark.parametrize(
        "bad",
        [
            *("[" * 100_000, "[[1]]", "[[1, NaN]]", "{}", '[["a", 1]]', "[[1e999, 1]]"),
            *("[[true, 1]]", "[[1" + "0" * 5000 + ", 1]]", f"[[{10**400}, 1]]"),
        ],
    )
    def test_malformed_trials(self, bad):
        found = Quality.from_metadata({**FULL.to_metadata(), "quality_trials": bad})
        assert found is not None
        assert found.trials == ()

    def test_errors(self):
        texts = errors_to_metadata(0.123456, [0.0, 1.0, 0.98765, 12.345, 1e-9])
        assert texts["quality_tensor_errors"] == "0 1 0.988 12.3 1e-09"
        assert errors_from_metadata(texts, 5) == (0.123, [0.0, 1.0, 0.988, 12.3, 1e-9])
        assert errors_from_metadata(texts, 4) == (0.123, [None] * 4)
        assert errors_from_metadata({}, 2) == (None, [None] * 2)
        odd = {"quality_error": "-1", "quality_tensor_errors": "0.5 -1 nan inf 1e999 x"}
        assert errors_from_metadata(odd, 6) == (None, [0.5, None, None, None, None, None])

    def test_errors_leave_room_for_other_metadata(self):
        assert set(errors_to_metadata(0.5, [0.123] * 200_000)) == {"quality_error"}

    @pytest.mark.parametrize(
        "bad",
        [
            *("", "[", "[" * 100_000, "[]", "{}", '{"prune": "best", "density": 0.1}'),
            *(f'{{"prune": "sampled", "density": {d}}}' for d in (2, "NaN", "true", "[]", "1e999")),
            *('{"prune": ["sampled"], "density": 0.1}', '{"prune": {}, "density": 0.1}'),
        ],
    )
    def test_recipes_that_make_no_sense(self, bad):
        assert recipe_words({"recipe": bad}) is None

    def test_recipe_in_words(self):
        recipe = Recipe.with_subspaces(3, "tail", prune="magnitude", density=0.02, seed=5).to_dict()
        recipe["search"] = {"evaluations": 31}
        assert recipe_words({"recipe": json.dumps(recipe)}) == (
            "the largest 0.02 of the changes, ranked by size over the whole model; 3 subspaces "
            "with a coefficient each; searched in 31 evaluations; seed 5"
        )
        assert "; values rounded (int3); 3 sub" in recipe_words(
            {"recipe": json.dumps(recipe | {"values": "int3"})}
        )
        recipe |= {"search": {"evaluations": EVIL}, "seed": EVIL, "coefficients": EVIL}
        recipe |= {"values": EVIL}
        assert recipe_words({"recipe": json.dumps(recipe)}) == (
            "the largest 0.02 of the changes, ranked by size over the whole model"
        )

    @pytest.mark.parametrize(
        ("config", "kind"),
        [
            ('{"architectures": ["BertForSequenceClassification"]}', "sequence-classification"),
            ('{"architectures": ["LlamaForCausalLM"]}', "causal-lm"),
            ('{"architectures": ["GPT2LMHeadModel"]}', "causal-lm"),
            ('{"architectures": ["BertModel"]}', None),
            ('{"architectures": ["For<b>"]}', None),
            ('{"architectures": [1]}', None),
            ('{"architectures": []}', None),
            ("[]", None),
            ("{", None),
        ],
    )
    def test_task_of(self, tmp_path, config, kind):
        folder = write_checkpoint(tmp_path / "m", {"w": torch.ones(1)}, config=config)
        assert task_of(open_checkpoint(folder)) == kind
        assert task_of(open_checkpoint(folder / "model.safetensors")) is None


class TestDistortion:
    def test_by_hand(self):
        f32, bf16 = BY_NAME["F32"], BY_NAME["BF16"]

        def words(*values):
            return np.array(values, np.float32).view(np.uint32)

        base, tuned = words(1, 1, 1), words(4, 5, 1)
        for packed, relative in (
            (words(4, 5, 1), 0),
            (words(1, 1, 1), 1),
            (words(4, 1, 1), 4 / 5),
            (words(11, 5, 1), 7 / 5),
        ):
            assert distortion(base, f32, tuned, f32, packed).relative == pytest.approx(relative)
        # The fine-tune in a wider dtype than base and packed.
        narrow = [round_float32(w.view(np.float32), bf16) for w in (base, words(4, 1, 1))]
        assert distortion(narrow[0], bf16, tuned, f32, narrow[1]) == Distortion(16, 25)
        assert total([Distortion(16, 25), Distortion(9, 75), Distortion()]).relative == 0.5
        assert distortion(base, f32, base, f32, base).relative == 0

    def test_sums_are_float64_over_all_slices(self):
        f32 = BY_NAME["F32"]
        size = 2 * _SLICE + 17
        rng = np.random.default_rng(0)
        base, tuned, packed = (rng.standard_normal(size).astype(np.float32) for _ in range(3))
        tuned *= 1e20  # squares overflow float32
        words = [w.view(np.uint32) for w in (base, tuned, packed)]
        found = distortion(words[0], f32, words[1], f32, words[2])
        wide = [w.astype(np.float64) for w in (base, tuned, packed)]
        assert found.lost == pytest.approx(((wide[2] - wide[1]) ** 2).sum(), rel=1e-12)
        assert found.changed == pytest.approx(((wide[1] - wide[0]) ** 2).sum(), rel=1e-12)

    @pytest.mark.parametrize("prune", ["magnitude", "sampled"])
    def test_the_file_states_what_unpacking_gives(self, tiny, tmp_path, prune):
        base, tuned = tiny
        recipe = Recipe(prune=prune, density=0.1)
        report = nps_compress.pack(base, tuned, tmp_path / "t.nps", recipe=recipe)
        nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "out")
        old, new, got = (
            load_file(folder / "model.safetensors") for folder in (base, tuned, tmp_path / "out")
        )
        found = nps_compress.inspect(tmp_path / "t.nps")
        lost, changed = 0.0, 0.0
        for tensor in found["tensors"]:
            name = tensor["name"]
            if name in ("layer.attention", "layer.mlp"):
                off = float((got[name].double() - new[name].double()).square().sum())
                moved = float((new[name].double() - old[name].double()).square().sum())
                expected = math.sqrt(off / moved)
                assert expected > 0.1
                assert tensor["relative_error"] == pytest.approx(expected, rel=6e-3)
                lost, changed = lost + off, changed + moved
            else:  # new, unchanged, not a float; "pooler" is the base's alone
                assert tensor["relative_error"] == (None if name == "pooler" else 0)
        assert found["relative_error"] == pytest.approx(math.sqrt(lost / changed), rel=6e-3)
        assert report.relative_error == pytest.approx(math.sqrt(lost / changed))
        assert (found["relative_error"] > 1) == (prune == "sampled")

    def test_nothing_lost_is_all_zeros(self, tmp_path):
        base = write_checkpoint(tmp_path / "a", {n: torch.arange(99.0) for n in "xyz"})
        tuned = write_checkpoint(
            tmp_path / "b", {n: torch.arange(99.0) + (n != "z") for n in "xyz"}
        )
        nps_compress.pack(base, tuned, tmp_path / "t.nps", recipe=Recipe(density=1.0))
        metadata = nps_compress.inspect(tmp_path / "t.nps")["metadata"]
        assert metadata["quality_error"] == "0"
        assert metadata["quality_tensor_errors"] == "0 0 0"

    def test_a_tensor_whose_changes_are_all_dropped(self, tmp_path):
        base = write_checkpoint(tmp_path / "a", {n: torch.zeros(100) for n in "xy"})
        tuned = write_checkpoint(
            tmp_path / "b", {"x": torch.full((100,), 1e-3), "y": torch.full((100,), 1.0)}
        )
        recipe = Recipe(prune="magnitude", density=0.5)
        nps_compress.pack(base, tuned, tmp_path / "t.nps", recipe=recipe)
        x, y = nps_compress.inspect(tmp_path / "t.nps")["tensors"]
        assert (x["op"], x["relative_error"]) == ("copy", 1)
        assert (y["op"], y["relative_error"]) == ("delta", 0)

    def test_not_finite_tensors_are_exact(self, tmp_path):
        broken = torch.ones(100)
        broken[3] = float("nan")
        base = write_checkpoint(tmp_path / "a", {n: torch.zeros(100) for n in "xy"})
        tuned = write_checkpoint(tmp_path / "b", {"x": broken, "y": torch.ones(100)})
        recipe = Recipe(prune="magnitude", density=0.25)
        nps_compress.pack(base, tuned, tmp_path / "t.nps", recipe=recipe)
        x, y = nps_compress.inspect(tmp_path / "t.nps")["tensors"]
        assert x["relative_error"] == 0
        assert 0.5 < y["relative_error"] < 1

    def test_lossless_files_state_none(self, tiny, tmp_path):
        report = nps_compress.pack(*tiny, tmp_path / "t.nps", lossless=True)
        found = nps_compress.inspect(tmp_path / "t.nps")
        assert report.relative_error is None
        assert found["relative_error"] is None
        assert {tensor["relative_error"] for tensor in found["tensors"]} == {None}
        assert not [key for key in found["metadata"] if key.startswith("quality_")]

    def test_it_travels_with_an_export(self, tiny, tmp_path):
        nps_compress.pack(*tiny, tmp_path / "t.nps", recipe=Recipe(prune="magnitude"))
        patch = tmp_path / "p.safetensors"
        nps_compress.export_sparse(tiny[0], tmp_path / "t.nps", patch)
        nps_compress.import_sparse(tiny[0], patch, tmp_path / "u.nps")
        first, second = (nps_compress.inspect(tmp_path / f"{n}.nps") for n in "tu")
        assert first["tensors"] == second["tensors"]
        assert first["relative_error"] == second["relative_error"] is not None


def measured(*values: float) -> Measured:
    return Measured(np.array(values), np.ones(len(values), np.int64))


class TestScores:
    def test_kl_counts_the_gain_over_the_base(self):
        base, tuned, packed = measured(-4, -2), measured(0, 0), measured(-1, -0.5)
        quality = Yardstick("kl", base, tuned).report(packed, seed=3)
        assert quality.retained == pytest.approx(0.75)
        assert quality.low == pytest.approx(0.75)  # every example keeps the same share
        assert quality.high == pytest.approx(0.75)
        assert (quality.base, quality.packed, quality.seed) == (-3, -0.75, 3)
        assert (
            "retained of the gain over the base",
            "75.00% (95 % interval 75.00% to 75.00%)",
        ) in (quality.rows())

    @pytest.mark.parametrize(
        ("metric", "base", "tuned"), [("loss", -2, -2), ("loss", -1, -2), ("accuracy", 0, 0)]
    )
    def test_no_share_of_nothing(self, metric, base, tuned):
        yardstick = Yardstick(metric, measured(base, base), measured(tuned, tuned))
        quality = yardstick.report(measured(-2, -2))
        assert (quality.retained, quality.low, quality.high) == (None, None, None)
        assert "quality_retained" not in quality.to_metadata()

    def test_a_broken_model_keeps_no_share(self):
        yardstick = Yardstick("loss", measured(-4, -4), measured(-2, -2))
        quality = yardstick.report(measured(math.nan, -2))
        assert quality.retained is None
        assert "quality_packed" not in quality.to_metadata()

    @pytest.mark.parametrize("fitness", ["kl", "agreement"])
    def test_a_search_is_reported(self, classifier_pair, tmp_path, fitness):
        base, tuned, calibration = classifier_pair
        out = tmp_path / "t.nps"
        recipe = Recipe.with_subspaces(3, "tail", density=0.2, seed=4)
        report = nps_compress.pack(
            base,
            tuned,
            out,
            recipe=recipe,
            calibration=calibration,
            search=SearchOptions(fitness=fitness, generations=1),
        )
        quality = report.quality
        assert quality is not None
        assert (quality.metric, quality.task) == (fitness, "sequence-classification")
        assert (quality.seed, quality.density, quality.examples) == (4, 0.2, 24)
        assert quality.finetuned == (0 if fitness == "kl" else 1)
        assert report.recipe is not None
        assert quality.evaluations == report.recipe.search["evaluations"] > 1
        assert quality.packed == pytest.approx(report.recipe.search["best"])
        assert quality.data_sha256 == data_digest(read_examples(calibration))
        assert quality.target is None
        assert quality.examples_needed == 0
        # The unpacked model has the score that the file states.
        nps_compress.unpack(base, out, tmp_path / "out")
        scorer = Fitness(tuned, read_examples(calibration), fitness)
        packed = load_model(tmp_path / "out").model
        scorer.model.load_state_dict(packed.state_dict())
        found = nps_compress.inspect(out)
        assert scorer.score() == pytest.approx(quality.packed)
        assert found["quality"]["packed"] == pytest.approx(quality.packed, rel=1e-5)
        assert found["quality"]["data_sha256"] == quality.data_sha256
        assert (found["quality"]["retained"] is None) == (quality.retained is None)
        assert not list(tmp_path.glob("*.search.json"))
        text = run("inspect", out)
        assert re.search(rf"^  metric +{fitness}$", text, re.M)
        assert re.search(r"^  evaluations +\d+$", text, re.M)
        card = nps_compress.model_card(out)
        assert f"| metric | `{fitness}` |" in card
        assert f"| calibration data sha256 | `{quality.data_sha256}` |" in card
        assert f"searched in {quality.evaluations} evaluations" in card

    def test_the_command_states_it(self, classifier_pair, tmp_path):
        base, tuned, calibration = classifier_pair
        call = ("pack", base, tuned, "-o", tmp_path / "t.nps", "--calibration", calibration)
        said = run(*call, "--generations", 1, "--subspaces", 2, "--density", 0.3)
        assert "kl on calibration data: fine-tune" in said
        assert "kl on 24 calibration examples: base" in said
        assert "on other data" not in said  # the coefficients were fitted to these examples
        found = json.loads(run(*call, "--generations", 1, "--subspaces", 2, "--force", "--json"))
        assert found["quality"]["metric"] == "kl"
        assert found["relative_error"] > 0


class TestInspect:
    def test_columns_and_block(self, tiny, tmp_path):
        nps_compress.pack(*tiny, tmp_path / "t.nps")
        text = run("inspect", tmp_path / "t.nps")
        assert text.splitlines()[0].split()[-1] == "error"
        assert "1 as if nothing were kept" in text
        assert "recipe: signs of 0.2 of the changes" in text
        assert "quality, as measured" not in text
        nps_compress.pack(*tiny, tmp_path / "t.nps", lossless=True, force=True)
        text = run("inspect", tmp_path / "t.nps")
        assert text.splitlines()[0].split()[-1] == "codecs"
        assert "relative error" not in text

    def test_block(self, tmp_path):
        text = run("inspect", write_file(tmp_path / "t.nps", FULL.to_metadata()))
        for line in (
            r"task +sequence-classification",
            r"fine-tune +0\.6",
            r"retained +99\.38% \(95 % interval 97\.00% to 101\.00%\)",
            r"asked for +99\.00%",
            r"calibration examples +240",
            r"seed +7",
            r"evaluations +2",
            r"calibration data sha256 +(ab){32}",
        ):
            assert re.search(rf"^  {line}$", text, re.M), line

    def test_hostile_metadata(self, tmp_path):
        keys = [*FULL.to_metadata(), "quality_error", "quality_tensor_errors", "recipe", "tool"]
        for texts in (
            dict.fromkeys([*keys, "base_name", "finetuned_name"], EVIL),
            dict.fromkeys(keys, EVIL) | {"quality_metric": "accuracy"},
            dict.fromkeys(keys, "nan") | {"quality_metric": "loss", "quality_task": ""},
            dict.fromkeys(keys, "[" * 50_000) | {"quality_metric": "loss"},
        ):
            path = write_file(tmp_path / "t.nps", texts)
            for text in (run("inspect", path), run("card", path)):
                assert all(c.isprintable() or c == "\n" for c in text)
                assert "nan" not in text.replace("finetuned", "")
            found = json.loads(
                run("inspect", path, "--json"), parse_constant=lambda name: pytest.fail(name)
            )
            assert found["relative_error"] is None


GOLDEN = """\
---
library_name: nps-compress
tags:
- nps-compress
- task-vector
base_model: "someone/base"
---

# `someone/law`

A fine-tune of `someone/base`, stored as what changed: base and this file give the weights back, \
each tensor checked against its digest.

```
nps-compress unpack someone/base law.nps -o law-rebuilt
```

## Size

| bytes | weights in full | ratio | parameters | bits per parameter | density |
| --- | --- | --- | --- | --- | --- |
| {bytes} | 16 | {ratio}x | 4 | {bits} | 0 |

## Recipe

An unbiased sample of 0.01 of the changes, ranked by size over the whole model; seed 0.

## Quality

As measured by who packed the file, on the data that its recipe was chosen on; nothing in the \
file can prove it.

|  |  |
| --- | --- |
| task | `sequence-classification` |
| metric | `accuracy` |
| base | `0.17` |
| fine-tune | `0.6` |
| packed | `0.596` |
| retained | `99.38% (95 % interval 97.00% to 101.00%)` |
| asked for | `99.00%` |
| calibration examples | `240` |
| calibration data sha256 | `{data}` |
| density | `0.0125` |
| seed | `7` |
| evaluations | `2` |

## Tensors

- 1 tensors; stored whole, without the base: none
- every change kept exactly: none
- the same as the base's: 0
- relative error over the pruned tensors: 1 (norm of packed - fine-tune over norm of fine-tune - \
base: 0 is exact, 1 as if nothing were kept, and an unbiased sample goes beyond 1)

| largest relative error | error | density |
| --- | --- | --- |
| `w` | 1 | 0 |

## Digests

| digests |  |
| --- | --- |
| the fine-tune (content, BLAKE3) | `{content}` |
| the file (SHA-256) | `{file}` |
| the base (root over 1 tensors) | `{root}` |
"""


class TestCard:
    def test_the_whole_card(self, tmp_path):
        recipe = Recipe(prune="sampled", density=0.01).to_dict()
        names = {"base_name": "someone/base", "finetuned_name": "someone/law"}
        texts = {**names, "recipe": json.dumps(recipe), **FULL.to_metadata()}
        path = write_file(tmp_path / "law.nps", texts | errors_to_metadata(1.0, [1.0]))
        found = nps_compress.inspect(path)
        expected = GOLDEN.format(
            bytes=f"{found['file_bytes']:,}",
            ratio=f"{16 / found['file_bytes']:.1f}",
            bits=f"{found['bits_per_param']:.4g}",
            data="ab" * 32,
            content=found["content_digest"],
            file=found["file_sha256"],
            root=found["base_root"],
        )
        assert nps_compress.model_card(path) == expected
        assert run("card", path) == expected

    def test_of_a_packed_file(self, tiny, tmp_path):
        nps_compress.pack(*tiny, tmp_path / "t.nps")
        card = run("card", tmp_path / "t.nps")
        assert "base_model" not in card  # a folder's name is no Hub id
        assert "nps-compress unpack base t.nps -o tuned-rebuilt" in card
        assert "8 tensors; stored whole, without the base: `embed`, `empty`, `head`" in card
        assert "the same as the base's: 3" in card
        assert "pooler" not in card
        nps_compress.pack(*tiny, tmp_path / "t.nps", lossless=True, force=True)
        card = run("card", tmp_path / "t.nps")
        assert "None is recorded in the file." in card
        assert "## Quality" not in card
        assert "relative error" not in card

    def test_the_five_worst_come_first(self, tmp_path):
        values = {f"t{i}": torch.zeros(10, 100) for i in range(7)}
        base = write_checkpoint(tmp_path / "a", values)
        rng = torch.Generator().manual_seed(0)
        tuned = write_checkpoint(
            tmp_path / "b",
            {n: torch.randn(10, 100, generator=rng) * (i + 1) for i, n in enumerate(values)},
        )
        nps_compress.pack(
            base, tuned, tmp_path / "t.nps", recipe=Recipe(prune="sampled", density=0.2)
        )
        card = nps_compress.model_card(tmp_path / "t.nps")
        shown = re.findall(r"^\| `(t\d)` \| ([\d.]+) \|", card, re.M)
        assert [name for name, _ in shown] == ["t0", "t1", "t2", "t3", "t4"]
        errors = [float(error) for _, error in shown]
        assert errors == sorted(errors, reverse=True)

    def test_names_stay_names(self, tmp_path):
        names = {"base_name": EVIL, "finetuned_name": EVIL}
        path = write_file(tmp_path / "t.nps", names | errors_to_metadata(1, [1]), "a|`<b>`|\\")
        card = nps_compress.model_card(path)
        front, body = card.split("---\n\n", 1)
        assert front == ("---\nlibrary_name: nps-compress\ntags:\n- nps-compress\n- task-vector\n")
        assert "\nnps-compress unpack BASE t.nps -o finetuned-rebuilt\n" in body
        code = re.compile(r"```.*?```|`[^`\n]*`", re.S)
        outside = code.sub("", body)
        assert "`" not in outside
        for piece in ("<", "script", "reboot", "evil", "\x1b", "‮"):
            assert piece not in outside
        row = next(line for line in body.splitlines() if "<b>" in line)
        assert row.count("|") == 4

    @pytest.mark.parametrize("base", ["a/b/c", "-x/y", "a/b c", "a/..", "../a", "a/b\n", "x" * 300])
    def test_what_is_no_hub_id(self, tmp_path, base):
        card = nps_compress.model_card(write_file(tmp_path / "t.nps", {"base_name": base}))
        assert "base_model" not in card
        assert "nps-compress unpack BASE t.nps" in card
        assert max(map(len, card.splitlines())) < 500

    def test_a_file_name_that_a_shell_reads(self, tmp_path):
        card = nps_compress.model_card(write_file(tmp_path / "$(x) t.nps", {}))
        assert "unpack BASE '$(x) t.nps' -o finetuned-rebuilt" in card
        card = nps_compress.model_card(write_file(tmp_path / "-o.nps", {}))
        assert "unpack BASE ./-o.nps -o" in card

    def test_command(self, tiny, tmp_path):
        task, out = tmp_path / "t.nps", tmp_path / "README.md"
        nps_compress.pack(*tiny, task)
        assert run("card", task, "-o", out) == f"{out}: written\n"
        assert out.read_text() == run("card", task)

        def fails(*arguments: object) -> str:
            done = CliRunner().invoke(main, [str(a) for a in ("card", *arguments)])
            assert done.exit_code == 1
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1
            return done.stderr

        out.write_text("precious")
        assert "pass --force" in fails(task, "-o", out)
        assert out.read_text() == "precious"
        run("card", task, "-o", out, "--force")
        assert out.read_text() == run("card", task)
        before = task.read_bytes()
        assert "would replace the input" in fails(task, "-o", task, "--force")
        assert task.read_bytes() == before
        assert "No such file" in fails(tmp_path / "none.nps")
        assert "does not exist" in fails(task, "-o", tmp_path / "missing" / "README.md")
        task.write_bytes(b"x" * 500)
        assert "H-MAGIC" in fails(task)
        assert "H-MAGIC" in fails(task, "-o", tmp_path / "other.md")
        assert not (tmp_path / "other.md").exists()
