"""Tiny models, and what vLLM answers with each full checkpoint. `make test-vllm` runs these."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import WORDS, write_tokenizer
from processes import environment, offline

import nps_compress

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

TASKS = ("law", "med", "code")
MARGIN = 0.2  # in log-probability, so that a batch's rounding can't change a token


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, for each task NAME.nps and NAME/, its checkpoint, and damaged.nps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        # Heads of 48. For multiples of 32 vLLM's attention uses AMX where there is some, and dies
        # of it (SIGILL) when an eager engine's first prompt is short: nothing has asked for it yet.
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():  # fresh weights are so small that all inputs look the same
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter *= 3
    base.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    recipes = {
        "law": {},
        "med": {"lossless": True},
        "code": {"recipe": nps_compress.Recipe(prune="magnitude", density=0.3)},
    }
    for seed, name in enumerate(TASKS, 1):
        generator = torch.Generator().manual_seed(seed)
        tuned = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in tuned.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.05 * noise * noise.abs()).to(parameter.dtype)
        trained, task = root / f"{name}-trained", root / f"{name}.nps"
        tuned.save_pretrained(trained)
        write_tokenizer(trained)
        nps_compress.pack(root / "base", trained, task, **recipes[name])
        nps_compress.unpack(root / "base", task, root / name)
    _damage(root / "law.nps", root / "damaged.nps")
    return root


def _damage(task: Path, copy: Path) -> None:
    """A copy that opens, and can't be rebuilt: a byte of a tensor in the middle is another."""
    data = bytearray(task.read_bytes())
    with nps_compress.open(task) as opened:
        entry = opened.entry("model.layers.1.mlp.down_proj.weight")
        data[int(opened.reader._index.offsets[entry.first_chunk]) + 8] ^= 1
    copy.write_bytes(data)


@dataclass
class Answer:
    """What a full checkpoint answers to a prompt."""

    tokens: list[int]
    logprobs: list[float]
    margin: float  # of the first token over the second, the smallest of all


@pytest.fixture(scope="session")
def answers(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Answer]]:
    """By model and prompt, from vLLM with the full checkpoint, one prompt a batch."""
    draws = random.Random(0)
    prompts = [" ".join(draws.choices(WORDS, k=draws.randint(3, 12))) for _ in range(24)]
    found: dict[str, dict[str, Answer]] = {}
    for name in ("base", *TASKS):
        folder = tmp_path_factory.mktemp(f"full-{name}")
        (out,) = offline([{"generate": prompts}], folder, environment(), model=str(models / name))
        found[name] = {p: Answer(**one) for p, one in zip(prompts, out, strict=True)}
    return found


@pytest.fixture(scope="session")
def clear(answers: dict[str, dict[str, Answer]]) -> list[str]:
    """Prompts whose tokens no rounding changes, answered by each model in its own way."""
    found = []
    for prompt in answers["base"]:
        each = [answers[name][prompt] for name in answers]
        differ = len({tuple(one.tokens) for one in each}) == len(each)
        if differ and min(one.margin for one in each) > MARGIN:
            found.append(prompt)
    assert len(found) >= 3, "the models are too unsure of their tokens"
    return found
