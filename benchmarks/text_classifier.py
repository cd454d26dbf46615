"""Fine-tune and evaluate a text classifier with plain transformers; nothing of nps_compress."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

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
    batches = list(_batches(examples, names, tokenizer, shuffle=random.Random(seed)))
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / steps)
    )
    model.train()
    with tqdm(total=steps, desc="fine-tuning", unit="step", disable=None, leave=False) as bar:
        for epoch in range(epochs):
            random.Random(seed + epoch).shuffle(batches)
            for inputs, targets in batches:
                loss = functional.cross_entropy(model(**inputs).logits, targets)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.update()
    model.to(torch.bfloat16).save_pretrained(out)
    # Read anew: the one that batched the texts has taken on their padding and truncation.
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def accuracy(folder: Path, examples: Sequence[Example], names: Sequence[str]) -> float:
    """Share of examples whose label the model in ``folder`` predicts."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    right = 0
    with torch.inference_mode():
        batches = list(_batches(examples, names, tokenizer))
        for inputs, targets in tqdm(
            batches, desc=f"testing {folder.name}", unit="batch", disable=None, leave=False
        ):
            right += int((model(**inputs).logits.argmax(-1) == targets).sum())
    return right / len(examples)


def _batches(
    examples: Sequence[Example],
    names: Sequence[str],
    tokenizer: Any,
    shuffle: random.Random | None = None,
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Batches of texts of alike length, so that little is spent on padding."""
    tokens = tokenizer([e.text for e in examples], truncation=True, max_length=MAX_TOKENS)
    order = list(range(len(examples)))
    if shuffle:
        shuffle.shuffle(order)  # ties in length then fall differently from seed to seed
    order.sort(key=lambda i: len(tokens["input_ids"][i]))
    for start in range(0, len(order), BATCH):
        picked = order[start : start + BATCH]
        features = {key: [tokens[key][i] for i in picked] for key in tokens}
        inputs = tokenizer.pad(features, return_tensors="pt")
        yield dict(inputs), torch.tensor([names.index(examples[i].label) for i in picked])
