"""The search as a job on files: a pair and calibration data in, a recipe out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nps_compress._progress import bar
from nps_compress._threads import MEMORY_SLACK
from nps_compress.atomic import refuse_existing, refuse_input_as_output
from nps_compress.candidates import Pruner, find_coefficients
from nps_compress.checkpoint import Pair, open_checkpoint, pair
from nps_compress.errors import InvalidArgumentError
from nps_compress.recipe import Recipe
from nps_compress.search import Progress, check_search_options, population_size

if TYPE_CHECKING:
    from nps_compress.retain import Quality


def search_recipe(
    base: str | Path,
    finetuned: str | Path,
    calibration: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    fitness: str | None = None,
    generations: int = 30,
    population: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> Recipe:
    """Search the coefficients of ``recipe`` and save the result at ``out``.

    ``fitness``: None for ``kl``, or ``embedding`` where the model predicts no classes. The state
    is kept beside ``out`` while the search runs; the same call resumes it.

    Raises:
        OutputExistsError, CheckpointError, CalibrationError, FitnessError, InvalidArgumentError,
        RecipeError, SearchInterruptedError, WriteError.
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
        from nps_compress.calibration import read_examples
        from nps_compress.importance import fisher

        examples = read_examples(Path(calibration))
        with bar(len(examples), "measuring importance", "example", progress) as advance:
            importance = fisher(pair_.finetuned.path, examples, recipe.seed, advance, calibration)
    pruner = Pruner(pair_, recipe, importance)
    with bar(len(pair_.base_of), "reading", "tensor", progress) as advance:
        pruner.count(memory_budget(pair_), advance)
    return pruner


class RetainJob:
    """A share of quality that is asked for: its data is read before anything slow begins."""

    def __init__(self, calibration: Path, metric: str | None, share: float) -> None:
        from nps_compress.calibration import read_examples
        from nps_compress.retain import check_retain

        check_retain(share, metric)
        self.examples = read_examples(calibration)
        self.calibration, self.metric, self.share = calibration, metric, share

    def run(self, pruner: Pruner, progress: bool) -> tuple[Quality, dict[str, str]]:
        """Set the pruner's density; returns what it keeps, and the same as metadata."""
        from nps_compress.calibration import data_digest
        from nps_compress.fitness import Fitness, natural_metric
        from nps_compress.retain import find_density

        folder = pruner.pair.finetuned.path
        metric = self.metric or natural_metric(folder, self.examples)
        fitness = Fitness(folder, self.examples, metric, source=self.calibration)
        with bar(None, "trying densities", "trial", progress) as advance:
            quality = find_density(
                pruner,
                fitness,
                self.share,
                lambda trial: advance(f"density {trial.density:.3g} keeps {trial.retained:.2%}"),
            )
        digest = {"quality_data_sha256": data_digest(self.examples)}
        return quality, quality.to_metadata() | digest


class SearchJob:
    """A search that is asked for: its data is read before anything slow begins."""

    def __init__(
        self,
        calibration: Path,
        fitness: str | None,
        generations: int,
        population: int | None,
        out: Path,
    ) -> None:
        from nps_compress.calibration import read_examples
        from nps_compress.fitness import check_fitness

        check_search_options(generations, population)
        self.examples = read_examples(calibration)
        self.fitness = None if fitness is None else check_fitness(fitness)
        self.calibration = calibration
        self.state = out.with_name(out.name + ".search.json")  # kept while the search runs
        self.generations, self.population = generations, population

    def run(self, pruner: Pruner, progress: bool) -> Recipe:
        """The pruner's recipe with the best coefficients found."""
        from nps_compress.calibration import data_digest
        from nps_compress.fitness import Fitness, label_free_fitness

        folder = pruner.pair.finetuned.path
        name = self.fitness or label_free_fitness(folder, self.examples)
        fitness = Fitness(folder, self.examples, name, source=self.calibration)
        size = self.population
        if size is None:
            size = population_size(len(pruner.recipe.coefficients))
        total = 1 + self.generations * size
        with bar(total, "searching", "candidate", progress) as advance:

            def show(now: Progress) -> None:
                at = f"generation {now.generation}/{self.generations}"
                advance(f"{at}, best {name} {now.best:.5g}")

            return find_coefficients(
                pruner,
                fitness,
                self.generations,
                self.population,
                self.state,
                data_digest(self.examples),
                show,
            )


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
