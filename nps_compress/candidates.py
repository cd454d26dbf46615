"""What a recipe makes of a pair of checkpoints, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nps_compress._threads import bounded_map
from nps_compress.checkpoint import Pair
from nps_compress.dtypes import PRUNABLE, DType, Words, to_float32
from nps_compress.groups import GROUPS, Group, group_of
from nps_compress.prune import Selection, plan, prune, tensor_seed
from nps_compress.recipe import Recipe
from nps_compress.task_vector import HISTOGRAM_BYTES, NEUTRAL, Float32, Histogram, Ranking

SLICE = 1 << 18  # elements handled at once: a few MB, which a core's cache holds
# Small tensors are kept exactly where that costs no more than this share of the file.
_EXACT_SHARE, _BITS_PER_KEPT = 0.01, 16

Loaded = tuple[Words, DType, Words, DType]  # base and fine-tuned words, each with its dtype


def histogram_of(loaded: Loaded, importance: Float32 = NEUTRAL) -> Histogram | None:
    """Scores of one tensor's task vector; None where a difference is not finite."""
    base, base_dtype, finetuned, finetuned_dtype = loaded
    histogram = Histogram.empty()
    for part in slices(base.size):
        before = to_float32(base[part], base_dtype)
        after = to_float32(finetuned[part], finetuned_dtype)
        if not histogram.add(before, after, part_of(importance, part)):
            return None
    return histogram


def slices(size: int) -> list[slice]:
    """The parts in which so many elements are handled."""
    return [slice(start, min(start + SLICE, size)) for start in range(0, size, SLICE)]


def part_of(importance: Float32, part: slice) -> Float32:
    """The importance of some elements of a tensor; [1] stays [1]."""
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
        self.histograms: dict[Group, Histogram] = {}
        self.names: list[str] = []
        self._small_bytes = 0
        self._known: tuple[tuple[Group, ...], Ranking] | None = None

    def count(self, budget: int, on_tensor: Callable[[], None] = lambda: None) -> None:
        """Read the pair once: which tensors are prunable, and their scores by group."""
        tensors = self.pair.finetuned.tensors

        def run(name: str) -> Histogram | None:
            return histogram_of(self.load(name), self.importance(name))

        def cost(name: str) -> int:
            return 2 * tensors[name].nbytes + HISTOGRAM_BYTES

        found: dict[Group, Histogram] = {}
        results = bounded_map(run, self._candidates, cost, budget)
        for name, histogram in zip(self._candidates, results, strict=True):
            if histogram is not None:
                self.names.append(name)
                found.setdefault(self.group(name), Histogram.empty()).merge(histogram)
            on_tensor()
        self.histograms = {group: found[group] for group in GROUPS if group in found}
        small = (tensors[name].nbytes for name in self.names if self.group(name) == "small")
        self._small_bytes = sum(small)

    def group(self, name: str) -> Group:
        """The group of a tensor."""
        return group_of(name, self.pair.finetuned.tensors[name].shape)

    def importance(self, name: str) -> Float32:
        """The importance of a tensor's elements. -> [numel], or [1] for all."""
        return self._importance.get(name, NEUTRAL)

    def load(self, name: str) -> Loaded:
        """A tensor of base and fine-tune."""
        base_name = self.pair.base_of[name]
        base, finetuned = self.pair.base, self.pair.finetuned
        return (
            base.read(base_name),
            base.tensors[base_name].dtype,
            finetuned.read(name),
            finetuned.tensors[name].dtype,
        )

    def pruned_groups(self, recipe: Recipe | None = None) -> list[Group]:
        """The groups that are pruned; others are kept exactly.

        Small tensors are exact where their bytes are at most a hundredth of the file's, taking
        two bytes for each element that is kept of the others.
        """
        recipe = recipe or self.recipe
        others: list[Group] = [group for group in self.histograms if group != "small"]
        numel = sum(self.histograms[group].numel for group in others)
        if 8 * self._small_bytes <= _EXACT_SHARE * _BITS_PER_KEPT * recipe.density * numel:
            return others
        return list(self.histograms)

    def selection(self, recipe: Recipe | None = None) -> Selection | None:
        """The selection shared by all tensors; None where each is ranked by itself."""
        recipe = recipe or self.recipe
        if recipe.scope == "tensor":
            return None
        groups = self.pruned_groups(recipe)
        return _plan(self._ranking(tuple(groups)), recipe, groups)

    def _ranking(self, groups: tuple[Group, ...]) -> Ranking:
        if self._known is None or self._known[0] != groups:
            ranking = Ranking.of([self.histograms[group] for group in groups])
            self._known = groups, ranking
        return self._known[1]

    def selection_of(
        self, name: str, loaded: Loaded, shared: Selection | None, recipe: Recipe | None = None
    ) -> tuple[Selection, int]:
        """What to prune a tensor with: a selection, and the number of its group there."""
        recipe, group = recipe or self.recipe, self.group(name)
        if shared is not None:
            return shared, self.pruned_groups(recipe).index(group)
        histogram = histogram_of(loaded, self.importance(name))
        assert histogram is not None  # count() lists finite tensors only
        return _plan(Ranking.of([histogram]), recipe, [group]), 0

    def prune(self, name: str, loaded: Loaded, shared: Selection | None) -> Words:
        """A tensor of a pruned group, pruned by the recipe, in the base's dtype. -> [numel]."""
        selection, group = self.selection_of(name, loaded, shared)
        base, base_dtype, finetuned, finetuned_dtype = loaded
        seed, importance = tensor_seed(self.recipe.seed, name), self.importance(name)
        out = np.empty_like(base)
        for part in slices(base.size):
            out[part] = prune(
                selection,
                base[part],
                base_dtype,
                finetuned[part],
                finetuned_dtype,
                seed,
                part.start,
                part_of(importance, part),
                group,
            )
        return out


def _plan(ranking: Ranking, recipe: Recipe, groups: list[Group]) -> Selection:
    return plan(
        ranking,
        recipe.prune,
        recipe.density,
        recipe.top_shares,
        recipe.weighting(groups),
        recipe.eligible_share,
        recipe.grid,
    )
