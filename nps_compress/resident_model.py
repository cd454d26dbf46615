"""A model whose weights in memory become one task after another, and the base's again.

Where a task's tensors lie in the model, and how they are put there: those of the model's own shape
are exchanged in place, others (a head of another number of classes) take the parameter's place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nps_compress import resident, torch_words
from nps_compress._threads import MEMORY_SLACK, bounded_map
from nps_compress.checkpoint import Checkpoint, StoredTensor
from nps_compress.codecs import ValueCodec
from nps_compress.dtypes import Words, digest
from nps_compress.errors import BaseMismatchError, CheckpointError, TaskBankError
from nps_compress.format.layout import Op
from nps_compress.format.records import TensorEntry, has_digest
from nps_compress.kernels.form import Form, to_device
from nps_compress.kernels.table import Changes, Tensors
from nps_compress.models import weights_of
from nps_compress.reconstruct import Task

_NEED_NO_BASE = (ValueCodec.REPLACE, ValueCodec.SIGNS)
Owner = tuple[nn.Module, str, torch.Tensor]  # and what it holds of its own
Key = tuple[int, torch.Size, torch.dtype]


@dataclass(frozen=True)
class TaskForms:
    """What a task changes in a model, on the host.

    forms: by the number of the weight; whole: tensors that take a weight's place, likewise.
    """

    forms: dict[int, Form]
    whole: dict[int, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(form.nbytes for form in self.forms.values()) + _nbytes(self.whole.values())


@dataclass(frozen=True, eq=False)
class ResidentTask:
    """The same where the weights are: ready to be exchanged. changes: one a group of weights."""

    changes: tuple[Changes | None, ...]
    whole: dict[int, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(each.nbytes for each in self.changes if each) + _nbytes(self.whole.values())


@dataclass
class Weight:
    """A parameter or buffer, and what the base has there.

    ``names``: those that lead to it in the model's file, several where weights are tied. ``file``:
    the base's tensor; None where the base has none, and ``kept`` is then a copy of the model's.
    """

    names: list[str]
    tensor: torch.Tensor
    owners: list[Owner]
    file: StoredTensor | None = None
    kept: Words | None = None
    digest: bytes = b""
    place: tuple[int, int] | None = None  # its group and number there; None: not contiguous
    held: torch.Tensor | None = None  # what has taken its place

    def base_words(self) -> Words:
        """The base's words from its file, checked. -> [numel]."""
        if self.file is None:
            assert self.kept is not None
            return self.kept.copy()
        words = self.file.read()
        if digest(words) != self.digest:
            raise CheckpointError(self.file.file, f"tensor {self.file.name!r} has changed")
        return words


class ResidentModel:
    """The weights of a model that was loaded from a base checkpoint, in the checkpoint's dtypes.

    model: any module whose state dict has the checkpoint's names, or a model of transformers; it
    must stay where it is. Not thread-safe but for :meth:`load`.

    Raises:
        CheckpointError: a weight is not what the checkpoint holds.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        prefix = getattr(model, "base_model_prefix", "")
        self._prefix = f"{prefix}." if prefix else ""
        self._weights = list(_weights(model))
        self._by_name = {name: i for i, w in enumerate(self._weights) for name in w.names}
        for weight in self._weights:
            self._find_in_checkpoint(weight)
        largest = max((w.tensor.nbytes for w in self._weights), default=0)
        done = bounded_map(
            self._check, self._weights, lambda w: 2 * w.tensor.nbytes, 4 * largest + MEMORY_SLACK
        )
        for _ in done:
            pass
        self._groups = self._grouped()
        self._left: list[torch.Tensor | None] = [None] * len(self._groups)  # of the active task
        self._spare: list[torch.Tensor | None] = [None] * len(self._groups)
        self._broken = False

    @property
    def weights(self) -> Sequence[Weight]:
        """Every weight once."""
        return self._weights

    @property
    def groups(self) -> Sequence[Tensors]:
        """Contiguous weights of one dtype on one device together; a task's changes are by group."""
        return self._groups

    @property
    def on_host(self) -> bool:
        """Whether all weights are on the CPU."""
        return all(group.device.type == "cpu" for group in self._groups)

    @property
    def undo_bytes(self) -> int:
        """Bytes of the buffers that hold the base's words while a task is active."""
        return _nbytes(each for each in (*self._left, *self._spare) if each is not None)

    def load(self, task: Task, *, verify: bool) -> TaskForms:
        """A task's changes, decoded. ``verify``: every tensor must get the digest it promises.

        Any number of threads may load, whatever is active: the base is read from its files.

        Raises:
            FormatError: the task is damaged. BaseMismatchError: it is of another base.
            CheckpointError: it has a tensor for which the model has no place, or lacks one.
        """
        found: dict[int, TensorEntry] = {}
        for entry in task.reader.tensors:
            number = self._number_of(task, entry)
            if number is None:
                continue
            other = found.setdefault(number, entry)
            if other.digest != entry.digest or other.shape != entry.shape:
                raise self._misfit(
                    task, entry, f"is tied to {other.name!r} in the model, and differs from it"
                )
        self._check_complete(task, found)
        changed = [(i, entry) for i, entry in found.items() if entry.op is not Op.COPY]
        forms: dict[int, Form] = {}
        whole: dict[int, torch.Tensor] = {}

        def run(item: tuple[int, TensorEntry]) -> Form | torch.Tensor:
            return self._loaded(task, *item, verify)

        def cost(item: tuple[int, TensorEntry]) -> int:
            return 4 * item[1].numel * item[1].dtype.itemsize

        budget = max(map(cost, changed), default=0) + MEMORY_SLACK
        for (number, _), part in zip(changed, bounded_map(run, changed, cost, budget), strict=True):
            if isinstance(part, Form):
                forms[number] = part
            else:
                whole[number] = part
        return TaskForms(forms, whole)

    def place(self, forms: TaskForms) -> ResidentTask:
        """Put a task's changes where the weights are. On the CPU nothing is copied.

        Raises:
            OutOfMemoryError of torch: there is no room.
        """
        changes: list[Changes | None] = []
        for number, group in enumerate(self._groups):
            mine = {
                weight.place[1]: forms.forms[i]
                for i, weight in enumerate(self._weights)
                if weight.place and weight.place[0] == number and i in forms.forms
            }
            moved = dict(zip(mine, to_device(list(mine.values()), group.device), strict=True))
            every = [moved.get(at) for at in range(len(group.words))]
            changes.append(Changes(group, every) if mine else None)
        whole = {i: t.to(self._weights[i].tensor.device) for i, t in forms.whole.items()}
        return ResidentTask(tuple(changes), whole)

    def switch(self, former: ResidentTask | None, target: ResidentTask | None) -> None:
        """Take one task out and put another in; None is the base.

        Where this raises, the weights are those of neither until :meth:`restore_base`.

        Raises:
            TaskBankError: the model's weights are no longer those it had.
        """
        self.check_untouched()
        left = former.changes if former else (None,) * len(self._groups)
        right = target.changes if target else (None,) * len(self._groups)
        new = [self._buffer(number, changes) for number, changes in enumerate(right)]
        self._broken = True
        for number, (out, into) in enumerate(zip(left, right, strict=True)):
            if out and into:
                resident.switch(out, into, self._left[number], new[number])
            elif out:
                resident.exchange(out, self._left[number], undo=True)
            elif into:
                resident.exchange(into, new[number])
        for number in former.whole if former else ():
            self._hold(number, None)
        for number, tensor in target.whole.items() if target else ():
            self._hold(number, tensor)
        for group in self._groups:
            if group.device.type == "cuda":
                torch.cuda.synchronize(group.device)
        for number, buffer in enumerate(new):
            if buffer is not None:  # it was the spare one
                self._spare[number] = None
            if self._left[number] is not None:
                self._spare[number] = self._left[number]
            self._left[number] = buffer
        self._broken = False

    def rebuilt_bytes(self, task: ResidentTask) -> int:
        """Bytes that :meth:`rebuilt` would take."""
        numbers, rest = self._exchanged(task)
        tensors = [self._weights[number].tensor for number in numbers]
        nbytes = _nbytes((*tensors, *task.whole.values()))
        return nbytes + sum(each.nbytes for each in rest if each)

    def rebuilt(self, task: ResidentTask) -> ResidentTask:
        """The active task with its weights as they are now, which take the model's place.

        Switching to it moves no words, and it takes as much memory as all weights it changes.

        Raises:
            OutOfMemoryError of torch, MemoryError: there is no room.
        """
        numbers, rest = self._exchanged(task)
        whole = {number: self._weights[number].tensor.detach().clone() for number in numbers}
        return ResidentTask(rest, {**whole, **task.whole})

    def _exchanged(self, task: ResidentTask) -> tuple[list[int], tuple[Changes | None, ...]]:
        """The weights that a task exchanges and that can be taken the place of; the rest of it."""
        numbers: list[int] = []
        rest: list[list[Form | None]] = [[None] * len(group.words) for group in self._groups]
        for number, weight in enumerate(self._weights):
            changes = task.changes[weight.place[0]] if weight.place else None
            form = changes.forms[weight.place[1]] if changes and weight.place else None
            if form is None:
                continue
            if weight.owners:
                numbers.append(number)
            elif weight.place:
                rest[weight.place[0]][weight.place[1]] = form
        return numbers, tuple(
            Changes(group, forms) if any(forms) else None
            for group, forms in zip(self._groups, rest, strict=True)
        )

    @property
    def broken(self) -> bool:
        """Whether a switch failed half-way."""
        return self._broken

    def restore_base(self) -> None:
        """Write the base over whatever the weights are, from its files.

        Raises:
            CheckpointError: they can't be read, or are not what they were.
        """
        for number, weight in enumerate(self._weights):
            self._hold(number, None)
            words = torch_words.from_numpy(
                weight.base_words(), torch_words.dtype_of(weight.tensor), tuple(weight.tensor.shape)
            )
            with torch.no_grad():
                weight.tensor.copy_(words)
        self._left = [None] * len(self._groups)
        self._broken = False

    def check_untouched(self) -> None:
        """Raise TaskBankError where the model no longer has the weights it had."""
        for weight in self._weights:
            wanted = _key(weight.tensor if weight.held is None else weight.held)
            for module, leaf, _ in weight.owners:
                now = getattr(module, leaf, None)
                if now is None or _key(now) != wanted:
                    raise TaskBankError(
                        f"weight {weight.names[0]!r} of the model was moved or replaced "
                        "since the bank was made"
                    )

    def _find_in_checkpoint(self, weight: Weight) -> None:
        for name in weight.names:
            for spelling in self._spellings(name):
                file = self.checkpoint.tensors.get(spelling)
                if file is not None and file.shape == tuple(weight.tensor.shape):
                    weight.file = file
                    return

    def _check(self, weight: Weight) -> None:
        """Compare a weight with the base's file, and note its digest."""
        tensor, file = weight.tensor, weight.file
        if tensor.is_meta or isinstance(tensor, DTensor):
            raise self._unusable(weight, "is not in this process's memory as a whole")
        words = torch_words.to_numpy(torch_words.words_of(tensor))
        weight.digest = digest(words)
        if file is None:
            weight.kept = words.copy()
        elif torch_words.dtype_of(tensor) != file.dtype:
            raise self._unusable(
                weight,
                f"is {torch_words.dtype_of(tensor).name}, the base's tensor {file.dtype.name}: "
                "load the model in the checkpoint's own dtype",
            )
        elif digest(file.read()) != weight.digest:
            raise self._unusable(weight, f"is not what {file.file.name} holds as {file.name!r}")

    def _unusable(self, weight: Weight, why: str) -> CheckpointError:
        return CheckpointError(self.checkpoint.path, f"the model's {weight.names[0]!r} {why}")

    def _grouped(self) -> list[Tensors]:
        """Contiguous weights of one dtype on one device together."""
        groups: dict[tuple[torch.dtype, torch.device], list[Weight]] = {}
        for weight in self._weights:
            if weight.tensor.is_contiguous():
                groups.setdefault((weight.tensor.dtype, weight.tensor.device), []).append(weight)
        for number, members in enumerate(groups.values()):
            for at, weight in enumerate(members):
                weight.place = (number, at)
        return [Tensors([weight.tensor for weight in members]) for members in groups.values()]

    def _spellings(self, name: str) -> Iterator[str]:
        """A name as a checkpoint with or without the body's prefix ("bert.") has it."""
        yield name
        if self._prefix:
            yield name.removeprefix(self._prefix)
            yield self._prefix + name

    def _number_of(self, task: Task, entry: TensorEntry) -> int | None:
        """The number of the weight that a tensor is for, None where it needs none.

        Raises:
            CheckpointError: there is none. BaseMismatchError: it has another base tensor.
        """
        base_name = task.base_tensor_name(entry.name)
        names = [*self._spellings(entry.name), *(self._spellings(base_name) if base_name else ())]
        number = next((self._by_name[name] for name in names if name in self._by_name), None)
        if number is None:
            ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
            if entry.op is Op.COPY or any(re.search(each, entry.name) for each in ignored):
                return None
            raise self._misfit(task, entry, "has no place in the model")
        if entry.base_index is not None:
            record = task.reader.base[entry.base_index]
            if not self._weights[number].digest.startswith(record.digest):
                raise BaseMismatchError(
                    self.checkpoint.path,
                    f"tensor {record.name!r}",
                    "has other values",
                    task.base_name,
                )
        return number

    def _misfit(self, task: Task, entry: TensorEntry, why: str) -> CheckpointError:
        return CheckpointError(task.reader.path, f"tensor {entry.name!r} {why}")

    def _check_complete(self, task: Task, found: dict[int, TensorEntry]) -> None:
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        for number, weight in enumerate(self._weights):
            if number in found or weight.file is None:
                continue
            if not any(re.search(each, name) for each in ignored for name in weight.names):
                name = weight.names[0]
                raise CheckpointError(
                    task.reader.path, f"has no tensor {name!r}, which the model takes from the base"
                )

    def _loaded(
        self, task: Task, number: int, entry: TensorEntry, verify: bool
    ) -> Form | torch.Tensor:
        weight = self._weights[number]
        alike = (torch_words.dtype_of(weight.tensor), tuple(weight.tensor.shape)) == (
            entry.dtype,
            entry.shape,
        )
        if entry.op is Op.NEW and not alike:
            if not weight.owners:
                raise self._misfit(task, entry, "is a part of one of the model's, of another shape")
            return task.rebuild(entry.name).to(weight.tensor.dtype)
        if weight.place is None:
            raise self._misfit(task, entry, "is not contiguous in the model")
        base = None
        if verify or (entry.op is Op.DELTA and entry.value_codec not in _NEED_NO_BASE):
            base = torch_words.from_numpy(weight.base_words(), entry.dtype, entry.shape)
        form = task.form(entry.name, base if entry.op is Op.DELTA else None)
        if verify:
            assert base is not None
            changes, out = Changes(Tensors([base]), [form]), torch.empty_like(base)
            resident.rebuild(changes, Tensors([out]))
            words = torch_words.to_numpy(torch_words.words_of(out))
            if changes.fault.item() or not has_digest(words, entry.digest):
                raise task.damaged(entry.name)
        return form

    def _buffer(self, number: int, changes: Changes | None) -> torch.Tensor | None:
        """Room for the words that an exchange leaves, beside those that the active task left."""
        if changes is None or not changes.old_words:
            return None
        spare = self._spare[number]
        if spare is None or spare.numel() < changes.old_words:
            group = self._groups[number]
            spare = torch.empty(changes.old_words, dtype=group.word, device=group.device)
            self._spare[number] = spare
        return spare

    def _hold(self, number: int, tensor: torch.Tensor | None) -> None:
        """Give a weight's owners another tensor; None: the model's own."""
        weight = self._weights[number]
        weight.held = tensor
        shared: dict[bool, nn.Parameter] = {}  # tied weights stay one parameter
        for module, leaf, own in weight.owners:
            if tensor is None:
                setattr(module, leaf, own)
            elif isinstance(own, nn.Parameter):
                trained = own.requires_grad
                if trained not in shared:
                    shared[trained] = nn.Parameter(tensor, requires_grad=trained)
                setattr(module, leaf, shared[trained])
            else:
                setattr(module, leaf, tensor)


def _weights(model: nn.Module) -> Iterator[Weight]:
    """Every weight once, by its names in the model's file."""
    is_of_transformers = hasattr(model, "base_model_prefix")
    named = weights_of(model) if is_of_transformers else model.state_dict()
    owners: dict[Key, list[Owner]] = {}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel():
                owners.setdefault(_key(tensor), []).append((module, leaf, tensor))
    found: dict[object, Weight] = {}
    for name, tensor in named.items():
        if isinstance(tensor, torch.Tensor):
            key = _key(tensor) if tensor.numel() else name
            weight = found.setdefault(key, Weight([], tensor, owners.get(_key(tensor), [])))
            weight.names.append(name)
    yield from found.values()


def _key(tensor: torch.Tensor) -> Key:
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
