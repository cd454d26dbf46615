"""Time what a deployment does with one task, and refuse every time whose result is not exact."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from nps_compress._threads import MEMORY_SLACK, bounded_map
from nps_compress.checkpoint import Checkpoint, open_checkpoint
from nps_compress.dtypes import Words
from nps_compress.errors import BenchmarkError
from nps_compress.format.layout import Op
from nps_compress.inspection import inspect
from nps_compress.packed import is_packed
from nps_compress.packing import PackReport, pack
from nps_compress.recipe import Recipe
from nps_compress.unpacking import open_task, rebuilt, unpack

STEPS = ("pack", "unpack", "copy", "plain load", "load", "switch")

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """One task. Sizes in bytes; ``seconds``: of each of STEPS that was run, the median.

    ``changed_bytes``: of the rebuilt weights, those of tensors that differ from the base's.
    ``shapes``: of the tensors that the base has too; ``new_params``: elements of the others.
    """

    name: str
    tensors: int
    file_bytes: float
    dense_bytes: float
    changed_bytes: float
    params: float
    new_params: int
    shapes: dict[str, tuple[int, ...]]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Job:
    """A task to measure: a fine-tune to pack, by ``recipe`` or (None) lossless, or a ``.nps`` file.

    ``folder``: where to work; its disk is the one that is measured.
    """

    base: str | Path
    task: str | Path
    name: str
    recipe: Recipe | None
    folder: Path
    on_step: Callable[[str], None] = field(default=lambda _: None)

    @property
    def is_packed(self) -> bool:
        """Whether the task is a ``.nps`` file already, so that nothing is packed."""
        return is_packed(self.task)


def measure(job: Job, repeat: int, discard: int = 0) -> Measured:
    """Medians over ``repeat`` rounds, after ``discard`` rounds that are not counted.

    Raises:
        BenchmarkError: a step's result is not what the file promises.
        CheckpointError, FormatError, BaseMismatchError, WriteError, ...: as pack and unpack.
    """
    rounds = [_round(job) for _ in range(discard + repeat)]
    seconds = {
        step: statistics.median(times[step] for times in rounds[discard:]) for step in rounds[0]
    }
    with open_task(_file(job)) as task:
        entries = task.reader.tensors
        shapes = {entry.name: entry.shape for entry in entries if entry.op is not Op.NEW}
        nbytes = {entry.name: entry.numel * entry.dtype.itemsize for entry in entries}
        return Measured(
            job.name,
            len(entries),
            task.reader.file_bytes,
            sum(nbytes.values()),
            sum(nbytes[entry.name] for entry in entries if entry.op is not Op.COPY),
            sum(entry.numel for entry in entries),
            sum(entry.numel for entry in entries if entry.op is Op.NEW),
            shapes,
            seconds,
        )


def _file(job: Job) -> Path:
    return Path(job.task) if job.is_packed else job.folder / "task.nps"


def _round(job: Job) -> dict[str, float]:
    seconds = {}
    file, out, copied = _file(job), job.folder / "unpacked", job.folder / "copy"

    def timed(step: str, run: Callable[[], T]) -> T:
        job.on_step(step)
        start = time.perf_counter()
        result = run()
        seconds[step] = time.perf_counter() - start
        return result

    if not job.is_packed:
        lossless = job.recipe is None
        said = timed(
            "pack",
            lambda: pack(
                job.base, job.task, file, recipe=job.recipe, lossless=lossless, force=True
            ),
        )
        _check_packed(job, said)
    timed("unpack", lambda: unpack(job.base, file, out, force=True))
    unpacked = open_checkpoint(out)
    _check(job, "unpacked", _streamed(unpacked))
    if unpacked.tensors.keys() != _names(file):
        raise BenchmarkError(job.name, "unpacked, it has other tensors than the file")
    timed("copy", lambda: _copy(out, copied))
    timed("plain load", lambda: _read(unpacked))
    held = timed("load", lambda: _load(job.base, file))
    resident = _read(open_checkpoint(job.base))
    for words in held.values():  # as another task's weights: nothing of this one is left
        np.invert(words, out=words)
    switched = timed("switch", lambda: _switch(resident, held, file))
    _check(job, "switched to", switched.items())
    return seconds


def _copy(source: Path, target: Path) -> None:
    """Every weight file, by the operating system, without waiting for the disk (as unpack)."""
    target.mkdir(exist_ok=True)
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)


def _load(base: str | Path, file: Path) -> dict[str, Words]:
    """All tensors from a base on disk and the file, each checked against its digest."""
    with open_task(file) as task:
        found = rebuilt(task, open_checkpoint(base), task.reader.tensors)
        return {entry.name: words for entry, words in found}


def _read(checkpoint: Checkpoint) -> dict[str, Words]:
    """All tensors of a plain checkpoint, with the threads that :func:`_load` has."""
    sizes = {name: tensor.nbytes for name, tensor in checkpoint.tensors.items()}
    budget = 2 * max(sizes.values(), default=0) + MEMORY_SLACK
    read = bounded_map(checkpoint.read, sizes, sizes.__getitem__, budget)
    return dict(zip(sizes, read, strict=True))


def _switch(resident: dict[str, Words], held: dict[str, Words], file: Path) -> dict[str, Words]:
    """Rebuild what the task changes, where the last task's tensors are held, from a base in memory
    that stays as it is. Digests are left to the caller."""
    with open_task(file) as task:

        def run(name: str) -> Words:
            source = task.base_tensor_name(name)
            if source is None:
                return task.rebuild_words(name, None)
            np.copyto(held[name], resident[source])
            return task.rebuild_words(name, held[name])

        changed = [name for name in task.names if task.entry(name).op is not Op.COPY]
        # The largest first, so that no thread is left with it at the end.
        changed.sort(key=lambda name: -task.entry(name).numel)
        return dict(zip(changed, bounded_map(run, changed, lambda _: 0, 0), strict=True))


def _check_packed(job: Job, said: PackReport) -> None:
    """The file holds what the packer says, and, lossless, every tensor of the fine-tune."""
    found = inspect(said.path)
    for name in ("file_bytes", "total_params", "nnz", "base_root"):
        if found[name] != getattr(said, name):
            raise BenchmarkError(
                job.name, f"its {name} is {found[name]}, the packer said {getattr(said, name)}"
            )
    if job.recipe is None:
        _check(job, "in the fine-tune", _streamed(open_checkpoint(job.task)))


def _check(job: Job, where: str, tensors: Iterable[tuple[str, Words]]) -> None:
    """Each of these has the digest that the file promises."""
    with open_task(_file(job)) as task:
        for name, words in tensors:
            if name not in task.entries or not task.matches(name, words):
                raise BenchmarkError(
                    job.name, f"{where}, tensor {name!r} is not what the file promises"
                )


def _streamed(checkpoint: Checkpoint) -> Iterator[tuple[str, Words]]:
    return ((name, checkpoint.read(name)) for name in checkpoint.tensors)


def _names(file: Path) -> set[str]:
    with open_task(file) as task:
        return set(task.names)
