"""What a candidate of a search costs: applying it beside evaluating it, and workers side by side.

    python benchmarks/search_cost.py

Medians over candidates, in seconds of the same run; ``apply_share`` is applying over evaluating.
``two_workers`` is how many times as fast two candidates at once are as one after the other. Gate:
after the last candidate, every weight of the live model is what a file would store.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import rows
import tasks
from nps_compress.calibration import read_examples
from nps_compress.candidates import Pruner
from nps_compress.checkpoint import open_checkpoint, pair
from nps_compress.dtypes import to_float32
from nps_compress.evaluator import Evaluator
from nps_compress.fitness import Fitness
from nps_compress.live import LiveModel
from nps_compress.recipe import Recipe
from nps_compress.search import SIGMA, Memory

CANDIDATES = 24
SETTINGS = (("magnitude", 0.05), ("sampled", 0.05), ("sampled", 0.01), ("signs", 0.05))


def candidates(recipe: Recipe) -> list[Recipe]:
    """As a search asks for them at its start."""
    rng = np.random.default_rng(0)
    spread = np.exp(SIGMA * rng.normal(size=(CANDIDATES, len(recipe.coefficients))))
    return [replace(recipe, coefficients=tuple(map(float, factors))) for factors in spread]


def check(pruner: Pruner, fitness: Fitness, recipe: Recipe) -> None:
    """Raise AssertionError where the live model isn't what would be stored."""
    pruner.recipe = recipe
    shared, groups = pruner.selection(), pruner.pruned_groups()
    for name in pruner.names:
        loaded = pruner.load(name)
        if pruner.group(name) in groups:
            wanted = to_float32(pruner.prune(name, loaded, shared), loaded[1])
        else:
            wanted = to_float32(*loaded[2:])
        assert np.array_equal(fitness.weights[name].cpu().numpy().reshape(-1), wanted), name


def measure(name: str, rule: str, density: float) -> dict[str, object]:
    task = tasks.build(name)
    examples = read_examples(task.calibration)
    recipe = Recipe.with_subspaces(8, "tail", prune=rule, density=density)
    pruner = Pruner(pair(open_checkpoint(task.base), open_checkpoint(task.finetuned)), recipe)
    pruner.count(1 << 31)
    fitness = Fitness(task.finetuned, examples)
    live = LiveModel(pruner, fitness.weights)
    asked = candidates(recipe)
    applying, evaluating = [], []
    for candidate in asked:
        started = time.perf_counter()
        live.apply(candidate)
        applied = time.perf_counter()
        fitness.score()
        applying.append(applied - started)
        evaluating.append(time.perf_counter() - applied)
    check(pruner, fitness, asked[-1])
    seconds = []
    for workers in (1, 2):
        evaluator = Evaluator(pruner, examples, "kl", workers=workers)
        evaluator.race(asked[:2], _forgets())  # the short lists are then made
        started = time.perf_counter()
        evaluator.race(asked[2:10], _forgets())
        seconds.append(time.perf_counter() - started)
    apply, evaluate = statistics.median(applying), statistics.median(evaluating)
    return {
        "task": name,
        "prune": rule,
        "density": density,
        "apply_s": round(apply, 4),
        "evaluate_s": round(evaluate, 4),
        "apply_share": round(apply / evaluate, 4),
        "first_apply_s": round(applying[0], 4),
        "two_workers": round(seconds[0] / seconds[1], 3),
    }


def _forgets() -> Memory:
    return Memory({}, {}, lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", action="append", choices=tasks.names())
    arguments = parser.parse_args()
    found = [
        measure(name, rule, density)
        for name in arguments.task or ("packages", "digits", "source")
        for rule, density in SETTINGS
    ]
    path: Path = rows.save("search_cost", found)
    print(rows.table(found))
    print(f"rows in {path}")


if __name__ == "__main__":
    main()
