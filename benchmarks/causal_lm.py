"""A small Llama that has read docstrings, fine-tuned to write Python.

Tokenizer and base are made here as well: byte-level BPE over prose and source, then next-token
training on prose alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import Item, functions, modules, prose
from training import IGNORED, Batch, Row, Settings, by_length, class_measures, fit

VOCABULARY = 2048
MAX_TOKENS = 128
BATCH = 16
_START, _END, _PADDING = "<start>", "<end>", "<padding>"

measures = class_measures


def collect(modules_per_package: int = 220) -> tuple[list[Item], list[Item]]:
    """Functions and whole docstrings."""
    sources: list[Item] = []
    texts: list[Item] = []
    seen: set[str] = set()
    for module in modules(modules_per_package):
        for items, found in ((sources, functions(module)), (texts, prose(module))):
            for text in found:
                if text not in seen:
                    seen.add(text)
                    items.append(Item(module.source, module.package, {"text": text}))
    return sources, texts


def train_tokenizer(out: Path, texts: Sequence[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_PADDING, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start, end = tokenizer.token_to_id(_START), tokenizer.token_to_id(_END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, start), (_END, end)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START,
        eos_token=_END,
        pad_token=_PADDING,
        padding_side="right",
        model_max_length=MAX_TOKENS,
    ).save_pretrained(out)


def pretrain(
    out: Path, texts: Sequence[Row], sources: Sequence[Row], settings: Settings, progress: bool
) -> None:
    train_tokenizer(out, [row["text"] for row in (*texts, *sources)])
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(out)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2 * MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    shuffled = _batches(out, texts, random.Random(settings.seed))
    fit(model, shuffled, settings, progress=progress)
    model.to(torch.bfloat16).save_pretrained(out)


def finetune(
    base: Path,
    out: Path,
    rows: Sequence[Row],
    labels: Sequence[str],
    settings: Settings,
    progress: bool,
) -> None:
    """Train all weights in float32; save in bfloat16 with tokenizer. There are no labels."""
    torch.manual_seed(settings.seed)
    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    shuffled = _batches(base, rows, random.Random(settings.seed))
    fit(model, shuffled, settings, progress=progress)
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def batches(folder: Path, rows: Sequence[Row]) -> list[Batch]:
    return _batches(folder, rows, None)


def _batches(folder: Path, rows: Sequence[Row], shuffle: random.Random | None) -> list[Batch]:
    """Each position's target is the next token; the last one and padding have none."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_TOKENS)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    found = []
    for picked in by_length(lengths, BATCH, shuffle):
        features = {
            key: [tokens[key][i] for i in picked] for key in ("input_ids", "attention_mask")
        }
        inputs = dict(tokenizer.pad(features, return_tensors="pt"))
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        targets = torch.full_like(ids, IGNORED)
        targets[:, :-1] = ids[:, 1:].where(mask[:, 1:], IGNORED)
        found.append((inputs, targets))
    return found
