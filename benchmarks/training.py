"""The loop that every fine-tune here is made with, and the figures it is judged by.

A batch is what the model takes and what it should say: one class for each row of logits. That
covers classes of texts, tokens and images and, with targets moved on by one, next tokens. Plain
torch, nothing of nps_compress.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

IGNORED = -100  # target of padding and of word pieces that carry no label

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
Row = dict[str, Any]  # one line of a JSONL file


@dataclass(frozen=True)
class Settings:
    epochs: int
    learning_rate: float
    seed: int = 0


def class_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the targets that are not ignored."""
    inputs, targets = batch
    logits = model(**inputs).logits
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def fit(
    model: torch.nn.Module,
    batches: list[Batch],
    settings: Settings,
    loss: Callable[[Any, Batch], torch.Tensor] = class_loss,
    progress: bool = True,
) -> None:
    """Train all weights with AdamW: a tenth of the steps to warm up, then down to nothing.

    ``batches`` is put into another order every epoch, in place.
    """
    steps = settings.epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / steps)
    )
    model.train()
    hidden = None if progress else True
    with tqdm(total=steps, desc="training", unit="step", disable=hidden, leave=False) as bar:
        for epoch in range(settings.epochs):
            random.Random(settings.seed + epoch).shuffle(batches)
            for batch in batches:
                found = loss(model, batch)
                found.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.set_postfix_str(f"loss {found.item():.3f}", refresh=False)
                bar.update()


@torch.inference_mode()
def class_measures(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """``accuracy`` and ``loss``, means over all targets that are not ignored."""
    model.eval()
    device = next(model.parameters()).device
    right, loss, count = 0, 0.0, 0
    for inputs, targets in batches:
        logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        logits, wanted = logits.float().flatten(0, -2), targets.to(device).flatten()
        loss += float(
            functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        )
        right += int((logits.argmax(-1) == wanted).sum())  # no class is -100
        count += int((wanted != IGNORED).sum())
    return {"accuracy": right / count, "loss": loss / count}


def by_length(
    lengths: Sequence[int], size: int, shuffle: random.Random | None = None
) -> Iterator[list[int]]:
    """Groups of indices of alike length, so that little is spent on padding."""
    order = list(range(len(lengths)))
    if shuffle:
        shuffle.shuffle(order)  # ties in length then fall differently from seed to seed
    order.sort(key=lambda i: lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]
