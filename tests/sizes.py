"""How many bytes each codec takes on fixed pairs: ``python tests/sizes.py`` writes sizes.csv anew.

The bytes are those of the tensors' chunks, without index and metadata. A change that loses or gains
a byte shows in review.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import nps_compress
from nps_compress import Recipe

SIZES = Path(__file__).parent / "sizes.csv"
FIELDS = ("fixture", "prune", "density", "level", "codecs", "bytes")


def _normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    # Twelve uniform numbers, whose sum is exact in float64: the same on every machine.
    return torch.from_numpy(rng.integers(0, 1 << 20, (*shape, 12)).sum(-1) / (1 << 20) - 6)


def fixtures() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, base and fine-tuned matrix."""
    rng = np.random.default_rng(0)
    rows, columns = (torch.from_numpy(rng.integers(1, 9, n) / 4.0) for n in (384, 512))
    base = 0.05 * _normal(rng, 384, 512)
    heavy = _normal(rng, 384, 512)
    tau = 1e-3 * heavy * heavy * heavy * rows[:, None] * columns
    yield "matrix, bf16", base.bfloat16(), (base + tau).bfloat16()
    yield "matrix, f16", base.half(), (base + tau).half()
    yield "matrix, f32", base.float(), (base + tau).float()
    few = torch.from_numpy(rng.integers(0, 50, 384) == 0)
    yield "embedding, bf16", base.bfloat16(), (base + tau * few[:, None]).bfloat16()
    sparse = torch.from_numpy(rng.integers(0, 100, (384, 512)) == 0)
    yield "1 % changed, bf16", base.bfloat16(), (base + tau * sparse).bfloat16()


def measured() -> list[dict[str, str]]:
    """All rows of the table."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, base, tuned in fixtures():
            for path, tensor in (("base", base), ("tuned", tuned)):
                save_file({"w": tensor}, Path(folder) / f"{path}.safetensors")
            for level in ("fast", "default", "max"):
                found.append(_row(Path(folder), name, None, level))
                for density in (0.002, 0.05, 0.5):
                    recipe = Recipe(prune="magnitude", density=density)
                    found.append(_row(Path(folder), name, recipe, level))
            for values in ("int8", "int4", "int3", "int2", "sign"):
                for density in (0.002, 0.05, 0.5):
                    recipe = Recipe(prune="magnitude", density=density, values=values)  # type: ignore[arg-type]
                    found.append(_row(Path(folder), name, recipe, "default"))
            for rule in ("signs", "sampled"):
                for density in (0.002, 0.01, 0.05, 0.2, 0.5, 0.9):
                    recipe = Recipe(prune=rule, density=density)  # type: ignore[arg-type]
                    found.append(_row(Path(folder), name, recipe, "default"))
    return found


def _row(folder: Path, name: str, recipe: Recipe | None, level: str) -> dict[str, str]:
    out = folder / "t.nps"
    nps_compress.pack(
        folder / "base.safetensors",
        folder / "tuned.safetensors",
        out,
        recipe=recipe,
        lossless=recipe is None,
        level=level,  # type: ignore[arg-type]
        force=True,
    )
    nps_compress.verify(folder / "base.safetensors", out)
    (tensor,) = nps_compress.inspect(out)["tensors"]
    how = recipe.prune if recipe else "lossless"
    if recipe and recipe.values != "exact":
        how = f"{how} {recipe.values}"
    values = (
        name,
        how,
        recipe.density if recipe else "",
        level,
        " ".join(tensor["codecs"]),
        tensor["stored_bytes"],
    )
    return dict(zip(FIELDS, map(str, values), strict=True))


def main() -> None:
    with SIZES.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(measured())


if __name__ == "__main__":
    main()
