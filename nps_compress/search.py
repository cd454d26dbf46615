"""CMA-ES over the coefficients of magnitude subspaces (NPS, arXiv 2505.18713, section 3.2).

Knows no model: it maximises a callable. The paper leaves sigma, bounds and population open; here
coefficients are searched as exp(x) from x = 0, so that they start at 1 and stay positive.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nps_compress.atomic import write_json
from nps_compress.errors import InvalidArgumentError, RecipeError, SearchInterruptedError

SIGMA = 0.3
_STATE_VERSION = 1

Coefficients = tuple[float, ...]


@dataclass(frozen=True)
class Progress:
    """Where a search stands after one evaluation; generation 0 is all coefficients at 1."""

    generation: int
    evaluation: int
    fitness: float
    best: float


@dataclass(frozen=True)
class SearchResult:
    """The best candidate and the way to it. ``history`` holds one list of fitness a generation."""

    coefficients: Coefficients
    fitness: float
    start_fitness: float
    history: list[list[float]]


def population_size(dimensions: int) -> int:
    """CMA-ES's default population for this many coefficients."""
    return 4 + int(3 * math.log(dimensions))


def check_search_options(generations: int, population: int | None) -> None:
    """Raise InvalidArgumentError where an option is out of range."""
    if generations < 1:
        raise InvalidArgumentError("generations", generations, "at least 1")
    if population is not None and population < 2:
        raise InvalidArgumentError("population", population, "at least 2")


def search(
    evaluate: Callable[[Coefficients], float],
    dimensions: int,
    generations: int = 30,
    population: int | None = None,
    sigma: float = SIGMA,
    seed: int = 0,
    state: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    on_evaluation: Callable[[Progress], None] = lambda _: None,
) -> SearchResult:
    """Maximise ``evaluate`` over ``dimensions`` positive coefficients.

    With ``state``, every fitness is saved there as soon as it is known. A state of the same
    ``identity`` is taken up again: its fitnesses are replayed to the same optimiser, so a resumed
    search equals an uninterrupted one. The state stays when the search ends.

    Raises:
        InvalidArgumentError: an option is out of range.
        RecipeError: ``state`` belongs to another search or is not readable.
        SearchInterruptedError: Ctrl-C; everything evaluated so far is in ``state``.
    """
    check_search_options(generations, population)
    if dimensions < 1:
        raise InvalidArgumentError("subspaces", dimensions, "at least 1")
    if population is None:
        population = population_size(dimensions)
    settings = {
        **(identity or {}),
        "dimensions": dimensions,
        "population": population,
        "sigma": sigma,
        "seed": seed,
    }
    known = _read_state(state, settings) if state else []
    strategy = _strategy(dimensions, population, sigma, seed)

    best: tuple[float, Coefficients] = (-math.inf, ())
    done: list[float] = []
    history: list[list[float]] = []
    generation = 0

    def score(x: Sequence[float]) -> float:
        nonlocal best
        coefficients = tuple(math.exp(value) for value in x)
        replayed = len(done) < len(known)
        fitness = known[len(done)] if replayed else float(evaluate(coefficients))
        if math.isnan(fitness):
            fitness = -math.inf
        done.append(fitness)
        if state and not replayed:
            _write_state(state, settings, done)
        if fitness > best[0] or not best[1]:
            best = (fitness, coefficients)
        on_evaluation(Progress(generation, len(done), fitness, best[0]))
        return fitness

    try:
        history.append([score([0.0] * dimensions)])
        for generation in range(1, generations + 1):  # noqa: B007 - score() reports it
            candidates = strategy.ask()
            fitnesses = [score(x) for x in candidates]
            strategy.tell(candidates, [_cost(fitness) for fitness in fitnesses])
            history.append(fitnesses)
            if strategy.stop():
                break
    except KeyboardInterrupt:
        raise SearchInterruptedError(state if done else None, generation) from None
    return SearchResult(best[1], best[0], history[0][0], history)


def _cost(fitness: float) -> float:
    """What CMA-ES minimises; a candidate that broke the model is merely very bad."""
    return -fitness if math.isfinite(fitness) else 1e300


def _strategy(dimensions: int, population: int, sigma: float, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cma warns about optional packages it can do without
        import cma

        # A generator of its own: by default cma reseeds NumPy's global one.
        return cma.CMAEvolutionStrategy(
            [0.0] * dimensions,
            sigma,
            {
                "popsize": population,
                "randn": np.random.RandomState(seed).randn,
                "seed": math.nan,
                "verbose": -9,
                "verb_log": 0,
            },
        )


def _read_state(path: Path, settings: Mapping[str, Any]) -> list[float]:
    if not path.exists():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version, saved, fitness = value["nps_search"], value["settings"], value["fitness"]
        known = [float(number) for number in fitness]
        if not isinstance(saved, dict):
            raise ValueError("settings")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise RecipeError(path, f"is not the state of a search ({error!r})") from error
    if version != _STATE_VERSION:
        raise RecipeError(path, f"is a search state of version {version}")
    for key in {*saved, *settings}:
        if saved.get(key) != settings.get(key):
            raise RecipeError(
                path,
                f"belongs to another search ({key} was {saved.get(key)!r}, is now "
                f"{settings.get(key)!r}); delete it to start anew",
            )
    return known


def _write_state(path: Path, settings: Mapping[str, Any], fitness: Sequence[float]) -> None:
    write_json(
        path,
        {"nps_search": _STATE_VERSION, "settings": settings, "fitness": list(fitness)},
        force=True,
    )
