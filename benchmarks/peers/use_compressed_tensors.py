"""The sparse-bitmask form of compressed-tensors 0.14, of base XOR fine-tune.

As int16, whose only zero is the word of an unchanged weight: as a bfloat16, -0.0 is one as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
from safetensors.torch import load_file, save_file

import worker

FILE = "bitmask.safetensors"
PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def encode(base: Path, tuned: Path, out: Path) -> None:
    before = load_file(base)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tuned).items():
        changed = before[name].view(torch.int16) ^ tensor.view(torch.int16)
        stored |= BitmaskTensor.from_dense(as_matrix(changed)).dict(name)
    save_file(stored, out / FILE)


def decode(base: Path, packed: Path, out: Path) -> None:
    stored, weights = load_file(packed / FILE), {}
    for name, tensor in load_file(base).items():
        parts = {part: stored[f"{name}.{part}"] for part in PARTS}
        changed = BitmaskTensor(**parts).decompress().reshape(tensor.shape)
        weights[name] = (tensor.view(torch.int16) ^ changed).view(torch.bfloat16)
    save_file(weights, out / worker.MODEL, {"format": "pt"})


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)


worker.serve(encode, decode, ["compressed-tensors", "torch", "numpy"])
