"""Batches whose rows are of several tasks, while the base is in the model.

Hooks on the model's own modules put in what a row's task changes. A linear layer's output gets
x Δᵀ (:func:`nps_compress.resident.delta_matmul`) and the task's bias, an embedding's the words of
the rows that were looked up; a norm is computed again for the task's rows. A product of x with
base and Δ apart is rounded otherwise than that with the task's own weights, so outputs agree with
the task's up to rounding, not bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from nps_compress import resident
from nps_compress.errors import InvalidArgumentError, NotMixableError, NpsError
from nps_compress.kernels.form import Form
from nps_compress.kernels.table import INTEGER, Changes, Tasks, Tensors
from nps_compress.resident_model import ResidentModel, ResidentTask, Weight

# Of a probe. What a module reads whose first dimension is positions is told from rows by these.
_ROWS, _POSITIONS = 3, 5


@dataclass(frozen=True)
class _Table:
    """Words that a task changes in an embedding, row by row.

    starts: [rows + 1] int64; columns: [changed] int64; words: [changed], of the table's dtype.
    """

    starts: torch.Tensor
    columns: torch.Tensor
    words: torch.Tensor

    def write(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Put the words of some rows in. ids: [n] int64; out: [n, columns], with the base's."""
        first = self.starts[ids]
        counts = self.starts[ids + 1] - first
        row = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        at = torch.arange(len(row), device=ids.device) + (first - before)[row]
        out[row, self.columns[at]] = self.words[at]


@dataclass(frozen=True, eq=False)
class MixedTask:
    """What hooks put in for one task.

    changes: of the weights of linear layers, by group; biases: [outputs] float32, to be added;
    tables: of embeddings; small: what norms have instead of their own parameters.
    """

    changes: tuple[Changes | None, ...]
    biases: Mapping[nn.Module, torch.Tensor]
    tables: Mapping[nn.Module, _Table]
    small: Mapping[nn.Module, dict[str, torch.Tensor]]


def mixed_task(model: ResidentModel, task: ResidentTask) -> MixedTask:
    """What hooks need of a task, which must not be active.

    Raises:
        NotMixableError: it changes something that no hook can put in.
    """
    if task.whole:
        name = model.weights[next(iter(task.whole))].names[0]
        raise NotMixableError(f"its tensor {name!r} has a shape of its own")
    biases: dict[nn.Module, torch.Tensor] = {}
    tables: dict[nn.Module, _Table] = {}
    small: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for weight in model.weights:
        form = _form(task.changes, weight)
        if form is None:
            continue
        for module, leaf, own in weight.owners:
            if (module, leaf) in _linear_weights(weight):
                continue
            rebuilt = _rebuilt(weight.tensor, form).view(own.shape)
            if type(module) is nn.Linear and leaf == "bias":
                biases[module] = rebuilt.float() - own.detach().float()
            elif _is_plain_embedding(module):
                tables[module] = _table(own.detach(), rebuilt)
            elif _is_small(module, leaf):
                small.setdefault(module, {})[leaf] = rebuilt
            else:
                raise _refusal(weight, type(module).__name__)
        if not weight.owners:
            raise _refusal(weight, "module that has it as a part of another")
    return MixedTask(task.changes, biases, tables, small)


@dataclass(frozen=True)
class _Batch:
    """The rows of a pass. segments: a task, its first row, and the row after its last."""

    rows: int
    segments: Sequence[tuple[MixedTask, int, int]]
    tasks: Sequence[Tasks | None]  # by group
    starts: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict)

    def times(self, x: torch.Tensor, module: nn.Module) -> int:
        """How many of a tensor's first dimension each row has. Raises NotMixableError."""
        times, left = divmod(x.shape[0], self.rows) if x.dim() else (0, 1)
        if left:
            raise NotMixableError(
                f"{type(module).__name__} got {list(x.shape)} in a batch of {self.rows} rows"
            )
        return times

    def part(self, value: Any, module: nn.Module, first: int, end: int) -> Any:
        """What a tensor has of these rows; anything else is all rows'. Raises NotMixableError."""
        if not isinstance(value, torch.Tensor):
            return value
        times = self.times(value, module)
        return value[times * first : times * end]

    def starts_of(self, times: int, device: torch.device) -> torch.Tensor:
        """As ``delta_matmul`` takes them, each row being so many."""
        if (times, device) not in self.starts:
            ends = [self.segments[0][1], *(end for _, _, end in self.segments)]
            numbers = [times * end for end in ends]
            self.starts[times, device] = torch.tensor(numbers, dtype=torch.int32, device=device)
        return self.starts[times, device]


class MixedModel:
    """A model with the base in it, and tasks whose rows may share a batch.

    >>> with bank.mix(["law", "med"]) as mixed:  # doctest: +SKIP
    ...     with mixed.rows([None, "law", "law", "med"]) as model:
    ...         model(tokens)  # [4, positions]

    Every module with weights must have batch rows in the first dimension of what it gets, one or
    more of it a row. For inference only.

    resident: the base is active in it, and stays so. load: a task by its name. Hooks are on the
    model until :meth:`close`, and do nothing outside of :meth:`rows`.
    """

    def __init__(self, resident: ResidentModel, load: Callable[[str], MixedTask]) -> None:
        self.model, self._resident, self._load = resident.model, resident, load
        self._tasks: dict[str, MixedTask] = {}
        self._batch: _Batch | None = None
        self._places: dict[nn.Module, tuple[int, int]] = {}
        modules: dict[nn.Module, None] = {}
        for weight in resident.weights:
            modules.update(dict.fromkeys(module for module, _, _ in weight.owners))
            if weight.place:
                linear = (module for module, _ in _linear_weights(weight))
                self._places.update(dict.fromkeys(linear, weight.place))
        self._handles: list[Any] = []
        for module in modules:
            if type(module) is nn.Linear:
                self._handles.append(module.register_forward_hook(self._add, with_kwargs=True))
            elif _is_plain_embedding(module):
                before = module.register_forward_pre_hook(self._expand, with_kwargs=True)
                after = module.register_forward_hook(self._overwrite, with_kwargs=True)
                self._handles += [before, after]
            elif any(_is_small(module, leaf) for leaf in module._parameters):
                after = module.register_forward_hook(self._recompute, with_kwargs=True)
                self._handles.append(after)

    @property
    def names(self) -> list[str]:
        """The tasks that are in."""
        return list(self._tasks)

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tasks.clear()

    def join(self, name: str) -> None:
        """Let a task in; nothing if it is. Raises: as ``TaskBank.mix`` for one task."""
        if name not in self._tasks:
            self._tasks[name] = self._load(name)

    def leave(self, name: str) -> None:
        """A task that needs its place no more may be evicted."""
        self._tasks.pop(name, None)

    @contextlib.contextmanager
    def rows(self, tasks: Sequence[str | None]) -> Iterator[nn.Module]:
        """The model for batches of rows of these tasks, the base's (None) first, a task's together.

        Raises:
            InvalidArgumentError: another order, or a task that is not in. A pass of the model
            raises NotMixableError: a module got something else than the batch's rows.
        """
        segments: list[tuple[MixedTask, int, int]] = []
        bounds = [i for i, name in enumerate(tasks) if not i or name != tasks[i - 1]]
        names = [tasks[i] for i in bounds]
        if len(set(names)) < len(names) or None in names[1:]:
            raise InvalidArgumentError("rows", list(tasks), "the base's first, a task's together")
        for first, end in pairwise([*bounds, len(tasks)]):
            name = tasks[first]
            if name is not None:
                if name not in self._tasks:
                    raise InvalidArgumentError("task name", name, f"one of {self.names}")
                segments.append((self._tasks[name], first, end))
        with self._running(len(tasks), segments):
            yield self.model

    def check(self, task: MixedTask, as_task: Callable[[], AbstractContextManager[Any]]) -> None:
        """Compare a mixed batch of a few tokens with the task itself, and the base itself.

        It catches architectures whose modules don't get a batch's rows, or don't use their weights
        by being called. as_task: for its length the task is active, and for it only.

        Raises:
            NotMixableError: they differ by more than rounding does, or the model can't be run like
            that. What ``as_task`` raises.
        """
        try:
            tokens = self._tokens()
            base = self._answer(tokens)
            with self._running(_ROWS, [(task, 1, _ROWS)]):
                found = self._answer(tokens)
            with as_task():
                wanted = self._answer(tokens)
        except NpsError:
            raise
        except Exception as error:  # whatever a model may raise
            raise NotMixableError(f"the model can't be tried ({error})") from error
        wanted[0] = base[0]
        dtypes = {each.dtype for each in self.model.parameters() if each.is_floating_point()}
        allowed = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
        for got, true in zip(found.flatten(1).double(), wanted.flatten(1).double(), strict=True):
            distance, length = float((got - true).norm()), float(true.norm())
            if not distance <= allowed * length:  # also where there is a NaN
                raise NotMixableError(
                    f"an answer in a mixed batch is {distance:.2g} off, and {length:.2g} long"
                )

    def _tokens(self) -> torch.Tensor:
        model: Any = self.model  # of transformers, or else it is refused
        table = model.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        shape = (_ROWS, _POSITIONS)
        found = torch.randint(table.num_embeddings, shape, generator=generator)
        return found.to(table.weight.device)

    def _answer(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        return (found if isinstance(found, torch.Tensor) else found[0]).clone()

    @contextlib.contextmanager
    def _running(self, rows: int, segments: Sequence[tuple[MixedTask, int, int]]) -> Iterator[None]:
        groups = range(len(self._resident.groups)) if segments else ()
        tasks = [self._together([task.changes[i] for task, _, _ in segments], i) for i in groups]
        self._batch = _Batch(rows, segments, tasks)
        try:
            with torch.no_grad():
                yield
        finally:
            self._batch = None

    def _together(self, changes: Sequence[Changes | None], group: int) -> Tasks | None:
        tensors = self._resident.groups[group]
        if tensors.float_kind == INTEGER or not any(changes):
            return None
        nothing = Changes(tensors, [None] * len(tensors.words))
        return Tasks([each or nothing for each in changes])

    def _add(self, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> Any:
        """Of linear layers."""
        if self._batch is None or not self._batch.segments:
            return None
        x = _first(args, kwargs)
        output = output.contiguous()
        y = output.view(-1, output.shape[-1])
        group, number = self._places.get(module, (0, 0))
        tasks = self._batch.tasks[group] if module in self._places else None
        if tasks and any(each.forms[number] for each in tasks.changes):
            times = self._batch.times(x, module) * (y.shape[0] // x.shape[0])
            starts = self._batch.starts_of(times, x.device)
            resident.delta_matmul(tasks, number, x.reshape(-1, x.shape[-1]), y, starts)
        for task, first, end in self._batch.segments:
            if module in task.biases:
                self._batch.part(output, module, first, end).add_(task.biases[module])
        return output

    def _expand(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Of embeddings: positions that are the same for all rows become each row's own."""
        batch = self._batch
        if batch is None or not any(module in task.tables for task, _, _ in batch.segments):
            return None
        ids = _first(args, kwargs)
        if ids.shape[:1] != (1,):
            return None
        ids = ids.expand(batch.rows, *ids.shape[1:])
        return ((ids, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): ids})

    def _overwrite(self, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        """Of embeddings."""
        ids = _first(args, kwargs)
        batch = self._batch
        if batch is None:
            return
        for task, first, end in batch.segments:
            if module in task.tables:
                own_ids = batch.part(ids, module, first, end)
                out = batch.part(output, module, first, end)
                task.tables[module].write(own_ids.reshape(-1), out.view(-1, out.shape[-1]))

    def _recompute(self, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        """Of norms."""
        batch = self._batch
        if batch is None:
            return
        for task, first, end in batch.segments:
            if module not in task.small:
                continue

            own = partial(batch.part, module=module, first=first, end=end)
            self._batch = None  # the module is called once more
            try:
                named = {name: own(value) for name, value in kwargs.items()}
                own_args = tuple(own(value) for value in args)
                found = functional_call(module, task.small[module], own_args, named)
            finally:
                self._batch = batch
            own(output).copy_(found)


def _form(changes: Sequence[Changes | None], weight: Weight) -> Form | None:
    """How a task changes a weight; what is not contiguous can't be changed."""
    group = changes[weight.place[0]] if weight.place else None
    return group.forms[weight.place[1]] if group and weight.place else None


def _linear_weights(weight: Weight) -> list[tuple[nn.Module, str]]:
    """The linear layers that multiply with a weight."""
    if weight.tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return []
    owners = ((module, leaf) for module, leaf, _ in weight.owners)
    return [each for each in owners if type(each[0]) is nn.Linear and each[1] == "weight"]


def _is_plain_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.max_norm is None


def _is_small(module: nn.Module, leaf: str) -> bool:
    """Whether it is a parameter of a norm, or of another module of parameters of one dimension."""
    is_leaf = not any(True for _ in module.children())
    sizes = [each.dim() for each in module._parameters.values() if each is not None]
    return is_leaf and leaf in module._parameters and max(sizes, default=0) <= 1


def _refusal(weight: Weight, where: str) -> NotMixableError:
    return NotMixableError(f"it changes {weight.names[0]!r} of a {where}")


def _rebuilt(tensor: torch.Tensor, form: Form) -> torch.Tensor:
    out = torch.empty_like(tensor)
    resident.rebuild(Changes(Tensors([tensor]), [form]), Tensors([out]))
    return out


def _table(base: torch.Tensor, rebuilt: torch.Tensor) -> _Table:
    word = Tensors([base]).word
    rows, columns = (rebuilt.view(word) != base.view(word)).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(base))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _Table(starts, columns, rebuilt[rows, columns])


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a module is called with."""
    found: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return found
