"""Fine-tune and evaluate a text classifier with plain transformers; nothing of nps_compress."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

import training
from docstrings import Example

MAX_TOKENS = 64
BATCH = 32

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


def finetune(
    base: Path,
    out: Path,
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    epochs: int = 2,
    learning_rate: float = 2e-4,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train all weights and a new head with AdamW in float32; save in bfloat16 with tokenizer."""
    torch.manual_seed(seed)
    labels = dict(enumerate(names))
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        dtype=torch.float32,
        num_labels=len(names),
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    shuffled = list(batches(examples, names, tokenizer, shuffle=random.Random(seed)))
    settings = training.Settings(epochs, learning_rate, seed)
    training.fit(model, shuffled, settings, progress=progress)
    model.to(torch.bfloat16).save_pretrained(out)
    # Read anew: the one that batched the texts has taken on their padding and truncation.
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def accuracy(folder: Path, examples: Sequence[Example], names: Sequence[str]) -> float:
    """Share of examples whose label the model in ``folder`` predicts."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bar = tqdm(
        list(batches(examples, names, tokenizer)),
        desc=f"testing {folder.name}",
        unit="batch",
        disable=None,
        leave=False,
    )
    return training.class_measures(model, bar)["accuracy"]


def batches(
    examples: Sequence[Example],
    names: Sequence[str],
    tokenizer: Any,
    shuffle: random.Random | None = None,
) -> Iterator[training.Batch]:
    """Batches of texts of alike length."""
    tokens = tokenizer([e.text for e in examples], truncation=True, max_length=MAX_TOKENS)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    for picked in training.by_length(lengths, BATCH, shuffle):
        features = {key: [tokens[key][i] for i in picked] for key in tokens}
        inputs = tokenizer.pad(features, return_tensors="pt")
        yield dict(inputs), torch.tensor([names.index(examples[i].label) for i in picked])
