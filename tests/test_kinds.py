"""Every fitness on tiny models of every kind: against plain transformers, and what must hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch.nn import functional

import nps_compress
from nps_compress import (
    CalibrationError,
    CheckpointError,
    FitnessError,
    InvalidArgumentError,
    Recipe,
    SearchOptions,
)
from nps_compress.batches import in_batches
from nps_compress.calibration import Example
from nps_compress.fitness import (
    LABEL_FREE,
    SUITS,
    Fitness,
    check_fitness,
    label_free_fitness,
    natural_metric,
)
from nps_compress.importance import fisher
from nps_compress.measured import join
from nps_compress.models import kind_of, load_model

KINDS = (*SUITS, "vision encoder")
COMBINATIONS = [
    (kind, name)
    for kind in KINDS
    for name in SUITS.get(kind, ("hidden", "embedding"))
    if name != "exact_match"
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (folder, examples), each made once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tiny_models.build(kind, tmp_path_factory.mktemp(kind.replace(" ", "-")))
            examples = tiny_models.examples_of(kind, folder)
            if kind != "vision encoder":
                examples = tiny_models.labelled(folder, examples)
            made[kind] = folder, examples
        return made[kind]

    return get


@pytest.mark.parametrize(("kind", "name"), COMBINATIONS)
def test_what_holds_for_every_fitness(models, kind, name):
    folder, examples = models(kind)
    fitness = Fitness(folder, examples, name, batch_size=5)
    before = fitness.measure()
    assert len(before.counts) == len(examples)
    if name in ("agreement", "accuracy", "spearman"):
        assert before.score == pytest.approx(1)
    elif name in LABEL_FREE or kind == "regression":
        assert before.score == pytest.approx(0, abs=1e-5)
    parts = [part for n in range(fitness.part_count) for part in fitness.parts([n])]
    assert len(parts) == math.ceil(len(examples) / 5)
    assert join(parts).score == before.score
    tiny_models.damage(fitness.model)
    after = fitness.score()
    assert after < before.score - 1e-3
    # Neither padding nor the company of other examples changes anything.
    alone = Fitness(folder, examples, name, batch_size=1)
    tiny_models.damage(alone.model)
    assert alone.score() == pytest.approx(after, rel=1e-3, abs=1e-4)


def test_batches_are_alike_in_length_and_their_order_is_not():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 100, 200)]
    found = in_batches(lengths, 8, 400)
    assert sorted(i for batch in found for i in batch) == list(range(200))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in found]
    assert max(map(len, found)) == 8
    assert max(padded) <= 400
    assert sum(padded) < 1.1 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in found]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3
    assert found == in_batches(lengths, 8, 400)
    assert sorted(in_batches([1000, 2000], 8, 400)) == [[0], [1]]  # one each at least


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_suit_a_model(models, kind):
    folder, examples = models(kind)
    suits = SUITS[kind_of(folder)]
    for name in {"kl", "accuracy", "perplexity", "spearman"} - set(suits):
        with pytest.raises(InvalidArgumentError, match=f"{suits[-1]} or module:function for "):
            Fitness(folder, examples, name)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_by_their_names_in_the_file(models, kind, tmp_path):
    folder, examples = models(kind)
    other = tiny_models.build(kind, tmp_path / "other", seed=1)
    fitness = Fitness(folder, examples, "embedding")
    assert fitness.score() == pytest.approx(0, abs=1e-5)
    stored = load_file(other / "model.safetensors")
    assert set(stored) <= set(fitness.weights)
    with torch.no_grad():
        for name, tensor in stored.items():
            fitness.weights[name].copy_(tensor)
    assert fitness.score() < -1e-3
    wanted = load_model(other).model.state_dict()
    found = fitness.model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_importance(models, kind):
    folder, examples = models(kind)
    found = fisher(folder, examples)
    stored = load_file(folder / "model.safetensors")
    floats = {name for name, tensor in stored.items() if tensor.is_floating_point()}
    assert floats <= set(found)
    for name in floats:
        assert found[name].rows.size * found[name].columns.size == stored[name].numel()
    every = np.concatenate([f.part(0, f.rows.size * f.columns.size) for f in found.values()])
    assert np.isfinite(every).all()
    assert every.max() > 4 * every.min()
    again = fisher(folder, examples)
    for name, one in found.items():
        assert np.array_equal(one.rows, again[name].rows)
        assert np.array_equal(one.columns, again[name].columns)


@pytest.mark.parametrize("kind", ["token", "seq2seq", "image", "clip", "encoder", "vision encoder"])
def test_search_and_pack(models, kind, tmp_path):
    _, examples = models(kind)
    base = tiny_models.build(kind, tmp_path / "base")
    tuned = load_model(base)
    tiny_models.damage(tuned.model)
    tuned.model.save_pretrained(tmp_path / "tuned")
    for path in base.glob("tokenizer*"):
        (tmp_path / "tuned" / path.name).write_bytes(path.read_bytes())
    lines = [
        {
            key: str(value) if key == "image" else value
            for key, value in vars(example).items()
            if value is not None
        }
        for example in examples
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = nps_compress.search_recipe(
        base,
        tmp_path / "tuned",
        tmp_path / "c.jsonl",
        tmp_path / "r.json",
        Recipe.with_subspaces(2, "tail", density=0.3),
        SearchOptions(generations=1, population=2),
    )
    assert recipe.search["fitness"] == label_free_fitness(tmp_path / "tuned", examples)
    assert recipe.search["best"] < 0
    report = nps_compress.pack(base, tmp_path / "tuned", tmp_path / "t.nps", recipe=recipe)
    assert report.nnz


class TestToken:
    def test_accuracy_and_loss_agree_with_transformers(self, models):
        folder, _ = models("token")
        words = ("the", "cat-dog", "runs")  # three pieces in the middle
        examples = [Example(words=words, labels=(0, "green", -100)), Example(text="a red day")]
        examples[1] = replace(examples[1], labels=(2, 2, 1))
        loaded = load_model(folder)
        loss = right = 0.0
        for text, where, wanted in (
            ("the cat-dog runs", [0, 1], [0, 1]),
            ("a red day", [0, 1, 2], [2, 2, 1]),
        ):
            with torch.inference_mode():
                logits = loaded.model(**loaded.processor(text, return_tensors="pt")).logits[0]
            target = torch.tensor(wanted)
            loss += float(functional.cross_entropy(logits[where], target, reduction="sum"))
            right += int((logits[where].argmax(-1) == target).sum())
        found = Fitness(folder, examples, "loss").measure()
        assert found.score == pytest.approx(-loss / 5, abs=1e-5)
        assert sorted(found.counts.tolist()) == [2, 3]
        assert Fitness(folder, examples, "accuracy").score() == pytest.approx(right / 5)
        assert Fitness(folder, examples, "kl").measure().counts.sum() == 6

    def test_bad_examples(self, models):
        folder, _ = models("token")
        for example, reason in (
            (Example(words=("a",)), "example 1 has no labels"),
            (Example(words=("a",), labels=(7,)), "example 1 has label 7, the model knows 3"),
            (Example(image=folder, label=1), "example 1 has no words"),
            (Example(words=("a",), labels=(-100,)), "no word with a label"),
        ):
            with pytest.raises(CalibrationError, match=reason):
                Fitness(folder, [example], "accuracy")


class TestImage:
    def test_agrees_with_transformers(self, models, tmp_path):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder, examples = models("image")
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 16, "width": 16},
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.3, 0.4],
        }
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        names = {name: i for i, name in tiny_models.NAMES.items()}
        total = 0.0
        for example in examples:
            from PIL import Image

            pixels = processor(images=Image.open(example.image), return_tensors="pt").pixel_values
            with torch.inference_mode():
                found = model(pixels, labels=torch.tensor([names[example.label]]))
            total += float(found.loss)
        score = Fitness(tmp_path, examples, "loss").score()
        assert score == pytest.approx(-total / len(examples), abs=1e-5)
        assert score != pytest.approx(Fitness(folder, examples, "loss").score(), abs=1e-4)

    def test_bad_examples(self, models, tmp_path):
        folder, examples = models("image")
        with pytest.raises(CalibrationError, match="example 1 has no image"):
            Fitness(folder, [Example(text="a")], "kl")
        with pytest.raises(CalibrationError, match="example 2 has label 'pink'"):
            Fitness(folder, [examples[0], replace(examples[1], label="pink")], "accuracy")
        (tmp_path / "a.png").write_text("no image")
        with pytest.raises(CalibrationError, match="can't be read as an image"):
            Fitness(folder, [Example(image=tmp_path / "a.png")], "kl")


class TestSeq2seq:
    def test_loss_agrees_with_transformers(self, models):
        from transformers import AutoModelForSeq2SeqLM

        folder, examples = models("seq2seq")
        model, tokenizer = (
            AutoModelForSeq2SeqLM.from_pretrained(folder).eval(),
            load_model(folder).processor,
        )
        total, count = 0.0, 0
        for example in examples:
            inputs = tokenizer(example.text, return_tensors="pt")
            wanted = tokenizer(text_target=example.target, return_tensors="pt")["input_ids"]
            assert wanted[0, -1] == tokenizer.eos_token_id
            with torch.inference_mode():
                loss = model(**inputs, labels=wanted).loss
            total, count = total + float(loss) * wanted.shape[1], count + wanted.shape[1]
        assert Fitness(folder, examples, "loss").score() == pytest.approx(-total / count, abs=1e-4)
        perplexity = Fitness(folder, examples, "perplexity").score()
        assert perplexity == pytest.approx(-math.exp(total / count), rel=1e-4)

    def test_without_targets(self, models):
        folder, examples = models("seq2seq")
        prompts = [replace(example, target=None) for example in examples]
        fitness = Fitness(folder, prompts, "agreement")
        assert fitness.score() == 1
        assert fitness.measure().counts.min() >= 1
        with pytest.raises(CalibrationError, match="example 1 has no target"):
            Fitness(folder, prompts, "loss")


class TestCausal:
    def test_only_the_target_counts(self, models):
        folder, _ = models("causal")
        example = Example(text="the red cat", target="runs in")
        loaded = load_model(folder)
        ids = loaded.processor("the red cat runs in", return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, :3] = -100
        with torch.inference_mode():
            loss = float(loaded.model(ids, labels=labels).loss)
        found = Fitness(folder, [example, Example(text="a", target="dog")], "loss").measure()
        assert sorted(found.counts.tolist()) == [1, 2]
        assert min(found.sums / found.counts) == pytest.approx(-loss, abs=1e-4) or max(
            found.sums / found.counts
        ) == pytest.approx(-loss, abs=1e-4)

    @pytest.mark.parametrize("name", ["loss", "kl", "agreement", "perplexity"])
    def test_an_example_that_predicts_nothing(self, models, name):
        folder, examples = models("causal")
        more = [Example(text="cat"), *examples]
        found = Fitness(folder, more, name, batch_size=1).measure()
        assert sorted(found.counts.tolist())[0] == 0
        assert found.score == pytest.approx(Fitness(folder, examples, name).score(), abs=1e-4)

    def test_a_long_prompt_keeps_its_end(self, models):
        folder, _ = models("causal")
        loaded = load_model(folder)
        encoded = loaded.encode([Example(text="red " * 40 + "cat", target="dog")], "test", True)[0]
        assert len(encoded.rows[0]["input_ids"]) == 32
        assert loaded.text_of(encoded.rows[0]["input_ids"][-2:]) == "cat dog"
        assert encoded.predicted == (30,)


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def trained(request, tmp_path_factory):
    """A model that has learnt to answer PAIRS by heart."""
    kind = request.param
    folder = tiny_models.build(kind, tmp_path_factory.mktemp("answers"))
    loaded = load_model(folder)
    examples = [Example(text=text, target=target) for text, target in tiny_models.PAIRS]
    end = loaded.processor.eos_token_id
    encoded = []
    for item in loaded.encode(examples, "test", labelled=True):
        if kind == "causal":  # a target ends where the text ends; the answer must end too
            (row,) = item.rows
            size = len(row["input_ids"])
            row = {"input_ids": [*row["input_ids"], end], "attention_mask": [1] * (size + 1)}
            item = replace(
                item,
                rows=(row,),
                predicted=(*item.predicted, size - 1),
                targets=(*item.targets, end),
            )
        encoded.append(item)
    batch = loaded.collate(encoded)
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = functional.cross_entropy(loaded.logits(batch), batch.targets)
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02
    loaded.model.save_pretrained(folder)
    return folder, examples


class TestExactMatch:
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_share_of_right_answers(self, trained, batch_size):
        folder, examples = trained
        some = [replace(e, target="cat the") if i in (1, 4) else e for i, e in enumerate(examples)]
        some[0] = replace(some[0], target=f"  {some[0].target}\n")
        fitness = Fitness(folder, some, "exact_match", batch_size)
        found = fitness.measure()
        assert found.score == pytest.approx(4 / 6)
        assert len(found.counts) == 6
        assert fitness.part_count == math.ceil(6 / batch_size)
        tiny_models.damage(fitness.model)
        assert fitness.score() < 0.5

    def test_settings_of_the_folder_do_not_sample(self, trained, tmp_path):
        folder, examples = trained
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        path = tmp_path / "generation_config.json"
        settings = json.loads(path.read_text())
        path.write_text(
            json.dumps({**settings, "do_sample": True, "temperature": 50.0, "num_beams": 2})
        )
        assert Fitness(tmp_path, examples, "exact_match").score() == 1

    def test_no_target(self, trained):
        with pytest.raises(CalibrationError, match="example 2 has no target"):
            Fitness(trained[0], [trained[1][0], Example(text="a")], "exact_match")


NAMES = ("red", "green", "blue", "red")


class TestClip:
    def test_agrees_with_transformers(self, models):
        folder, examples = models("clip")
        loaded = load_model(folder)
        every = [replace(e, label=name) for e, name in zip(examples, NAMES, strict=False)]
        encoded = loaded.encode(every, "test", labelled=True)
        assert loaded.classes == ["blue", "green", "red"]
        batch = loaded.collate(encoded)
        texts = [f"a photo of a {name}." for name in loaded.classes]
        tokens = loaded.tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            found = loaded.model(
                pixel_values=batch.inputs["pixel_values"],
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
            )
            assert torch.allclose(loaded.logits(batch), found.logits_per_image, atol=1e-4)
            assert torch.allclose(loaded.embeddings(batch), found.image_embeds, atol=1e-5)

    def test_the_text_head_stays(self, models):
        fitness = Fitness(*models("clip"), "loss")
        before = fitness.score()
        tiny_models.damage(fitness.model.text_model)
        assert fitness.score() == before
        tiny_models.damage(fitness.model.vision_model)
        assert fitness.score() != before

    def test_bad_labels(self, models):
        folder, examples = models("clip")
        numbers = [replace(example, label=1) for example in examples]
        with pytest.raises(CalibrationError, match="CLIP needs names"):
            Fitness(folder, numbers, "accuracy")
        bare = [replace(example, label=None) for example in examples]
        with pytest.raises(CalibrationError, match="CLIP's classes"):
            Fitness(folder, bare, "kl")
        assert Fitness(folder, bare, "embedding").score() == pytest.approx(0, abs=1e-6)


class TestEncoder:
    def vectors(self, folder, text):
        loaded = load_model(folder)
        inputs = loaded.processor(text, return_tensors="pt")
        with torch.inference_mode():
            return loaded.model(**inputs).last_hidden_state[0]

    def test_embeddings_and_spearman(self, models):
        folder, examples = models("encoder")
        cosines = []
        for example in examples:
            left, right = (self.vectors(folder, t).mean(0) for t in (example.text, example.pair))
            cosines.append(float(functional.cosine_similarity(left, right, dim=0)))
        # Scores in the opposite order of the cosines.
        wrong = [replace(e, label=-c) for e, c in zip(examples, cosines, strict=True)]
        assert Fitness(folder, wrong, "spearman").score() == pytest.approx(-1)
        fitness = Fitness(folder, examples[:1], "embedding")
        kept = [self.vectors(folder, t).mean(0) for t in (examples[0].text, examples[0].pair)]
        with torch.no_grad():
            fitness.model.encoder.layer[-1].output.LayerNorm.bias += 1.0
        moved = [vector + 1 for vector in kept]
        expected = np.mean(
            [
                2 * float(functional.cosine_similarity(a, b, dim=0)) - 2
                for a, b in zip(kept, moved, strict=True)
            ]
        )
        assert fitness.score() == pytest.approx(expected, abs=1e-5)

    def test_hidden_is_relative(self, models):
        folder, _ = models("encoder")
        fitness = Fitness(folder, [Example(text="the cat"), Example(text="a")], "hidden")
        states = torch.cat([self.vectors(folder, "the cat"), self.vectors(folder, "a")])
        with torch.no_grad():
            fitness.model.encoder.layer[-1].output.LayerNorm.bias += 0.5
        assert fitness.score() == pytest.approx(-0.25 / float(states.square().mean()), rel=1e-4)

    @pytest.mark.parametrize("mode", [{"pooling_mode": "cls"}, {"pooling_mode_lasttoken": True}])
    def test_pooling_of_sentence_transformers(self, models, tmp_path, mode):
        folder, _ = models("encoder")
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(mode))
        loaded = load_model(tmp_path)
        texts = [Example(text="the red cat"), Example(text="a")]
        batch = loaded.collate(loaded.encode(texts, "test", labelled=False))
        found = loaded.embeddings(batch)
        at = 0 if "pooling_mode" in mode else -1
        wanted = functional.normalize(self.vectors(folder, "the red cat")[at], dim=0)
        assert torch.allclose(found[0], wanted, atol=1e-5)
        (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
        with pytest.raises(CheckpointError, match="asks for 'max'"):
            load_model(tmp_path)

    def test_bad_examples(self, models):
        folder, _ = models("encoder")
        for example, reason in (
            (Example(text="a", label=0.5), "example 1 has no second text"),
            (Example(text="a", pair="b", label="x"), "example 1 has label 'x', needs a score"),
            (Example(words=("a",)), "example 1 has no text"),
            (Example(text=""), "example 1 has no tokens"),
        ):
            with pytest.raises(CalibrationError, match=reason):
                Fitness(folder, [example], "spearman")


def test_other_heads_are_encoders(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    torch.manual_seed(0)
    several = BertConfig(**tiny_models.BERT, problem_type="multi_label_classification")
    BertForSequenceClassification(several).save_pretrained(tmp_path)
    assert kind_of(tmp_path) == "encoder"
    BertForMaskedLM(BertConfig(**tiny_models.BERT)).save_pretrained(tmp_path)
    tiny_models.write_tokenizer(tmp_path)
    fitness = Fitness(tmp_path, [Example(text="the cat runs")], "hidden")
    assert fitness.score() == pytest.approx(0, abs=1e-6)
    tiny_models.damage(fitness.model)
    assert fitness.score() < -1e-3


def test_metrics_people_judge_by(models):
    expected = {
        "sequence": ("accuracy", "kl"),
        "regression": ("spearman", "embedding"),
        "token": ("accuracy", "kl"),
        "causal": ("loss", "kl"),
        "seq2seq": ("loss", "kl"),
        "image": ("accuracy", "kl"),
        "clip": ("accuracy", "kl"),
        "encoder": ("spearman", "embedding"),
        "vision encoder": ("embedding", "embedding"),
    }
    without = {"causal": "loss", "clip": "embedding", "regression": "embedding"}
    without |= {"encoder": "embedding", "vision encoder": "embedding"}
    for kind, wanted in expected.items():
        folder, examples = models(kind)
        assert (natural_metric(folder, examples), label_free_fitness(folder, examples)) == wanted
        bare = [replace(e, label=None, labels=None, target=None) for e in examples]
        assert natural_metric(folder, bare) == without.get(kind, "agreement")


def test_a_model_that_can_not_be_run(models, tmp_path):
    folder, _ = models("encoder")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer.json"
    path.write_text(
        path.read_text().replace('"cat":5', '"cat":5000').replace('"cat": 5', '"cat": 5000')
    )
    with pytest.raises(CheckpointError, match="can't be run on the examples"):
        Fitness(tmp_path, [Example(text="the cat")], "hidden")


class TestOwnFunction:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def write(name, text):
            (tmp_path / f"{name}.py").write_text(text)

        return write

    def test_one_figure_or_one_for_each_example(self, models, module):
        module(
            "own_a",
            "def one(model, examples):\n"
            "    return float(model.pooler.dense.weight.abs().sum())\n"
            "def each(model, examples, tokenizer):\n"
            "    return [-len(tokenizer(e.text)['input_ids']) for e in examples]\n"
            "def tensor(model, examples, batch_size=2):\n"
            "    assert batch_size == 2\n"
            "    return next(model.parameters()).sum() * 0 + 3\n",
        )
        folder, examples = models("encoder")
        fitness = Fitness(folder, examples, "own_a:one")
        before = fitness.measure()
        assert before.counts.tolist() == [1]
        with torch.no_grad():
            fitness.model.pooler.dense.weight *= 2
        assert fitness.score() == pytest.approx(2 * before.score)
        found = Fitness(folder, examples, "own_a:each").measure()
        assert found.sums.tolist() == [-len(e.text.split()) for e in examples]
        assert Fitness(folder, examples, "own_a:tensor").score() == 3
        assert fitness.part_count == 1

    def test_errors(self, models, module):
        module(
            "own_b",
            "number = 3\n"
            "def fails(model, examples): return {}['key']\n"
            "def short(model, examples): return [1.0]\n"
            "def text(model, examples): return 'high'\n",
        )
        module("own_c", "raise RuntimeError('not today')\n")
        folder, examples = models("encoder")
        for name, reason in (
            ("fails", "fitness own_b:fails: KeyError: 'key'"),
            ("short", r"returned shape \(1,\), needs a float or 14 of them"),
            ("text", "ValueError: could not convert string"),
        ):
            with pytest.raises(FitnessError, match=reason):
                Fitness(folder, examples, f"own_b:{name}").score()
        with pytest.raises(FitnessError, match="RuntimeError: not today"):
            check_fitness("own_c:x")
        for name, reason in (
            ("own_b:number", "a function of own_b"),
            ("own_b:nothing", "a function of own_b"),
            ("own_none:x", "importable"),
            ("a/b:c", "or your own module:function"),
            ("bleu", "one of kl, agreement"),
        ):
            with pytest.raises(InvalidArgumentError, match=reason):
                check_fitness(name)

    def test_pack(self, classifier_pair, module, tmp_path):
        module(
            "own_d",
            "reference = None\n"
            "def near(model, examples):\n"
            "    global reference\n"
            "    found = model.classifier.weight.sum() + model.bert.pooler.dense.weight.sum()\n"
            "    reference = found if reference is None else reference\n"
            "    return -abs(float(found - reference))\n",
        )
        base, tuned, calibration = classifier_pair
        report = nps_compress.pack(
            base,
            tuned,
            tmp_path / "t",
            retain=0.5,
            calibration=calibration,
            search=SearchOptions(fitness="own_d:near", generations=0),
        )
        assert report.quality
        assert report.quality.metric == "own_d:near"
        assert report.quality.low == report.quality.retained >= 0.5
        assert report.quality.examples == 1


@pytest.mark.parametrize("name", ["spearman", "hidden", "embedding"])
def test_retain_of_an_encoder(models, name, tmp_path):
    _, examples = models("encoder")
    base = tiny_models.build("encoder", tmp_path / "base")
    tuned = load_model(base)
    tiny_models.damage(tuned.model)
    tuned.model.save_pretrained(tmp_path / "tuned")
    for path in base.glob("tokenizer*"):
        (tmp_path / "tuned" / path.name).write_bytes(path.read_bytes())
    examples = tiny_models.labelled(tmp_path / "tuned", examples)
    lines = [{"text": e.text, "pair": e.pair, "label": e.label} for e in examples]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = nps_compress.pack(
        base,
        tmp_path / "tuned",
        tmp_path / "t.nps",
        retain=0.6,
        calibration=tmp_path / "c.jsonl",
        search=SearchOptions(fitness=name, generations=0),
    )
    quality = report.quality
    assert quality
    assert 0.6 <= quality.retained <= 1.01
    assert quality.low <= quality.retained <= quality.high
    assert quality.examples == 14
