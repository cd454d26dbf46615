"""Where an error costs most: a factor for each row and column of a weight, measured on calibration
data.

``fisher`` is a power of the diagonal of the Fisher information at the fine-tune: the mean square of
the gradients of log p(y | x), with y drawn from the fine-tune's own outputs, so that no labels are
needed (Kirkpatrick et al. 2017, arXiv 1612.00796, use the same diagonal to weigh changes). Models
without classes, encoders and regression models, are taken to say the mean of a Gaussian of unit
variance: the gradients are then those of a random projection of the embedding or score, with unit
Gaussian weights.

``activation`` is a power of the mean square of the input that a weight is multiplied with, relative
to the mean over its tensor, without gradients (Wanda, arXiv 2306.11695, ranks weights by the root
of it); for an embedding, of how often its row is looked up.

A small power, because a high one forgets what the calibration data don't show; `make quality`
measures both.

Either is taken as a product of row and column means (as Adafactor does with squares of gradients,
arXiv 1804.04235), the mean of a row relative to its tensor's and that of a column to the whole
model's: cheap enough to store (signs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from nps_compress.adapters import LoadedModel, device
from nps_compress.batches import Encoded
from nps_compress.calibration import Example
from nps_compress.models import by_file_name, load_model, running
from nps_compress.rank_one import RankOne, rows_and_columns
from nps_compress.recipe import Importance

POWER = 1 / 3
DAMPING = 0.01  # of the mean: keeps what no calibration example touches from counting nothing
_RANGE = 2.0**10  # of the factors, either way


def measure_importance(
    name: Importance,
    finetuned: Path,
    examples: Sequence[Example],
    seed: int = 0,
    on_example: Callable[[], None] = lambda: None,
    source: Path | str = "calibration data",
) -> dict[str, RankOne]:
    """Importance of every parameter by its name in the file.

    seed: of the labels that ``fisher`` draws; not that of a recipe, which a search may change.
    Empty for ``magnitude``, where all count alike. Raises as :func:`fisher`.
    """
    if name == "fisher":
        return fisher(finetuned, examples, seed, on_example, source)
    if name == "activation":
        return activation(finetuned, examples, on_example, source)
    return {}


def fisher(
    finetuned: Path,
    examples: Sequence[Example],
    seed: int = 0,
    on_example: Callable[[], None] = lambda: None,
    source: Path | str = "calibration data",
) -> dict[str, RankOne]:
    """Importance of every parameter by its name in the file.

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


def activation(
    finetuned: Path,
    examples: Sequence[Example],
    on_example: Callable[[], None] = lambda: None,
    source: Path | str = "calibration data",
) -> dict[str, RankOne]:
    """As :func:`fisher`, with one pass forward per example; 1 for all but matrices.

    Raises as :func:`fisher`.
    """
    loaded = load_model(finetuned)
    loaded.model.to(device())
    named = dict(loaded.model.named_parameters())
    squares = {name: torch.zeros(0) for name in named}  # by input: [inputs], or [rows]
    hooks = []
    for path, module in loaded.model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if name in squares and (isinstance(module, _MATRICES) or _is_transposed(module)):
            hooks.append(
                module.register_forward_pre_hook(_adds_inputs(squares, name), with_kwargs=True)
            )
    try:
        with running(finetuned), torch.inference_mode():
            for encoded in loaded.encode(examples, source, labelled=False):
                batch = loaded.collate([encoded])
                if loaded.kind == "encoder":
                    loaded.embeddings(batch)
                else:
                    loaded.logits(batch)
                on_example()
    finally:
        for hook in hooks:
            hook.remove()
    modules = dict(loaded.model.named_modules())
    spread = {
        name: _spread(modules[name.rpartition(".")[0]], parameter, squares[name])
        for name, parameter in named.items()
    }
    found = by_file_name(loaded.model, spread)
    return {name: _factors(square, float(square.mean())) for name, square in found.items()}


_MATRICES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Embedding)


def _is_transposed(module: torch.nn.Module) -> bool:
    """Whether it is a linear layer of transformers whose weight is [inputs, outputs] (GPT-2)."""
    return type(module).__name__ == "Conv1D"


def _adds_inputs(squares: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    """A hook that adds up the squares of what a module is given."""

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = [*inputs, *named.values()][0]
        if isinstance(module, torch.nn.Embedding):
            rows = torch.bincount(given.flatten(), minlength=module.num_embeddings)
            found = rows.float()
        elif isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
            # Of a channel: its pixels meet all weights of the kernel alike, but at the edges.
            found = given.float().square().transpose(0, 1).flatten(1).sum(1)
        else:
            found = given.float().square().flatten(0, -2).sum(0)
        squares[name] = squares[name].to(found.device) + found if squares[name].numel() else found

    return hook


def _spread(
    module: torch.nn.Module, parameter: torch.Tensor, squares: torch.Tensor
) -> torch.Tensor:
    """Squares by input as one for each weight. -> the parameter's shape."""
    if not squares.numel():
        return torch.ones(parameter.shape)
    if isinstance(module, torch.nn.Embedding) or _is_transposed(module):  # rows are inputs
        return squares.cpu()[:, None].expand(parameter.shape).contiguous()
    groups = getattr(module, "groups", 1)
    if groups > 1:
        each = squares.cpu().view(groups, -1).repeat_interleave(parameter.shape[0] // groups, 0)
    else:
        each = squares.cpu()[None].expand(parameter.shape[0], -1)
    shape = (*each.shape, *[1] * (parameter.ndim - 2))
    return each.reshape(shape).expand(parameter.shape).contiguous()


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


def _factors(square: torch.Tensor, mean: float) -> RankOne:
    """The power of row means over the tensor's mean, and of column means over ``mean``."""
    matrix = square.double().reshape(rows_and_columns(tuple(square.shape))).cpu()
    own = float(matrix.mean()) if matrix.numel() else 0.0
    rows = matrix.mean(1) / own if own > 0 else torch.ones(len(matrix))
    columns = matrix.mean(0) / mean if mean > 0 else torch.ones(matrix.shape[1])
    return RankOne.of(*(_power(each) for each in (rows, columns)))


def _power(relative: torch.Tensor) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = ((relative + DAMPING) ** POWER).numpy()
    return np.clip(found, 1 / _RANGE, _RANGE)
