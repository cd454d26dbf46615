"""Where an error costs most: one factor per weight, from gradients on calibration data.

``fisher`` is a power of the diagonal of the Fisher information at the fine-tune: the mean square of
the gradients of log p(y | x), with y drawn from the fine-tune's own outputs, so that no labels are
needed (Kirkpatrick et al. 2017, arXiv 1612.00796, use the same diagonal to weigh changes). A small
power, because a high one forgets what the calibration data don't show; `make quality` measures it.

Factors are rounded to powers of the square root of 2: what threads and devices add up in another
order then nearly always comes out the same, and the values that are stored repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from nps_compress.fitness import Row, device, load_model, token_limit
from nps_compress.task_vector import Float32

POWER = 0.25
DAMPING = 0.01  # of the mean: keeps what no calibration example touches from counting nothing
_RANGE = 2.0**10  # of the factors, either way


def fisher(
    finetuned: Path,
    rows: Sequence[Row],
    seed: int = 0,
    on_example: Callable[[], None] = lambda: None,
) -> dict[str, Float32]:
    """Importance of every parameter of a model folder, by name. -> [numel] float32 each.

    One pass forward and back per example; holds the model, its gradients and their squares in
    float32.

    Raises:
        CheckpointError: the folder can't be loaded as a classifier or causal LM.
    """
    model, tokenizer, is_classifier = load_model(finetuned)
    model.to(device())
    named = dict(model.named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    limit = token_limit(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        inputs = tokenizer(row.text, truncation=True, max_length=limit, return_tensors="pt")
        logits = model(**inputs.to(device())).logits.float()
        if not is_classifier:
            logits = logits[0, :-1]
        if len(logits):
            shares = functional.softmax(logits.detach(), -1).cpu()
            drawn = torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)
            loss = functional.cross_entropy(logits, drawn, reduction="sum")
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    squares[name] += gradient.square()
        on_example()
    total = sum(float(square.sum(dtype=torch.float64)) for square in squares.values())
    mean = total / sum(square.numel() for square in squares.values())
    return {name: _factors(square, mean) for name, square in squares.items()}


def _factors(square: torch.Tensor, mean: float) -> Float32:
    if not mean > 0:
        return np.ones(square.numel(), np.float32)
    relative = (square.double() / mean + DAMPING).cpu().numpy().reshape(-1)
    halves = np.rint(2 * POWER * np.log2(relative))  # of an octave
    return np.clip(np.exp2(halves / 2), 1 / _RANGE, _RANGE).astype(np.float32)
