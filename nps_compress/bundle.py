"""Many tasks of one base in a folder, where they share the base's table.

A bundle is a folder with ``base.nps`` and one ``.nps`` file a task. ``base.nps`` holds the
base's table; the index of a task is compressed with that of ``base.nps`` as
dictionary (SPEC.md, bundles). It follows from the base's table alone, which every task lists, so
that the first one brings it along, and tasks of one base can move from bundle to bundle. Tasks
don't know of each other: to add or remove one touches no other file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nps_compress.atomic import (
    atomic_file,
    os_errors_as_write_errors,
    refuse_existing,
    refuse_input_as_output,
)
from nps_compress.errors import BaseMismatchError, InvalidArgumentError, OutputExistsError
from nps_compress.format.layout import DICTIONARY_FILE, FOOTER_BYTES
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import BaseTensor
from nps_compress.format.writer import FILE_NAME, NpsWriter, index_and_footer
from nps_compress.reconstruct import Task
from nps_compress.unpacking import open_task

SUFFIX = ".nps"
_BASE = DICTIONARY_FILE.removesuffix(SUFFIX)
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows


@dataclass(frozen=True)
class BundledTask:
    """One task of a bundle. Sizes in bytes: of its file, of the index in it, and of the same task
    as a file that needs no other."""

    name: str
    file_bytes: int
    index_bytes: int
    standalone_bytes: int
    total_params: int

    @property
    def bits_per_param(self) -> float:
        """Bits of file per element of the fine-tune; what is shared is not counted."""
        return 8 * self.file_bytes / self.total_params if self.total_params else 0.0


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds. ``base_bytes``: the size of ``base.nps``, which all tasks share."""

    path: Path
    base_name: str
    base_root: str
    base_bytes: int
    tasks: tuple[BundledTask, ...]

    @property
    def file_bytes(self) -> int:
        """Of all files together."""
        return self.base_bytes + sum(task.file_bytes for task in self.tasks)

    @property
    def standalone_bytes(self) -> int:
        """Of the same tasks as files that need no other."""
        return sum(task.standalone_bytes for task in self.tasks)

    @property
    def mean_task_bytes(self) -> float:
        """What one more task costs, on average; 0 where there is none."""
        return sum(task.file_bytes for task in self.tasks) / max(len(self.tasks), 1)


def add(
    folder: str | Path, tasks: Sequence[str | Path], *, name: str | None = None, force: bool = False
) -> tuple[BundledTask, ...]:
    """Put copies of tasks into a bundle, which is made where it is not there.

    tasks: ``.nps`` files of one base; each keeps its file's name, or takes ``name`` where it is the
    only one. All are checked before any is written. What changes is how the index is compressed;
    chunks are copied as they are stored.

    Raises:
        InvalidArgumentError: a name can't be used, or a file can't be read.
        BaseMismatchError: a task is of another base. FormatError: a file breaks a rule.
        OutputExistsError: a name is taken and ``force`` is False. WriteError.
    """
    folder, sources = Path(folder), [Path(task) for task in tasks]
    if not sources or (name is not None and len(sources) != 1):
        expected = "one or more" if name is None else f"one, to be called {name!r}"
        raise InvalidArgumentError("number of tasks", len(sources), expected)
    names = [path.name.removesuffix(SUFFIX) for path in sources] if name is None else [name]
    for number, each in enumerate(names):
        _check_name(each)
        if each in names[:number]:
            raise InvalidArgumentError("task name", each, "given once")
    outs = [folder / f"{each}{SUFFIX}" for each in names]
    base = folder / DICTIONARY_FILE
    with os_errors_as_write_errors(folder):
        known = base if base.exists() else sources[0]
        is_there = folder.exists()
    with open_task(known) as first:
        table, root = first.reader.base, first.reader.base_root
    for path in sources:
        with open_task(path) as task:
            _check_root(task, root, known)
    for out in outs if is_there else ():
        refuse_existing(out, force)
        refuse_input_as_output(out, sources)
    with os_errors_as_write_errors(folder):
        folder.mkdir(exist_ok=True)
    if known != base:
        with contextlib.suppress(OutputExistsError):  # another process was quicker
            _write_base(base, table, root)
    with open_task(base) as shared:
        for path, out in zip(sources, outs, strict=True):
            with open_task(path) as task:
                _check_root(task, shared.reader.base_root, base)
                _rewrite(task.reader, out, shared.reader.raw_index, force)
    return tuple(_inspect_task(out) for out in outs)


def extract(folder: str | Path, name: str, out: str | Path, *, force: bool = False) -> None:
    """Write a task of a bundle as a file that needs no other.

    Raises:
        InvalidArgumentError: there is no such bundle or task. FormatError: a file breaks a rule.
        OutputExistsError, WriteError.
    """
    path = _find(folder, name)
    refuse_input_as_output(Path(out), [path, path.with_name(DICTIONARY_FILE)])
    with open_task(path) as task:
        _rewrite(task.reader, Path(out), b"", force)


def remove(folder: str | Path, name: str) -> None:
    """Delete a task's file from a bundle.

    Raises:
        InvalidArgumentError: there is no such bundle or task. WriteError.
    """
    path = _find(folder, name)
    with os_errors_as_write_errors(path):
        path.unlink()


def inspect(folder: str | Path) -> Bundle:
    """The tasks of a bundle by name, and what they cost.

    Raises:
        InvalidArgumentError: this is no bundle, or a file can't be read.
        FormatError: a file breaks a rule. BaseMismatchError: a task is of another base.
    """
    folder, base, base_name = Path(folder), _base_of(folder), "unnamed base"
    with open_task(base) as identity:
        root, base_bytes = identity.reader.base_root, identity.reader.file_bytes
    tasks = []
    for name in _names(folder):
        path = folder / f"{name}{SUFFIX}"
        with open_task(path) as task:
            _check_root(task, root, base)
            base_name = task.base_name
        tasks.append(_inspect_task(path))
    return Bundle(folder, base_name, root.hex(), base_bytes, tuple(tasks))


def _inspect_task(path: Path) -> BundledTask:
    with open_task(path) as task:
        reader = task.reader
        offset, raw = reader.index_offset, reader.raw_index
        return BundledTask(
            path.name.removesuffix(SUFFIX),
            reader.file_bytes,
            reader.file_bytes - offset - FOOTER_BYTES,
            offset + len(index_and_footer(raw, offset, minor=reader.minor)),
            sum(entry.numel for entry in reader.tensors),
        )


def _rewrite(reader: NpsReader, out: Path, dictionary: bytes, force: bool) -> None:
    """The same file with its index compressed with a dictionary, or (where empty) without."""
    end = index_and_footer(reader.raw_index, reader.index_offset, dictionary, reader.minor)
    with atomic_file(out, force) as stream:
        for part in reader.stored(reader.index_offset):
            stream.write(part)
        stream.write(end)


def _write_base(path: Path, base: Sequence[BaseTensor], root: bytes) -> None:
    """The base's table, and nothing else that differs by task: of digests only the start."""
    with atomic_file(path) as stream:
        NpsWriter(stream).finish(base, {}, root)


def _names(folder: Path) -> list[str]:
    found = {path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")}
    return sorted(name for name in found if _is_name(name))


def _base_of(folder: str | Path) -> Path:
    path = Path(folder) / DICTIONARY_FILE
    if not path.is_file():
        raise InvalidArgumentError("bundle", str(folder), f"a folder with {DICTIONARY_FILE}")
    return path


def _find(folder: str | Path, name: str) -> Path:
    _base_of(folder)
    _check_name(name)
    path = Path(folder) / f"{name}{SUFFIX}"
    if not path.is_file():
        known = _names(Path(folder))
        some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise InvalidArgumentError("task name", name, f"one of {folder}: {some or 'none'}")
    return path


def _is_name(name: str) -> bool:
    return (
        FILE_NAME.fullmatch(name) is not None
        and name.lower() != _BASE
        and not name.lower().endswith(SUFFIX)
        and not _DEVICES.fullmatch(name)
    )


def _check_name(name: str) -> None:
    if not _is_name(name):
        expected = f"letters, digits, dot, dash, underscore, without {SUFFIX}, and not {_BASE!r}"
        raise InvalidArgumentError("task name", name, expected)


def _check_root(task: Task, root: bytes, known: Path) -> None:
    if task.reader.base_root != root:
        found = f"has base root {task.reader.base_root.hex()}, not {root.hex()}"
        what = f"task {task.reader.path}"
        raise BaseMismatchError(f"the base of {known}", what, found, task.base_name)
