"""Rebuild, exchange, switch and products of changes on a GPU, beside what else does it: one run.

    make gpu                                     # all of it
    python benchmarks/gpu.py --only changes --models llama-8b --densities 0.01 0.05

First every operation is checked against the reference, on the card, and again at full size before
it is timed; what is wrong ends the run. Then rows, printed as they come and added to
results/gpu.csv: medians of repetitions in which all ways take turns, by CUDA's clock, the cache
overwritten before each. ``bytes`` must move (kernels/README.md); ``share_of_copy`` is their rate
over that of a copy of the same weights from device to device, reads and writes counted.

changes  rebuild, exchange, switch, switch with the next task in pinned memory of the host; beside
         a dense copy, index_put_, masked_scatter_, a patch of NaN as vLLM applies it, and 1 bit a
         weight as BitDelta has it (in torch, each with what it needs in memory)
load     a file to weights in memory, base already there; the whole, then its parts one by one:
         read, decode (zstd and entropy coding, forms made), copy, expand; beside a dense file.
         ``cold``: the file was dropped from the page cache
matmul   all matrices of one layer, a batch of rows of 1, 4 and 16 tasks: base and delta_matmul,
         beside the base's product alone, a dense weight a task, and LoRA of rank 16. Captured in
         CUDA graphs, so that no launch is timed

Without CUDA the same code runs on small shapes on the CPU. It shows that it works: no time is of a
GPU then, and no row is kept.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import gpu_cases as cases
import nps_compress
import rows
from gpu_cases import Batch, Model
from nps_compress import resident
from nps_compress.bench import shapes, synthetic
from nps_compress.kernels.form import parts_of, to_device
from nps_compress.kernels.table import Changes, Tensors
from nps_compress.recipe import Recipe

RESULT = rows.RESULTS / "gpu.csv"
FIELDS = (
    *("section", "model", "params", "density", "values", "tasks", "batch", "way", "seconds"),
    *("bytes", "gb_s", "share_of_copy", "over_base", "task_bytes", "repeats"),
    *("card", "cuda", "machine", "versions", "commit"),
)
SECTIONS = ("changes", "load", "matmul")
DENSITIES = (0.002, 0.01, 0.05, 0.1, 0.2)
MODELS = ("llama-1b", "llama-8b", "llama-70b")
KINDS = ("signs", "words")
TASKS, BATCHES, RANK = (1, 4, 16), (16, 64, 1024), 16
TINY = shapes.Model("none", "llama", 64, 2, 4, 2, 160, 300, False)
_CACHE = 256 << 20  # bytes: more than any card's

Row = dict[str, object]
Ways = Mapping[str, Callable[[], object]]


class Clock:
    """Seconds of what a device does."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self._other = torch.zeros(_CACHE if self.is_cuda else 0, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call, from an empty queue; on CUDA from an overwritten cache."""
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._other.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def medians(self, ways: Ways, repeats: int) -> dict[str, float]:
        """Of each way, in turns; the first turn compiles and is not counted."""
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats + 1):
            for name, run in ways.items():
                found[name].append(self.seconds(run))
        return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same without the cost of launches."""
        if not self.is_cuda:
            return run
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


# ----- changes in memory


def measure_changes(
    clock: Clock, model: Model, density: float, kind: str, repeats: int, others: bool
) -> Iterator[Row]:
    """Rows of one density. ``others``: beside every other way."""
    left, right = (cases.task(model, density, kind, seed) for seed in (1, 2))
    buffers = cases.old_words(left), cases.old_words(right)
    copy_base = _copier(model.tensors.words, model.out.words)
    bring = _pinned(right)

    def switch_from_host() -> None:
        bring()
        resident.switch(left, right, *buffers)

    ways: dict[str, Callable[[], object]] = {
        "copy": copy_base,
        "rebuild": lambda: resident.rebuild(left, model.out),
        "exchange": lambda: resident.exchange(left, buffers[0]),
        "switch": lambda: resident.switch(left, right, *buffers),
        "undo": lambda: resident.exchange(right, buffers[1], undo=True),
        "exchange again": lambda: resident.exchange(left, buffers[0]),
        "switch from host": switch_from_host,
        "undo again": lambda: resident.exchange(right, buffers[1], undo=True),
    }
    _check_at_full_size(model, ways)
    for changes in (left, right):
        changes.check()
    moved = {
        "copy": 2.0 * model.nbytes,
        "rebuild": cases.rebuild_bytes(model, left),
        "exchange": cases.exchange_bytes(model, left, density),
        "switch": cases.switch_bytes(model, left, right, density),
        "switch from host": math.nan,
    }
    seconds = clock.medians(ways, repeats)
    if others:
        torch_ways = cases.other_ways(model, left)
        wanted = [words.clone() for words in model.out.words]
        for name, run in torch_ways.items():
            copy_base()
            run()
            if not all(map(torch.equal, model.out.words, wanted)):
                raise cases.WrongResultError(f"{name} differs from rebuild")
        del wanted
        seconds |= clock.medians(torch_ways, repeats)
    copy_rate = moved["copy"] / seconds["copy"]
    for name, taken in seconds.items():
        if name in ("undo", "exchange again", "undo again"):
            continue
        nbytes = moved.get(name, math.nan)
        yield {
            "section": "changes",
            "model": model.name,
            "params": model.params,
            "density": density,
            "values": kind if name in moved and name != "copy" else "",
            "way": name,
            "seconds": f"{taken:.6f}",
            **_rate(nbytes, taken, copy_rate),
            "task_bytes": left.nbytes if name in moved and name != "copy" else "",
            "repeats": repeats,
        }


def measure_one_bit(clock: Clock, model: Model, repeats: int) -> Row:
    """The row of a rebuild from 1 bit a weight."""
    taken = clock.medians({"1 bit": cases.one_bit(model)}, repeats)["1 bit"]
    return {
        "section": "changes",
        "model": model.name,
        "params": model.params,
        "way": "1 bit",
        "seconds": f"{taken:.6f}",
        "repeats": repeats,
    }


def _check_at_full_size(model: Model, ways: Ways) -> None:
    """Rebuild and exchange give the same, and undoing the base. Raises WrongResultError."""
    before = _sums(model.tensors)
    ways["rebuild"]()
    ways["exchange"]()
    cases.expect_same("exchange", model.tensors, model.out)
    ways["switch"]()
    ways["undo"]()
    if _sums(model.tensors) != before:
        raise cases.WrongResultError("undoing a switch did not restore the base")


def _sums(tensors: Tensors) -> list[int]:
    return [int(words.sum(dtype=torch.int64)) for words in tensors.words]


def _copier(source: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        for one, other in zip(source, out, strict=True):
            other.copy_(one, non_blocking=True)

    return run


def _pinned(changes: Changes) -> Callable[[], None]:
    """Copies the parts of a task from pinned memory of the host to where they are."""
    there = [part for form in changes.forms if form for part in parts_of(form)]
    here = [part.cpu().clone() for part in there]
    if changes.tensors.device.type == "cuda":
        here = [part.pin_memory() for part in here]
    return _copier(here, there)


def _rate(nbytes: float, seconds: float, copy_rate: float) -> Row:
    if math.isnan(nbytes):
        return {}
    rate = nbytes / seconds
    share = f"{rate / copy_rate:.3f}"
    return {"bytes": round(nbytes), "gb_s": f"{rate / 1e9:.1f}", "share_of_copy": share}


# ----- from a file


def measure_load(
    device: str, name: str, tensors: shapes.Shapes, recipe: Recipe, repeats: int, folder: Path
) -> Iterator[Row]:
    """Rows of one task of random weights, packed here."""
    from safetensors.torch import load_file

    base, (tuned,) = synthetic.write_pairs(folder, tensors, 1)
    path, dense = folder / "task.nps", tuned / "model.safetensors"
    nps_compress.pack(base, tuned, path, recipe=recipe)
    os.sync()
    weights = load_file(base / "model.safetensors", device)
    with nps_compress.open(path) as task:
        names = task.names
        weights = {one: weights[one] for one in names}
        held = Tensors(list(weights.values()))
        out = Tensors([torch.empty_like(weights[one]) for one in names])
        here = task.forms(weights, "cpu")
        there = Changes(held, [form.to(device) for form in here.values()])

    def whole() -> None:
        with nps_compress.open(path) as task:
            resident.rebuild(Changes(held, list(task.forms(weights, device).values())), out)
            _wait(device)

    def decode() -> None:
        with nps_compress.open(path) as task:
            task.forms(weights, "cpu")

    def copy() -> None:
        to_device(list(here.values()), device)
        _wait(device)

    def expand() -> None:
        resident.rebuild(there, out)
        _wait(device)

    def load_dense() -> None:
        load_file(dense, device)
        _wait(device)

    whole()
    with nps_compress.open(path) as task:
        for one, words in zip(names, out.words, strict=True):
            if not task.matches(one, words.cpu().numpy().view(np.uint16)):
                raise cases.WrongResultError(
                    f"{one} does not have the digest that its file promises"
                )
    there.check()
    ways = {
        "load": (whole, path),
        "read": (path.read_bytes, path),
        "dense load": (load_dense, dense),
        "dense read": (dense.read_bytes, dense),
        "decode": (decode, None),
        "copy": (copy, None),
        "expand": (expand, None),
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats + 1):
        for way, (run, file) in ways.items():
            for state in ("cold", "warm") if file else ("",):
                if file and state == "cold":
                    _drop(file)
                start = time.perf_counter()
                run()
                taken = time.perf_counter() - start
                seconds.setdefault(f"{way} {state}".strip(), []).append(taken)
    for way, times in seconds.items():
        yield {
            "section": "load",
            "model": name,
            "params": shapes.parameters(tensors),
            "density": recipe.density,
            "values": recipe.prune,
            "way": way,
            "seconds": f"{statistics.median(times[1:]):.6f}",
            "task_bytes": path.stat().st_size,
            "repeats": repeats,
        }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _drop(path: Path) -> None:
    """Take a file that is on the disk out of the page cache (Linux)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


# ----- products


def measure_matmul(
    clock: Clock,
    device: str,
    name: str,
    layer: shapes.Shapes,
    density: float,
    kind: str,
    counts: Sequence[int],
    batches: Sequence[int],
    repeats: int,
) -> Iterator[Row]:
    """Rows of all matrices of a layer, one product after the other."""
    matrices = [(shape[0], shape[1]) for shape in layer.values() if len(shape) == 2]
    weights = [0.02 * torch.randn(shape, dtype=cases.BF16, device=device) for shape in matrices]
    # Two tasks' numbers, again and again, each in memory of its own.
    made = [cases.random_forms(matrices, density, kind, seed) for seed in (1, 2)]
    forms = [
        to_device([made[number % 2][shape] for number in range(max(counts))], device)
        for shape in matrices
    ]
    for count in counts:
        for batch in batches:
            if batch < count:
                continue
            parts = [
                Batch.of(weight, of_one[:count], batch)
                for weight, of_one in zip(weights, forms, strict=True)
            ]
            for part in parts:
                part.check()
            ways = {
                "base": _all([part.base for part in parts]),
                "delta_matmul": _all([part.ours for part in parts]),
                "dense": _all([part.dense() for part in parts]),
                f"LoRA {RANK}": _all([part.lora(RANK) for part in parts]),
            }
            captured = {way: clock.captured(run) for way, run in ways.items()}
            seconds = clock.medians(captured, repeats)
            for way, taken in seconds.items():
                yield {
                    "section": "matmul",
                    "model": name,
                    "params": sum(map(math.prod, matrices)),
                    "density": density if way == "delta_matmul" else "",
                    "values": kind if way == "delta_matmul" else "",
                    "tasks": count,
                    "batch": batch,
                    "way": way,
                    "seconds": f"{taken:.6f}",
                    "over_base": f"{taken / seconds['base']:.3f}",
                    "task_bytes": sum(form.nbytes for of_one in forms for form in of_one[:1])
                    if way == "delta_matmul"
                    else "",
                    "repeats": repeats,
                }


def _all(runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for one in runs:
            one()

    return run


# ----- all of it


def measure(
    device: str,
    models: Mapping[str, shapes.Model],
    arguments: argparse.Namespace,
    folder: Path | None = None,
) -> Iterator[Row]:
    """All rows, one by one."""
    clock, repeats = Clock(device), arguments.repeats
    for name, model in models.items():
        if "changes" in arguments.only:
            tensors, what = synthetic.sample(model, round(arguments.gigabytes * 1e9))
            made = Model.of(f"{name}, {what}", tensors, device)
            for density in arguments.densities:
                for kind in KINDS:
                    others = kind == KINDS[-1]
                    yield from measure_changes(clock, made, density, kind, repeats, others)
            yield measure_one_bit(clock, made, repeats)
            del made
        if "load" in arguments.only:
            tensors, what = synthetic.sample(model, round(arguments.load_gigabytes * 1e9))
            for prune in ("signs", "magnitude"):
                recipe = Recipe(prune=prune, density=0.05)
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    yield from measure_load(
                        device, f"{name}, {what}", tensors, recipe, repeats, Path(work)
                    )
        if "matmul" in arguments.only:
            for density in arguments.densities:
                for kind in KINDS:
                    yield from measure_matmul(
                        *(clock, device, f"{name}, 1 layer", model.layer(0), density, kind),
                        *(TASKS, arguments.batches, repeats),
                    )
        if device == "cuda":
            torch.cuda.empty_cache()


def show(row: Row) -> str:
    """A row as a line."""
    parts = [f"{row[field]:>10}" if field in row else "" for field in ("density", "values")]
    batch = f"{row['tasks']} tasks, {row['batch']} rows" if "tasks" in row else ""
    figures = [
        f"{row[field]} {unit}"
        for field, unit in (
            ("gb_s", "GB/s"),
            ("share_of_copy", "of a copy"),
            ("over_base", "x base"),
        )
        if row.get(field, "") != ""
    ]
    milliseconds = 1e3 * float(str(row["seconds"]))
    return (
        f"{row['model']!s:28}{parts[0]:>10}{parts[1]:>10}  {batch:20}{row['way']!s:18}"
        f"{milliseconds:>12.3f} ms  {', '.join(figures)}"
    )


def environment() -> dict[str, str]:
    """The card and versions that a row belongs to."""
    import triton

    found = rows.environment()
    found["versions"] += f", torch {torch.__version__}, triton {triton.__version__}"
    return {
        "card": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        **found,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--models", nargs="+", choices=sorted(shapes.MODELS), default=MODELS)
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="rows in a batch")
    parser.add_argument(
        "--gigabytes", type=float, default=17.0, help="of a model's weights in memory, at most"
    )
    parser.add_argument(
        "--load-gigabytes", type=float, default=2.0, help="of weights that are packed and loaded"
    )
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: Mapping[str, shapes.Model] = {name: shapes.MODELS[name] for name in options.models}
    if device == "cpu":
        print("no CUDA device: the gate and the CPU's code on small shapes; no time is of a GPU")
        models = {"tiny": TINY}
        options.gigabytes = options.load_gigabytes = 0.001
        options.batches, options.repeats = (16,), 1
    try:
        print(f"{cases.check_all(device)} cases are as the reference has them", flush=True)
        shared = environment() if device == "cuda" else {}
        for row in measure(device, models, options):
            print(show(row), flush=True)
            if device == "cuda":
                rows.append(RESULT, FIELDS, {**row, **shared})
    except cases.WrongResultError as error:
        raise SystemExit(f"{error}; nothing more is timed") from None
    if device == "cuda":
        print(f"\nadded to {RESULT}")
    else:
        print("no CUDA device: nothing was written")


if __name__ == "__main__":
    main()
