"""What a recipe makes of a pair of checkpoints, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt

from nps_compress._threads import bounded_map
from nps_compress.checkpoint import Pair
from nps_compress.dtypes import PRUNABLE, DType, Words, round_float32, to_float32
from nps_compress.groups import GROUPS, Group, group_of
from nps_compress.prune import (
    Elements,
    Rule,
    Selection,
    plan,
    select,
    subspaces_by_exponent,
    tensor_seed,
)
from nps_compress.rank_one import Exponents, RankOne, rows_and_columns
from nps_compress.recipe import Recipe
from nps_compress.sign_codec import SignParameters, add_changes, level_changes
from nps_compress.signs import Scales, levels_of, scales_of
from nps_compress.task_vector import HISTOGRAM_BYTES, NEUTRAL, Float32, Histogram, Ranking

SLICE = 1 << 18  # elements handled at once: a few MB, which a core's cache holds
TINY = 4096  # elements up to which a tensor is rounded, not sampled, where signs are kept
# Small tensors are kept exactly where that costs no more than this share of the file.
_EXACT_SHARE, _BITS_PER_KEPT = 0.01, 16
_NOWHERE = np.empty(0, np.uint32)
# About what each takes on real fine-tunes: a 16-bit value stored exactly, a level, a factor.
_VALUE_BITS, _LEVEL_BITS, _FACTOR_BITS = 9.5, 2.5, 2.5

Loaded = tuple[Words, DType, Words, DType]  # base and fine-tuned words, each with its dtype


def slices(size: int) -> list[slice]:
    """The parts in which so many elements are handled; one where there are none."""
    return [slice(start, min(start + SLICE, size)) for start in range(0, max(size, 1), SLICE)]


def tau_of(loaded: Loaded, part: slice) -> Float32:
    """Fine-tuned minus base of some elements; not finite where either is not."""
    base, base_dtype, finetuned, finetuned_dtype = loaded
    with np.errstate(invalid="ignore", over="ignore"):
        return to_float32(finetuned[part], finetuned_dtype) - to_float32(base[part], base_dtype)


class Pruner:
    """Applies a recipe to the prunable tensors of a pair, one tensor at a time.

    Prunable are matched tensors of F16, BF16 or F32 on both sides whose differences are finite;
    all others are the business of exact storage. Thread-safe.
    """

    def __init__(
        self, pair: Pair, recipe: Recipe, importance: Mapping[str, RankOne] | None = None
    ) -> None:
        self.pair, self.recipe = pair, recipe
        self._importance = importance or {}
        self._candidates = [
            name
            for name, base_name in pair.base_of.items()
            if pair.base.tensors[base_name].dtype.name in PRUNABLE
            and pair.finetuned.tensors[name].dtype.name in PRUNABLE
        ]
        self._histograms: dict[bool, dict[Group, Histogram]] = {}  # by whether for signs
        self._numel: dict[bool, dict[Group, int]] = {}
        self._scales: dict[str, Scales] = {}
        self.names: list[str] = []
        self._small_bytes = 0
        self._known: dict[tuple[bool, tuple[Group, ...]], Ranking] = {}

    def count(
        self,
        budget: int,
        on_tensor: Callable[[], None] = lambda: None,
        rules: Collection[Rule] = (),
    ) -> None:
        """Read the pair once: which tensors are prunable, and their scores by group.

        rules: those that recipes will ask for beside the pruner's own.
        """
        tensors = self.pair.finetuned.tensors
        kinds = sorted({rule == "signs" for rule in (self.recipe.prune, *rules)})

        def run(name: str) -> list[Histogram] | None:
            loaded = self.load(name)
            if not all(np.isfinite(tau_of(loaded, part)).all() for part in slices(loaded[0].size)):
                return None
            if True in kinds and not self._is_rounded(name):
                self._scales[name] = self._measured_scales(name, loaded)
            histograms = [self._histogram(name, loaded, kind) for kind in kinds]
            return [each for each in histograms if each] if all(histograms) else None

        def cost(name: str) -> int:
            return 2 * tensors[name].nbytes + len(kinds) * HISTOGRAM_BYTES

        found: dict[bool, dict[Group, Histogram]] = {kind: {} for kind in kinds}
        results = bounded_map(run, self._candidates, cost, budget)
        for name, histograms in zip(self._candidates, results, strict=True):
            if histograms is not None:
                self.names.append(name)
                for kind, histogram in zip(kinds, histograms, strict=True):
                    found[kind].setdefault(self.group(name), Histogram.empty()).merge(histogram)
            on_tensor()
        self._histograms = {
            kind: {group: by_group[group] for group in GROUPS if group in by_group}
            for kind, by_group in found.items()
        }
        self._numel = {
            kind: {group: histogram.numel for group, histogram in by_group.items()}
            for kind, by_group in self._histograms.items()
        }
        small = (tensors[name].nbytes for name in self.names if self.group(name) == "small")
        self._small_bytes = sum(small)

    def _measured_scales(self, name: str, loaded: Loaded) -> Scales:
        rows, columns = rows_and_columns(self.pair.finetuned.tensors[name].shape)
        parts = slices(loaded[0].size)
        return scales_of(lambda: (tau_of(loaded, part) for part in parts), rows, columns)

    def _is_rounded(self, name: str) -> bool:
        """Whether signs would say too little of a tensor: a vector, or a tiny one."""
        shape = self.pair.finetuned.tensors[name].shape
        return len(shape) < 2 or math.prod(shape) <= TINY

    def _histogram(self, name: str, loaded: Loaded, for_signs: bool) -> Histogram | None:
        """Scores of one tensor; None where one is not finite."""
        histogram = Histogram.empty()
        if for_signs and self._is_rounded(name):
            return histogram  # see fixed()
        for part in slices(loaded[0].size):
            tau, importance = self.changes(name, loaded, part, for_signs)
            if not histogram.add(*((importance,) if for_signs else (tau, importance))):
                return None
        return histogram

    def group(self, name: str) -> Group:
        """The group of a tensor."""
        return group_of(name, self.pair.finetuned.tensors[name].shape)

    def factors(self, name: str) -> list[Exponents]:
        """The factors that a reader of signs needs, rows and columns; none for other tensors."""
        if name not in self._scales:
            return []
        both = (self._scales[name].sizes, self._importance.get(name))
        return [each for factor in both if factor for each in (factor.rows, factor.columns)]

    def changes(
        self, name: str, loaded: Loaded, part: slice, for_signs: bool
    ) -> tuple[Float32, Float32]:
        """What prune.Elements calls tau and importance, of some of a tensor's elements."""
        tau, importance = tau_of(loaded, part), self._importance.get(name)
        if for_signs:
            scales = self._scales[name]
            return scales.signed(tau, part.start), scales.scores(importance, part)
        return tau, NEUTRAL if importance is None else importance.part(part.start, part.stop)

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
        two bytes for each element that is kept of the others, or a bit where it is a sign.
        """
        recipe = recipe or self.recipe
        by_group = self._numel[recipe.prune == "signs"]
        others: list[Group] = [group for group in by_group if group != "small"]
        numel = sum(by_group[group] for group in others)
        bits = 1 if recipe.prune == "signs" else _BITS_PER_KEPT
        if 8 * self._small_bytes <= _EXACT_SHARE * bits * recipe.density * numel:
            return others
        return list(by_group)

    def expected_bits(self, recipe: Recipe) -> float:
        """About what the pruned tensors take in a file, to compare recipes by."""
        groups, for_signs = self.pruned_groups(recipe), recipe.prune == "signs"
        tensors = self.pair.finetuned.tensors
        exact = 0 if "small" in groups else 8 * self._small_bytes
        numel = sum(self._numel[for_signs][group] for group in groups)
        if not for_signs:
            return exact + numel * (_VALUE_BITS * recipe.density + _entropy(recipe.density))
        rounded = [name for name in self.names if self._is_rounded(name)]
        levels = sum(tensors[name].numel for name in rounded) if "small" in groups else 0
        factors = sum(each.size for name in self._scales for each in self.factors(name))
        return exact + recipe.density * numel + _LEVEL_BITS * levels + _FACTOR_BITS * factors

    def selection(self, recipe: Recipe | None = None) -> Selection | None:
        """The selection shared by all tensors; None where each is ranked by itself."""
        recipe = recipe or self.recipe
        if recipe.scope == "tensor":
            return None
        groups = self.pruned_groups(recipe)
        key = recipe.prune == "signs", tuple(groups)
        if key not in self._known:
            histograms = self._histograms[key[0]]
            self._known = {key: Ranking.of([histograms[group] for group in groups])}
        return _plan(self._known[key], recipe, groups)

    def selection_of(
        self, name: str, loaded: Loaded, shared: Selection | None, recipe: Recipe | None = None
    ) -> tuple[Selection, int]:
        """What to prune a tensor with: a selection, and the number of its group there."""
        recipe, group = recipe or self.recipe, self.group(name)
        if shared is not None:
            return shared, self.pruned_groups(recipe).index(group)
        histogram = self._histogram(name, loaded, recipe.prune == "signs")
        assert histogram is not None  # count() lists such tensors only
        return _plan(Ranking.of([histogram]), recipe, [group]), 0

    def sign_parameters(
        self, name: str, loaded: Loaded, shared: Selection | None
    ) -> SignParameters:
        """What a reader needs to draw the signs of a pruned tensor again."""
        scales, importance = self._scales[name], self._importance.get(name)
        sizes = scales.sizes
        if importance is None:
            importance = RankOne(np.zeros_like(sizes.rows), np.zeros_like(sizes.columns))
        selection, group = self.selection_of(name, loaded, shared)
        subspaces = subspaces_by_exponent(selection, group, scales.gain)
        first, rate, scale = zip(*subspaces, strict=True)
        seed = tensor_seed(self.recipe.seed, name)
        return SignParameters(seed, scales.gain, first, rate, scale, sizes, importance)

    def levels(self, name: str, loaded: Loaded) -> tuple[int, npt.NDArray[np.int8]] | None:
        """Exponent of the step and levels of a tensor that is rounded; None for any other."""
        if self.recipe.prune != "signs" or not self._is_rounded(name):
            return None
        return levels_of(tau_of(loaded, slice(None)))

    def fixed(self, name: str, loaded: Loaded, recipe: Recipe | None = None) -> Float32 | None:
        """A tensor that no factor of the recipe changes: one kept exactly, or, with signs, rounded.
        -> [numel], None for any other."""
        recipe = recipe or self.recipe
        if self.group(name) not in self.pruned_groups(recipe):
            return to_float32(*loaded[2:])
        if recipe.prune != "signs" or not self._is_rounded(name):
            return None
        base, dtype = loaded[:2]
        exponent, levels = levels_of(tau_of(loaded, slice(None)))
        out, everywhere = np.empty_like(base), np.arange(base.size, dtype=np.uint32)
        add_changes(everywhere, level_changes(levels, exponent), base, out, dtype)
        return to_float32(out, dtype)

    def prune(self, name: str, loaded: Loaded, shared: Selection | None) -> Words:
        """A tensor of a pruned group, pruned by the recipe, in the base's dtype. -> [numel]."""
        fixed = self.fixed(name, loaded)
        if fixed is not None:
            return round_float32(fixed, loaded[1])
        selection, group = self.selection_of(name, loaded, shared)
        base, dtype = loaded[:2]
        out, seed = base.copy(), tensor_seed(self.recipe.seed, name)
        for part in slices(base.size):
            changes = self.changes(name, loaded, part, self.recipe.prune == "signs")
            elements = Elements(to_float32(base[part], dtype), *changes, _NOWHERE, part.start)
            indices, values = select(selection, elements, dtype, seed, group)
            out[part][indices] = round_float32(values, dtype)
        return out


def _entropy(share: float) -> float:
    """Of whether an element is kept, in bits."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p)


def _plan(ranking: Ranking, recipe: Recipe, groups: list[Group]) -> Selection:
    return plan(
        ranking,
        recipe.prune,
        recipe.density,
        recipe.top_shares,
        recipe.weighting(groups),
        recipe.grid,
    )
