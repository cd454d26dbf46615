"""The floor that benchmarks/entropy.py compares files with, on pairs counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import nps_compress
from nps_compress.checkpoint import open_checkpoint
from nps_compress.reconstruct import Task


@pytest.fixture(scope="module")
def entropy(benchmark):
    return benchmark("entropy")


def test_entropies_by_hand(entropy):
    assert entropy.binary_entropy(0.5) == 1.0
    assert entropy.binary_entropy(0.0) == entropy.binary_entropy(1.0) == 0.0
    assert entropy.binary_entropy(0.25) == pytest.approx(0.25 * 2 + 0.75 * np.log2(4 / 3))
    # Two of four symbols are alike: half of them cost 1 bit, the others 2 each.
    assert entropy.frequencies_entropy(np.array([7, 7, 1, 2])) == 2 * 1 + 2 * 2
    assert entropy.frequencies_entropy(np.array([3, 3, 3])) == 0.0


def floor_of(entropy, folder: Path, base: torch.Tensor, tuned: torch.Tensor, **options) -> dict:
    for name, tensors in (("base", {"w": base}), ("tuned", {"w": tuned, "head": torch.ones(3)})):
        save_file(tensors, folder / f"{name}.safetensors")
    path = folder / "t.nps"
    nps_compress.pack(folder / "base.safetensors", folder / "tuned.safetensors", path, **options)
    with Task(path) as file:
        found = {
            entry.name: entropy.floor(file, entry, open_checkpoint(folder / "base.safetensors"))
            for entry in file.reader.tensors
        }
        stored = {entry.name: file.reader.stored_bytes(entry) for entry in file.reader.tensors}
    assert found["head"] == (0.0, 8 * stored["head"])
    return found["w"]


def test_exact_values_by_hand(tmp_path, entropy):
    base = torch.ones(8, 128, dtype=torch.bfloat16)
    tuned = base.clone()
    one = torch.tensor(1 + 2**-7, dtype=torch.bfloat16)  # the next float up
    tuned[0] = one
    tuned[1, :64], tuned[1, 64:] = one, one + 2**-7
    mask, values = floor_of(entropy, tmp_path, base, tuned, lossless=True)
    assert mask == pytest.approx(1024 * entropy.binary_entropy(0.25))
    assert values == pytest.approx(256 * entropy.binary_entropy(0.25))  # 64 of 256 are two up


@pytest.mark.parametrize("values", ["sign", "int8"])
def test_integers_by_hand(tmp_path, entropy, values):
    base = torch.zeros(8, 128)
    tuned = base.clone()
    tuned[0, :64], tuned[0, 64:] = 1.0, -1.0
    recipe = nps_compress.Recipe(prune="magnitude", density=0.125, values=values)
    mask, bits = floor_of(entropy, tmp_path, base, tuned, recipe=recipe)
    assert mask == pytest.approx(1024 * entropy.binary_entropy(0.125))
    assert bits == pytest.approx(128.0)  # two integers, each as often


def test_a_sign_costs_one_bit(tmp_path, entropy):
    base = torch.zeros(512, 512)
    tuned = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    recipe = nps_compress.Recipe(prune="signs", density=0.25)
    mask, bits = floor_of(entropy, tmp_path, base, tuned, recipe=recipe)
    assert bits == int(bits)
    assert 0.2 < bits / base.numel() < 0.3
    assert mask == pytest.approx(base.numel() * entropy.binary_entropy(bits / base.numel()))
