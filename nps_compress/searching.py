"""The search as a job on files: a pair and calibration data in, a recipe out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nps_compress._progress import bar
from nps_compress._threads import MEMORY_SLACK
from nps_compress.atomic import refuse_existing, refuse_input_as_output
from nps_compress.candidates import LiveModel, Pruner, find_coefficients
from nps_compress.checkpoint import Pair, open_checkpoint, pair
from nps_compress.errors import InvalidArgumentError
from nps_compress.recipe import Recipe
from nps_compress.report import Quality, task_of
from nps_compress.search import Progress, check_search_options, population_size

if TYPE_CHECKING:
    from nps_compress.fitness import Fitness, Row


def search_recipe(
    base: str | Path,
    finetuned: str | Path,
    calibration: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    fitness: str = "kl",
    generations: int = 30,
    population: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> Recipe:
    """Search the coefficients of ``recipe`` and save the result at ``out``.

    The state is kept beside ``out`` while the search runs; the same call resumes it.

    Raises:
        OutputExistsError, CheckpointError, CalibrationError, InvalidArgumentError, RecipeError,
        SearchInterruptedError, WriteError.
    """
    out = Path(out)
    refuse_existing(out, force)
    search = SearchJob(Path(calibration), fitness, generations, population, out)
    pair_ = pair(open_checkpoint(base), open_checkpoint(finetuned))
    refuse_input_as_output(out, input_files(pair_, calibration))
    found = search.run(counted(pair_, recipe, calibration, progress), progress)
    found.write(out, force)
    search.state.unlink(missing_ok=True)
    return found


def counted(pair_: Pair, recipe: Recipe, calibration: str | Path | None, progress: bool) -> Pruner:
    """A pruner that has read the pair once, and measured the recipe's importance.

    Raises:
        InvalidArgumentError: the importance needs calibration data.
    """
    importance = None
    if recipe.importance == "fisher":
        if calibration is None:
            raise InvalidArgumentError("importance", "fisher", "used with calibration data")
        from nps_compress.fitness import read_jsonl
        from nps_compress.importance import fisher

        rows = read_jsonl(Path(calibration))
        with bar(len(rows), "measuring importance", "example", progress) as advance:
            importance = fisher(pair_.finetuned.path, rows, recipe.seed, advance)
    pruner = Pruner(pair_, recipe, importance)
    with bar(len(pair_.base_of), "reading", "tensor", progress) as advance:
        pruner.count(memory_budget(pair_), advance)
    return pruner


class RetainJob:
    """A share of quality that is asked for: its data is read before anything slow begins."""

    def __init__(self, calibration: Path, metric: str | None, share: float) -> None:
        from nps_compress.fitness import read_jsonl
        from nps_compress.retain import METRICS, check_retain

        check_retain(share, metric or METRICS[0])
        self.rows = read_jsonl(calibration)
        self.calibration, self.metric, self.share = calibration, metric, share

    def run(self, pruner: Pruner, progress: bool) -> Quality:
        """Set the pruner's density; returns what it keeps."""
        from nps_compress.fitness import Fitness, natural_metric
        from nps_compress.retain import find_density

        folder = pruner.pair.finetuned.path
        metric = self.metric or natural_metric(folder, self.rows)
        fitness = Fitness(folder, self.rows, metric, source=self.calibration)
        with bar(None, "trying densities", "trial", progress) as advance:
            quality = find_density(
                pruner,
                fitness,
                self.share,
                lambda trial: advance(f"density {trial.density:.3g} keeps {trial.retained:.2%}"),
            )
        return _bound(quality, pruner, self.rows)


class SearchJob:
    """A search that is asked for: its data is read before anything slow begins."""

    def __init__(
        self,
        calibration: Path,
        fitness: str,
        generations: int,
        population: int | None,
        out: Path,
    ) -> None:
        from nps_compress.fitness import check_fitness, read_jsonl

        check_search_options(generations, population)

        self.rows = read_jsonl(calibration)
        self.fitness = check_fitness(fitness)
        self.calibration = calibration
        self.state = out.with_name(out.name + ".search.json")  # kept while the search runs
        self.generations, self.population = generations, population

    def run(self, pruner: Pruner, progress: bool) -> Recipe:
        """The pruner's recipe with the best coefficients found."""
        return self._search(pruner, self._load(pruner), progress)

    def run_and_report(self, pruner: Pruner, progress: bool) -> Quality:
        """Set the pruner's recipe to the best found; returns what it keeps."""
        from nps_compress.retain import report_quality

        fitness = self._load(pruner)
        finetuned = fitness.measure()  # while the model is the fine-tune
        pruner.recipe = self._search(pruner, fitness, progress)
        live = LiveModel(pruner, fitness.model)
        live.apply_base()
        base = fitness.measure()
        live.apply()
        quality = report_quality(
            fitness.name,
            base,
            finetuned,
            fitness.measure(),
            density=pruner.recipe.density,
            seed=pruner.recipe.seed,
            evaluations=pruner.recipe.search["evaluations"],
        )
        return _bound(quality, pruner, self.rows)

    def _load(self, pruner: Pruner) -> Fitness:
        from nps_compress.fitness import Fitness

        folder = pruner.pair.finetuned.path
        return Fitness(folder, self.rows, self.fitness, source=self.calibration)

    def _search(self, pruner: Pruner, fitness: Fitness, progress: bool) -> Recipe:
        from nps_compress.fitness import data_digest

        size = self.population
        if size is None:
            size = population_size(len(pruner.recipe.coefficients))
        total = 1 + self.generations * size
        with bar(total, "searching", "candidate", progress) as advance:

            def show(now: Progress) -> None:
                at = f"generation {now.generation}/{self.generations}"
                advance(f"{at}, best {self.fitness} {now.best:.5g}")

            return find_coefficients(
                pruner,
                fitness,
                self.generations,
                self.population,
                self.state,
                data_digest(self.rows),
                show,
            )


def _bound(quality: Quality, pruner: Pruner, rows: Sequence[Row]) -> Quality:
    """The report with what ties it to the model and the data."""
    from nps_compress.fitness import data_digest

    return replace(quality, task=task_of(pruner.pair.finetuned), data_sha256=data_digest(rows))


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
