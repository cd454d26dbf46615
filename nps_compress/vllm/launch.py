"""vLLM's own server for a base and its tasks: what is checked before, and how it is started."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from nps_compress.atomic import atomic_directory, os_errors_as_write_errors
from nps_compress.checkpoint import SIDE_FILES, open_checkpoint
from nps_compress.errors import InvalidArgumentError
from nps_compress.lazy import LazyTensors
from nps_compress.serve.api_key import OPEN, is_loopback
from nps_compress.vllm import arguments
from nps_compress.vllm.stream import refuse_other_shape

_CONFIGURATION = {"config.json", "generation_config.json"}
_KEY_VARIABLE = "VLLM_API_KEY"  # unlike an option it is not in the list of processes


@dataclass(frozen=True)
class Launch:
    """A command line, what its environment has besides, and what it does, for people."""

    command: list[str]
    environment: Mapping[str, str]
    what: str
    warnings: Sequence[str] = ()

    def run(self, tell: Callable[[str], Any]) -> NoReturn:
        """Become that process: signals and exit status are vLLM's own."""
        for line in (*(f"warning: {each}" for each in self.warnings), self.what):
            tell(line)
        sys.stdout.flush()
        os.execve(self.command[0], self.command, {**os.environ, **self.environment})


def prepare(
    base: str,
    tasks: Mapping[str, Path],
    *,
    host: str,
    port: int,
    name: str | None = None,
    api_key: str | None = None,
    cycle: float | None = None,
    options: Sequence[str] = (),
) -> Launch:
    """How vLLM serves a base: one task from the start, several by request, or none yet.

    Names, dtypes, shapes and side files of each task and the base are compared here, so that what
    can't be served is said before an engine starts; values are checked as vLLM reads them.

    base: a folder or a Hub id in the local cache; name: the base's; cycle: seconds that a task may
    keep others waiting; options: more of vLLM's own.

    Raises:
        CheckpointError, FormatError: a file can't be read or is damaged. BaseMismatchError: a task
        is of another base. InvalidArgumentError: an argument is out of its range, or a task can't
        be served with others. WriteError: a task's configuration can't be kept for vLLM.
    """
    checkpoint = open_checkpoint(base)
    environment = {_KEY_VARIABLE: api_key} if api_key else {}
    warnings = []
    if not api_key and not is_loopback(host):
        warnings.append(OPEN)
    with ExitStack() as stack:
        opened = {
            task: stack.enter_context(LazyTensors(checkpoint, path)) for task, path in tasks.items()
        }
        common = {each: checkpoint.read_side_file(each) for each in checkpoint.side_files}
        files = {task: _files(each, common) for task, each in opened.items()}
        differ = [task for task in tasks if files[task] != common]
        if len(tasks) > 1:
            for each in opened.values():
                refuse_other_shape(each.task)
    model, called = checkpoint.path, name or arguments.name_of(base)
    if len(tasks) == 1:
        ((task, path),) = tasks.items()
        config = _kept(files[task]) if differ else None
        found = arguments.one_task(model, path, name=task, config=config, host=host, port=port)
        what = f"{task} alone, as `--load-format nps`"
    elif tasks:
        cycle = arguments.DEFAULT_CYCLE if cycle is None else cycle
        found = arguments.many_tasks(model, tasks, name=called, cycle=cycle, host=host, port=port)
        what = f"{called} and {len(tasks)} tasks, chosen by each request (experimental)"
        if differ:
            these = ", ".join(differ)
            warnings.append(
                f"{these}: tokenizer and configuration are the base's here, and the task's differ"
            )
    else:
        if not is_loopback(host):
            expected = "a loopback address: the routes that switch weights are open to whoever asks"
            raise InvalidArgumentError("--host", host, expected)
        found = arguments.switched(model, name=called, host=host, port=port)
        environment[arguments.SWITCH_VARIABLE] = "1"
        what = f"{called}, weights switched by /update_weights"
    if len(tasks) != 1 and not torch.cuda.is_available():
        found.append("--enforce-eager")  # compiled for a CPU, a model keeps copies of its weights
    command = arguments.command([*found, *options])
    return Launch(command, environment, f"starting vLLM: {what}, on port {port}", warnings)


def _files(task: LazyTensors, base: Mapping[str, bytes]) -> dict[str, bytes]:
    """Configuration and tokenizer to serve a task with; what it has none of is the base's."""
    own = {name: data for name, data in task.side_files.items() if name in SIDE_FILES}
    return own if own.keys() - _CONFIGURATION else {**base, **own}


def _kept(files: Mapping[str, bytes]) -> Path:
    """A folder with these files, as vLLM reads them from one.

    It is in the user's cache, named by content: nothing is left to delete it when vLLM ends.

    Raises:
        WriteError: the folder can't be written.
    """
    content = hashlib.sha256()
    for name, data in sorted(files.items()):
        content.update(b"%s\0%d\0%s" % (name.encode(), len(data), data))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nps-compress" / "side-files" / content.hexdigest()[:32]
    if not folder.exists():
        with os_errors_as_write_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(folder, force=True) as made:
            for name, data in files.items():
                (made / name).write_bytes(data)
    return folder
