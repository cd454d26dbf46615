"""Tensors and forms to test with: random, special, and such as lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from nps_compress.kernels import form as forms
from nps_compress.kernels.form import Factors, Form, Grid, Mask, Signs, Words, form_of
from nps_compress.rank_one import POWERS

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_words(rng, numel: int, itemsize: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(rng.bytes(numel * itemsize), f"<i{itemsize}").copy())


def random_tensor(rng, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, then random bits, then special values."""
    numel = shape[0] * shape[1]
    tensor = torch.from_numpy(rng.normal(0, 0.05, numel)).to(dtype)
    anything = random_words(rng, numel // 2, dtype.itemsize).view(dtype)
    tensor[: len(anything)] = anything
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        values = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, largest, -largest]
        special = torch.tensor(values, dtype=torch.float64).to(dtype)
        tensor[: min(len(special), numel)] = special[:numel]
    return tensor.reshape(shape)


def random_factors(rng, rows: int, columns: int, centre: int) -> Factors:
    gain = np.float32(rng.uniform(0.5, 2))
    with np.errstate(over="ignore"):
        table = POWERS * gain
    exponents = (rng.integers(-9, 10, size) + centre // 2 for size in (rows, columns))
    return Factors.of(*exponents, table)


def random_values(rng, kind: str, nnz: int, shape: tuple[int, int], dtype: torch.dtype):
    if kind == "words":
        return Words(random_words(rng, nnz, dtype.itemsize))
    # From changes that no dtype can hold to such as vanish beside a subnormal.
    centre = int(rng.choice([-20, -20, -48, -100, 30, 120]))
    if kind == "grid":
        levels = torch.from_numpy(rng.integers(-127, 128, nnz).astype(np.int8))
        return Grid(levels, random_factors(rng, *shape, centre))
    minus = torch.from_numpy(rng.integers(0, 256, -(-nnz // 8)).astype(np.uint8))
    other = random_factors(rng, *shape, 6)
    return Signs(minus, random_factors(rng, *shape, centre), other)


def random_form(rng, kind: str, density: float, tensor: torch.Tensor, in_mask=None) -> Form:
    numel = tensor.numel()
    positions = np.flatnonzero(rng.random(numel) < density)
    values = random_values(rng, kind, positions.size, tuple(tensor.shape), tensor.dtype)
    found = form_of(numel, positions, values)
    if in_mask is not None:
        make = forms.mask_of if in_mask else forms.gaps_of
        found = replace(found, places=make(numel, positions))
    return found


GUARD = 64


def guarded(words: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory that has poison on both sides of a tensor, and the tensor in it."""
    whole = torch.full((words.numel() + 2 * GUARD,), 0x5A, dtype=words.dtype, device=device)
    part = whole[GUARD : GUARD + words.numel()]
    part.copy_(words)
    return whole, part


def lies(honest: Form) -> dict[str, Form]:
    """What a form can say that is wrong, each with what follows from it in bounds of its parts."""
    places = honest.places
    if isinstance(places, Mask):
        counts = places.counts.clone()
        counts[-1] += honest.nnz
        far = places.counts.clone()
        far[0] = -1
        return {
            "one too many before": replace(
                honest, places=replace(places, counts=places.counts + 1)
            ),
            "too many": replace(honest, places=replace(places, counts=counts)),
            "2^32 - 1 before": replace(honest, places=replace(places, counts=far)),
        }
    gaps, anchors = places.gaps.clone(), places.anchors.clone()
    gaps[-1] = 254
    changed = {"past the end": replace(places, gaps=gaps)}
    changed["past the block"] = replace(places, gaps=torch.full_like(gaps, 250))
    for name, at, value in (
        ("entries that are not there", (-1, 0), 1 << 30),
        ("2^32 - 1 entries", (-1, 0), -1),
        ("a block that ends before it begins", (1, 0), -1),
        ("ranks that are not there", (1, 1), 1 << 30),
        ("2^32 - 1 ranks", (0, 1), -1),
    ):
        wrong = anchors.clone()
        wrong[at] = value
        changed[name] = replace(places, anchors=wrong)
    return {name: replace(honest, places=each) for name, each in changed.items()}
