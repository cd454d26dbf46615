"""What can be named in ``model``: the base and its tasks."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nps_compress.bank import TaskBank
from nps_compress.checkpoint import Checkpoint
from nps_compress.errors import CheckpointError, InvalidArgumentError, NpsError
from nps_compress.serve.failures import RequestError
from nps_compress.serve.processors import Processor, load_processor
from nps_compress.unpacking import open_task, side_files_of


@dataclass(frozen=True)
class Served:
    """``task``: its name in the bank, None for the base; ``root``: its path; ``created``: Unix
    seconds since when it has been served."""

    name: str
    task: str | None
    root: str
    created: int
    processor: Processor


class Catalogue:
    """The base and the tasks of a bank, each with its tokenizer.

    folders: from which tasks may be loaded later on. Thread-safe.

    Raises:
        InvalidArgumentError: the base has a task's name, or a folder isn't there. CheckpointError:
        a model is of a kind that is not served, or lacks a tokenizer.
    """

    def __init__(
        self,
        bank: TaskBank,
        base: Checkpoint,
        base_name: str,
        folders: Sequence[Path] = (),
    ) -> None:
        self.bank, self.base_name = bank, base_name
        self._base = base
        self._loads = itertools.count(1)
        self._folders = []
        for folder in folders:
            if not folder.is_dir():
                raise InvalidArgumentError("folder of tasks", str(folder), "a folder")
            self._folders.append(folder.resolve())
        self._lock = threading.Lock()
        if base_name in bank:
            raise InvalidArgumentError("name of the base", base_name, "none of the tasks' names")
        files = {name: base.read_side_file(name) for name in base.side_files}
        self._base_served = self._serve(base_name, None, files, base.path)
        self._tasks: dict[str, Served] = {}
        for name in bank.tasks():
            self._tasks[name] = self._serve_task(name, name)

    def __iter__(self) -> Iterator[Served]:
        with self._lock:
            return iter([self._base_served, *self._tasks.values()])

    def get(self, name: str) -> Served:
        """Raises RequestError: 404, there is none."""
        with self._lock:
            found = self._base_served if name == self.base_name else self._tasks.get(name)
        if found is None:
            shown = name if name.isprintable() else ascii(name)
            raise RequestError(
                404, f"the model {shown!r} does not exist", code="model_not_found", param="model"
            )
        return found

    def load(self, name: str, path: str) -> Served:
        """Add a task from a file in an allowed folder, given from its root or as a whole path.

        Raises:
            RequestError: 400, the name is taken, there is no such file in the folders, or the bank
            refuses it.
        """
        file = self._allowed(path)
        # Unlike any before, so that nothing that was asked of a task is answered by its successor.
        key = f"{name} (load {next(self._loads)})"
        try:
            self._refuse_taken(name)
            self.bank.add(file, key)
            try:
                served = self._serve_task(key, name)
                with self._lock:
                    self._refuse_taken(name)
                    self._tasks[name] = served
            except BaseException:
                self.bank.remove(key)
                raise
        except NpsError as error:
            raise RequestError(400, str(error), code="not_loaded") from None
        return served

    def _refuse_taken(self, name: str) -> None:
        if name == self.base_name or name in self._tasks:
            raise InvalidArgumentError("task name", name, "one that is not taken")
        if not name.isprintable():
            raise InvalidArgumentError("task name", name, "printable")

    def withdraw(self, name: str) -> Served:
        """Serve a task no more; it stays in the bank.

        Raises:
            RequestError: 400, it is the base; 404, there is none.
        """
        found = self.get(name)
        if found.task is None:
            raise RequestError(400, "the base can't be unloaded", param="lora_name")
        with self._lock:
            if self._tasks.pop(name, None) is None:
                raise RequestError(404, f"the model {name!r} does not exist", param="lora_name")
        return found

    def _allowed(self, path: str) -> Path:
        """Where a path leads, whatever links and ``..`` are on the way."""
        for folder in self._folders:
            try:
                found = (folder / path).resolve(strict=True)
                if found.is_relative_to(folder) and found.is_file() and found.suffix == ".nps":
                    return found
            except (OSError, ValueError, RuntimeError):
                continue  # nothing is told about files elsewhere, not even whether they are there
        raise RequestError(
            400, "there is no such .nps file in the allowed folders", param="lora_path"
        )

    def _serve_task(self, key: str, name: str) -> Served:
        info = self.bank.tasks()[key]
        with open_task(info.path) as task:
            files = dict(side_files_of(task, self._base))
            if task.reader.content_digest.hex() != info.content_digest:
                raise CheckpointError(info.path, "was replaced while it was loaded")
        return self._serve(name, key, files, info.path)

    def _serve(
        self, name: str, task: str | None, files: Mapping[str, bytes], source: Path
    ) -> Served:
        pooling = self._base.path if self._base.path.is_dir() else self._base.path.parent
        processor = load_processor(files, self.bank.model, source, pooling)
        return Served(name, task, str(source), int(time.time()), processor)
