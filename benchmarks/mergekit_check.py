"""Ours beside mergekit on the same inputs and settings: task arithmetic, TIES and DARE.

    make storage-peers                    # installs mergekit, among others
    python benchmarks/mergekit_check.py

Three text fine-tunes without their heads, so that all models are of the base's architecture.
mergekit works in float32 and rounds to bfloat16, as we do, and trims within each tensor: ours is
told so. ``equal`` is the share of weights with the same bits, ``apart`` the norm of the difference
over that of the change, ``at_threshold`` the share of differing weights where some task's change is
within a thousandth of where it is trimmed: which of equal magnitudes are kept is open. DARE's draws
differ, and mergekit rescales to the L1 norm of the tensor instead of by 1 / density, so that what
can be compared are statistics: the share of weights that change, and how far the change goes along
the sum of the task vectors (1: as far as task arithmetic).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import rows
import tasks
from nps_compress.merging.contract import Settings
from nps_compress.merging.driver import merge

PYTHON = Path(__file__).parent / "peers" / ".envs" / "mergekit" / "bin" / "python"
NAMES = ("packages", "kinds", "topics")


@dataclass(frozen=True)
class Case:
    """The same method twice: ours, and mergekit's name and parameters."""

    method: str
    settings: Settings
    theirs: str
    parameters: Mapping[str, object]


CASES = (
    Case("task-arithmetic", Settings(scale=0.4), "task_arithmetic", {"lambda": 0.4}),
    Case(
        "ties",
        Settings(density=0.2, prune="magnitude", scope="tensor"),
        "ties",
        {"density": 0.2, "normalize": True, "rescale": False, "lambda": 1.0},
    ),
    Case(
        "ties",
        Settings(density=1.0, prune="magnitude", scope="tensor"),
        "ties",
        {"density": 1.0, "normalize": True, "rescale": False, "lambda": 1.0},
    ),
    Case(
        "dare",
        Settings(scale=0.4, density=1.0, prune="random"),
        "dare_linear",
        {"density": 1.0, "lambda": 0.4},
    ),
    Case(
        "dare",
        Settings(scale=0.4, density=0.1, prune="random"),
        "dare_linear",
        {"density": 0.1, "lambda": 0.4},
    ),
)


def theirs(case: Case, base: Path, models: list[Path], out: Path) -> dict[str, torch.Tensor]:
    shared = {"normalize": False, "rescale": True, "int8_mask": False, **case.parameters}
    told = {
        "base": str(base / "model.safetensors"),
        "models": [str(model / "model.safetensors") for model in models],
        "out": str(out),
        "method": case.theirs,
        "sparse": {"weight": 1.0, "density": shared.pop("density", 1.0)},
        "parameters": shared,
    }
    script = Path(__file__).parent / "peers" / "use_mergekit.py"
    subprocess.run([PYTHON, script, json.dumps(told)], check=True)
    return load_file(out)


def main() -> None:
    if not PYTHON.exists():
        raise SystemExit(f"there is no {PYTHON}: run `make storage-peers`")
    built = [tasks.build(name) for name in NAMES]
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = built[0].base
        models = []
        for task in built:  # the fine-tune's encoder, bit for bit
            folder = root / task.name
            merge(
                *(base, [task.finetuned], folder),
                method="task-arithmetic",
                settings=Settings(scale=1.0),
            )
            models.append(folder)
        before = {name: t.float() for name, t in load_file(base / "model.safetensors").items()}
        tuned = [load_file(model / "model.safetensors") for model in models]
        taus = {
            name: torch.stack([each[name].float() - start for each in tuned])
            for name, start in before.items()
        }
        for number, case in enumerate(CASES):
            folder = root / str(number)
            folder.mkdir()
            merge(base, models, folder / "ours", method=case.method, settings=case.settings)
            ours = load_file(folder / "ours" / "model.safetensors")
            other = theirs(case, base, models, folder / "theirs.safetensors")
            assert ours.keys() == other.keys(), ours.keys() ^ other.keys()
            row = compare(before, taus, ours, other, case)
            print(row, flush=True)
            found.append(row)
    path = rows.save("mergekit", found)
    print(rows.table(found))
    print(f"rows in {path}")


def compare(
    before: Mapping[str, torch.Tensor],
    taus: Mapping[str, torch.Tensor],
    ours: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
    case: Case,
) -> dict[str, object]:
    numel = equal = near = 0
    apart = size = squares = 0.0
    changed, along = [0, 0], [0.0, 0.0]
    for name, start in before.items():
        mine, yours = ours[name].float(), other[name].float()
        total = taus[name].sum(0)
        numel += start.numel()
        equal += int((mine == yours).sum())
        sizes = taus[name].abs()
        count = max(1, int(case.settings.density * start.numel()))
        limits = sizes.flatten(1).topk(count).values[:, -1].view(-1, *[1] * start.dim())
        is_near = ((sizes - limits).abs() <= 1e-3 * limits).any(0)
        near += int((is_near & (mine != yours)).sum())
        apart += float((mine - yours).square().sum(dtype=torch.float64))
        size += float((yours - start).square().sum(dtype=torch.float64))
        squares += float(total.square().sum(dtype=torch.float64))
        for at, each in enumerate((mine, yours)):
            changed[at] += int((each != start).sum())
            along[at] += float(((each - start) * total).sum(dtype=torch.float64))
    scale = case.settings.scale or 1.0
    return {
        "method": case.method,
        "density": case.settings.density if case.settings.prune else 1.0,
        "lambda": scale,
        "equal": f"{equal / numel:.6f}",
        "apart": f"{(apart / size) ** 0.5:.2e}",
        "at_threshold": f"{near / (numel - equal):.4f}"
        if case.method == "ties" and numel > equal
        else "",
        "changed_ours": f"{changed[0] / numel:.4f}",
        "changed_mergekit": f"{changed[1] / numel:.4f}",
        "along_ours": f"{along[0] / squares / scale:.4f}",
        "along_mergekit": f"{along[1] / squares / scale:.4f}",
    }


if __name__ == "__main__":
    main()
