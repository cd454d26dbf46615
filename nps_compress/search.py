"""CMA-ES over positive factors, of which all start at 1 (NPS, arXiv 2505.18713, section 3.2).

Knows no model: it maximises what it is given, a generation at a time. The paper leaves sigma,
bounds and population open; here factors are searched as exp(x) from x = 0, so that they stay
positive.
"""

from __future__ import annotations

import hashlib
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
GENERATIONS = 12
# A search that gains less than a hundredth of all it has gained, for so long, has ended.
PATIENCE, _GAIN = 6, 0.01
_STATE_VERSION = 2

Factors = tuple[float, ...]


class Memory:
    """What is known of the generation in work, as JSON values; it survives an interruption.

    ``kept``: by the generations before.
    """

    def __init__(
        self, known: dict[str, Any], kept: Mapping[str, Any], save: Callable[[], None]
    ) -> None:
        self._known, self.kept, self._save = known, kept, save
        self.later: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """What was put there before; None where nothing was."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Remember a JSON value in this generation."""
        self._known[key] = value
        self._save()

    def keep(self, key: str, value: Any) -> None:
        """Remember a JSON value for good, from the end of this generation on."""
        self.later[key] = value


# Scores of a generation's candidates, in their order.
Evaluate = Callable[[Sequence[Any], Memory], Sequence[float]]


class Journal:
    """What a search has measured, a generation at a time; with ``state`` in a file as well.

    A file of the same ``settings`` is taken up again: the generations that it holds are answered
    from it, and what was put into the memory of the next one is there.

    Raises:
        RecipeError: the file belongs to another search or is not readable.
    """

    def __init__(self, state: Path | None, settings: Mapping[str, Any]) -> None:
        self.history: list[list[float]] = []
        self._state, self._settings = state, settings
        self._known, self._begun, self.kept = (
            _read_state(state, settings) if state else ([], {}, {})
        )

    def score(self, candidates: Sequence[Any], evaluate: Evaluate) -> list[float]:
        """The scores of the next generation; minus infinity where one is not a number."""
        if len(self.history) < len(self._known):
            found = self._known[len(self.history)]
        else:
            memory = Memory(self._begun, self.kept, self._save)
            found = [float(fitness) for fitness in evaluate(candidates, memory)]
            found = [-math.inf if math.isnan(fitness) else fitness for fitness in found]
            self.kept.update(memory.later)
        self.history.append(found)
        if len(self.history) > len(self._known):
            self._begun.clear()
            self._save()
        return found

    def interrupted(self) -> SearchInterruptedError:
        """The error for Ctrl-C; everything measured so far is in the file."""
        anything = self._state and (self.history or self._begun)
        return SearchInterruptedError(self._state if anything else None, len(self.history) - 1)

    def _save(self) -> None:
        if self._state:
            done = {
                "settings": self._settings,
                "fitness": self.history,
                "begun": self._begun,
                "kept": self.kept,
            }
            told = {"nps_search": _STATE_VERSION, "sha256": _digest(done)}
            write_json(self._state, told | done, force=True)


@dataclass(frozen=True)
class Progress:
    """Where a search stands after one generation; generation 0 is all factors at 1."""

    generation: int
    evaluations: int
    best: float


@dataclass(frozen=True)
class SearchResult:
    """The best candidate and the way to it. ``history`` holds one list of fitness a generation.

    ``kept``: what ``evaluate`` kept for good.
    """

    factors: Factors
    fitness: float
    start_fitness: float
    history: list[list[float]]
    kept: dict[str, Any]


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
    evaluate: Evaluate,
    dimensions: int,
    generations: int = GENERATIONS,
    population: int | None = None,
    sigma: float = SIGMA,
    seed: int = 0,
    patience: int = PATIENCE,
    state: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    on_generation: Callable[[Progress], None] = lambda _: None,
) -> SearchResult:
    """Maximise ``evaluate`` over ``dimensions`` positive factors.

    With ``state``, every generation's fitness is saved there, and what ``evaluate`` puts into its
    memory. A state of the same ``identity`` is taken up again: its fitnesses are replayed to the
    same optimiser, so a resumed search equals an uninterrupted one. The state stays when the
    search ends; fewer ``generations`` than it holds are answered from it. ``patience``: generations
    without a gain to speak of after which it ends.

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
    journal = Journal(state, settings)
    strategy = _strategy(dimensions, population, sigma, seed)
    best: tuple[float, Factors] = (-math.inf, ())

    def score(xs: Sequence[Sequence[float]]) -> list[float]:
        nonlocal best
        candidates = [tuple(math.exp(value) for value in x) for x in xs]
        found, history = journal.score(candidates, evaluate), journal.history
        for fitness, candidate in zip(found, candidates, strict=True):
            if fitness > best[0] or not best[1]:
                best = (fitness, candidate)
        on_generation(Progress(len(history) - 1, sum(map(len, history)), best[0]))
        return found

    try:
        score([[0.0] * dimensions])
        for _ in range(generations):
            xs = strategy.ask()
            strategy.tell(xs, [_cost(fitness) for fitness in score(xs)])
            if strategy.stop() or _stands_still(journal.history, patience):
                break
    except KeyboardInterrupt:
        raise journal.interrupted() from None
    history = journal.history
    return SearchResult(best[1], best[0], history[0][0], history, journal.kept)


def _stands_still(history: Sequence[Sequence[float]], patience: int) -> bool:
    """Whether the last generations gained next to nothing."""
    best = [score for score in map(max, history) if math.isfinite(score)]
    if len(best) <= patience + 1:
        return False
    before, now = max(best[:-patience]), max(best)
    return now - before <= _GAIN * (now - best[0])


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


def _read_state(
    path: Path, settings: Mapping[str, Any]
) -> tuple[list[list[float]], dict[str, Any], dict[str, Any]]:
    """The fitness of finished generations, what is known of the one after, and kept for good."""
    if not path.exists():
        return [], {}, {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version, digest = value.pop("nps_search"), value.pop("sha256", None)
        if version == _STATE_VERSION and digest != _digest(value):
            raise ValueError("its digest does not match")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(path, f"is not the state of a search ({error!r})") from error
    if version != _STATE_VERSION:
        raise RecipeError(path, f"is a search state of version {version!r}")
    saved = value["settings"]
    for key in {**settings, **saved}:
        if saved.get(key) != settings.get(key):
            raise RecipeError(
                path,
                f"belongs to another search ({key} was {saved.get(key)!r}, is now "
                f"{settings.get(key)!r}); delete it to start anew",
            )
    return value["fitness"], value["begun"], value["kept"]


def _digest(state: Mapping[str, Any]) -> str:
    """So that what is taken up again is what was saved."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
