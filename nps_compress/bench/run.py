"""Measure tasks, given or made, and project a fleet of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from nps_compress._progress import bar
from nps_compress.bench.figures import Figure, Kind, Table, counted, row
from nps_compress.bench.measuring import STEPS, Job, Measured, measure
from nps_compress.bench.page import draw
from nps_compress.bench.peers import PEERS
from nps_compress.bench.projection import LORA_BYTES, One, Plan, methods, project
from nps_compress.bench.results import Report, machine
from nps_compress.bench.shapes import MODELS, lora_parameters, parameters
from nps_compress.bench.synthetic import BF16, CHANGE_SCALE, WEIGHT_SCALE, sample, write_pairs
from nps_compress.checkpoint import open_checkpoint
from nps_compress.errors import InvalidArgumentError, OutOfMemoryError
from nps_compress.format.records import printable
from nps_compress.packed import is_packed
from nps_compress.recipe import Recipe
from nps_compress.unpacking import open_task

_MADE = 2  # tasks of a made fleet: sizes and times of one could be chance
_MIN_SAMPLE = 1_000_000
_DISCARDED = 1  # rounds of the first task, which compile code and fill the page cache

_HOW = (
    "pack, unpack: files to files; copy: the unpacked weight files on the same disk; none waits "
    "for the disk. plain load: the unpacked files to memory; load: base and file on disk to the "
    "same, every digest checked. switch: only the tensors that the task changes, "
    "rebuilt from a base in memory over those of the last task, digests checked afterwards."
)


@dataclass(frozen=True)
class Settings:
    """How to measure. ``recipe`` None: lossless. ``folder``: where to work, by default the
    system's folder for temporary files. ``sample_bytes``: of bf16 weights that are made."""

    recipe: Recipe | None
    repeat: int = 3
    folder: Path | None = None
    sample_bytes: int = 500_000_000

    def __post_init__(self) -> None:
        if not 1 <= self.repeat <= 1000:
            raise InvalidArgumentError("repeat", self.repeat, "from 1 to 1000")
        if self.sample_bytes < _MIN_SAMPLE:
            raise InvalidArgumentError(
                "sample", self.sample_bytes, f"{_MIN_SAMPLE:,} bytes or more"
            )
        if self.folder is not None and not self.folder.is_dir():
            raise InvalidArgumentError("folder", str(self.folder), "an existing folder")


def bench_tasks(
    base: str, tasks: Sequence[str], plan: Plan, settings: Settings, progress: bool = False
) -> Report:
    """Measure fine-tunes and ``.nps`` files of one base, and project a fleet like them.

    Raises:
        BenchmarkError: a result was not exact. OutOfMemoryError, and as pack and unpack.
    """
    base_bytes = _dense_bytes(base)
    for task in tasks:
        _refuse_too_large(printable(task), base_bytes + _dense_bytes(task))
    with tempfile.TemporaryDirectory(prefix="nps-bench-", dir=settings.folder) as folder:
        found = _measure(base, list(tasks), list(tasks), settings, Path(folder), progress)
    average = _mean(found)
    lora = mean(lora_parameters(task.shapes, plan.lora_rank) + task.new_params for task in found)
    figures = [figure for task in _with_mean(found) for figure in _figures(task, "measured")]
    here = Table("On this machine", tuple(figures), (_HOW,))
    title = f"{counted(plan.tasks, 'fine-tune')} of {printable(base)}"
    return _report(title, [here], found, average, base_bytes, lora, plan, settings, ())


def bench_model(name: str, plan: Plan, settings: Settings, progress: bool = False) -> Report:
    """Measure made fine-tunes of a part of a public model, and project a fleet of whole ones.

    name: of shapes.MODELS. Raises as :func:`bench_tasks`.
    """
    if name not in MODELS:
        raise InvalidArgumentError("model", name, f"one of {', '.join(MODELS)}")
    model = MODELS[name]
    shapes, part = sample(model, settings.sample_bytes)
    made, total = parameters(shapes), parameters(model.tensors())
    _refuse_too_large(f"{part} of {name}", 2 * BF16.itemsize * made)
    with tempfile.TemporaryDirectory(prefix="nps-bench-", dir=settings.folder) as folder:
        base, tuned = write_pairs(Path(folder), shapes, _MADE)
        names = [f"{name}, made {number}" for number in range(1, _MADE + 1)]
        found = _measure(base, tuned, names, settings, Path(folder), progress)
    whole = _scaled(_mean(found), total / made, f"{name}, whole")
    figures = [figure for task in _with_mean(found) for figure in _figures(task, "measured")]
    tables = [
        Table(
            "On this machine",
            tuple(figures),
            (f"{part} of {model.source}: {made:,} of {total:,} parameters", _HOW),
        ),
        Table("The whole model", tuple(_figures(whole, "projected"))),
    ]
    notes = (
        f"Made weights: bf16, normal, deviation {WEIGHT_SCALE}; a change is a normal number times "
        f"its own size times {CHANGE_SCALE}. They show sizes and times, nothing of quality; sizes "
        "of lossless files and of exact values depend on the real changes.",
        f"The whole model: what was measured times {total / made:.4g}, by parameters.",
    )
    lora = lora_parameters(model.tensors(), plan.lora_rank)
    title = f"{counted(plan.tasks, 'fine-tune')} of {name}"
    base_bytes = BF16.itemsize * total
    return _report(title, tables, found, whole, base_bytes, lora, plan, settings, notes)


def _measure(
    base: str | Path,
    tasks: Sequence[str | Path],
    names: Sequence[str],
    settings: Settings,
    folder: Path,
    progress: bool,
) -> list[Measured]:
    steps = [len(STEPS) - is_packed(task) for task in tasks]  # what is packed is not packed again
    total = settings.repeat * sum(steps) + _DISCARDED * steps[0]
    with bar(total, "measuring", "step", progress) as advance:
        return [
            measure(
                Job(base, task, printable(name), settings.recipe, folder, advance),
                settings.repeat,
                0 if number else _DISCARDED,
            )
            for number, (task, name) in enumerate(zip(tasks, names, strict=True))
        ]


def _report(
    title: str,
    tables: list[Table],
    found: list[Measured],
    average: Measured,
    base_bytes: float,
    lora: float,
    plan: Plan,
    settings: Settings,
    notes: tuple[str, ...],
) -> Report:
    one = One(
        base_bytes,
        average.dense_bytes,
        average.file_bytes,
        average.changed_bytes,
        lora,
        average.seconds["load"],
        average.seconds["plain load"],
        average.seconds["switch"],
    )
    here = machine()
    return Report(
        title,
        (*tables, Table(counted(plan.tasks, "task"), tuple(project(one, plan))), _peers()),
        tuple(draw(_mean(found), methods(one, plan), plan)),
        (
            f"{here['processor']}, {here['cores']} cores, {here['system']}, nps-compress "
            f"{here['nps_compress']}. Medians of {settings.repeat}, files in the page cache.",
            *notes,
            *_assumptions(plan, lora),
        ),
        plan,
        len(found),
        sum(task.tensors for task in found),
        settings.repeat * len(found) + _DISCARDED,
    )


def _figures(task: Measured, kind: Kind) -> list[Figure]:
    seconds = task.seconds
    return row(
        task.name,
        kind,
        [
            ("weights", task.dense_bytes, "bytes"),
            ("file", task.file_bytes, "bytes"),
            ("weights / file", task.dense_bytes / task.file_bytes, "ratio"),
            ("bits per parameter", 8 * task.file_bytes / task.params, "bits"),
            *((step, seconds.get(step), "seconds") for step in STEPS),
            ("unpack / copy", seconds["unpack"] / seconds["copy"], "ratio"),
            ("load / plain load", seconds["load"] / seconds["plain load"], "ratio"),
        ],
    )


def _peers() -> Table:
    figures = [
        figure
        for peer in PEERS
        for figure in row(peer.name, "reported", [("weights / file", peer.ratio, "ratio")])
    ]
    notes = (
        f"{peer.name}: {peer.by}, {'lossless' if peer.lossless else 'lossy'}; {peer.of} "
        f"({peer.source})"
        for peer in PEERS
    )
    return Table("What others report", tuple(figures), tuple(notes))


def _assumptions(plan: Plan, lora: float) -> tuple[str, ...]:
    return (
        f"{counted(plan.downloads, 'download')} of a task, and of the base once for each of "
        f"{counted(plan.machines, 'machine')}, at {plan.egress_price:g} USD/GB; network "
        f"{plan.bandwidth:g} Gbit/s: assumptions, not quotes. 1 GB is 10^9 bytes.",
        f"Memory, host or GPU, for {counted(plan.resident, 'task')}. One in use: the base, all "
        "files, and the rebuilt tensors of one. All in use: each with its own rebuilt tensors; "
        "dense copies, a LoRA and peers that compute on packed weights need no more than what they "
        "store.",
        "Cold start: download, then load with the base on disk; warm start: download, then "
        "switch, with the base in memory. Not known where nothing was measured here.",
        f"LoRA of rank {plan.lora_rank}: {lora:,.0f} parameters of {LORA_BYTES} bytes, on every "
        "linear layer but the output, and what only the fine-tune has. It is trained as such, of "
        "other quality; this is a count.",
        "Others: these weights divided by the ratio each of them reports, on its own models at its "
        "own quality.",
    )


def _with_mean(found: list[Measured]) -> list[Measured]:
    return [*found, _mean(found)] if len(found) > 1 else found


def _mean(found: list[Measured]) -> Measured:
    if len(found) == 1:
        return found[0]
    common = [step for step in STEPS if all(step in task.seconds for task in found)]
    return replace(
        found[0],
        name=f"mean of {len(found)}",
        file_bytes=mean(task.file_bytes for task in found),
        dense_bytes=mean(task.dense_bytes for task in found),
        changed_bytes=mean(task.changed_bytes for task in found),
        params=mean(task.params for task in found),
        seconds={step: mean(task.seconds[step] for task in found) for step in common},
    )


def _scaled(task: Measured, factor: float, name: str) -> Measured:
    return replace(
        task,
        name=name,
        file_bytes=factor * task.file_bytes,
        dense_bytes=factor * task.dense_bytes,
        changed_bytes=factor * task.changed_bytes,
        params=factor * task.params,
        seconds={step: factor * seconds for step, seconds in task.seconds.items()},
    )


def _dense_bytes(source: str) -> int:
    """Bytes of the weights that a checkpoint has, or a ``.nps`` file makes. Raises as opening."""
    if is_packed(source):
        with open_task(source) as task:
            return sum(entry.numel * entry.dtype.itemsize for entry in task.reader.tensors)
    return sum(tensor.nbytes for tensor in open_checkpoint(source).tensors.values())


def _refuse_too_large(what: str, nbytes: int) -> None:
    """A switch is measured with base and task in memory; to swap them would measure the disk."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    ):
        raise OutOfMemoryError(f"{what}, twice", nbytes)
