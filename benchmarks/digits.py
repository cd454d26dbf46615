"""A small vision transformer for scikit-learn's handwritten digits.

The base has learnt something else of the same strokes: whether a digit that lies on its side or
stands on its head is even. The fine-tune reads upright digits. Parts are contiguous: neighbours in
the data set were written by the same hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from training import Batch, Row, Settings, class_measures, fit

SIZES = (900, 256, 641)
PIXELS = 32
BATCH = 32
_BASE_COPIES, _COPIES = 4, 4  # of each image, differently moved

measures = class_measures


def collect(folder: Path) -> list[list[Row]]:
    """Write the images beside the rows that name them."""
    from sklearn.datasets import load_digits

    data = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (grey, label) in enumerate(zip(data.images, data.target, strict=True)):
        name = f"images/{number:04}.png"
        image = Image.fromarray((grey * (255 / 16)).astype(np.uint8))
        image.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR).save(folder / name)
        rows.append({"image": name, "label": int(label)})
    first, second = SIZES[0], SIZES[0] + SIZES[1]
    return [rows[:first], rows[first:second], rows[second:]]


def pretrain(out: Path, rows: Sequence[Row], settings: Settings, progress: bool) -> None:
    torch.manual_seed(settings.seed)
    config = ViTConfig(
        image_size=PIXELS,
        patch_size=PIXELS // 4,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        id2label={0: "even", 1: "odd"},
        label2id={"even": 0, "odd": 1},
    )
    images, digits = _read(rows)
    generator = torch.Generator().manual_seed(settings.seed)
    moved = [_move(images, (60.0, 300.0), generator) for _ in range(_BASE_COPIES)]
    model: Any = ViTForImageClassification(config)
    data = _cut(torch.cat(moved), (digits % 2).repeat(_BASE_COPIES), generator)
    fit(model, data, settings, progress=progress)
    model.to(torch.bfloat16).save_pretrained(out)


def finetune(
    base: Path,
    out: Path,
    rows: Sequence[Row],
    labels: Sequence[str],
    settings: Settings,
    progress: bool,
) -> None:
    """Train all weights and a new head in float32; save in bfloat16."""
    torch.manual_seed(settings.seed)
    names = dict(enumerate(labels))
    model: Any = ViTForImageClassification.from_pretrained(
        base,
        dtype=torch.float32,
        num_labels=len(labels),
        id2label=names,
        label2id={name: number for number, name in names.items()},
        ignore_mismatched_sizes=True,
    )
    images, digits = _read(rows)
    generator = torch.Generator().manual_seed(settings.seed)
    moved = [_move(images, (-10.0, 10.0), generator) for _ in range(_COPIES)]
    data = _cut(torch.cat(moved), digits.repeat(_COPIES), generator)
    fit(model, data, settings, progress=progress)
    model.to(torch.bfloat16).save_pretrained(out)


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def batches(folder: Path, rows: Sequence[Row]) -> list[Batch]:
    images, digits = _read(rows)
    return _cut(images, digits, None)


def _read(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> [n, 1, 32, 32] from -1, paper, to 1, ink, and [n] classes."""
    grey = np.stack([np.asarray(Image.open(row["image"]), np.float32) for row in rows])
    images = torch.from_numpy(grey / 127.5 - 1)[:, None]
    return images, torch.tensor([row["label"] for row in rows])


def _move(
    images: torch.Tensor, degrees: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """Each image turned by an angle of the range and shifted by a pixel or two."""
    low, high = degrees
    count = len(images)
    angle = torch.rand(count, generator=generator) * (high - low) + low
    angle = torch.deg2rad(angle)
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * (6 / PIXELS)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
    affine = torch.cat([rotation.view(count, 2, 2), shift[:, :, None]], -1)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1  # paper outside


def _cut(
    images: torch.Tensor, targets: torch.Tensor, generator: torch.Generator | None
) -> list[Batch]:
    order = torch.arange(len(images))
    if generator is not None:
        order = torch.randperm(len(images), generator=generator)
    return [({"pixel_values": images[i]}, targets[i]) for i in order.split(BATCH)]
