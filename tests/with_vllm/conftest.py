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
MARGIN = 0.4  # in log-probability, so that a batch's rounding can't change a token


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
        for name, parameter in base.named_parameters():
            if parameter.ndim > 1:
                parameter *= 15 if name == "lm_head.weight" else 3
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
    """By model and prompt, one prompt a batch, each model loaded by vLLM from its full checkpoint.

    In one engine, by vLLM's own reloading, as an engine takes a minute or two to start.
    """
    draws = random.Random(0)
    prompts = [" ".join(draws.choices(WORDS, k=draws.randint(3, 12))) for _ in range(24)]
    steps: list[dict[str, object]] = [{"generate": prompts}]
    for name in TASKS:
        steps += [{"full": str(models / name)}, {"generate": prompts}]
    folder = tmp_path_factory.mktemp("full")
    out = offline(steps, folder, environment(), model=str(models / "base"))[::2]
    return {
        name: {prompt: Answer(**one) for prompt, one in zip(prompts, each, strict=True)}
        for name, each in zip(("base", *TASKS), out, strict=True)
    }


@pytest.fixture(scope="session")
def clear(answers: dict[str, dict[str, Answer]]) -> dict[str, list[str]]:
    """By model, prompts whose tokens no rounding changes and that others answer in another way."""
    found: dict[str, list[str]] = {}
    for name, own in answers.items():
        others = [answers[other] for other in answers if other != name]
        found[name] = [
            prompt
            for prompt, answer in own.items()
            if answer.margin > MARGIN
            and all(other[prompt].tokens != answer.tokens for other in others)
        ]
        assert len(found[name]) >= 4, f"{name} is too unsure of its tokens"
    return found
