"""Tiny models of every kind that a fitness knows, and examples that they get right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import WORDS, write_tokenizer
from PIL import Image

from nps_compress.calibration import Example
from nps_compress.models import load_model

BERT = {
    "vocab_size": len(WORDS) + 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
NAMES = {0: "red", 1: "green", 2: "blue"}
LABELS: dict[str, Any] = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
PAIRS = (
    ("the red cat", "runs"),
    ("a dog", "sleeps in"),
    ("bird", "eats the word day"),
    ("green", "blue of"),
    ("on a day in the word", "cat"),
    ("blue bird runs", "a cat"),
)


def build(kind: str, folder: Path, seed: int = 0) -> Path:
    """A random model of a kind, with all that its folder needs."""
    import transformers as hf

    torch.manual_seed(seed)
    text = {**BERT, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    makers = {
        "sequence": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, **LABELS)),
        "regression": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=1)),
        "token": lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT, **LABELS)),
        "encoder": lambda: hf.BertModel(hf.BertConfig(**BERT)),
        "causal": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**BERT, eos_token_id=BERT["vocab_size"] - 1)
        ),
        "seq2seq": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=BERT["vocab_size"],
                d_model=32,
                d_kv=16,
                d_ff=64,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
                eos_token_id=BERT["vocab_size"] - 1,
            )
        ),
        "image": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, **LABELS)),
        "clip": lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=16)
        ),
        "vision encoder": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)),
    }
    model = makers[kind]()
    with torch.no_grad():  # fresh weights are so small that all inputs look the same
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 4
    model.save_pretrained(folder)
    if kind not in ("image", "vision encoder"):
        write_tokenizer(folder)
    if kind in ("causal", "seq2seq"):
        _end_answers(folder, kind == "seq2seq")
    return folder


def _end_answers(folder: Path, always: bool) -> None:
    """Give the tokenizer a token that ends answers; ``always``: after every text, as T5's does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "[EOS]"})
    tokenizer.save_pretrained(folder)
    if always:
        path = folder / "tokenizer.json"
        value = json.loads(path.read_text())
        sequence = [{"Sequence": {"id": "A", "type_id": 0}}]
        end = {"SpecialToken": {"id": "[EOS]", "type_id": 0}}
        value["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*sequence, end],
            "pair": [*sequence, end, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "[EOS]": {"id": "[EOS]", "ids": [BERT["vocab_size"] - 1], "tokens": ["[EOS]"]}
            },
        }
        path.write_text(json.dumps(value))


def examples_of(kind: str, folder: Path, count: int = 14) -> list[Example]:
    """Random inputs of a kind; images are written into the folder."""
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(2, 9)))

    found = []
    for i in range(count):
        if kind in ("image", "clip", "vision encoder"):
            path = folder / f"{i}.png"
            pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(path)
            found.append(Example(image=path, label=NAMES[i % 3]))
        elif kind == "token":
            found.append(Example(words=tuple(text().split())))
        elif kind in ("encoder", "regression"):
            found.append(Example(text=text(), pair=text()))
        elif kind == "seq2seq":
            found.append(Example(text=text(), target=text()))
        else:
            found.append(Example(text=text()))
    return found


def labelled(folder: Path, examples: list[Example]) -> list[Example]:
    """The same with what the model itself says for labels."""
    loaded = load_model(folder)
    found = []
    for example, encoded in zip(
        examples, loaded.encode(examples, "test", labelled=False), strict=True
    ):
        batch = loaded.collate([encoded])
        with torch.inference_mode():
            if loaded.kind == "encoder":
                left, right = loaded.embeddings(batch)
                found.append(replace(example, label=float(left @ right)))
                continue
            logits = loaded.logits(batch)
        if loaded.kind == "regression":
            found.append(replace(example, label=float(logits[0, 0])))
        elif loaded.kind == "token":
            found.append(replace(example, labels=tuple(logits.argmax(-1).tolist())))
        elif loaded.kind in ("causal", "seq2seq"):
            found.append(example)
        else:
            names = getattr(loaded, "classes", list(NAMES.values()))
            found.append(replace(example, label=names[int(logits[0].argmax())]))
    return found


def damage(model: torch.nn.Module, seed: int = 5) -> None:
    """Noise as large as the weights themselves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += noise * parameter.std()
