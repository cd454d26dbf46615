"""Merged models as checkpoints that are computed while they are read, and writing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nps_compress._progress import bar
from nps_compress._threads import MEMORY_SLACK, bounded_map
from nps_compress.candidates import slices
from nps_compress.checkpoint import Checkpoint, pair
from nps_compress.dtypes import Words, octets, to_float32
from nps_compress.errors import InvalidArgumentError
from nps_compress.merging.merger import Merger, Plan
from nps_compress.packing import write
from nps_compress.unpacking import DEFAULT_SHARD_BYTES, shards_of, write_headers

METADATA_KEY = "merge"


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """``model`` with its merged tensors replaced. ``merged_as``: their names in the base."""

    model: Checkpoint
    merger: Merger
    plan: Plan
    number: int
    merged_as: Mapping[str, str]

    def read_into(self, name: str, words: Words) -> None:
        """Fill ``words``, [numel], with the tensor.

        Raises:
            CheckpointError; InvalidArgumentError: merging left the range of the dtype.
        """
        if name not in self.merged_as:
            self.model.read_into(name, words)
            return
        found = self.merger.merged(self.merged_as[name], self.plan)[self.number]
        dtype = self.tensors[name].dtype
        if not np.isfinite(to_float32(found, dtype)).all():
            expected = f"small enough that {name!r} stays finite in {dtype.name}"
            raise InvalidArgumentError("scale", self.plan.settings.scale, expected)
        np.copyto(words, found)

    def read_side_file(self, name: str) -> bytes:
        """The bytes of a side file."""
        return self.model.read_side_file(name)


def merged_base(merger: Merger, plan: Plan) -> MergedCheckpoint:
    """The base with what was merged: all that the tasks share, nothing that only some have."""
    return _replaced(merger.base, merger, plan, 0, {name: name for name in merger.names})


def merged_task(merger: Merger, plan: Plan, task: int) -> MergedCheckpoint:
    """A task with what was merged; its other tensors, as its head, are its own."""
    names = {merger.found_in[task][name]: name for name in merger.names}
    number = task if plan.method.per_task else 0
    return _replaced(merger.tasks[task], merger, plan, number, names)


def _replaced(
    model: Checkpoint, merger: Merger, plan: Plan, number: int, names: Mapping[str, str]
) -> MergedCheckpoint:
    tensors = dict(model.tensors)
    for own, base_name in names.items():
        base = merger.base.tensors[base_name]
        tensors[own] = replace(tensors[own], dtype=base.dtype, nbytes=base.nbytes)
    files = model.side_files
    return MergedCheckpoint(
        model.path, model.name, tensors, files, model, merger, plan, number, names
    )


def write_checkpoint(found: MergedCheckpoint, folder: Path, progress: bool) -> int:
    """Fill a folder that is there with weights and side files. -> bytes of the weights."""
    shards = shards_of(found.tensors.values(), DEFAULT_SHARD_BYTES)
    places = write_headers(folder, shards)

    def run(name: str) -> int:
        words = found.read(name)
        path, offset = places[name]
        with path.open("r+b") as stream:
            stream.seek(offset)
            for part in slices(words.size):
                stream.write(octets(words[part]))
        return words.nbytes

    copies = 2 + len(found.merger.tasks)
    largest = max(tensor.nbytes for tensor in found.tensors.values())
    budget = copies * largest + MEMORY_SLACK
    written = 0
    with bar(len(found.tensors), "merging", "tensor", progress) as advance:
        tensors = found.tensors
        for nbytes in bounded_map(run, tensors, lambda n: copies * tensors[n].nbytes, budget):
            written += nbytes
            advance()
    for name in found.side_files:
        (folder / name).write_bytes(found.read_side_file(name))
    return written


def write_packed(
    found: MergedCheckpoint, out: Path, said: Mapping[str, str], force: bool, progress: bool
) -> int:
    """Write a ``.nps`` file that keeps every changed bit. -> its bytes."""
    pair_ = pair(found.merger.base, found)
    return write(pair_, None, out, said, force, progress).file_bytes
