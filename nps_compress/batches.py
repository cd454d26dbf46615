"""Examples as models take them, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Encoded:
    """One example.

    rows: what the model takes, a dict each of lists of one length (``input_ids`` and so on), or of
    ``pixel_values``, [channels, height, width] float32. One row, or two where an encoder compares
    two texts. answer: tokens that a decoder should say. predicted: the positions whose logits
    count, ascending; None: the row as a whole. targets: the class, token or score that each of
    them should say, in their order; empty where that is unknown.
    """

    rows: tuple[Mapping[str, Any], ...]
    answer: tuple[int, ...] = ()
    predicted: tuple[int, ...] | None = None
    targets: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        """Positions of the longest row, and of the answer; 0 for images."""
        rows = (len(row["input_ids"]) for row in self.rows if "input_ids" in row)
        return max(rows, default=0) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Some examples in tensors.

    inputs: what the model takes; answers: [rows, tokens] int64, -100 after the end, or None;
    row_owner: [rows] int64, which of the batch's examples a row belongs to; predicted: [rows,
    positions] bool or None; owner: [predictions] int64, the example of each prediction; targets:
    [predictions] int64 or float32, or None.
    """

    size: int
    inputs: dict[str, torch.Tensor]
    answers: torch.Tensor | None
    row_owner: torch.Tensor
    predicted: torch.Tensor | None
    owner: torch.Tensor
    targets: torch.Tensor | None


def collate(examples: Sequence[Encoded], padding: Mapping[str, int], at: torch.device) -> Batch:
    """A batch of examples of one kind. ``padding``: what a shorter row is filled up with."""
    rows = [row for example in examples for row in example.rows]
    row_owner = torch.tensor([i for i, example in enumerate(examples) for _ in example.rows])
    inputs = {}
    for key in rows[0]:
        if key == "pixel_values":
            inputs[key] = torch.from_numpy(np.stack([row[key] for row in rows]))
        else:
            inputs[key] = pad([row[key] for row in rows], padding.get(key, 0))
    answers, predicted, owner = None, None, row_owner
    if any(example.answer for example in examples):
        answers = pad([example.answer for example in examples], -100)
    if examples[0].predicted is not None:
        positions = (answers if answers is not None else inputs["input_ids"]).shape
        predicted = torch.zeros(positions, dtype=torch.bool)
        for row, example in enumerate(examples):
            predicted[row, list(example.predicted or ())] = True
        owner = predicted.nonzero()[:, 0]
    targets = None
    known = [target for example in examples for target in example.targets]
    if known or not len(owner):  # nothing to predict is known, too
        whole = all(isinstance(target, int) for target in known)
        targets = torch.tensor(known, dtype=torch.int64 if whole else torch.float32, device=at)
    return Batch(
        len(examples),
        {key: value.to(at) for key, value in inputs.items()},
        None if answers is None else answers.to(at),
        row_owner.to(at),
        None if predicted is None else predicted.to(at),
        owner.to(at),
        targets,
    )


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """Rows filled up to the longest. -> [rows, longest] int64."""
    longest = max(map(len, rows))
    filled = torch.full((len(rows), longest), value, dtype=torch.int64)
    for filling, row in zip(filled, rows, strict=True):
        start = longest - len(row) if left else 0
        filling[start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return filled


def in_batches(lengths: Sequence[int], size: int, most: int) -> list[list[int]]:
    """Indices in batches of ``size`` at most, and of ``most`` positions, padding included.

    Alike lengths share a batch, so that little is spent on padding; the order of the batches has
    nothing to do with length, so that the first few stand for all.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first of a batch is its longest.
        full = not batches or len(batches[-1]) == size
        if full or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > most:
            batches.append([])
        batches[-1].append(index)
    random.Random(0).shuffle(batches)
    return batches
