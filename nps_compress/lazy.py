"""A fine-tune's tensors as the loaders of model frameworks take them: rebuilt when they are read.

Names, dtypes and shapes are those of the fine-tune's checkpoint, before a framework renames,
merges, shards or quantises anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nps_compress import torch_words
from nps_compress.checkpoint import Checkpoint, open_checkpoint
from nps_compress.dtypes import DType, Words, digest
from nps_compress.errors import NpsError
from nps_compress.format.records import TensorEntry
from nps_compress.unpacking import (
    check_content,
    check_layout,
    first_difference,
    open_task,
    right_base,
    side_files_of,
)


class LazyTensor:
    """A tensor that is read when it is indexed, as a slice of ``safetensors`` is.

    ``tensor[...]`` is the whole, a new one on the CPU each time; any other index is of that, and
    keeps no more than its own memory.

    Raises:
        NpsError: what reading raises.
    """

    def __init__(self, dtype: DType, shape: tuple[int, ...], read: Callable[[], Words]) -> None:
        self._dtype, self._read = dtype, read
        self.dtype = torch_words.torch_dtype(dtype)
        self.shape = torch.Size(shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole = torch_words.from_numpy(self._read(), self._dtype, tuple(self.shape))
        return whole if index is Ellipsis else whole[index].clone()

    def get_dtype(self) -> str:
        """The dtype's name in safetensors."""
        return self._dtype.name

    def get_shape(self) -> list[int]:
        """The shape of the whole."""
        return list(self.shape)

    def is_floating_point(self) -> bool:
        """As of the tensor."""
        return self.dtype.is_floating_point


class LazyTensors(Mapping[str, LazyTensor]):
    """A fine-tune's tensors by their names in its checkpoint, in order of their UTF-8 names.

    ``tensors[name][...]`` reads the base's tensor, rebuilds the fine-tune's on the CPU and checks
    the digest that the file promises. Any number of threads may read. ``error`` is the first one
    that a read raised: some frameworks replace it by their own.

    ``side_files``: the fine-tune's other files by name, config.json among them.

    base: a folder, a file or a Hub id; task: a ``.nps`` file.

    Raises:
        CheckpointError, InvalidArgumentError, FormatError: a file can't be read or is damaged.
        BaseMismatchError: a name, dtype, shape or side file of the base is not what the task was
        made from. Reading a tensor raises the same.
    """

    def __init__(self, base: str | Path | Checkpoint, task: str | Path) -> None:
        self.base = base if isinstance(base, Checkpoint) else open_checkpoint(base)
        self.task = open_task(task)
        self.error: NpsError | None = None
        self._digests: dict[str, bytes] = {}
        self._lock = threading.Lock()
        try:
            check_layout(self.task, self.base, self.task.reader.tensors)
            self._all_files = dict(side_files_of(self.task, self.base))
        except BaseException:
            self.close()
            raise

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """The fine-tune's files beside the weights, by name."""
        return self._all_files

    def __enter__(self) -> LazyTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the task's file; nothing can be read any more."""
        self.task.close()

    def __getitem__(self, name: str) -> LazyTensor:
        entry = self.task.entries[name]
        return LazyTensor(entry.dtype, entry.shape, lambda: self._rebuilt(entry))

    def __iter__(self) -> Iterator[str]:
        return iter(self.task.entries)

    def __len__(self) -> int:
        return len(self.task.entries)

    def check_content(self) -> None:
        """Check the digest over the whole fine-tune, where every tensor was read at least once.

        Raises:
            FormatError, BaseMismatchError: it is another one.
        """
        if len(self._digests) == len(self):
            check_content(self.task, self.base, self._digests, self._all_files)

    def _rebuilt(self, entry: TensorEntry) -> Words:
        try:
            base_name = self.task.base_tensor_name(entry.name)
            before = self.base.read(base_name) if base_name else None
            with right_base(self.task, self.base):
                words = self.task.rebuild_words(entry.name, before)
            found = digest(words)
            if not found.startswith(entry.digest):
                raise first_difference(self.task, self.base) or self.task.damaged(entry.name)
        except NpsError as error:
            with self._lock:
                self.error = self.error or error
            raise
        with self._lock:
            self._digests[entry.name] = found
        return words


def base_tensors(base: Checkpoint) -> dict[str, LazyTensor]:
    """A checkpoint's own tensors, by name. Reading one raises CheckpointError."""
    return {
        name: LazyTensor(tensor.dtype, tensor.shape, tensor.read)
        for name, tensor in base.tensors.items()
    }


def base_under_names_of(tensors: LazyTensors) -> dict[str, LazyTensor]:
    """The base's tensors under the fine-tune's names; what the base lacks is the fine-tune's."""
    own = base_tensors(tensors.base)
    found = {}
    for name, tensor in tensors.items():
        before = own.get(tensors.task.base_tensor_name(name) or name)
        alike = before is not None and (before.shape, before.dtype) == (tensor.shape, tensor.dtype)
        found[name] = before if before is not None and alike else tensor
    return found
