"""Where an error costs most: one factor per weight, from gradients on calibration data.

``fisher`` is a power of the diagonal of the Fisher information at the fine-tune: the mean square of
the gradients of log p(y | x), with y drawn from the fine-tune's own outputs, so that no labels are
needed (Kirkpatrick et al. 2017, arXiv 1612.00796, use the same diagonal to weigh changes). Models
without classes, encoders and regression models, are taken to say the mean of a Gaussian of unit
variance: the gradients are then those of a random projection of the embedding or score, with unit
Gaussian weights. A small power, because a high one forgets what the calibration data don't show;
`make quality` measures it.

Factors are rounded to powers of the square root of 2: what threads and devices add up in another
order then nearly always comes out the same, and the values that are stored repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from nps_compress.adapters import LoadedModel, device
from nps_compress.batches import Encoded
from nps_compress.calibration import Example
from nps_compress.models import by_file_name, load_model, running
from nps_compress.task_vector import Float32

POWER = 0.25
DAMPING = 0.01  # of the mean: keeps what no calibration example touches from counting nothing
_RANGE = 2.0**10  # of the factors, either way


def fisher(
    finetuned: Path,
    examples: Sequence[Example],
    seed: int = 0,
    on_example: Callable[[], None] = lambda: None,
    source: Path | str = "calibration data",
) -> dict[str, Float32]:
    """Importance of every parameter by its name in the file. -> [numel] float32 each.

    One pass forward and back per example; holds the model, its gradients and their squares in
    float32.

    Raises:
        CheckpointError: the folder can't be loaded as a model of a known kind, or not be run.
        CalibrationError: an example lacks what the model needs.
    """
    loaded = load_model(finetuned)
    loaded.model.to(device())
    named = dict(loaded.model.named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    generator = torch.Generator().manual_seed(seed)
    with running(finetuned):
        for encoded in loaded.encode(examples, source, labelled=False):
            loss = _drawn_loss(loaded, encoded, generator)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                for name, gradient in zip(named, found, strict=True):
                    if gradient is not None:
                        squares[name] += gradient.square()
            on_example()
    squares = by_file_name(loaded.model, squares)
    total = sum(float(square.sum(dtype=torch.float64)) for square in squares.values())
    mean = total / sum(square.numel() for square in squares.values())
    return {name: _factors(square, mean) for name, square in squares.items()}


def _drawn_loss(loaded: LoadedModel, encoded: Encoded, generator: torch.Generator) -> torch.Tensor:
    """Minus log p(y | x) of one example, up to a constant, for a y that the model itself draws."""
    batch = loaded.collate([encoded])
    if loaded.kind in ("encoder", "regression"):
        is_encoder = loaded.kind == "encoder"
        found = loaded.embeddings(batch) if is_encoder else loaded.logits(batch)
        noise = torch.randn(found.shape, generator=generator).to(found.device)
        return (noise * found).sum()  # the gradient's only random part: y minus its mean
    logits = loaded.logits(batch)
    if not len(logits):
        return torch.zeros(())
    shares = functional.softmax(logits.detach(), -1).cpu()
    drawn = torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)
    return functional.cross_entropy(logits, drawn, reduction="sum")


def _factors(square: torch.Tensor, mean: float) -> Float32:
    if not mean > 0:
        return np.ones(square.numel(), np.float32)
    relative = (square.double() / mean + DAMPING).cpu().numpy().reshape(-1)
    halves = np.rint(2 * POWER * np.log2(relative))  # of an octave
    return np.clip(np.exp2(halves / 2), 1 / _RANGE, _RANGE).astype(np.float32)
