"""What a recipe makes of a pair of checkpoints, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from nps_compress._threads import bounded_map
from nps_compress.checkpoint import Pair
from nps_compress.dtypes import PRUNABLE, DType, Words, difference, round_float32, to_float32
from nps_compress.grid_codec import GridParameters
from nps_compress.groups import GROUPS, Group, group_of
from nps_compress.prune import (
    Elements,
    Levels,
    Rule,
    Selection,
    add_to_tally,
    plan,
    select,
    subspaces_by_exponent,
    tensor_seed,
)
from nps_compress.rank_one import ZERO, Exponents, RankOne, rows_and_columns
from nps_compress.recipe import Recipe
from nps_compress.sign_codec import SignParameters, add_changes, level_changes
from nps_compress.signs import Scales, levels_of, scales_of
from nps_compress.task_vector import HISTOGRAM_BYTES, NEUTRAL, Float32, Histogram, Ranking
from nps_compress.values import BITS, EXACT, Rounding, Values, empty_tally, rounding_of

SLICE = 1 << 18  # elements handled at once: a few MB, which a core's cache holds
TINY = 4096  # elements up to which a tensor is rounded rather than stored as signs
_EXACT_SHARE = 0.01  # of the file, that small tensors may take if kept exactly
_NOWHERE = np.empty(0, np.uint32)
# About what each takes on real fine-tunes: a 16-bit value stored exactly, a level, a factor, and
# what a bit of a rounded value takes beyond its sign.
_VALUE_BITS, _LEVEL_BITS, _FACTOR_BITS, _BIT_BITS = 9.5, 2.5, 2.5, 0.75
_AUTO_BITS = 4  # that ``auto`` mostly takes

Loaded = tuple[Words, DType, Words, DType]  # base and fine-tuned words, each with its dtype
Kind = Literal["signs", "grid", "exact"]  # of what is stored of each change that is kept


def kind_of(rule: Rule) -> Kind:
    """What a rule has stored."""
    kinds: dict[Rule, Kind] = {"signs": "signs", "sampled": "grid"}
    return kinds.get(rule, "exact")


def slices(size: int) -> list[slice]:
    """The parts in which so many elements are handled; one where there are none."""
    return [slice(start, min(start + SLICE, size)) for start in range(0, max(size, 1), SLICE)]


def tau_of(loaded: Loaded, part: slice) -> Float32:
    """Fine-tuned minus base of some elements; not finite where either is not."""
    base, base_dtype, finetuned, finetuned_dtype = loaded
    if base_dtype == finetuned_dtype:
        return difference(finetuned[part], base[part], base_dtype)
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
        self._histograms: dict[Kind, dict[Group, Histogram]] = {}
        self._numel: dict[Kind, dict[Group, int]] = {}
        self._scales: dict[str, Scales] = {}
        self.names: list[str] = []
        self._small_bytes = 0
        self._known: dict[tuple[Kind, tuple[Group, ...]], Ranking] = {}

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
        kinds = sorted({kind_of(rule) for rule in (self.recipe.prune, *rules)})

        def run(name: str) -> list[Histogram] | None:
            loaded = self.load(name)
            if not all(np.isfinite(tau_of(loaded, part)).all() for part in slices(loaded[0].size)):
                return None
            if "signs" in kinds and not self._is_rounded(name, "signs"):
                self._scales[name] = self._measured_scales(name, loaded)
            histograms = [self._histogram(name, loaded, kind) for kind in kinds]
            return [each for each in histograms if each] if all(histograms) else None

        def cost(name: str) -> int:
            return 2 * tensors[name].nbytes + len(kinds) * HISTOGRAM_BYTES

        found: dict[Kind, dict[Group, Histogram]] = {kind: {} for kind in kinds}
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

    def _is_rounded(self, name: str, kind: Kind) -> bool:
        """Whether a sample would say too little of a tensor: a vector, or too few signs."""
        shape = self.pair.finetuned.tensors[name].shape
        if kind == "signs":
            return len(shape) < 2 or math.prod(shape) <= TINY
        return kind == "grid" and len(shape) < 2

    def _histogram(self, name: str, loaded: Loaded, kind: Kind) -> Histogram | None:
        """Scores of one tensor; None where one is not finite."""
        histogram = Histogram.empty()
        if self._is_rounded(name, kind):
            return histogram  # see fixed()
        for part in slices(loaded[0].size):
            tau, importance = self.changes(name, loaded, part, kind == "signs")
            if not histogram.add(*((importance,) if kind == "signs" else (tau, importance))):
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

    @property
    def still_share(self) -> float:
        """Of the elements that signs would move, those that the fine-tune leaves alone."""
        still = sum(scales.still for scales in self._scales.values())
        moved = sum(
            int((scales.sizes.rows > ZERO).sum()) * int((scales.sizes.columns > ZERO).sum())
            for scales in self._scales.values()
        )
        return still / moved if moved else 0.0

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

        Small tensors are exact where that takes at most a hundredth of the file.
        """
        recipe = recipe or self.recipe
        kind = kind_of(recipe.prune)
        by_group = self._numel[kind]
        others: list[Group] = [group for group in by_group if group != "small"]
        numel = sum(by_group[group] for group in others)
        bits = _bits(kind, recipe.density, recipe.values)
        if 8 * self._small_bytes <= _EXACT_SHARE * bits * numel:
            return others
        return list(by_group)

    def expected_bits(self, recipe: Recipe) -> float:
        """About what the pruned tensors take in a file, to compare recipes by."""
        groups, kind = self.pruned_groups(recipe), kind_of(recipe.prune)
        tensors = self.pair.finetuned.tensors
        exact = 0 if "small" in groups else 8 * self._small_bytes
        numel = sum(self._numel[kind][group] for group in groups)
        bits = exact + numel * _bits(kind, recipe.density, recipe.values)
        if kind == "exact":
            return bits
        rounded = [name for name in self.names if self._is_rounded(name, kind)]
        levels = sum(tensors[name].numel for name in rounded) if "small" in groups else 0
        factors = sum(each.size for name in self._scales for each in self.factors(name))
        return bits + _LEVEL_BITS * levels + _FACTOR_BITS * factors

    def selection(self, recipe: Recipe | None = None) -> Selection | None:
        """The selection shared by all tensors; None where each is ranked by itself."""
        recipe = recipe or self.recipe
        if recipe.scope == "tensor":
            return None
        groups = self.pruned_groups(recipe)
        key = kind_of(recipe.prune), tuple(groups)
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
        histogram = self._histogram(name, loaded, kind_of(recipe.prune))
        assert histogram is not None  # count() lists such tensors only
        return _plan(Ranking.of([histogram]), recipe, [group]), 0

    def sign_parameters(
        self, name: str, loaded: Loaded, shared: Selection | None
    ) -> SignParameters:
        """What a reader needs to draw the signs of a pruned tensor again."""
        scales, importance = self._scales[name], self._factors_of_importance(name)
        selection, group = self.selection_of(name, loaded, shared)
        subspaces = subspaces_by_exponent(selection, group, scales.gain)
        first, rate, scale = zip(*subspaces, strict=True)
        seed = tensor_seed(self.recipe.seed, name)
        return SignParameters(seed, scales.gain, first, rate, scale, scales.sizes, importance)

    def grid_parameters(
        self, name: str, loaded: Loaded, step: float
    ) -> tuple[GridParameters, GridParameters]:
        """What a reader needs to know of a tensor's multiples of a step, with sizes of rows and
        columns and without."""
        importance = self._factors_of_importance(name)
        none = RankOne(np.zeros_like(importance.rows), np.zeros_like(importance.columns))
        measured = self._scales.get(name) or self._measured_scales(name, loaded)
        with_sizes, without = (
            GridParameters.of(step, sizes, importance) for sizes in (measured.sizes, none)
        )
        return with_sizes, without

    def _factors_of_importance(self, name: str) -> RankOne:
        rows, columns = rows_and_columns(self.pair.finetuned.tensors[name].shape)
        neutral = RankOne(np.zeros(rows, np.int16), np.zeros(columns, np.int16))
        return self._importance.get(name, neutral)

    def levels(self, name: str, loaded: Loaded) -> tuple[int, npt.NDArray[np.int8]] | None:
        """Exponent of the step and levels of a tensor that is rounded; None for any other."""
        if not self._is_rounded(name, kind_of(self.recipe.prune)):
            return None
        return levels_of(tau_of(loaded, slice(None)))

    def fixed(self, name: str, loaded: Loaded, recipe: Recipe | None = None) -> Float32 | None:
        """A tensor that no factor of the recipe changes: one kept exactly, or rounded. -> [numel],
        None for any other."""
        recipe = recipe or self.recipe
        if self.group(name) not in self.pruned_groups(recipe):
            return to_float32(*loaded[2:])
        if not self._is_rounded(name, kind_of(recipe.prune)):
            return None
        base, dtype = loaded[:2]
        exponent, levels = levels_of(tau_of(loaded, slice(None)))
        out, everywhere = np.empty_like(base), np.arange(base.size, dtype=np.uint32)
        add_changes(everywhere, level_changes(levels, exponent), base, out, dtype)
        return to_float32(out, dtype)

    def step(
        self, name: str, loaded: Loaded, shared: Selection | None, rounding: Rounding
    ) -> float:
        """What kept changes of importance 1 are multiples of; 0 where they are of nothing."""
        if self.recipe.prune != "sampled":
            return rounding.step
        selection, group = self.selection_of(name, loaded, shared)
        return float(selection.unit[group]) if selection.step else 0.0

    def values_of(self, name: str, recipe: Recipe) -> Values:
        """How precisely a recipe stores a pruned tensor: vectors and tiny ones exactly."""
        shape = self.pair.finetuned.tensors[name].shape
        return recipe.values if len(shape) > 1 and math.prod(shape) > TINY else "exact"

    def rounding(self, name: str, loaded: Loaded, shared: Selection | None) -> Rounding:
        """What kept changes of a tensor are rounded to; EXACT where the rule rounds none."""
        values = self.values_of(name, self.recipe)
        if values == "exact" or self.fixed(name, loaded) is not None:
            return EXACT
        selection, group = self.selection_of(name, loaded, shared)
        parts = (elements for _, elements in self._elements(name, loaded))
        seed = tensor_seed(self.recipe.seed, name)
        return rounding_for(values, selection, parts, loaded[1], seed, group)

    def _elements(self, name: str, loaded: Loaded) -> Iterator[tuple[slice, Elements]]:
        """What may be kept of a tensor, in parts."""
        base, dtype = loaded[:2]
        for part in slices(base.size):
            changes = self.changes(name, loaded, part, self.recipe.prune == "signs")
            yield part, Elements(to_float32(base[part], dtype), *changes, _NOWHERE, part.start)

    def prune(
        self,
        name: str,
        loaded: Loaded,
        shared: Selection | None,
        multiples: Levels | None = None,
        rounding: Rounding | None = None,
    ) -> Words:
        """A tensor of a pruned group, pruned by the recipe, in the base's dtype. -> [numel].

        multiples: [numel] zeros, receives those of the step that is kept, where there is one.
        rounding: as :meth:`rounding` says, None where that was not asked.
        """
        fixed = self.fixed(name, loaded)
        if fixed is not None:
            return round_float32(fixed, loaded[1])
        selection, group = self.selection_of(name, loaded, shared)
        rounding = rounding or self.rounding(name, loaded, shared)
        base, dtype = loaded[:2]
        out, seed = base.copy(), tensor_seed(self.recipe.seed, name)
        levels = np.empty(0, np.int16) if multiples is None else multiples
        for part, elements in self._elements(name, loaded):
            indices, values = select(
                selection, elements, dtype, seed, group, levels[part], rounding
            )
            out[part][indices] = round_float32(values, dtype)
        return out


def rounding_for(
    values: Values,
    selection: Selection,
    parts: Iterable[Elements],
    dtype: DType,
    seed: int,
    group: int,
) -> Rounding:
    """What to round the changes to that a selection keeps of a tensor. parts: of its elements."""
    if values == "exact":
        return EXACT
    tally = empty_tally()
    for elements in parts:
        add_to_tally(tally, selection, elements, dtype, seed, group)
    return rounding_of(tally, values)


@lru_cache  # asked once a tensor, for every candidate of a search
def _bits(kind: Kind, density: float, values: Values) -> float:
    """About what a weight takes."""
    if kind == "signs":
        return density
    if kind == "exact":
        bits = _VALUE_BITS
        if values != "exact":
            bits = 1 + _BIT_BITS * (BITS.get(values, _AUTO_BITS) - 1)
        return bits * density + _entropy(density)
    # Of magnitudes with an exponential distribution in units of the step, rounded at random.
    low, high = 1e-9, 1e9
    for _ in range(100):
        mean = math.sqrt(low * high)
        low, high = (mean, high) if -mean * math.expm1(-1 / mean) < density else (low, mean)
    more = math.exp(-1 / high)
    return _entropy(density) + density * (1 + _entropy(more) / (1 - more))


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
    )
