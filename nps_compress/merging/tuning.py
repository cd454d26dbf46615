"""Tune a method's settings on development data: CMA-ES over factors, or Evolver's evolution."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nps_compress._progress import bar
from nps_compress.errors import InvalidArgumentError, SearchInterruptedError
from nps_compress.merging.contract import Exchange, Settings
from nps_compress.merging.merger import Merger, Plan
from nps_compress.merging.methods import Method
from nps_compress.merging.neuromerging import free_scale
from nps_compress.prune import COEFFICIENTS
from nps_compress.search import (
    GENERATIONS,
    Factors,
    Journal,
    Memory,
    Progress,
    check_search_options,
    population_size,
    search,
)

EVOLVER_ITERATIONS = 15  # of the authors' configurations
SCALE_GENERATIONS = 6  # for one number: four candidates each

# What settings are worth, higher is better.
Judge = Callable[[Plan], float]


@dataclass(frozen=True)
class TuningOptions:
    """How settings are tuned.

    ``generations``: of CMA-ES at most (where lambda is tuned before all else, of what follows), of
    Evolver the iterations; None: the default of each. ``population``: None for CMA-ES's default.

    Raises:
        InvalidArgumentError: an option is out of range.
    """

    generations: int | None = None
    population: int | None = None

    def __post_init__(self) -> None:
        if self.generations is not None or self.population is not None:
            check_search_options(
                1 if self.generations is None else self.generations, self.population
            )


@dataclass(frozen=True)
class Tuned:
    """The best settings found, their score and that of the settings the search began from."""

    settings: Settings
    start: float
    best: float
    evaluations: int


def tune(
    merger: Merger,
    method: Method,
    settings: Settings,
    judge: Judge,
    options: TuningOptions,
    state: Path | None,
    identity: Mapping[str, Any],
    progress: bool,
) -> tuple[Tuned, list[Path]]:
    """Search what the method's genes name, in stages: lambda alone first, then all together.

    state: where measurements are kept, one file a stage. -> and the files that there are.

    Raises:
        InvalidArgumentError: the method has nothing to tune.
        RecipeError, SearchInterruptedError: see search.search.
    """
    genes = method.genes
    if not genes:
        raise InvalidArgumentError("calibration", "given", "left out: nothing is tuned")
    if genes == ("exchanges",):
        states = [state] if state else []
        tuned = _evolve(merger, method, settings, judge, options, state, identity, progress)
        return tuned, states
    settings = _start(merger, method, settings)
    if "coefficients" not in genes:
        tuned = _search(merger, method, settings, genes, judge, options, state, identity, progress)
        return tuned, [state] if state else []
    first = state.with_name(f"{state.stem}.{genes[0]}.json") if state else None
    try:
        alone = TuningOptions(SCALE_GENERATIONS)
        begun = _search(
            merger, method, settings, genes[:1], judge, alone, first, identity, progress
        )
    except SearchInterruptedError as error:
        raise SearchInterruptedError(error.state, 0) from None
    tuned = _search(
        merger, method, begun.settings, genes, judge, options, state, identity, progress
    )
    evaluations = begun.evaluations + tuned.evaluations
    tuned = replace(tuned, start=begun.start, evaluations=evaluations)
    return tuned, [first, state] if first and state else []


def _start(merger: Merger, method: Method, settings: Settings) -> Settings:
    """Numbers that factors can multiply."""
    if "coefficients" in method.genes and not settings.coefficients:
        ones = (1.0,) * (len(settings.top_shares) + 1)
        settings = replace(settings, coefficients=(ones,) * len(merger.tasks))
    if settings.scale is None:
        settings = replace(settings, scale=free_scale(merger.plan(method, settings).totals))
    if "parallel" in method.genes and not settings.parallel:
        settings = replace(settings, parallel=1.0)
    return settings


def _express(settings: Settings, genes: Sequence[str], factors: Factors) -> Settings:
    """The settings that factors stand for; all 1: as they are."""
    rest = list(factors)
    for gene in genes:
        if gene == "coefficients":
            low, high = COEFFICIENTS
            rows = []
            for row in settings.coefficients:
                taken, rest = rest[: len(row)], rest[len(row) :]
                scaled = np.clip(np.multiply(row, taken), low, high)
                rows.append(tuple(scaled.tolist()))
            settings = replace(settings, coefficients=tuple(rows))
        else:
            scaled = getattr(settings, gene) * rest.pop(0)
            settings = replace(settings, **{gene: scaled})
    return settings


def _search(
    merger: Merger,
    method: Method,
    settings: Settings,
    genes: Sequence[str],
    judge: Judge,
    options: TuningOptions,
    state: Path | None,
    identity: Mapping[str, Any],
    progress: bool,
) -> Tuned:
    dimensions = sum(
        sum(map(len, settings.coefficients)) if gene == "coefficients" else 1 for gene in genes
    )
    generations = options.generations or GENERATIONS
    size = options.population or population_size(dimensions)

    def evaluate(generation: Sequence[Factors], memory: Memory) -> list[float]:
        return [
            _once(
                memory,
                str(number),
                lambda f=factors: judge(  # type: ignore[misc]
                    merger.plan(method, _express(settings, genes, f))
                ),
                advance,
            )
            for number, factors in enumerate(generation)
        ]

    what = f"tuning {' and '.join(genes)}"
    with bar(1 + generations * size, what, "merge", progress) as advance:

        def show(now: Progress) -> None:
            advance(f"generation {now.generation}/{generations}, best {now.best:.5g}", 0)

        result = search(
            evaluate,
            dimensions,
            generations,
            options.population,
            seed=settings.seed,
            state=state,
            identity={**identity, "genes": list(genes), "start": repr(settings)},
            on_generation=show,
        )
    evaluations = sum(map(len, result.history))
    found = _express(settings, genes, result.factors)
    return Tuned(found, result.start_fitness, result.fitness, evaluations)


def _once(
    memory: Memory, key: str, judge: Callable[[], float], advance: Callable[..., None]
) -> float:
    """A score, measured unless it is known."""
    known = memory.get(key)
    if known is None:
        known = judge()
        memory.put(key, known)
    advance()
    return float(known)


def _evolve(
    merger: Merger,
    method: Method,
    settings: Settings,
    judge: Judge,
    options: TuningOptions,
    state: Path | None,
    identity: Mapping[str, Any],
    progress: bool,
) -> Tuned:
    """Evolver in merger mode (arXiv 2406.12208): a child stays if the merge of all gains by it.

    The partner is any other member, the order of members is drawn anew each iteration.
    """
    count, rng = len(merger.tasks), random.Random(settings.seed)
    if count < 2:
        raise InvalidArgumentError("tasks", count, "two or more for evolver")
    iterations = options.generations or EVOLVER_ITERATIONS
    told = {**identity, "start": repr(settings)}
    journal = Journal(state, told)
    with bar(1 + iterations * count, "evolving", "merge", progress) as advance:

        def score(exchanges: tuple[Exchange, ...]) -> float:
            candidate = replace(settings, exchanges=exchanges)
            (found,) = journal.score(
                [candidate],
                lambda candidates, memory: [
                    _once(
                        memory, "score", lambda: judge(merger.plan(method, candidate)), lambda: None
                    )
                ],
            )
            advance(f"best {best:.5g}")
            return found

        best, kept = -math.inf, settings.exchanges
        try:
            best = start = score(kept)
            for _ in range(iterations):
                for member in rng.sample(range(count), count):
                    other = rng.choice([n for n in range(count) if n != member])
                    child = (*kept, Exchange(member, other, rng.randrange(2**32)))
                    found = score(child)
                    if found > best:
                        best, kept = found, child
        except KeyboardInterrupt:
            done = (len(journal.history) - 1) // count
            raise SearchInterruptedError(journal.interrupted().state, done) from None
    return Tuned(replace(settings, exchanges=kept), start, best, len(journal.history))
