"""What a deployment takes: counts and projections by hand, measurements through the command."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from test_cli import fails, ok

import nps_compress
from nps_compress.bench import measuring, projection, run, svg, synthetic
from nps_compress.bench.figures import Figure, Table, human
from nps_compress.bench.peers import PEERS
from nps_compress.bench.projection import DENSE, OURS, One, Plan
from nps_compress.bench.shapes import MODELS, lora_parameters, parameters
from nps_compress.checkpoint import open_checkpoint

TOTALS = {  # as the Hub states them for each model's safetensors
    "minilm": 22_713_216,
    "bert-base": 109_482_240,
    "qwen-0.5b": 494_032_768,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
}
KINDS = {"measured", "projected", "reported"}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_have_the_public_totals(name):
    assert parameters(MODELS[name].tensors()) == TOTALS[name]


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_transformers(name):
    import transformers as hf

    model = MODELS[name]
    options = {
        "hidden_size": model.hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": model.heads,
        "intermediate_size": model.intermediate,
        "vocab_size": model.vocab,
        "tie_word_embeddings": model.tied,
    }
    if model.family != "bert":
        options["num_key_value_heads"] = model.kv_heads
    made = {
        "bert": lambda: hf.BertModel(hf.BertConfig(**options)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**options)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**options)),
    }
    with torch.device("meta"):
        found = made[model.family]()
    expected = {key: tuple(value.shape) for key, value in found.named_parameters()}
    others = re.compile(r"layers?\.([2-9]|\d\d+)\.")
    stated = {key: shape for key, shape in model.tensors().items() if not others.search(key)}
    assert stated == expected


def test_lora_of_llama_8b_by_hand():
    # In each of 32 layers: q and o are 4096 x 4096, k and v 1024 x 4096, gate, up and down
    # 14336 x 4096.
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert 32 * 16 * layer == 41_943_040
    assert lora_parameters(MODELS["llama-8b"].tensors(), 16) == 41_943_040
    assert lora_parameters(MODELS["llama-8b"].tensors(), 1) == 2_621_440


def test_lora_leaves_out_embeddings_and_output():
    shapes = {
        "model.embed_tokens.weight": (100, 8),
        "transformer.wte.weight": (100, 8),
        "bert.embeddings.position_embeddings.weight": (32, 8),
        "lm_head.weight": (100, 8),
        "layer.norm.weight": (8,),
        "experts": (2, 8, 8),
        "layer.dense.weight": (24, 8),
    }
    assert lora_parameters(shapes, 4) == 4 * (24 + 8)


class TestProjection:
    ONE = One(
        base_bytes=1000e9,
        dense_bytes=800e9,
        file_bytes=10e9,
        changed_bytes=600e9,
        lora_params=2e9,
        load=7.0,
        plain_load=3.0,
        switch=5.0,
    )
    PLAN = Plan(
        tasks=50,
        downloads=200,
        machines=4,
        egress_price=0.5,
        resident=10,
        bandwidth=8.0,
        lora_rank=4,
    )

    def figures(self) -> dict[tuple[str, str], float]:
        found = projection.project(self.ONE, self.PLAN)
        assert {figure.kind for figure in found} == {"projected"}
        return {(figure.subject, figure.name): figure.value for figure in found}

    def test_ours(self):
        found = self.figures()
        expected = {
            "one task": 10e9,
            "disk": 1000e9 + 50 * 10e9,
            "dense / this": 50 * 800e9 / 1500e9,
            "egress": 4 * 1000e9 + 200 * 10e9,
            "egress cost": 6000 * 0.5,
            "memory, one in use": 1000e9 + 10 * 10e9 + 600e9,
            "memory, all in use": (800e9 - 600e9) + 10 * 600e9,
            "download": 10.0,  # 10 GB at 1 GB/s
            "cold start": 17.0,
            "warm start": 15.0,
        }
        assert {name: found[OURS, name] for name in expected} == pytest.approx(expected)

    def test_dense_copies_need_no_base(self):
        found = self.figures()
        expected = {
            "disk": 50 * 800e9,
            "dense / this": 1.0,
            "egress": 200 * 800e9,
            "egress cost": 80_000.0,
            "memory, one in use": 10 * 800e9,
            "memory, all in use": 10 * 800e9,
            "cold start": 803.0,
        }
        assert {name: found[DENSE, name] for name in expected} == pytest.approx(expected)

    def test_lora(self):
        found = self.figures()
        name = "LoRA of rank 4"
        assert found[name, "one task"] == 4e9  # two bytes a parameter
        assert found[name, "disk"] == 1000e9 + 50 * 4e9
        assert found[name, "memory, all in use"] == 1000e9 + 10 * 4e9
        assert found[name, "download"] == pytest.approx(4.0)
        assert (name, "cold start") not in found  # nothing of it was measured

    @pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
    def test_peers(self, peer):
        found = self.figures()
        size = 800e9 / peer.ratio
        stored = 1000e9 + 10 * size
        assert found[peer.name, "disk"] == pytest.approx(1000e9 + 50 * size)
        assert found[peer.name, "memory, one in use"] == pytest.approx(
            stored if peer.unrebuilt else stored + 800e9
        )
        assert found[peer.name, "memory, all in use"] == pytest.approx(
            stored if peer.unrebuilt else 10 * 800e9
        )
        assert (peer.name, "cold start") not in found
        assert peer.source.startswith("https://")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("tasks", 0),
            ("machines", 0),
            ("resident", -1),
            ("lora_rank", 0),
            ("downloads", -1),
            ("egress_price", math.nan),
            ("egress_price", -0.1),
            ("bandwidth", 0.0),
            ("bandwidth", math.inf),
        ],
    )
    def test_out_of_range(self, name, value):
        with pytest.raises(nps_compress.NpsError, match=r"received"):
            Plan(**{"tasks": 1, "downloads": 1, name: value})


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "bytes", "0 B"),
        (999, "bytes", "999 B"),
        (999_940, "bytes", "999.9 kB"),
        (999_960, "bytes", "1 MB"),
        (16_060_522_496, "bytes", "16.06 GB"),
        (5e30, "bytes", "5e+12 EB"),
        (0.01234, "seconds", "12.3 ms"),
        (1.2, "seconds", "1.2 s"),
        (7200, "seconds", "7,200 s"),
        (53.61, "ratio", "53.6x"),
        (1234.5, "ratio", "1,234x"),
        (1234.5, "USD", "1,234.50 USD"),
        (0.21674, "bits", "0.2167"),
        (8030261248, "parameters", "8,030,261,248"),
    ],
)
def test_numbers_for_people(value, unit, text):
    assert human(value, unit) == text


def test_a_table_shows_what_is_not_known():
    table = Table(
        "t",
        (Figure("a", "x", 1, "seconds", "measured"), Figure("b", "y", 2, "bytes", "projected")),
    )
    assert table.rows() == [
        ("", "x", "y"),
        ("", "measured", "projected"),
        ("a", "1 s", "-"),
        ("b", "-", "2 B"),
    ]


class TestSample:
    def test_the_whole_model_where_it_fits(self):
        shapes, part = synthetic.sample(MODELS["minilm"], 2 * TOTALS["minilm"])
        assert (parameters(shapes), part) == (TOTALS["minilm"], "the whole model")

    def test_else_whole_layers(self):
        model = MODELS["llama-8b"]
        layer = parameters(model.layer(0))
        assert synthetic.sample(model, 2 * layer) == (model.layer(0), "1 layer")
        shapes, part = synthetic.sample(model, 6 * layer + 2)
        assert (parameters(shapes), part) == (3 * layer, "3 layers")

    def test_else_rows_of_one(self):
        model = MODELS["llama-70b"]
        layer = parameters(model.layer(0))
        shapes, part = synthetic.sample(model, layer // 2)
        assert part == "1 layer with 25.00% of its rows"
        assert parameters(shapes) == pytest.approx(layer / 4, rel=1e-3)
        assert shapes.keys() == model.layer(0).keys()
        assert shapes["model.layers.0.mlp.up_proj.weight"] == (7168, 8192)

    def test_what_is_made(self, tmp_path):
        shapes = {"a": (300, 40), "b": (7,)}
        base, tuned = synthetic.write_pairs(tmp_path, shapes, 2)
        found = [open_checkpoint(path).read("a").astype("<u4") << 16 for path in (base, *tuned)]
        values = [torch.from_numpy(words.view("<f4")) for words in found]
        assert values[0].std().item() == pytest.approx(synthetic.WEIGHT_SCALE, rel=0.02)
        for value in values[1:]:
            change = value - values[0]
            # The root of E[z^4] is the root of 3; bf16 rounds as coarsely as most changes are.
            expected = math.sqrt(3) * synthetic.CHANGE_SCALE
            assert change.std().item() == pytest.approx(expected, rel=0.1)
        assert not torch.equal(values[1], values[2])
        (tmp_path / "again").mkdir()
        again, _ = synthetic.write_pairs(tmp_path / "again", shapes, 0)
        assert (again / "model.safetensors").read_bytes() == (
            base / "model.safetensors"
        ).read_bytes()


class _Page(HTMLParser):
    """Collects what a browser would see, and that every element is closed in order."""

    VOID = ("meta", "rect", "line", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in (*self.VOID, "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


class TestCommand:
    def test_real_fine_tunes(self, tiny, tmp_path):
        base, tuned = tiny
        task = tmp_path / "law.nps"
        packed = json.loads(ok("pack", base, tuned, "-o", task, "--json"))
        text = ok(
            *("bench", base, tuned, task, "--tasks", 40, "--machines", 3, "--repeat", 1, "--json"),
            *("--csv", tmp_path / "r.csv", "--html", tmp_path / "r.html", "--folder", tmp_path),
        )
        found = json.loads(text)
        assert found.keys() == {
            *("nps_bench", "title", "verified", "machine", "plan", "figures", "peers", "notes"),
        }
        assert found["verified"] == {"tasks": 2, "tensors": 16, "rounds": 3}
        assert (found["plan"]["tasks"], found["plan"]["downloads"]) == (40, 120)
        figures = {(f["subject"], f["name"]): f for f in found["figures"]}
        assert {f["kind"] for f in found["figures"]} == KINDS
        for subject in (str(tuned), str(task), "mean of 2"):
            assert figures[subject, "file"]["value"] == packed["file_bytes"]
            assert figures[subject, "weights"]["value"] == packed["finetuned_bytes"]
            assert figures[subject, "switch"]["value"] > 0
            assert figures[subject, "switch"]["kind"] == "measured"
            copied = figures[subject, "unpack"]["value"] / figures[subject, "copy"]["value"]
            assert figures[subject, "unpack / copy"]["value"] == pytest.approx(copied)
        assert (str(tuned), "pack") in figures
        assert (str(task), "pack") not in figures  # it was packed before
        base_bytes = sum(tensor.nbytes for tensor in open_checkpoint(base).tensors.values())
        disk = figures[OURS, "disk"]
        assert disk["value"] == base_bytes + 40 * packed["file_bytes"]
        assert (disk["kind"], disk["unit"]) == ("projected", "bytes")
        assert figures["BitDelta", "weights / file"]["kind"] == "reported"
        # Two linear layers of the base, and the head, the embedding and the empty tensor whole.
        linear = 16 * ((37 + 53) + (300 + 101))
        lora = linear + 53 * 16 + 5 * 16
        assert figures["LoRA of rank 16", "one task"]["value"] == 2 * lora
        with (tmp_path / "r.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == len(found["figures"])
        assert {row["kind"] for row in rows} == KINDS
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            *("base", "law.nps", "r.csv", "r.html", "tuned"),
        ]

    def test_what_is_packed_is_what_pack_makes(self, tiny, tmp_path):
        for number, options in enumerate(
            ([], ["--prune", "magnitude"], ["--density", 0.5], ["--lossless"])
        ):
            task = tmp_path / f"{number}.nps"
            ok("pack", *tiny, "-o", task, *options)
            found = json.loads(ok("bench", *tiny, "--repeat", 1, "--json", *options))
            (size,) = (f["value"] for f in found["figures"] if f["name"] == "file")
            assert size == task.stat().st_size

    def test_a_made_fleet(self, tmp_path):
        page = tmp_path / "r.html"
        text = ok(
            *("bench", "--like", "llama-8b", "--tasks", 500, "--sample", 0.004, "--repeat", 1),
            *("--html", page, "--csv", tmp_path / "r.csv"),
        )
        assert "500 fine-tunes of llama-8b" in text
        assert "verified: in each of 3 rounds" in text
        assert "of 8,030,261,248 parameters" in text
        with (tmp_path / "r.csv").open(newline="") as stream:
            figures = {(row["subject"], row["name"]): row for row in csv.DictReader(stream)}
        assert float(figures[DENSE, "one task"]["value"]) == 2 * TOTALS["llama-8b"]
        assert float(figures[DENSE, "disk"]["value"]) == 1000 * TOTALS["llama-8b"]
        assert float(figures["LoRA of rank 16", "one task"]["value"]) == 2 * 41_943_040
        whole = figures["llama-8b, whole", "file"]
        part = figures["mean of 2", "file"]
        assert (whole["kind"], part["kind"]) == ("projected", "measured")
        factor = float(figures["llama-8b, whole", "weights"]["value"]) / float(
            figures["mean of 2", "weights"]["value"]
        )
        assert float(whole["value"]) == pytest.approx(factor * float(part["value"]))
        for heading in ("On this machine", "The whole model", "500 tasks", "What others report"):
            (block,) = (b for b in text.split("\n\n") if b.startswith(heading))
            kinds = set(block.splitlines()[2].split())
            assert kinds
            assert kinds <= KINDS

    def test_the_page_stands_alone(self, tiny, tmp_path):
        base, tuned = tiny
        evil = tuned.rename(tmp_path / "<script>alert(1)<&'\"")
        page = tmp_path / "r.html"
        ok("bench", base, evil, "--repeat", 1, "--html", page)
        text = page.read_text()
        found = _Page(text)
        names = [tag for tag, _ in found.tags]
        assert names.count("svg") == 5
        assert names.count("table") == 3
        assert not {"script", "link", "img", "iframe", "object", "a", "use", "image"} & set(names)
        for _, attributes in found.tags:
            assert not {"src", "href", "xlink:href", "style", "onload"} & set(attributes)
        assert "url(" not in text
        assert "@import" not in text
        policy = {a.get("http-equiv"): a.get("content") for t, a in found.tags if t == "meta"}
        assert policy["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"
        assert "<script>alert(1)<&'\"" in found.text
        for kind in KINDS:
            assert kind in found.text

    def test_outputs_are_not_overwritten(self, tiny, tmp_path, monkeypatch):
        def never(*_: object) -> None:
            raise AssertionError("worked before it looked")

        for option, name in (("--csv", "r.csv"), ("--html", "r.html")):
            path = tmp_path / name
            path.write_text("precious")
            with monkeypatch.context() as patched:
                patched.setattr(run, "measure", never)
                assert "pass --force" in fails("bench", *tiny, option, path)
                assert "does not exist" in fails("bench", *tiny, option, tmp_path / "no" / "r")
                other = tmp_path / "t.nps"
                other.touch()
                line = fails("bench", tiny[0], other, option, other, "--force")
                assert "would replace the input" in line
            assert path.read_text() == "precious"
            ok("bench", *tiny, "--repeat", 1, option, path, "--force")
            assert path.read_text() != "precious"


class TestGate:
    """Whatever a step gives wrongly ends in one line, and in no report."""

    def refused(self, pair: tuple[Path, Path], tmp_path: Path, *options: object) -> str:
        outputs = ("--csv", tmp_path / "r.csv", "--html", tmp_path / "r.html")
        line = fails("bench", *pair, "--repeat", 1, *outputs, *options)
        assert not list(tmp_path.glob("r.*"))
        assert line.endswith("; nothing is reported")
        return line

    def test_a_flipped_bit_on_the_disk(self, tiny, tmp_path, monkeypatch):
        real = measuring.unpack

        def corrupting(base, task, out, **options):
            real(base, task, out, **options)
            path = out / "model.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

        monkeypatch.setattr(measuring, "unpack", corrupting)
        line = self.refused(tiny, tmp_path)
        assert re.search(r"tuned: unpacked, tensor '.+' is not what the file promises", line)

    def test_a_missing_tensor(self, tiny, tmp_path, monkeypatch):
        from safetensors.torch import load_file, save_file

        real = measuring.unpack

        def forgetful(base, task, out, **options):
            real(base, task, out, **options)
            tensors = load_file(out / "model.safetensors")
            del tensors["scalar"]
            save_file(tensors, out / "model.safetensors")

        monkeypatch.setattr(measuring, "unpack", forgetful)
        assert "other tensors than the file" in self.refused(tiny, tmp_path)

    def test_a_wrong_switch(self, tiny, tmp_path, monkeypatch):
        real = measuring._switch

        def wrong(*arguments):
            found = real(*arguments)
            found["head"] = found["head"] ^ 1
            return found

        monkeypatch.setattr(measuring, "_switch", wrong)
        line = self.refused(tiny, tmp_path)
        assert "switched to, tensor 'head' is not what the file promises" in line

    def test_a_packer_that_says_something_else(self, tiny, tmp_path, monkeypatch):
        from dataclasses import replace

        real = measuring.pack

        def boasting(*arguments, **options):
            said = real(*arguments, **options)
            return replace(said, nnz=said.nnz - 1)

        monkeypatch.setattr(measuring, "pack", boasting)
        assert "nnz is" in self.refused(tiny, tmp_path)

    def test_lossless_that_is_not(self, tiny, tmp_path, monkeypatch):
        real = measuring.pack

        def lossy(base, task, file, **options):
            return real(base, task, file, force=True)

        monkeypatch.setattr(measuring, "pack", lossy)
        assert "in the fine-tune, tensor" in self.refused(tiny, tmp_path, "--lossless")


class TestBadInput:
    def test_paths(self, tiny, tmp_path):
        base, tuned = tiny
        assert "or --like, received 0 paths" in fails("bench", code=2)
        assert "or --like, received 1 paths" in fails("bench", base, code=2)
        line = fails("bench", base, "--like", "llama-8b", code=2)
        assert "can't be used with --like" in line
        assert "'gpt-5' is not one of" in fails("bench", "--like", "gpt-5", code=2)
        assert "nor a Hub model" in fails("bench", base, tmp_path / "none")
        assert "No such file" in fails("bench", base, tmp_path / "none.nps")
        (tmp_path / "bad.nps").write_bytes(b"x" * 500)
        assert "H-MAGIC" in fails("bench", base, tmp_path / "bad.nps")
        ok("pack", base, tuned, "-o", tmp_path / "t.nps")
        assert "is not the base" in fails("bench", tuned, tmp_path / "t.nps")
        assert "holds no .safetensors" in fails("bench", tmp_path, tuned)

    def test_options(self, tiny, tmp_path):
        base, tuned = tiny
        for option, value in (
            *(("--tasks", 0), ("--machines", 0), ("--resident", 0), ("--lora-rank", 0)),
            *(("--downloads", -1), ("--egress-price", "nan"), ("--bandwidth", 0)),
            *(("--repeat", 0), ("--density", 2), ("--folder", tmp_path / "none")),
        ):
            assert "received" in fails("bench", base, tuned, option, value)
        assert "nan GB" in fails("bench", "--like", "minilm", "--sample", "nan", code=2)
        assert "received 1000" in fails("bench", "--like", "minilm", "--sample", 1e-6)
        assert "--sample needs --like" in fails("bench", base, tuned, "--sample", 1, code=2)
        line = fails("bench", base, tuned, "--lossless", "--prune", "signs", code=2)
        assert "--prune can't be used with --lossless" in line
        line = fails("bench", base, tmp_path / "t.nps", "--density", 0.5, code=2)
        assert "--density needs a fine-tune to pack" in line
        one = tmp_path / "r"
        line = fails("bench", base, tuned, "--csv", one, "--html", one)
        assert "another file than csv" in line

    def test_more_than_the_memory(self, tiny, monkeypatch):
        monkeypatch.setattr(run.os, "sysconf", lambda name: 100)
        assert "does not fit into memory" in fails("bench", *tiny)


def test_lines_that_end_together_keep_their_names_apart():
    series = [svg.Line(f"line {i}", [(1, 1), (10, 100 + i)], "peer") for i in range(4)]
    found = svg.lines("t", "x", series, str)
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="start">line', found))
    assert len(heights) == 4
    assert all(b - a >= 15 for a, b in itertools.pairwise(heights))


def test_bars_are_to_scale():
    rows = [svg.Bar("a", [(1, "ours"), (1, "dense")], "2"), svg.Bar("b", [(4, "dense")], "4")]
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height', svg.bars("t", rows))]
    assert widths[0] == widths[1] == pytest.approx(widths[2] / 4, abs=0.1)


def test_a_switch_writes_over_the_last_task_and_spares_the_base(tiny, tmp_path):
    base, tuned = tiny
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    resident, before = (measuring._read(open_checkpoint(base)) for _ in range(2))
    held = {name: words ^ 1 for name, words in measuring._load(base, tmp_path / "t.nps").items()}
    switched = measuring._switch(resident, held, tmp_path / "t.nps")
    assert switched["layer.mlp"] is held["layer.mlp"]
    assert "positions" not in switched  # as in the base
    assert all((resident[name] == words).all() for name, words in before.items())
    nps_compress.unpack(base, tmp_path / "t.nps", tmp_path / "out")
    plain = open_checkpoint(tmp_path / "out")
    assert all((plain.read(name) == words).all() for name, words in switched.items())
