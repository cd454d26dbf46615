"""A ``.nps`` file as a checkpoint: what a fine-tune is read from need not be on disk as weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nps_compress.checkpoint import SIDE_FILES, Checkpoint, StoredTensor, open_checkpoint
from nps_compress.dtypes import Words
from nps_compress.reconstruct import Task
from nps_compress.unpacking import check_layout, open_task, rebuilt, side_files_of

SUFFIX = ".nps"


@dataclass(frozen=True)
class PackedCheckpoint(Checkpoint):
    """Tensors are rebuilt, and checked by their digests, whenever they are read."""

    task: Task
    base: Checkpoint
    contents: Mapping[str, bytes]  # of the side files

    def read_into(self, name: str, words: Words) -> None:
        """Fill ``words``, [numel], with the tensor.

        Raises:
            FormatError: the file is damaged. BaseMismatchError: the base is another one.
        """
        ((_, found),) = rebuilt(self.task, self.base, [self.task.entry(name)])
        np.copyto(words, found)

    def read_side_file(self, name: str) -> bytes:
        """The bytes of a side file."""
        return self.contents[name]


def is_packed(source: str | Path) -> bool:
    """Whether this names a ``.nps`` file rather than a checkpoint."""
    return Path(source).suffix == SUFFIX


def open_finetuned(base: Checkpoint, source: str | Path) -> Checkpoint:
    """Open a checkpoint, or a ``.nps`` file of ``base``.

    Raises:
        CheckpointError, FormatError, BaseMismatchError, InvalidArgumentError (no such file).
    """
    if not is_packed(source):
        return open_checkpoint(source)
    path, task = Path(source), open_task(source)
    check_layout(task, base, task.reader.tensors)
    tensors = {
        entry.name: StoredTensor(
            entry.name, entry.dtype, entry.shape, path, 0, entry.numel * entry.dtype.itemsize
        )
        for entry in task.reader.tensors
    }
    contents = {name: data for name, data in side_files_of(task, base) if name in SIDE_FILES}
    files = dict.fromkeys(contents, path)
    return PackedCheckpoint(path, path.stem, tensors, files, task, base, contents)
