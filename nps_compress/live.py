"""A model in memory that becomes one candidate after another.

A candidate of a search differs from the last in a few percent of its weights: only those are
written. And of the task vector only a short list can be kept by any candidate near the present
one: the rest is looked at again only when a candidate reaches further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit
from nps_compress._threads import workers
from nps_compress.candidates import Loaded, Pruner, rounding_for, slices
from nps_compress.dtypes import to_float32
from nps_compress.errors import CheckpointError
from nps_compress.prune import Elements, Reach, Selection, reach, select, tensor_seed, within
from nps_compress.recipe import Recipe
from nps_compress.task_vector import Float32
from nps_compress.values import Values

if TYPE_CHECKING:
    import torch


class LiveModel:
    """A float32 model whose prunable weights are overwritten by one candidate after another.

    weights: by their names in the fine-tune's file.
    """

    def __init__(self, pruner: Pruner, weights: Mapping[str, torch.Tensor]) -> None:
        self._pruner = pruner
        missing = [name for name in pruner.names if name not in weights]
        if missing:
            raise CheckpointError(
                pruner.pair.finetuned.path,
                f"tensor {missing[0]!r} has no parameter of that name in the model",
            )
        self._tensors = {
            name: _LiveTensor(weights[name], pruner.load(name), partial(pruner.changes, name))
            for name in pruner.names
        }
        # The largest first, so that no thread is left with it at the end.
        self._order = sorted(pruner.names, key=lambda name: -weights[name].numel())

    def apply(self, recipe: Recipe | None = None) -> None:
        """Overwrite the weights with what would be stored. None: the pruner's recipe."""
        pruner, recipe = self._pruner, recipe or self._pruner.recipe
        shared = pruner.selection(recipe)

        def run(name: str) -> None:
            tensor = self._tensors[name]
            fixed = pruner.fixed(name, tensor.loaded, recipe)
            if fixed is not None:
                tensor.write_all(fixed)
                return
            selection, group = pruner.selection_of(name, tensor.loaded, shared, recipe)
            values = pruner.values_of(name, recipe)
            tensor.write(selection, group, tensor_seed(recipe.seed, name), values)

        self._for_each(run)

    def apply_base(self) -> None:
        """Overwrite the weights with the base's: what the model is without its task vector."""
        self._for_each(lambda name: self._tensors[name].write_base())

    def _for_each(self, run: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(workers()) as pool:
            list(pool.map(run, self._order))


class _LiveTensor:
    """One parameter. target: float32, where the model has it; changes: as Pruner.changes."""

    def __init__(
        self,
        target: torch.Tensor,
        loaded: Loaded,
        changes: Callable[[Loaded, slice, bool], tuple[Float32, Float32]],
    ) -> None:
        self.loaded = loaded
        self._target, self._changes = target, changes
        self._flat = target.view(-1) if target.is_contiguous() else None
        # Where the parameter may differ from the base, and the base there; None: anywhere.
        self._changed: tuple[npt.NDArray[np.uint32], Float32] | None = None
        self._short: tuple[object, Reach, Elements] | None = None  # what the list is good for

    def write_base(self) -> None:
        if self._changed is None or self._flat is None:
            self._write_all(to_float32(*self.loaded[:2]))
        else:
            _put(self._flat, *self._changed)
        self._changed = np.empty(0, np.uint32), np.empty(0, np.float32)

    def write_all(self, values: Float32) -> None:
        self._write_all(values)
        self._changed = None

    def write(self, selection: Selection, group: int, seed: int, precision: Values) -> None:
        elements, dtype = self._short_list(selection, group, seed), self.loaded[1]
        rounding = rounding_for(precision, selection, [elements], dtype, seed, group)
        indices, values = select(selection, elements, dtype, seed, group, rounding=rounding)
        if self._flat is None:
            whole = to_float32(*self.loaded[:2]).copy()
            whole[elements.at[indices]] = values
            self._write_all(whole)
            return
        if self._changed is None or self._changed[0] is not elements.at:
            self.write_base()
        if self._flat.device.type == "cpu":
            _rewrite(self._flat.numpy(), elements.at, elements.before, indices, values)
        else:
            after = elements.before.copy()
            after[indices] = values
            _put(self._flat, elements.at, after)
        self._changed = elements.at, elements.before

    def _write_all(self, values: Float32) -> None:
        import torch

        self._target.copy_(torch.from_numpy(values).view(self._target.shape))

    def _short_list(self, selection: Selection, group: int, seed: int) -> Elements:
        density = selection.density if selection.rule == "random" else None
        alike = (selection.rule, density, seed)
        needed = reach(selection, group)
        if self._short is None or self._short[0] != alike or not self._short[1].covers(needed):
            limits = needed.widened()
            self._short = alike, limits, self._within(limits, selection, seed)
        return self._short[2]

    def _within(self, limits: Reach, selection: Selection, seed: int) -> Elements:
        parts = []
        for part in slices(self.loaded[0].size):
            before = to_float32(self.loaded[0][part], self.loaded[1])
            changes = self._changes(self.loaded, part, selection.rule == "signs")
            elements = Elements(before, *changes, np.empty(0, np.uint32), part.start)
            parts.append(within(limits, selection, elements, seed))
        return Elements(
            np.concatenate([part.before for part in parts]),
            np.concatenate([part.tau for part in parts]),
            np.concatenate([part.importance for part in parts]),
            np.concatenate([part.at for part in parts]),
        )


@jit
def _rewrite(target, at, before, indices, values):  # type: ignore[no-untyped-def]
    """target[at] = before, but values at these indices, in one pass."""
    kept = 0
    for i in range(at.size):
        value = before[i]
        if kept < indices.size and indices[kept] == i:
            value = values[kept]
            kept += 1
        target[at[i]] = value


def _put(target: torch.Tensor, at: npt.NDArray[np.uint32], values: Float32) -> None:
    """target[at] = values. at: [n]; values: [n]."""
    import torch

    if target.device.type == "cpu":
        target.numpy()[at] = values
    else:
        where = torch.from_numpy(at.astype(np.int64)).to(target.device)
        target[where] = torch.from_numpy(values).to(target.device)
