"""A fine-tune loaded by transformers is, bit for bit, what it loads from the unpacked folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from conftest import ROOT, bits
from safetensors.torch import load_file, save_file

import nps_compress
from nps_compress import NPSConfig
from nps_compress.errors import (
    BaseMismatchError,
    CheckpointError,
    FormatError,
    InvalidArgumentError,
    NpsError,
)
from nps_compress.lazy import LazyTensors
from nps_compress.recipe import Recipe

KINDS = ("sequence", "regression", "token", "encoder", "causal", "seq2seq", "image", "clip")


def same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    assert type(model) is type(other)
    assert not model.training
    found, wanted = model.state_dict(), other.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert bits(tensor) == bits(wanted[name]), name
    configs = [each.config.to_dict() for each in (model, other)]
    for config in configs:
        del config["_name_or_path"]
    assert configs[0] == configs[1]
    if model.can_generate():
        assert model.generation_config.to_dict() == other.generation_config.to_dict()


class Case:
    """A base, a fine-tune as task, and unpacked."""

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype = torch.float32, **pack) -> None:
        folders = []
        for seed, name in enumerate(("base", "tuned")):
            tiny_models.build(kind, folder / name, seed)
            if dtype != torch.float32:
                model = transformers.AutoModel.from_pretrained(folder / name)
                cls = getattr(transformers, model.config.architectures[0])
                cls.from_pretrained(folder / name, dtype=dtype).save_pretrained(folder / name)
            folders.append(folder / name)
        self.base, self.tuned = folders
        self.task, self.out = folder / "t.nps", folder / "out"
        options = pack or {"recipe": Recipe(prune="signs", density=0.3)}
        nps_compress.pack(*folders, self.task, **options)
        nps_compress.unpack(self.base, self.task, self.out)


@pytest.fixture
def causal(tmp_path) -> Case:
    return Case(tmp_path, "causal", torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(tmp_path, kind):
    case = Case(tmp_path, kind)
    model = nps_compress.from_pretrained(case.base, case.task)
    assert type(model).__name__ == model.config.architectures[0]
    same(model, type(model).from_pretrained(case.out))
    assert model.name_or_path == str(case.task)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"dtype": "float16"},
        {"dtype": "auto", "device_map": "cpu"},
        {"device_map": {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "cpu"}},
        {"attn_implementation": "eager", "use_cache": False},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=3)},
        {"model_class": transformers.AutoModelForCausalLM},
        {"model_class": transformers.AutoModel},
        {"model_class": transformers.LlamaForSequenceClassification, "num_labels": 2},
    ],
    ids=str,
)
def test_arguments_are_those_of_transformers(causal, options):
    torch.manual_seed(0)  # of the head that no file has
    model = nps_compress.from_pretrained(causal.base, causal.task, **options)
    options = dict(options)
    cls = options.pop("model_class", transformers.AutoModelForCausalLM)
    torch.manual_seed(0)
    same(model, cls.from_pretrained(causal.out, **options))


def test_a_quantiser_on_top(causal):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    model = nps_compress.from_pretrained(causal.base, causal.task, quantization_config=config)
    assert any(tensor.dtype == torch.uint8 for tensor in model.state_dict().values())
    wanted = type(model).from_pretrained(causal.out, quantization_config=config)
    found, others = model.state_dict(), wanted.state_dict()
    assert found.keys() == others.keys()
    assert all(bits(found[name]) == bits(others[name]) for name in found)
    tokens = torch.arange(8)[None]
    assert bits(model(tokens).logits) == bits(wanted(tokens).logits)


TENSOR_PARALLEL = """
import sys, torch, torch.distributed as dist, transformers, nps_compress
import transformers.quantizers.auto
from transformers.distributed import DistributedConfig
base, task, out = sys.argv[1:]
dist.init_process_group("gloo")
torch.set_num_threads(1)
options = {"distributed_config": DistributedConfig(tp_size=2)}
model = nps_compress.from_pretrained(base, task, **options)
other = type(model).from_pretrained(out, **options)
sharded = 0
for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
    a, b = (getattr(t, "_local_tensor", t).detach() for t in (a, b))
    assert torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16)), name
    sharded += hasattr(model.get_parameter(name), "_local_tensor")
assert sharded, "nothing was sharded"
tokens = torch.arange(8)[None]
assert torch.equal(model(tokens).logits, other(tokens).logits)
dist.destroy_process_group()
methods = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
assert "nps" not in methods
nps_compress.NPSConfig  # this, and nothing before it, registers the method
assert "nps" in methods
print("equal", sharded)
"""


def test_tensor_parallelism(causal, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(script), str(causal.base), str(causal.task), str(causal.out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2


def test_a_base_in_shards_and_one_of_tied_weights(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny_models.BERT, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    model.save_pretrained(tmp_path / "tuned", max_shard_size="30KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    task = tmp_path / "t.nps"
    nps_compress.pack(tmp_path / "base", tmp_path / "tuned", task)
    nps_compress.unpack(tmp_path / "base", task, tmp_path / "out", max_shard_bytes=30_000)
    found = nps_compress.from_pretrained(tmp_path / "base", task)
    same(found, type(found).from_pretrained(tmp_path / "out"))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    config = NPSConfig(task)
    auto = transformers.AutoModelForCausalLM
    same(auto.from_pretrained(tmp_path / "base", quantization_config=config), found)


def test_the_dtype_of_a_folder_that_names_none_is_that_of_its_weights(tmp_path):
    case = Case(tmp_path, "causal", torch.bfloat16)
    for folder in (case.base, case.tuned):
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(config))
    nps_compress.pack(case.base, case.tuned, case.task, force=True)
    nps_compress.unpack(case.base, case.task, case.out, force=True)
    model = nps_compress.from_pretrained(case.base, case.task)
    assert model.dtype == torch.bfloat16
    same(model, type(model).from_pretrained(case.out))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"dtype": torch.float16}])
@pytest.mark.parametrize("place", [{}, {"device_map": "cpu"}], ids=str)
def test_as_a_quantisation_config(causal, tmp_path, options, place):
    auto = transformers.AutoModelForCausalLM
    config = NPSConfig(causal.task)
    model = auto.from_pretrained(causal.base, quantization_config=config, **options, **place)
    wanted = auto.from_pretrained(causal.out, **options, **place)
    same(model, wanted)
    assert not hasattr(model, "hf_quantizer")
    assert not model.is_quantized
    model.save_pretrained(tmp_path / "saved")
    same(auto.from_pretrained(tmp_path / "saved", dtype="auto"), model)


@pytest.mark.parametrize("kind", ["token", "encoder", "seq2seq", "image", "clip"])
def test_other_kinds_as_a_quantisation_config(tmp_path, kind):
    case = Case(tmp_path, kind)
    cls = type(nps_compress.from_pretrained(case.base, case.task))
    model = cls.from_pretrained(case.base, quantization_config=NPSConfig(case.task))
    same(model, cls.from_pretrained(case.out))


@pytest.mark.parametrize("kind", ["integers", "float32 among float16"])
def test_weights_that_keep_a_dtype_of_their_own(tmp_path, kind):
    folders = [tmp_path / "base", tmp_path / "tuned"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        if kind == "integers":
            config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
            model = transformers.ResNetForImageClassification(config)
            for name, buffer in model.named_buffers():
                if "tracked" in name:
                    buffer += 1 + seed
            model.save_pretrained(folder)
        else:
            tiny_models.build("seq2seq", folder, seed)
    task = tmp_path / "t.nps"
    nps_compress.pack(*folders, task)
    nps_compress.unpack(folders[0], task, tmp_path / "out")
    model = nps_compress.from_pretrained(folders[0], task, dtype=torch.float16)
    assert len({tensor.dtype for tensor in model.state_dict().values()}) == 2
    same(model, type(model).from_pretrained(tmp_path / "out", dtype=torch.float16))
    config = NPSConfig(task)
    cls = type(model)
    same(cls.from_pretrained(folders[0], quantization_config=config, dtype=torch.float16), model)


def damage(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0x10
    path.write_bytes(data)


def both_ways(base: Path, task: Path):
    auto = transformers.AutoModelForCausalLM
    return (
        lambda: nps_compress.from_pretrained(base, task),
        lambda: auto.from_pretrained(base, quantization_config=NPSConfig(task)),
    )


@pytest.mark.parametrize("lossless", [False, True])
def test_what_is_damaged_is_never_handed_out(tmp_path, lossless):
    case = Case(tmp_path, "causal", **({"lossless": True} if lossless else {}))
    good = case.task.read_bytes()
    for at in (0.0001, 0.1, 0.3, 0.5, 0.7, 0.95):
        case.task.write_bytes(good)
        damage(case.task, at)
        for load in both_ways(case.base, case.task):
            with pytest.raises(FormatError):
                load()
    if lossless:  # every element may be new, whatever the base is
        return
    case.task.write_bytes(good)
    weights = load_file(case.base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, 0] += 1
    save_file(weights, case.base / "model.safetensors", {"format": "pt"})
    for load in both_ways(case.base, case.task):
        with pytest.raises(BaseMismatchError, match=r"'model.layers.1.mlp.up_proj.weight'"):
            load()


def test_what_is_not_there_or_not_loadable(causal, tmp_path):
    for load in both_ways(causal.base, tmp_path / "none.nps"):
        with pytest.raises(InvalidArgumentError, match="readable file"):
            load()
    with pytest.raises(CheckpointError):
        nps_compress.from_pretrained(tmp_path / "none", causal.task)
    with pytest.raises(InvalidArgumentError, match="state_dict"):
        nps_compress.from_pretrained(causal.base, causal.task, state_dict={})
    with pytest.raises(CheckpointError, match="no_such_option"):
        nps_compress.from_pretrained(causal.base, causal.task, no_such_option=1)
    with pytest.raises(CheckpointError, match="of which AutoModelForImageClassification has none"):
        nps_compress.from_pretrained(
            causal.base, causal.task, model_class=transformers.AutoModelForImageClassification
        )


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", "{}", '{"model_type": "none"}', '{"model_type": "llama"}', "\x00", "[" * 5000]
    + [json.dumps({"model_type": "llama", "architectures": [name]}) for name in ("os", "x", 3)]
    + [json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 0})]
    + [json.dumps({"model_type": "llama", "architectures": 7})],
)
def test_a_hostile_config(causal, tmp_path, config):
    (causal.tuned / "config.json").write_text(config)
    task = tmp_path / "hostile.nps"
    nps_compress.pack(causal.base, causal.tuned, task)
    for load in both_ways(causal.base, task):
        with pytest.raises(NpsError):
            load()


def test_a_quantisation_config_refuses_what_the_base_has_not(tmp_path, classifier_pair):
    base, tuned, _ = classifier_pair
    task = tmp_path / "t.nps"
    nps_compress.pack(base, tuned, task)
    auto = transformers.AutoModelForSequenceClassification
    with pytest.raises(CheckpointError, match=r"use nps_compress.from_pretrained"):
        auto.from_pretrained(base, quantization_config=NPSConfig(task))
    model = nps_compress.from_pretrained(base, task)
    nps_compress.unpack(base, task, tmp_path / "out")
    same(model, auto.from_pretrained(tmp_path / "out"))


def test_tensors_are_read_in_parts_and_as_often_as_wanted(causal):
    wanted = load_file(causal.out / "model.safetensors")
    with LazyTensors(causal.base, causal.task) as tensors:
        assert list(tensors) == sorted(wanted)
        for name, lazy in tensors.items():
            assert (lazy.get_dtype(), lazy.get_shape()) == ("BF16", list(wanted[name].shape))
            assert lazy.dtype == torch.bfloat16
            assert lazy.is_floating_point()
            for _ in range(2):
                assert bits(lazy[...]) == bits(wanted[name])
            part = lazy[1:3]
            assert bits(part) == bits(wanted[name][1:3])
            assert part.untyped_storage().nbytes() == part.nbytes
        tensors.check_content()
        assert tensors.side_files["config.json"] == (causal.out / "config.json").read_bytes()


@pytest.mark.parametrize("codec", ["short-delta", "distances", "grid", "levels", "signs"])
def test_a_tensor_with_another_digest_than_promised_is_not_read(codec):
    vector = ROOT / "format_spec" / "vectors" / "reject" / f"D-DIGEST-{codec}.nps"
    with LazyTensors(vector.with_suffix(".base.safetensors"), vector) as tensors:
        with pytest.raises(FormatError, match="D-DIGEST"):
            [lazy[...] for lazy in tensors.values()]
        assert isinstance(tensors.error, FormatError)
