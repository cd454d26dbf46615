"""Shared fixtures. Weights are tiny and random; every test writes under its own tmp_path."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent

# `kernels/` at the root must never be importable as `kernels`: transformers would take it for
# Hugging Face's package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/ by its name, as the scripts there do."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]
    yield importlib.import_module
    sys.path[:] = before


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **files: str) -> Path:
    """A checkpoint folder of one safetensors file; ``files`` are side files by stem (JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for stem, text in files.items():
        (folder / f"{stem}.json").write_text(text)
    return folder


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, to compare bit for bit."""
    if not tensor.numel():  # its stride may be 0, which torch does not view
        return b""
    words = tensor.detach().contiguous()
    # The stride of a single element may be anything, contiguous or not.
    return words.as_strided((words.numel(),), (1,)).view(torch.uint8).numpy().tobytes()


def changed_in_place(task, name: str, base: torch.Tensor) -> bytes:
    """A tensor's bytes with a task's changes exchanged into it; and undone, which is checked."""
    from nps_compress import resident
    from nps_compress.kernels.table import Changes, Tensors

    words = base.detach().clone()
    tensors = Tensors([words])
    changes = Changes(tensors, [task.form(name, base)])
    old = torch.zeros(changes.old_words, dtype=tensors.word)
    resident.exchange(changes, old)
    found = bits(words)
    resident.exchange(changes, old, undo=True)
    assert bits(words) == bits(base)
    assert not changes.fault.item()
    return found


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a fine-tune: all float types, an unchanged, a new, a resized, a deleted tensor."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    base = {
        "embed": normal(50, 16).to(torch.bfloat16),
        "layer.attention": normal(37, 53).to(torch.float16),
        "layer.mlp": normal(300, 101),
        "layer.norm": torch.ones(16, dtype=torch.bfloat16),
        "positions": torch.arange(40),
        "pooler": normal(4, 4),
        "scalar": torch.tensor(2.5),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items() if name != "pooler"}
    for name in ("embed", "layer.attention", "layer.mlp"):
        change = normal(*tuned[name].shape, scale=1e-3)
        tuned[name] = (tuned[name].float() + change).to(tuned[name].dtype)
    tuned["embed"] = torch.cat([tuned["embed"], normal(3, 16).to(torch.bfloat16)])
    tuned["head"] = normal(5, 16)
    tuned["empty"] = torch.empty(0, 7)
    return (
        write_checkpoint(tmp_path / "base", base, config='{"a": 1}', vocab="x" * 20_000),
        write_checkpoint(tmp_path / "tuned", tuned, config='{"a": 2}', vocab="x" * 20_000),
    )


WORDS = (
    *("red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "the", "a", "of"),
    *("day", "word", "in", "on"),
)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)


def _fine_tune(model: torch.nn.Module, scale: float, seed: int) -> None:
    """A stand-in for training: heavy-tailed changes of every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * noise * noise.abs()


def _model_pair(folder: Path, model: torch.nn.Module, body: torch.nn.Module) -> tuple[Path, Path]:
    base, tuned = folder / "base", folder / "tuned"
    body.save_pretrained(base)
    write_tokenizer(base)
    _fine_tune(model, 0.05, 1)
    model.save_pretrained(tuned)
    write_tokenizer(tuned)
    return base, tuned


@pytest.fixture
def classifier_pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A tiny BERT body, a classifier made from it, and labelled calibration data."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
        id2label={0: "red", 1: "green", 2: "blue"},
        label2id={"red": 0, "green": 1, "blue": 2},
    )
    model = BertForSequenceClassification(config)
    base, tuned = _model_pair(tmp_path, model, model.bert)
    return base, tuned, _write_calibration(tmp_path, labels=3)


@pytest.fixture
def causal_pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A tiny Llama, a fine-tune of it, and calibration text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    base, tuned = _model_pair(tmp_path, model, model)
    return base, tuned, _write_calibration(tmp_path, labels=0)


def _write_calibration(folder: Path, labels: int) -> Path:
    rng = np.random.default_rng(0)
    path = folder / "calibration.jsonl"
    lines = []
    for i in range(24):
        row: dict[str, object] = {"text": " ".join(rng.choice(WORDS, rng.integers(2, 9)))}
        if labels:
            row["label"] = ["red", "green", 2][i % 3]
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def causal_world(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A tiny language model and tasks of it, to be served; nobody may change the files."""
    import servers

    return servers.causal_world(tmp_path_factory.mktemp("causal"))
