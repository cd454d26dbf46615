"""The search as a job on files: a pair and calibration data in, a recipe out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nps_compress import __version__
from nps_compress._progress import bar
from nps_compress._threads import MEMORY_SLACK
from nps_compress.atomic import refuse_existing, refuse_input_as_output
from nps_compress.candidates import Pruner
from nps_compress.checkpoint import Pair, content_digest, open_checkpoint, pair
from nps_compress.errors import CheckpointError, InvalidArgumentError
from nps_compress.genotype import Genes, Genotype, check_genes
from nps_compress.prune import Cuts, Rule, top_shares
from nps_compress.recipe import Recipe
from nps_compress.report import Quality, Trial, task_of
from nps_compress.search import (
    GENERATIONS,
    Factors,
    Memory,
    Progress,
    check_search_options,
    population_size,
    search,
)

if TYPE_CHECKING:
    from nps_compress.calibration import Example
    from nps_compress.evaluator import Evaluator

MAX_DRAWS, MAX_WORKERS = 1000, 64


@dataclass(frozen=True)
class SearchOptions:
    """How a recipe's factors are searched.

    ``genes``: which of them (see genotype.py). ``cuts``: of the subspaces where a share of quality
    is asked for and the density changes; else the recipe says. ``fitness``: None for ``kl``, or
    ``embedding`` where the model predicts no classes. ``generations`` 0: nothing is searched.
    ``population``: None for CMA-ES's default. ``draws``: seeds of which the best is taken before
    the factors are searched. ``workers``: candidates in work at once, None for one a GPU, or one on
    the CPU.

    Raises:
        InvalidArgumentError: an option is out of range or unknown.
    """

    genes: tuple[str, ...] = ("subspaces",)
    cuts: Cuts = "tail"
    fitness: str | None = None
    generations: int = GENERATIONS
    population: int | None = None
    draws: int = 1
    workers: int | None = None

    def __post_init__(self) -> None:
        check_genes(self.genes)
        if self.generations:
            check_search_options(self.generations, self.population)
        if not 1 <= self.draws <= MAX_DRAWS:
            raise InvalidArgumentError("draws", self.draws, f"from 1 to {MAX_DRAWS}")
        if self.workers is not None and not 1 <= self.workers <= MAX_WORKERS:
            raise InvalidArgumentError("workers", self.workers, f"from 1 to {MAX_WORKERS}")


def search_recipe(
    base: str | Path,
    finetuned: str | Path,
    calibration: str | Path,
    out: str | Path,
    recipe: Recipe,
    options: SearchOptions | None = None,
    *,
    force: bool = False,
    progress: bool = False,
) -> Recipe:
    """Search the factors of ``recipe`` and save the result at ``out``.

    The state is kept beside ``out`` while the search runs; the same call resumes it.

    Raises:
        OutputExistsError, CheckpointError, CalibrationError, FitnessError, InvalidArgumentError,
        RecipeError, SearchInterruptedError, WriteError.
    """
    out = Path(out)
    refuse_existing(out, force)
    options = options or SearchOptions()
    check_genes(options.genes, (recipe.prune,))
    job = SearchJob(Path(calibration), options, out)
    pair_ = pair(open_checkpoint(base), open_checkpoint(finetuned))
    refuse_input_as_output(out, input_files(pair_, calibration))
    pruner = counted(pair_, recipe, job.examples, calibration, progress)
    job.run(pruner, progress)
    pruner.recipe.write(out, force)
    delete(job.states)
    return pruner.recipe


def counted(
    pair_: Pair,
    recipe: Recipe,
    examples: Sequence[Example] | None,
    source: str | Path | None,
    progress: bool,
    rules: Sequence[Rule] = (),
) -> Pruner:
    """A pruner that has read the pair once, and measured the recipe's importance.

    source: where the examples are from; rules: as Pruner.count.

    Raises:
        InvalidArgumentError: the importance needs calibration data.
    """
    importance = None
    if recipe.importance != "magnitude":
        if examples is None:
            what = "used with calibration data"
            raise InvalidArgumentError("importance", recipe.importance, what)
        from nps_compress.importance import measure_importance

        with bar(len(examples), "measuring importance", "example", progress) as advance:
            importance = measure_importance(
                recipe.importance,
                pair_.finetuned.path,
                examples,
                on_example=advance,
                source=source or "calibration data",
            )
    pruner = Pruner(pair_, recipe, importance)
    with bar(len(pair_.base_of), "reading", "tensor", progress) as advance:
        pruner.count(memory_budget(pair_), advance, rules)
    return pruner


class SearchJob:
    """A search that is asked for: its data is read before anything slow begins.

    ``states``: files that are kept until the search has ended, and may then be deleted.
    """

    def __init__(self, calibration: Path, options: SearchOptions, out: Path) -> None:
        from nps_compress.calibration import read_examples
        from nps_compress.fitness import check_fitness

        if options.fitness is not None:
            check_fitness(options.fitness)
        self.examples = read_examples(calibration)
        self.states: list[Path] = []
        self._calibration, self._options, self._out = calibration, options, out

    def run(self, pruner: Pruner, progress: bool) -> Quality:
        """Set the pruner's recipe to the best that is found; returns what it keeps.

        Raises:
            SearchInterruptedError, RecipeError: see search.search.
        """
        evaluator = self._evaluator(pruner)
        self._search(pruner, evaluator, "", progress)
        quality = evaluator.yardstick.report(
            evaluator.measure(pruner.recipe),
            density=pruner.recipe.density,
            seed=pruner.recipe.seed,
            evaluations=pruner.recipe.search["evaluations"],
        )
        return self._bound(quality, pruner)

    def _evaluator(self, pruner: Pruner) -> Evaluator:
        from nps_compress.evaluator import Evaluator
        from nps_compress.fitness import label_free_fitness

        options, folder = self._options, pruner.pair.finetuned.path
        metric = options.fitness or label_free_fitness(folder, self.examples)
        return Evaluator(pruner, self.examples, metric, self._calibration, options.workers)

    def _search(self, pruner: Pruner, evaluator: Evaluator, name: str, progress: bool) -> None:
        """Set the pruner's recipe to the best that is found from it. name: of the state."""
        from nps_compress.calibration import data_digest

        options, metric = self._options, evaluator.yardstick.metric
        finetuned = evaluator.yardstick.finetuned.score
        if not math.isfinite(finetuned):
            what = f"has a {metric} of {finetuned} on the calibration data"
            raise CheckpointError(pruner.pair.finetuned.path, what)
        genes = check_genes(options.genes)
        hunt = _Hunt(pruner, evaluator, genes, options.draws)
        dimensions = len(hunt.genotype.names)
        size = options.population or population_size(dimensions)
        total = options.draws + options.generations * size
        identity = {
            "recipe": _as_json(pruner.recipe),
            "fitness": metric,
            "genes": list(genes),
            "draws": options.draws,
            "base": content_digest(pruner.pair.base),
            "finetuned": content_digest(pruner.pair.finetuned),
            "calibration": data_digest(self.examples),
        }
        state = self._out.with_name(f"{self._out.name}{name}.search.json")
        self.states.append(state)
        what = f"searching at density {pruner.recipe.density:.3g}"
        with bar(total, what, "candidate", progress) as advance:
            hunt.on_share = lambda share: advance(steps=share)

            def show(now: Progress) -> None:
                missed = now.evaluations + options.draws - 1 - hunt.taken  # dropped, or known
                at = f"generation {now.generation}/{options.generations}"
                advance(f"{at}, best {metric} {now.best:.5g}", missed)
                hunt.taken += missed

            result = search(
                hunt,
                dimensions,
                options.generations,
                options.population,
                seed=pruner.recipe.seed,
                state=state,
                identity=identity,
                on_generation=show,
            )
        found = {
            "tool": f"nps-compress {__version__}",
            "fitness": metric,
            "finetuned": finetuned,
            "start": _finite(result.start_fitness),
            "best": _finite(result.fitness),
            "evaluations": sum(map(len, result.history)) + options.draws - 1,
            "cost": round(result.kept["cost"], 3),
            "generations": len(result.history) - 1,
            "population": size,
            "genes": dict(zip(hunt.genotype.names, result.factors, strict=True)),
            "calibration_sha256": data_digest(self.examples),
            "best_by_generation": _running_best(result.history),
        }
        best = hunt.genotype.express(result.factors)
        pruner.recipe = replace(best, seed=result.kept["seed"], search=found)

    def _bound(self, quality: Quality, pruner: Pruner) -> Quality:
        """The report with what ties it to the model and the data."""
        from nps_compress.calibration import data_digest

        digest = data_digest(self.examples)
        return replace(quality, task=task_of(pruner.pair.finetuned), data_sha256=digest)


class RetainJob(SearchJob):
    """A share of quality that is asked for.

    ``rules``: those that are tried. ``options.fitness`` is what a share is kept of, None for what
    people judge such a model by; searches maximise what needs no labels.
    """

    def __init__(
        self,
        calibration: Path,
        options: SearchOptions,
        out: Path,
        share: float,
        rules: Sequence[Rule],
    ) -> None:
        from nps_compress.retain import check_retain

        check_retain(share)
        super().__init__(calibration, options, out)
        self._metric, self._share, self._rules = options.fitness, share, rules
        self._options = replace(options, fitness=None)

    def run(self, pruner: Pruner, progress: bool) -> Quality:
        """Set the pruner's recipe to the smallest that keeps the share; returns what it keeps.

        First the least density without a search, by the best of the rules; then, density by
        density, what a search can still reach below it.
        """
        from nps_compress.evaluator import Evaluator
        from nps_compress.fitness import natural_metric
        from nps_compress.retain import SMALLEST_DENSITY, STEP, find_recipe

        metric = self._metric or natural_metric(pruner.pair.finetuned.path, self.examples)
        evaluator = Evaluator(pruner, self.examples, metric, self._calibration, workers=1)
        wanted = pruner.recipe
        with bar(None, "trying densities", "trial", progress) as advance:
            recipe, quality = find_recipe(
                evaluator.measure,
                evaluator.yardstick,
                replace(wanted, top_shares=(), coefficients=(1.0,)),
                self._rules,
                self._share,
                lambda t: advance(f"{t.how} at density {t.density:.3g} keeps {t.retained:.2%}"),
                pruner.expected_bits,
            )
        searcher = self._evaluator(pruner) if self._options.generations else None
        while searcher and recipe.density / STEP >= SMALLEST_DENSITY:
            density = recipe.density / STEP
            pruner.recipe = replace(
                recipe,
                density=density,
                top_shares=top_shares(len(wanted.coefficients), density, self._options.cuts),
                coefficients=recipe.coefficients if recipe.search else wanted.coefficients,
            )
            self._search(pruner, searcher, f".{density:.6g}", progress)
            found = evaluator.measure(pruner.recipe)
            trial = Trial(density, evaluator.yardstick.share(found), recipe.prune, recipe.values)
            quality = replace(
                quality,
                trials=(*quality.trials, trial),
                evaluations=(quality.evaluations or 0) + pruner.recipe.search["evaluations"],
            )
            if trial.retained < self._share:
                break
            recipe = pruner.recipe
            told = {name: getattr(quality, name) for name in ("target", "trials", "evaluations")}
            quality = evaluator.yardstick.report(found, density=density, seed=recipe.seed, **told)
        pruner.recipe = recipe
        return self._bound(quality, pruner)


class _Hunt:
    """Scores generations: the first by the draws of several seeds, of which the best is kept.

    ``taken``: evaluations done in this run. What all took is kept as ``cost``: 1 is a pass over
    all calibration data.
    """

    def __init__(
        self, pruner: Pruner, evaluator: Evaluator, genes: Sequence[Genes], draws: int
    ) -> None:
        self._evaluator, self._recipe, self._draws = evaluator, pruner.recipe, draws
        self.genotype = Genotype(pruner.recipe, genes, pruner.pruned_groups())
        self.on_share: Callable[[float], None] = lambda _: None
        self.taken = 0.0

    def __call__(self, generation: Sequence[Factors], memory: Memory) -> list[float]:
        recipes = [self.genotype.express(factors) for factors in generation]
        if "seed" in memory.kept:
            return self._race([replace(r, seed=memory.kept["seed"]) for r in recipes], memory)
        first = self._recipe.seed
        draws = [replace(recipes[0], seed=(first + n) % 2**32) for n in range(self._draws)]
        scores = self._race(draws, memory)
        best = int(np.argmax([-math.inf if math.isnan(score) else score for score in scores]))
        memory.keep("seed", draws[best].seed)
        return [scores[best]]

    def _race(self, recipes: Sequence[Recipe], memory: Memory) -> list[float]:
        outcomes = self._evaluator.race(recipes, memory, self._advance)
        shares = sum(outcome.share for outcome in outcomes)
        memory.keep("cost", memory.kept.get("cost", 0.0) + shares)
        return [outcome.score for outcome in outcomes]

    def _advance(self, share: float) -> None:
        self.taken += share
        self.on_share(share)


def _as_json(recipe: Recipe) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(recipe.to_dict()))
    return value


def _running_best(history: Sequence[Sequence[float]]) -> list[float | None]:
    best = np.maximum.accumulate([max(generation) for generation in history])
    return [_finite(float(value)) for value in best]


def _finite(value: float) -> float | None:
    """The value, or None (JSON's null) for a candidate that broke the model."""
    return value if math.isfinite(value) else None


def delete(states: Sequence[Path]) -> None:
    """Remove the states of searches whose results are written."""
    for state in states:
        state.unlink(missing_ok=True)


def memory_budget(pair_: Pair) -> int:
    """Bytes that tensors in work may take: three of the largest, and room for small ones."""
    largest = max(tensor.nbytes for tensor in pair_.finetuned.tensors.values())
    return 3 * largest + MEMORY_SLACK


def input_files(pair_: Pair, calibration: str | Path | None) -> Iterator[Path]:
    """Every file that is read: none of them may be the output."""
    for checkpoint in (pair_.base, pair_.finetuned):
        yield from {tensor.file for tensor in checkpoint.tensors.values()}
        yield from checkpoint.side_files.values()
    if calibration is not None:
        yield Path(calibration)
        yield from Path(calibration).rglob("*")  # of a folder of images
