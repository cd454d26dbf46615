"""Ways to draw a sampled task vector, at equal density: does any beat independent draws?

    python benchmarks/draws.py --task packages --task digits

All keep an element with probability |t| / step at +-step, and differ in what they make of chance:

``independent``    each element for itself, as the package does; ``package`` is the package itself,
                   which must agree
``rows``, ``columns``  systematic sampling: the running sum of probabilities along a row or column
                   decides, so that no row keeps too many or too few
``feedback``       the error of an element is made up for by those after it, as in GPTQ (Frantar et
                   al. 2022, arXiv 2210.17323), with second moments of calibration inputs
``best of 16``     of 16 independent draws of a row, the one whose error is least on those moments

One row a task, density, method and seed in results/draws.csv, with the divergence (nats) from the
fine-tune's outputs on examples that are not calibration data. Those that are there are kept.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import nn

import quality
import rows
import tasks
from nps_compress.candidates import Pruner
from nps_compress.checkpoint import open_checkpoint, pair
from nps_compress.live import LiveModel
from nps_compress.models import weights_of
from nps_compress.recipe import Recipe

RESULT = rows.RESULTS / "draws.csv"
FIELDS = ("task", "density", "method", "seed", "kept", "kl", "machine", "versions", "commit")
EXAMPLES, SEEDS, DRAWS = 384, 3, 16
DAMPING = 0.1  # of the mean second moment

Tensors = Mapping[str, torch.Tensor]
Draw = Callable[[torch.Tensor, float, torch.Generator, torch.Tensor | None], torch.Tensor]


def independent(
    tau: torch.Tensor, step: float, chance: torch.Generator, _: torch.Tensor | None
) -> torch.Tensor:
    """Each element for itself; from ``step`` on exactly. -> tau's shape."""
    kept = torch.rand(tau.shape, generator=chance) * step < tau.abs()
    return torch.where(tau.abs() >= step, tau, tau.sign() * step * kept)


def along_rows(
    tau: torch.Tensor, step: float, chance: torch.Generator, _: torch.Tensor | None
) -> torch.Tensor:
    """Systematic sampling along the last dimension, each row from a start of its own."""
    chances = (tau.abs() / step).clamp(max=1).double().flatten(0, -2) if tau.ndim > 1 else None
    if chances is None:
        return independent(tau, step, chance, None)
    start = torch.rand(len(chances), 1, generator=chance).double()
    upto = chances.cumsum(1) + start
    kept = (upto.floor() > (upto - chances).floor()).view(tau.shape)
    return torch.where(tau.abs() >= step, tau, tau.sign() * step * kept)


def along_columns(
    tau: torch.Tensor, step: float, chance: torch.Generator, _: torch.Tensor | None
) -> torch.Tensor:
    """The same along the first dimension."""
    return along_rows(tau.transpose(0, -1).contiguous(), step, chance, None).transpose(0, -1)


def with_feedback(
    tau: torch.Tensor, step: float, chance: torch.Generator, moments: torch.Tensor | None
) -> torch.Tensor:
    """Column by column; what the later ones are moved by is drawn with them."""
    if moments is None:
        return independent(tau, step, chance, None)
    damped = moments.double() + DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
    factor = torch.linalg.cholesky(damped.inverse(), upper=True).float()
    rest, drawn = tau.clone(), torch.zeros_like(tau)
    for column in range(tau.shape[1]):
        drawn[:, column] = independent(rest[:, column], step, chance, None)
        error = (rest[:, column] - drawn[:, column]) / factor[column, column]
        rest[:, column:] -= error[:, None] * factor[column, column:]
    return drawn


def best_of_many(
    tau: torch.Tensor, step: float, chance: torch.Generator, moments: torch.Tensor | None
) -> torch.Tensor:
    """The draw of each row whose outputs differ least in the mean square."""
    if moments is None:
        return independent(tau, step, chance, None)
    best, least = independent(tau, step, chance, None), torch.full((len(tau), 1), math.inf)
    for _ in range(DRAWS):
        drawn = independent(tau, step, chance, None)
        error = (((drawn - tau) @ moments) * (drawn - tau)).sum(1, keepdim=True)
        best = torch.where(error < least, drawn, best)
        least = torch.minimum(error, least)
    return best


METHODS: dict[str, Draw] = {
    "independent": independent,
    "rows": along_rows,
    "columns": along_columns,
    "feedback": with_feedback,
    "best of 16": best_of_many,
}


class Bench:
    """A task's model, task vector, and examples of its training data that no draw has seen."""

    def __init__(self, name: str) -> None:
        self.task = tasks.build(name)
        self.model = tasks.load_model(self.task, self.task.finetuned)
        self.weights = weights_of(self.model)
        found = quality.Pair.of(self.task)
        self.base = {name: found.base[name] for name in found.names if name in self.weights}
        self.tau = {name: found.tuned[name] - base for name, base in self.base.items()}
        self.numel = sum(tensor.numel() for tensor in self.tau.values())
        self.held_out = tasks.batches(self.task, "train")[: -(-EXAMPLES // 32)]
        self.said = [quality.log_shares(self.model, batch) for batch in self.held_out]
        self.moments = self._moments()

    def kl(self) -> float:
        """Nats a prediction from what the fine-tune says."""
        return quality.compare(self.model, self.held_out, self.said)[0]

    def draw(self, method: Draw, density: float, seed: int) -> float:
        """Put a draw into the model, in bfloat16; returns the share that it keeps."""
        step = self._step(density)
        for _ in range(6):  # feedback keeps more than its probabilities say
            chance = torch.Generator().manual_seed(seed)
            drawn = {n: method(t, step, chance, self.moments.get(n)) for n, t in self.tau.items()}
            kept = sum(int(tensor.count_nonzero()) for tensor in drawn.values()) / self.numel
            if abs(kept / density - 1) < 0.02:
                break
            step *= kept / density
        for name, tensor in drawn.items():
            self.weights[name].copy_((self.base[name] + tensor).bfloat16())
        return kept

    def pack(self, density: float, seed: int) -> float:
        """The same by the package."""
        found = pair(open_checkpoint(self.task.base), open_checkpoint(self.task.finetuned))
        pruner = Pruner(found, Recipe(prune="sampled", density=density, seed=seed))
        pruner.count(1 << 31)
        LiveModel(pruner, self.weights).apply()
        changed = (int((self.weights[n] != base).sum()) for n, base in self.base.items())
        return sum(changed) / self.numel

    def _step(self, density: float) -> float:
        low, high = 1e-12, 1e6
        for _ in range(80):
            step = math.sqrt(low * high)
            kept = sum(float((t.abs() / step).clamp(max=1).sum()) for t in self.tau.values())
            low, high = (step, high) if kept > density * self.numel else (low, step)
        return step

    @torch.inference_mode()
    def _moments(self) -> dict[str, torch.Tensor]:
        """Second moments of the inputs of linear layers, by file name. [inputs, inputs] each."""
        names = {tensor.data_ptr(): name for name, tensor in self.weights.items()}
        found: dict[str, torch.Tensor] = {}
        hooks = []
        for module in self.model.modules():
            name = names.get(module.weight.data_ptr()) if isinstance(module, nn.Linear) else None
            if name in self.tau:

                def hook(_: nn.Module, given: tuple[torch.Tensor, ...], name: str = name) -> None:
                    x = given[0].flatten(0, -2)
                    found[name] = found.get(name, torch.zeros(())) + x.T @ x / len(x)

                hooks.append(module.register_forward_pre_hook(hook))
        for inputs, _ in tasks.batches(self.task, "calibration"):
            self.model(**inputs)
        for handle in hooks:
            handle.remove()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", action="append", choices=tasks.names(), required=True)
    parser.add_argument("--density", action="append", type=float)
    arguments = parser.parse_args()
    environment = rows.environment()
    for name in arguments.task:
        bench = Bench(name)
        for density in arguments.density or (0.01, 0.05):
            for method in ("package", *METHODS):
                for seed in range(SEEDS):
                    _measure(bench, density, method, seed, environment)
            _check(name, density)


def _measure(
    bench: Bench, density: float, method: str, seed: int, environment: Mapping[str, str]
) -> None:
    key = {"task": bench.task.name, "density": str(density), "method": method, "seed": str(seed)}
    if any(all(row[k] == v for k, v in key.items()) for row in rows.read(RESULT)):
        return
    draw = METHODS.get(method)
    kept = bench.draw(draw, density, seed) if draw else bench.pack(density, seed)
    row = {**key, "kept": f"{kept:.5f}", "kl": f"{bench.kl():.5f}", **environment}
    rows.append(RESULT, FIELDS, row)
    print(*(f"{value:>12}" for value in list(row.values())[:6]), flush=True)


def _check(name: str, density: float) -> None:
    """The draws here must be those of the package, within what seeds differ by."""
    found: dict[str, list[float]] = {"package": [], "independent": []}
    for row in rows.read(RESULT):
        if (row["task"], row["density"]) == (name, str(density)) and row["method"] in found:
            found[row["method"]].append(float(row["kl"]))
    ours, here = map(statistics.fmean, found.values())
    spread = max(map(max, found.values())) - min(map(min, found.values()))
    if abs(ours - here) > max(spread, 0.1 * ours):
        raise SystemExit(f"independent draws differ from the package's: {here:.4f}, {ours:.4f}")


if __name__ == "__main__":
    main()
