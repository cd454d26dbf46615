"""Runs a method over the tensors of a base and its fine-tunes, one tensor at a time.

Merged are the base's tensors that every task has, of the same shape, in F16, BF16 or F32, where all
changes are finite. The others are not: a head that only some have, a resized vocabulary, positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from nps_compress._threads import MEMORY_SLACK, bounded_map
from nps_compress.candidates import SLICE, slices
from nps_compress.checkpoint import Checkpoint, pair
from nps_compress.dtypes import PRUNABLE, Words, round_float32, to_float32
from nps_compress.errors import CheckpointError
from nps_compress.merging.contract import Block, Settings, Totals
from nps_compress.merging.methods import Method
from nps_compress.merging.pruning import TaskPruner
from nps_compress.rank_one import rows_and_columns
from nps_compress.task_vector import Float32

R = TypeVar("R")


@dataclass(frozen=True)
class _Loaded:
    """A tensor of the base and of every task, as words."""

    base: Words
    tasks: tuple[Words, ...]


@dataclass(frozen=True)
class Plan:
    """A method and its settings, with what a first pass over all tensors found for them."""

    method: Method
    settings: Settings
    totals: Totals


class Merger:
    """A base and its tasks.

    ``names``: base tensors that are merged, once :meth:`count` has run. ``found_in``: their names
    in each task. ``held``: keep all weights in memory, for a search. Thread-safe.
    """

    def __init__(self, base: Checkpoint, tasks: Sequence[Checkpoint], held: bool = False) -> None:
        self.base, self.tasks = base, tasks
        self.found_in: list[dict[str, str]] = []
        for task in tasks:
            base_of = pair(base, task).base_of
            self.found_in.append({base_of[name]: name for name in reversed(list(base_of))})
        self.names = [name for name in base.tensors if self._is_mergeable(name)]
        if not self.names:
            raise CheckpointError(base.path, "has no tensor that all tasks have in its shape")
        self._held: dict[str, _Loaded] | None = {} if held else None
        self._pruners: list[TaskPruner] = []

    def _is_mergeable(self, name: str) -> bool:
        dtypes = {self.base.tensors[name].dtype.name}
        for task, names in zip(self.tasks, self.found_in, strict=True):
            if name not in names:
                return False
            dtypes.add(task.tensors[names[name]].dtype.name)
        return dtypes <= PRUNABLE

    @property
    def left(self) -> list[list[str]]:
        """The tensors of each task, by its own names, that are not merged."""
        merged = set(self.names)
        return [
            [n for n in task.tensors if n not in {names[m] for m in merged & names.keys()}]
            for task, names in zip(self.tasks, self.found_in, strict=True)
        ]

    def count(self, settings: Settings, on_tensor: Callable[[], None] = lambda: None) -> None:
        """Read everything once: which tensors are finite, and how magnitudes are distributed."""
        self._pruners = []
        if settings.prune is not None:
            rule, scope = settings.prune, settings.scope
            self._pruners = [TaskPruner(n, rule, scope) for n in range(len(self.tasks))]

        def run(name: str) -> bool:
            loaded, shape = self._load(name), self.base.tensors[name].shape
            parts = [partial(self._changes, name, loaded, n) for n in range(len(self.tasks))]
            if not all(np.isfinite(tau).all() for each in parts for tau in each()):
                return False
            for pruner, each in zip(self._pruners, parts, strict=False):
                pruner.count(name, shape, each)
            return True

        finite = []
        for name, is_finite in zip(self.names, self._map(run), strict=True):
            finite += [name] * is_finite
            on_tensor()
        self.names = finite
        if not finite:
            raise CheckpointError(self.base.path, "and its tasks have no finite tensor in common")

    def plan(
        self, method: Method, settings: Settings, on_tensor: Callable[[], None] = lambda: None
    ) -> Plan:
        """Run the method's first pass, where it has one."""
        none, measure = np.zeros((len(self.tasks), 2)), method.measure
        totals = none
        if measure is not None:

            def run(name: str) -> Totals:
                return sum((measure(block) for _, block in self._blocks(name, settings)), none)

            for found in self._map(run):
                totals = totals + found
                on_tensor()
        return Plan(method, settings, totals)

    def merged(self, name: str, plan: Plan) -> list[Words]:
        """One tensor, rounded to nearest even in the base's dtype.

        -> words, [numel]: one array, or one for each task where the method is ``per_task``.
        """
        base, loaded = self.base.tensors[name], self._load(name)
        before = to_float32(loaded.base, base.dtype)
        copies = len(self.tasks) if plan.method.per_task else 1
        outs = [np.empty_like(loaded.base) for _ in range(copies)]
        for part, block in self._blocks(name, plan.settings, loaded):
            change = plan.method.merge(block, plan.settings, plan.totals)
            for out, each in zip(outs, change.reshape(copies, -1), strict=True):
                with np.errstate(over="ignore", invalid="ignore"):
                    out[part] = round_float32(before[part] + each, base.dtype)
        return outs

    def each_merged(self, plan: Plan) -> Iterator[tuple[str, list[Words]]]:
        """All tensors in their order."""
        found = self._map(lambda name: self.merged(name, plan))
        yield from zip(self.names, found, strict=True)

    def release(self) -> None:
        """Hold nothing any more."""
        self._held = None

    def _map(self, function: Callable[[str], R]) -> Iterator[R]:
        tensors, copies = self.base.tensors, 2 + len(self.tasks)
        largest = max(tensors[name].nbytes for name in self.names)
        return bounded_map(
            function,
            self.names,
            lambda name: copies * tensors[name].nbytes,
            copies * largest + MEMORY_SLACK,
        )

    def _load(self, name: str) -> _Loaded:
        if self._held is not None and name in self._held:
            return self._held[name]
        pairs = zip(self.tasks, self.found_in, strict=True)
        found = _Loaded(
            self.base.read(name), tuple(task.read(names[name]) for task, names in pairs)
        )
        if self._held is not None:
            self._held[name] = found
        return found

    def _changes(self, name: str, loaded: _Loaded, task: int) -> Iterator[Float32]:
        for part in slices(loaded.base.size):
            yield self._tau(name, loaded, task, part)

    def _tau(self, name: str, loaded: _Loaded, task: int, part: slice) -> Float32:
        own = self.tasks[task].tensors[self.found_in[task][name]].dtype
        before = to_float32(loaded.base[part], self.base.tensors[name].dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            return to_float32(loaded.tasks[task][part], own) - before

    def _blocks(
        self, name: str, settings: Settings, loaded: _Loaded | None = None
    ) -> Iterator[tuple[slice, Block]]:
        """Whole rows, so many that they stay in a core's cache."""
        loaded = loaded or self._load(name)
        tensor = self.base.tensors[name]
        rows, columns = rows_and_columns(tensor.shape)
        selections = [
            pruner.selection(
                name, tensor.shape, partial(self._changes, name, loaded, task), settings
            )
            for task, pruner in enumerate(self._pruners)
        ]
        step = max(1, SLICE // max(columns * len(self.tasks), 1))
        for first in range(0, rows if columns else 0, step):
            shape = min(step, rows - first), columns
            start = first * columns
            part = slice(start, start + shape[0] * shape[1])
            whole = [self._tau(name, loaded, task, part) for task in range(len(self.tasks))]
            taus = (
                [
                    pruner.prune(name, selection, tau, start, settings.seed)
                    for pruner, selection, tau in zip(self._pruners, selections, whole, strict=True)
                ]
                if self._pruners
                else whole
            )
            yield (
                part,
                Block(
                    name,
                    to_float32(loaded.base[part], tensor.dtype).reshape(shape),
                    np.stack(taus).reshape(-1, *shape),
                    np.stack(whole).reshape(-1, *shape),
                    start,
                    len(tensor.shape) < 2,
                ),
            )
