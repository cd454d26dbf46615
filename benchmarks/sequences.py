"""Tasks over whole texts: rows of text and class number for the classifier of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import text_classifier
from docstrings import Example
from training import Batch, Row, Settings, class_measures

measures = class_measures


def finetune(
    base: Path,
    out: Path,
    rows: Sequence[Row],
    labels: Sequence[str],
    settings: Settings,
    progress: bool,
) -> None:
    text_classifier.finetune(
        base,
        out,
        _examples(rows, labels),
        labels,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        progress=progress,
    )


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.eval()


def batches(folder: Path, rows: Sequence[Row]) -> list[Batch]:
    names = [str(number) for number in range(1 + max(row["label"] for row in rows))]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(text_classifier.batches(_examples(rows, names), names, tokenizer))


def _examples(rows: Sequence[Row], names: Sequence[str]) -> list[Example]:
    return [Example(row["text"], names[row["label"]], "") for row in rows]
