"""The search as a whole job: candidates are pruned into a live model and scored there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nps_compress import __version__
from nps_compress._threads import bounded_map, workers
from nps_compress.checkpoint import Pair, content_digest
from nps_compress.dtypes import PRUNABLE, DType, Words, to_float32
from nps_compress.errors import CheckpointError
from nps_compress.prune import Selection, plan, prune, tensor_seed
from nps_compress.recipe import Recipe
from nps_compress.search import Progress, search
from nps_compress.task_vector import HISTOGRAM_BYTES, NEUTRAL, Float32, Histogram

if TYPE_CHECKING:
    import torch

    from nps_compress.fitness import Fitness

SLICE = 1 << 18  # elements handled at once: a few MB, which a core's cache holds


def histogram_of(
    base: Words,
    base_dtype: DType,
    finetuned: Words,
    finetuned_dtype: DType,
    importance: Float32 = NEUTRAL,
) -> Histogram | None:
    """Scores of one tensor's task vector; None where a difference is not finite."""
    histogram = Histogram.empty()
    for start in range(0, base.size, SLICE):
        part = slice(start, start + SLICE)
        before = to_float32(base[part], base_dtype)
        after = to_float32(finetuned[part], finetuned_dtype)
        if not histogram.add(before, after, _part(importance, part)):
            return None
    return histogram


def _part(importance: Float32, part: slice) -> Float32:
    return importance[part] if importance.size > 1 else importance


class Pruner:
    """Applies a recipe to the prunable tensors of a pair, one tensor at a time.

    Prunable are matched tensors of F16, BF16 or F32 on both sides whose differences are finite;
    all others are the business of exact storage. Thread-safe.
    """

    def __init__(
        self, pair: Pair, recipe: Recipe, importance: Mapping[str, Float32] | None = None
    ) -> None:
        self.pair, self.recipe = pair, recipe
        self._importance = importance or {}
        self._candidates = [
            name
            for name, base_name in pair.base_of.items()
            if pair.base.tensors[base_name].dtype.name in PRUNABLE
            and pair.finetuned.tensors[name].dtype.name in PRUNABLE
        ]
        self.histogram = Histogram.empty()
        self.names: list[str] = []

    def count(self, budget: int, on_tensor: Callable[[], None] = lambda: None) -> None:
        """Read the pair once: which tensors are prunable, and their magnitudes."""
        tensors = self.pair.finetuned.tensors

        def run(name: str) -> Histogram | None:
            return histogram_of(*self.load(name), self._importance.get(name, NEUTRAL))

        def cost(name: str) -> int:
            return 2 * tensors[name].nbytes + HISTOGRAM_BYTES

        results = bounded_map(run, self._candidates, cost, budget)
        for name, histogram in zip(self._candidates, results, strict=True):
            if histogram is not None:
                self.names.append(name)
                self.histogram.merge(histogram)
            on_tensor()

    def load(self, name: str) -> tuple[Words, DType, Words, DType]:
        """Base words and dtype, fine-tuned words and dtype of a tensor."""
        base_name = self.pair.base_of[name]
        base, finetuned = self.pair.base, self.pair.finetuned
        return (
            base.read(base_name),
            base.tensors[base_name].dtype,
            finetuned.read(name),
            finetuned.tensors[name].dtype,
        )

    def selection(self, coefficients: Sequence[float] | None = None) -> Selection | None:
        """The selection shared by all tensors; None where each is ranked by itself."""
        if self.recipe.scope == "tensor":
            return None
        return self._plan(self.histogram, coefficients)

    def prune(
        self,
        name: str,
        loaded: tuple[Words, DType, Words, DType],
        selection: Selection | None,
        coefficients: Sequence[float] | None = None,
    ) -> Words:
        """The pruned tensor in the base's dtype. -> [numel] words."""
        base, base_dtype, finetuned, finetuned_dtype = loaded
        importance = self._importance.get(name, NEUTRAL)
        if selection is None:
            histogram = histogram_of(*loaded, importance)
            assert histogram is not None  # count() lists finite tensors only
            selection = self._plan(histogram, coefficients)
        seed = tensor_seed(self.recipe.seed, name)
        out = np.empty_like(base)
        for start in range(0, base.size, SLICE):
            part = slice(start, start + SLICE)
            out[part] = prune(
                selection,
                base[part],
                base_dtype,
                finetuned[part],
                finetuned_dtype,
                seed,
                start,
                _part(importance, part),
            )
        return out

    def _plan(self, histogram: Histogram, coefficients: Sequence[float] | None) -> Selection:
        recipe = self.recipe
        return plan(
            histogram,
            recipe.prune,
            recipe.density,
            recipe.top_shares,
            coefficients or recipe.coefficients,
        )


class LiveModel:
    """A model in memory whose prunable weights are overwritten by one candidate after another."""

    def __init__(self, pruner: Pruner, model: torch.nn.Module) -> None:
        self._pruner = pruner
        parameters = model.state_dict()
        missing = [name for name in pruner.names if name not in parameters]
        if missing:
            raise CheckpointError(
                pruner.pair.finetuned.path,
                f"tensor {missing[0]!r} has no parameter of that name in {type(model).__name__}",
            )
        self._parameters = {name: parameters[name] for name in pruner.names}
        self._loaded = {name: pruner.load(name) for name in pruner.names}

    def apply(self, coefficients: Sequence[float] | None = None) -> None:
        """Overwrite the weights with what would be stored. None: the recipe's coefficients."""
        selection = self._pruner.selection(coefficients)
        self._overwrite(
            lambda name: self._pruner.prune(name, self._loaded[name], selection, coefficients)
        )

    def apply_base(self) -> None:
        """Overwrite the weights with the base's: what the model is without its task vector."""
        self._overwrite(lambda name: self._loaded[name][0])

    def _overwrite(self, words_of: Callable[[str], Words]) -> None:
        from nps_compress import torch_words

        def run(name: str) -> None:
            target = self._parameters[name]
            dtype, shape = self._loaded[name][1], tuple(target.shape)
            target.copy_(torch_words.from_numpy(words_of(name), dtype, shape))

        with ThreadPoolExecutor(workers()) as pool:
            list(pool.map(run, self._parameters))


def find_coefficients(
    pruner: Pruner,
    fitness: Fitness,
    generations: int,
    population: int | None,
    state: Path,
    data_digest: str,
    on_evaluation: Callable[[Progress], None],
) -> Recipe:
    """Search the coefficients of ``pruner.recipe``; returns it with the best ones found.

    Raises:
        SearchInterruptedError, RecipeError, InvalidArgumentError: see :func:`search.search`.
    """
    recipe = pruner.recipe
    live = LiveModel(pruner, fitness.model)

    def evaluate(coefficients: Sequence[float]) -> float:
        live.apply(coefficients)
        return fitness.score()

    finetuned_fitness = fitness.score()
    if not math.isfinite(finetuned_fitness):
        raise CheckpointError(
            pruner.pair.finetuned.path,
            f"has a {fitness.name} of {finetuned_fitness} on the calibration data",
        )
    identity = {
        "recipe": {**recipe.to_dict(), "top_shares": list(recipe.top_shares), "coefficients": None},
        "fitness": fitness.name,
        "base": content_digest(pruner.pair.base),
        "finetuned": content_digest(pruner.pair.finetuned),
        "calibration": data_digest,
    }
    result = search(
        evaluate,
        len(recipe.coefficients),
        generations,
        population,
        seed=recipe.seed,
        state=state,
        identity=identity,
        on_evaluation=on_evaluation,
    )
    return replace(
        recipe,
        coefficients=result.coefficients,
        search={
            "tool": f"nps-compress {__version__}",
            "fitness": fitness.name,
            "finetuned": finetuned_fitness,
            "start": _finite(result.start_fitness),
            "best": _finite(result.fitness),
            "evaluations": sum(map(len, result.history)),
            "generations": len(result.history) - 1,
            "calibration_sha256": data_digest,
            "best_by_generation": _running_best(result.history),
        },
    )


def _running_best(history: Sequence[Sequence[float]]) -> list[float | None]:
    best = np.maximum.accumulate([max(generation) for generation in history])
    return [_finite(float(value)) for value in best]


def _finite(value: float) -> float | None:
    """The value, or None (JSON's null) for a candidate that broke the model."""
    return value if math.isfinite(value) else None
