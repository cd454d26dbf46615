"""Merge files on disk: tasks in, settings tuned where there is data, a model or models out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nps_compress import __version__, bundle
from nps_compress._progress import bar
from nps_compress.atomic import (
    atomic_directory,
    refuse_existing,
    refuse_input_as_output,
    refuse_unrelated_content,
)
from nps_compress.checkpoint import Checkpoint, content_digest, open_checkpoint
from nps_compress.errors import InvalidArgumentError
from nps_compress.merging.contract import Settings
from nps_compress.merging.merger import Merger, Plan
from nps_compress.merging.methods import Method, check_settings, method_of
from nps_compress.merging.output import (
    METADATA_KEY,
    MergedCheckpoint,
    merged_base,
    merged_task,
    write_checkpoint,
    write_packed,
)
from nps_compress.merging.tuning import Tuned, TuningOptions, tune
from nps_compress.packed import SUFFIX, PackedCheckpoint, is_packed, open_finetuned
from nps_compress.searching import delete
from nps_compress.unpacking import is_ours, unpack

if TYPE_CHECKING:
    from nps_compress.merging.exams import Exam

Form = Literal["checkpoint", "nps"]


@dataclass(frozen=True)
class MergeReport:
    """What was merged.

    ``nbytes``: of the weights written, or of the ``.nps`` files. ``merged_params``: elements that
    were merged. ``left``: by task, the names of tensors that were not. ``settings``: what was used.
    ``tuned``: None where nothing was. ``scores``: the share of each task's own quality that the
    merged model keeps on its calibration data; empty where there is none.
    """

    path: Path
    method: str
    tasks: tuple[str, ...]
    nbytes: int
    merged_params: int
    left: Mapping[str, tuple[str, ...]]
    settings: Settings
    tuned: Tuned | None
    scores: Mapping[str, float]


def merge(
    base: str | Path,
    tasks: Sequence[str | Path],
    out: str | Path,
    *,
    method: str,
    settings: Settings | None = None,
    calibration: Sequence[str | Path] = (),
    fitness: str | None = None,
    tuning: TuningOptions | None = None,
    per_task: bool = False,
    form: Form | None = None,
    force: bool = False,
    progress: bool = False,
) -> MergeReport:
    """Merge fine-tunes of ``base`` into one model, or with ``per_task`` into one encoder for all.

    tasks: checkpoints or ``.nps`` files, mixed. ``settings`` None: the method's data-free ones.
    ``calibration``: development data, one file a task in their order; the settings that the
    method's genes name are then tuned for the mean share of ``fitness`` (None: ``kl``, or what the
    model has) that the tasks keep. ``out`` is the merged base: its own tensors and side files,
    without what only some tasks have. With ``per_task`` it is a folder with a model for each task,
    which has its own tensors that were not merged (its head) and its side files. ``form``: None for
    a ``.nps`` file where ``out`` is called so, else a checkpoint.

    Raises:
        OutputExistsError, CheckpointError, CalibrationError, FitnessError, FormatError,
        BaseMismatchError, InvalidArgumentError, RecipeError, SearchInterruptedError, WriteError.
    """
    out, chosen = Path(out), method_of(method)
    settings = settings or chosen.defaults
    per_task = per_task or chosen.per_task
    form = form or ("nps" if is_packed(out) and not per_task else "checkpoint")
    names = _names(tasks)
    if not names:
        raise InvalidArgumentError("tasks", "none", "one or more")
    check_settings(chosen, settings, len(names))
    if calibration and len(calibration) != len(names):
        what = f"one for each of {len(names)} tasks, in their order"
        raise InvalidArgumentError("calibration", f"{len(calibration)} files", what)
    _refuse(out, form, per_task, names, force)
    base_ = open_checkpoint(base)
    opened = [open_finetuned(base_, task) for task in tasks]
    refuse_input_as_output(out, inputs_of(base_, opened, calibration))
    merger = Merger(base_, opened, held=bool(calibration))
    with bar(len(merger.names), "reading", "tensor", progress) as advance:
        merger.count(settings, advance)
    tuned: Tuned | None = None
    states: list[Path] = []
    scores: dict[str, float] = {}
    if calibration:
        tuned, states, scores = _tuned(
            merger,
            chosen,
            settings,
            names,
            [Path(data) for data in calibration],
            fitness,
            tuning,
            out,
            progress,
        )
        settings = tuned.settings if tuned else settings
        merger.release()
    with bar(len(merger.names) if chosen.measure else 0, "measuring", "tensor", progress) as step:
        plan = merger.plan(chosen, settings, step)
    told = {METADATA_KEY: json.dumps(description(method, names, settings))}
    nbytes = _write(merger, plan, out, form, per_task, names, told, force, progress)
    delete(states)
    numel = sum(base_.tensors[name].numel for name in merger.names)
    left = {name: tuple(found) for name, found in zip(names, merger.left, strict=True)}
    return MergeReport(out, method, tuple(names), nbytes, numel, left, settings, tuned, scores)


def description(method: str, names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """How a model was merged, as JSON values."""
    tool = f"nps-compress {__version__}"
    return {"tool": tool, "method": method, "tasks": list(names), **asdict(settings)}


@contextlib.contextmanager
def model_folder(base: Checkpoint, task: Checkpoint) -> Iterator[Path]:
    """A folder that transformers can load a task from; a ``.nps`` file is unpacked for it."""
    if not isinstance(task, PackedCheckpoint):
        yield task.path
        return
    with tempfile.TemporaryDirectory(prefix="nps-compress-") as temporary:
        folder = Path(temporary) / "model"
        unpack(base.path, task.path, folder)
        yield folder


def _tuned(
    merger: Merger,
    method: Method,
    settings: Settings,
    names: Sequence[str],
    calibration: Sequence[Path],
    fitness: str | None,
    tuning: TuningOptions | None,
    out: Path,
    progress: bool,
) -> tuple[Tuned | None, list[Path], dict[str, float]]:
    from nps_compress.calibration import data_digest, read_examples
    from nps_compress.fitness import check_fitness, label_free_fitness
    from nps_compress.merging.exams import Exam, Exams

    if fitness is not None:
        check_fitness(fitness)
    examples = [read_examples(path) for path in calibration]
    with contextlib.ExitStack() as stack:
        exams: list[Exam] = []
        for number, task in enumerate(merger.tasks):
            folder = stack.enter_context(model_folder(merger.base, task))
            metric = fitness or label_free_fitness(folder, examples[number])
            exams.append(Exam(number, folder, examples[number], metric, calibration[number]))
        taken = Exams(merger, exams)

        def shares(plan: Plan) -> list[float]:
            pairs = zip(taken.yardsticks, taken.measure(plan), strict=True)
            return [yardstick.share(found) for yardstick, found in pairs]

        def judge(plan: Plan) -> float:
            found = shares(plan)
            return sum(found) / len(found)

        tuned, states = None, list[Path]()
        if method.genes:
            identity = {
                "base": content_digest(merger.base),
                "tasks": [content_digest(task) for task in merger.tasks],
                "fitness": [exam.metric for exam in exams],
                "calibration": [data_digest(each) for each in examples],
            }
            state = out.with_name(f"{out.name}.search.json")
            tuned, states = tune(
                merger,
                method,
                settings,
                judge,
                tuning or TuningOptions(),
                state,
                identity,
                progress,
            )
        final = tuned.settings if tuned else settings
        scores = dict(zip(names, shares(merger.plan(method, final)), strict=True))
    return tuned, states, {name: s if math.isfinite(s) else math.nan for name, s in scores.items()}


def _write(
    merger: Merger,
    plan: Plan,
    out: Path,
    form: Form,
    per_task: bool,
    names: Sequence[str],
    told: Mapping[str, str],
    force: bool,
    progress: bool,
) -> int:
    if not per_task:
        found = merged_base(merger, plan)
        if form == "nps":
            return write_packed(found, out, told, force, progress)
        with atomic_directory(out, force, is_ours) as folder:
            return write_checkpoint(found, folder, progress)
    with atomic_directory(out, force, lambda name: _is_of_tasks(out, name, names)) as folder:
        models = [merged_task(merger, plan, number) for number in range(len(names))]
        if form == "nps":
            return _write_bundle(models, names, folder, told, progress)
        written = 0
        for name, model in zip(names, models, strict=True):
            (folder / name).mkdir()
            written += write_checkpoint(model, folder / name, progress)
        return written


def _write_bundle(
    models: Sequence[MergedCheckpoint],
    names: Sequence[str],
    folder: Path,
    told: Mapping[str, str],
    progress: bool,
) -> int:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for name, model in zip(names, models, strict=True):
            path = Path(temporary) / f"{name}{SUFFIX}"
            write_packed(model, path, told, False, progress)
            bundle.add(folder, [path])
            path.unlink()
    return bundle.inspect(folder).file_bytes


def _names(tasks: Sequence[str | Path]) -> list[str]:
    """What tasks are called: their files' or folders' names; where alike, with the folder."""
    paths = [Path(os.path.abspath(task)) for task in tasks]  # noqa: PTH100 (a link has its own name)
    packed = (SUFFIX, ".safetensors")
    names = [path.stem if path.suffix in packed else path.name for path in paths]
    names = [
        f"{path.parent.name}-{name}" if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    for task, name in zip(tasks, names, strict=True):
        if names.count(name) > 1:
            raise InvalidArgumentError("tasks", str(task), "called differently from all others")
    return names


def _refuse(out: Path, form: Form, per_task: bool, names: Sequence[str], force: bool) -> None:
    """Ask before long work whether ``out`` may be written."""
    if per_task:
        refuse_unrelated_content(out, force, lambda name: _is_of_tasks(out, name, names))
    elif form == "nps":
        refuse_existing(out, force)
    else:
        refuse_unrelated_content(out, force, is_ours)


def _is_of_tasks(out: Path, name: str, names: Sequence[str]) -> bool:
    """Whether something in a folder of models is one that would be replaced."""
    if (out / name).is_dir():
        return name in names and all(is_ours(entry.name) for entry in (out / name).iterdir())
    return name in {f"base{SUFFIX}", *(f"{task}{SUFFIX}" for task in names)}


def inputs_of(
    base: Checkpoint, tasks: Sequence[Checkpoint], calibration: Sequence[str | Path]
) -> Iterator[Path]:
    """Every file that is read: none of them may be the output."""
    for checkpoint in (base, *tasks):
        yield from {tensor.file for tensor in checkpoint.tensors.values()}
        yield from checkpoint.side_files.values()
    yield from map(Path, calibration)
