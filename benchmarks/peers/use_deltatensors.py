"""deltatensors: its streaming writer, and its reader, whose float32 weights are rounded here."""

from __future__ import annotations

from pathlib import Path

import deltatensors
import torch
from safetensors.torch import save_file

import worker

SETTINGS = worker.settings()
FILE = "model.wdelta"


def encode(base: Path, tuned: Path, out: Path) -> None:
    deltatensors.save_delta_from_paths(out / FILE, tuned.parent, base.parent, **SETTINGS)


def decode(base: Path, packed: Path, out: Path) -> None:
    found = deltatensors.load_delta_from_paths(packed / FILE, base.parent)
    weights = {name: torch.from_numpy(array).bfloat16() for name, array in found.items()}
    save_file(weights, out / worker.MODEL, {"format": "pt"})


worker.serve(encode, decode, ["deltatensors", "torch", "numpy"])
