"""Every error this library raises on purpose.

::

    NpsError
    ├── InvalidArgumentError      an option is out of its range
    ├── CheckpointError           a base or fine-tuned checkpoint can't be used
    │   └── PickleRefusedError    only pickled weights were found
    ├── CalibrationError          calibration data can't be used
    ├── FitnessError              a fitness function of the user's own failed
    ├── RecipeError               a recipe or a saved search can't be used
    ├── RetainError               no density keeps the share of quality that was asked for
    ├── FormatError               a .nps file breaks a rule of format_spec/SPEC.md
    ├── BaseMismatchError         the base is not the one the task was packed against
    ├── TaskBankError             a task bank can't do what was asked
    │   └── NotMixableError       a task can't share a batch with others
    ├── BenchmarkError            what was measured is not what the file promises
    ├── OutputExistsError         the output is there already
    ├── OutputTooLargeError       the output would exceed a limit or the free space
    ├── OutOfMemoryError          a tensor or file does not fit into memory
    ├── WriteError                the output can't be written (disk full, no permission)
    └── SearchInterruptedError    the search was stopped; it can be resumed
"""

from __future__ import annotations

from pathlib import Path


class NpsError(Exception):
    """Base class of all errors of this library."""


class InvalidArgumentError(NpsError, ValueError):
    """An argument is out of its range."""

    def __init__(self, name: str, received: object, expected: str) -> None:
        self.name, self.received, self.expected = name, received, expected
        super().__init__(f"{name} must be {expected}, received {received!r}")


class CheckpointError(NpsError):
    """A checkpoint can't be opened, read or paired."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class PickleRefusedError(CheckpointError):
    """The checkpoint is stored as pickles, which run code when they are loaded."""

    def __init__(self, path: Path | str, found: str) -> None:
        self.found = found
        super().__init__(
            path,
            f"holds pickled weights ({found}), which can run code when loaded; convert them with "
            "model.save_pretrained(..., safe_serialization=True) and pass that folder",
        )


class CalibrationError(NpsError):
    """Calibration data is missing, empty or malformed."""

    def __init__(self, path: Path | str, reason: str, line: int | None = None) -> None:
        self.path, self.reason, self.line = path, reason, line
        super().__init__(f"{path}{'' if line is None else f', line {line}'}: {reason}")


class FitnessError(NpsError):
    """A fitness function of the user's own raised, or returned something else than figures."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"fitness {name}: {reason}")


class RecipeError(NpsError):
    """A recipe or the saved state of a search can't be used."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class RetainError(NpsError):
    """No density keeps the share of the fine-tune's quality that was asked for."""


class FormatError(NpsError):
    """A ``.nps`` file breaks a rule; ``rule`` is its id in format_spec/SPEC.md."""

    def __init__(self, rule: str, detail: str, path: Path | str | None = None) -> None:
        self.rule, self.detail, self.path = rule, detail, path
        super().__init__(f"{'' if path is None else f'{path}: '}{detail} [{rule}]")


class BaseMismatchError(NpsError):
    """The base differs from the one the task was packed against; names the first difference."""

    def __init__(self, base: Path | str, what: str, difference: str, made_from: str) -> None:
        self.base, self.what, self.difference, self.made_from = base, what, difference, made_from
        super().__init__(
            f"{base} is not the base this task was made from ({made_from}): {what} {difference}"
        )


class TaskBankError(NpsError):
    """A task bank can't do what was asked; the task that was active still is."""


class NotMixableError(TaskBankError):
    """What a task changes can't be added to the outputs of its own rows of a batch."""


class BenchmarkError(NpsError):
    """A timed step gave something else than the file promises, so that no figure is reported."""

    def __init__(self, task: str, reason: str) -> None:
        self.task, self.reason = task, reason
        super().__init__(f"{task}: {reason}; nothing is reported")


class OutputExistsError(NpsError):
    """The output exists and overwriting was not asked for, or would lose other files."""

    def __init__(self, path: Path | str, reason: str = "exists; pass --force to overwrite") -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class OutputTooLargeError(NpsError):
    """The output would be larger than was allowed, or than the disk has room for."""

    def __init__(self, path: Path | str, nbytes: int, reason: str) -> None:
        self.path, self.nbytes, self.reason = path, nbytes, reason
        super().__init__(f"{path} would take {nbytes:,} bytes; {reason}")


class OutOfMemoryError(NpsError):
    """Something the file describes does not fit into memory."""

    def __init__(self, what: str, nbytes: int) -> None:
        self.what, self.nbytes = what, nbytes
        super().__init__(f"{what} does not fit into memory ({nbytes:,} bytes)")


class WriteError(NpsError):
    """The operating system refused a write; nothing was left behind."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: can't be written: {reason}")


class SearchInterruptedError(NpsError):
    """The search was stopped; its state is on disk and the same command goes on from there.

    ``generation`` is the last that was finished; as ``--generations`` it takes the best so far.
    """

    def __init__(self, state: Path | str | None, generation: int) -> None:
        self.state, self.generation = state, generation
        kept = f"; state kept in {state}: run the same command to resume" if state else ""
        if state and generation > 0:
            kept += f", or with --generations {generation} to take the best so far"
        super().__init__(f"search interrupted after generation {generation}{kept}")
