"""A fine-tune's tensors from the stream of its base's, as engines read checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nps_compress.errors import BaseMismatchError, InvalidArgumentError

if TYPE_CHECKING:
    import torch

    from nps_compress.reconstruct import Task


def rebuilt_stream(
    base: Iterable[tuple[str, torch.Tensor]],
    task: Task,
    source: str | Path,
    *,
    whole: bool = True,
    others: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The task's tensors under their own names, each rebuilt and verified when it is asked for.

    They come in the order of the base tensors they are made from, so that an engine has a layer
    together; those without one come last. What the fine-tune lacks is left out.

    base: names and tensors of the base's checkpoint; source: what it is called in errors; whole:
    every tensor of the base must come; others: what the base the task was made from does not have
    passes unchanged.

    Raises:
        BaseMismatchError: the base is another one. FormatError: the file is damaged.
    """
    derived: dict[str, list[str]] = defaultdict(list)
    records = {record.name for record in task.reader.base}
    new = {name for name in task.names if task.base_tensor_name(name) is None}
    for name in task.names:
        if (base_name := task.base_tensor_name(name)) is not None:
            derived[base_name].append(name)
    for base_name, tensor in base:
        if base_name not in records:
            if not others:
                raise _mismatch(source, task, base_name, "is not in it")
            yield base_name, tensor
            continue
        for name in derived.pop(base_name, ()):
            yield name, task.rebuild(name, tensor)
        if base_name in new:  # of another shape or dtype, in the same place
            new.remove(base_name)
            yield base_name, task.rebuild(base_name)
    if whole and derived:
        raise _mismatch(source, task, min(derived), "is missing")
    for name in sorted(new):
        yield name, task.rebuild(name)


def refuse_other_shape(task: Task) -> None:
    """Refuse a task that can't take the place of its base in a model that is already built.

    Raises:
        InvalidArgumentError: it adds, lacks or resizes a tensor.
    """
    before = {record.name: record.shape for record in task.reader.base}
    after = {entry.name: entry.shape for entry in task.reader.tensors}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            expected = f"of the shapes of its base ({name!r} differs); vLLM can serve it by itself"
            raise InvalidArgumentError("task", str(task.reader.path), expected)


def _mismatch(source: str | Path, task: Task, name: str, difference: str) -> BaseMismatchError:
    return BaseMismatchError(source, f"tensor {name!r}", difference, task.base_name)
