"""Smallest on disk, fastest back: ours and every peer on the same pairs, in one run.

    make storage-peers               # the peers, each in an environment of its own
    python benchmarks/storage.py     # what has no row in results/storage.csv yet
    python benchmarks/storage.py --pair topics --provider "ours: lossless" --quality

One row a pair and provider. ``bytes`` is all that a provider wrote, over all parameters of the
fine-tune. Speeds are from files to files, imports and the first call left out, in MB/s of the
fine-tune's file: medians of repetitions in which the providers take turns. ``decode_over_copy`` is
the time that decoding takes over that of copying the fine-tune's file in the same turn. Files are
written as each provider does it; ours waits until the packed file is on the disk, others don't.
A provider runs in a process of its own for encoding and for decoding, whose peak resident set
the operating system reports: libraries and earlier repetitions included.

Every repetition's result is read back and compared. ``result`` says ``exact`` (bit for bit the
fine-tune), ``lossy`` with the ``relative_error`` of the task vector beside (0: exact, 1: as if
nothing were kept), or ``WRONG`` where a provider that promises exactness did not keep it, or two
repetitions differ. ``retained`` (with --quality, of lossy results) is the share of the fine-tune's
score on test data.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import nps_compress
import rows
import storage_pairs
from nps_compress.dtypes import BY_NAME, to_float32
from storage_pairs import Pair, Source, Tensors

RESULT = rows.RESULTS / "storage.csv"
FIELDS = (
    *("pair", "group", "provider", "params", "result", "bytes", "bits_per_param"),
    *("relative_error", "retained", "encode_mb_s", "decode_mb_s", "copy_mb_s"),
    *("encode_over_copy", "decode_over_copy", "encode_peak_mib", "decode_peak_mib"),
    *("repeats", "cores", "provider_versions", "machine", "versions", "commit"),
)
PEERS = Path(__file__).parent / "peers"
STEP_SECONDS = 900.0  # after which a worker is ended
COPY = "copy"
OURS = "ours.py"
STEPS = ("encode", "decode")
PARAMS = 24_000_000


@dataclass(frozen=True)
class Provider:
    """A way to store a fine-tune. ``environment``: the peer's, or None for this one."""

    name: str
    script: str
    settings: Mapping[str, Any]
    promises_exact: bool
    environment: str | None = None

    @property
    def python(self) -> Path:
        if self.environment is None:
            return Path(sys.executable)
        return PEERS / ".envs" / self.environment / "bin" / "python"


def providers() -> list[Provider]:
    """All of them; the low rank's budget is set for each pair, see :func:`with_budget`."""

    def ours(name: str, **recipe: object) -> Provider:
        return Provider(f"ours: {name}", OURS, {"recipe": recipe} if recipe else {}, False)

    def recipe(name: str, method: str, exact: bool) -> Provider:
        return Provider(name, "recipes.py", {"method": method}, exact)

    def deltatensors(name: str, **settings: object) -> Provider:
        peer = "deltatensors"
        return Provider(f"{peer} {name}", f"use_{peer}.py", settings, False, peer)

    fireworks, bitmask = "use_fireworks.py", "use_compressed_tensors.py"
    return [
        recipe(COPY, "copy", exact=True),
        Provider("ours: lossless", OURS, {"lossless": True}, True),
        Provider("ZipNN", "use_zipnn.py", {"delta": False}, True, "zipnn"),
        Provider("ZipNN XOR", "use_zipnn.py", {"delta": True}, True, "zipnn"),
        Provider("Fireworks arc_v2", fireworks, {"format": "arc_v2"}, True, "fireworks"),
        Provider("Fireworks arc_v3", fireworks, {"format": "arc_v3"}, True, "fireworks"),
        Provider("compressed-tensors bitmask", bitmask, {}, True, "compressed_tensors"),
        recipe("XOR + zstd (BitX)", "xor", exact=True),
        ours("default"),
        ours("signs 0.05", prune="signs", density=0.05),
        ours("magnitude 0.05", prune="magnitude", density=0.05),
        ours("sampled 0.05", prune="sampled", density=0.05),
        deltatensors("int4", strategy="int4"),
        deltatensors("sparse 0.9", strategy="sparse", sparsity=0.9),
        deltatensors("1 bit", strategy="quantized"),
        recipe("1 bit and scale (BitDelta)", "signs", exact=False),
        recipe("low rank, bytes of our default", "rank", exact=False),
    ]


class WorkerError(Exception):
    """A provider that is not installed, failed or died; one line."""


class Worker:
    """A provider's process. Raises WorkerError wherever it does not answer as it should."""

    def __init__(self, provider: Provider) -> None:
        if not provider.python.exists():
            raise WorkerError(f"not installed in {_shown(provider.python)}: make storage-peers")
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [provider.python, PEERS / provider.script, json.dumps(provider.settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.versions: dict[str, str] = self._answer()["versions"]

    def run(self, step: str, base: Path, source: Path, out: Path) -> tuple[float, float]:
        """One step. -> seconds and the peak resident set so far, in MiB."""
        assert self._process.stdin
        request = {"step": step, "base": str(base), "source": str(source), "out": str(out)}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(self._last_words()) from None
        found = self._answer()
        if "error" in found:
            raise WorkerError(str(found["error"]))
        return float(found["seconds"]), float(found["peak_mib"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        late = threading.Timer(STEP_SECONDS, self._process.kill)
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            raise WorkerError(self._last_words())
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"ended with {code}: {lines[-1] if lines else 'no word'}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(OSError):  # what it was not sent is lost, as it should be
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()


@dataclass(frozen=True)
class Gate:
    """What came back beside what should have. relative_error: of the shared tensors."""

    exact: bool
    relative_error: float

    @classmethod
    def of(cls, pair: Pair, found: Tensors) -> Gate:
        wrong = list(storage_pairs.differences(pair.tuned, found))
        error = change = 0.0
        for name, before in pair.base.items():
            wanted = _floats(pair.tuned[name].words)
            change += float(np.square(wanted - _floats(before.words), dtype=np.float64).sum())
            if name in wrong:
                if name not in found or found[name].shape != before.shape:
                    return cls(False, math.inf)
                moved = _floats(found[name].words) - wanted
                error += float(np.square(moved, dtype=np.float64).sum())
        if any(name not in pair.base for name in wrong):
            return cls(False, math.inf)  # what the fine-tune alone has is to be kept by all
        return cls(not wrong, math.sqrt(error / change) if change else float(error > 0))


@dataclass
class Measured:
    """What a provider did on a pair, over its repetitions."""

    versions: dict[str, str] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {step: [] for step in STEPS})
    peak: dict[str, float] = field(default_factory=dict)  # MiB
    gates: list[Gate] = field(default_factory=list)
    retained: float | None = None

    def result(self, promises_exact: bool) -> str:
        """``exact``, ``lossy`` or ``WRONG``."""
        if all(gate.exact for gate in self.gates):
            return "exact"
        same = len(set(self.gates)) == 1 and len(set(self.sizes)) == 1
        usable = all(math.isfinite(gate.relative_error) for gate in self.gates)
        return "WRONG" if promises_exact or not same or not usable else "lossy"


Report = Callable[[str, str], None]
Judge = Callable[[Tensors], float]


def measure(
    pair: Pair,
    chosen: Sequence[Provider],
    repeats: int,
    work: Path,
    report: Report,
    judge: Judge | None = None,
) -> dict[str, Measured]:
    """Encode and decode a pair with each provider, in turns.

    ``report`` hears of each provider that can't go on, which is then left out; ``judge`` scores
    what is lossy.
    """
    whole, small = work / "pair", work / "small"
    storage_pairs.write(pair, whole)
    storage_pairs.write(storage_pairs.tiny(pair), small)
    done = {provider.name: Measured() for provider in chosen}
    for step in STEPS:
        workers: dict[str, Worker] = {}
        with contextlib.ExitStack() as stack:
            for turn, provider in itertools.product(range(repeats + 1), chosen):
                found = done.get(provider.name)
                if found is None:
                    continue
                try:
                    if turn == 0:
                        worker = stack.enter_context(Worker(provider))
                        workers[provider.name], found.versions = worker, worker.versions
                        _step(step, worker, provider, small)
                        continue
                    seconds, peak = _step(step, workers[provider.name], provider, whole)
                except WorkerError as error:
                    report(provider.name, f"{step}: {error}")
                    del done[provider.name]
                    continue
                found.seconds[step].append(seconds)
                found.peak[step] = peak
                if step == "encode":
                    found.sizes.append(storage_pairs.folder_bytes(whole / provider.name))
                    continue
                rebuilt = storage_pairs.load(whole / "rebuilt")
                found.gates.append(Gate.of(pair, rebuilt))
                if judge and found.retained is None and found.result(False) == "lossy":
                    found.retained = judge(rebuilt)
    return done


def _step(step: str, worker: Worker, provider: Provider, at: Path) -> tuple[float, float]:
    """Let a worker encode or decode a pair. -> seconds and peak, see :meth:`Worker.run`."""
    packed = at / provider.name
    tuned = at / ("tuned" if provider.script == OURS else "common")
    source, out = (tuned, packed) if step == "encode" else (packed, at / "rebuilt")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if hasattr(os, "sync"):
        os.sync()  # so that who waits for the disk does not wait for what others have written
    return worker.run(step, at / "base", source, out)


def with_budget(provider: Provider, pair: Pair, work: Path) -> Provider:
    """The provider; the low rank's with the bits a parameter that our default takes."""
    if provider.settings.get("method") != "rank":
        return provider
    at = work / "budget"
    storage_pairs.write(pair, at)
    packed = nps_compress.pack(at / "base", at / "tuned", at / "task.nps")
    shutil.rmtree(at)
    settings = {**provider.settings, "bits": packed.bits_per_param}
    return dataclasses.replace(provider, settings=settings)


def row(
    source: Source, pair: Pair, provider: Provider, found: Measured, copy: Measured
) -> dict[str, object]:
    """The row of a provider; ``copy`` took turns with it."""
    megabytes = 2 * pair.params / 1e6
    result = found.result(provider.promises_exact)
    error = max(gate.relative_error for gate in found.gates)
    fields: dict[str, object] = {
        "pair": source.name,
        "group": source.group,
        "provider": provider.name,
        "params": pair.params,
        "result": result,
        "bytes": max(found.sizes),
        "bits_per_param": f"{8 * max(found.sizes) / pair.params:.4f}",
        "relative_error": f"{error:.4f}",
        "retained": "" if found.retained is None else f"{found.retained:.4f}",
        "copy_mb_s": f"{megabytes / statistics.median(copy.seconds['decode']):.0f}",
        "repeats": len(found.gates),
        "cores": _cores(),
        "provider_versions": ", ".join(f"{n} {v}" for n, v in found.versions.items()),
    }
    for step in STEPS:
        seconds = found.seconds[step]
        # A provider may end early, not start late: its turns are the copy's first.
        ratios = [a / b for a, b in zip(seconds, copy.seconds[step], strict=True)]
        fields[f"{step}_mb_s"] = f"{megabytes / statistics.median(seconds):.1f}"
        fields[f"{step}_over_copy"] = f"{statistics.median(ratios):.2f}"
        fields[f"{step}_peak_mib"] = f"{found.peak[step]:.0f}"
    return fields


def run(
    source: Source,
    chosen: Sequence[Provider],
    repeats: int,
    quality: bool,
    result: Path,
    folder: Path | None,
) -> list[str]:
    """Measure what has no row of a pair yet, and keep the rows. -> what could not be measured."""
    kept = {(r["pair"], r["provider"]): r for r in rows.read(result)}
    missing = {
        provider.name
        for provider in chosen
        if not _is_done(kept.get((source.name, provider.name)), source, quality)
    }
    if not missing:
        return []
    environment = rows.environment()
    failures: list[str] = []

    def report(provider: str, why: str) -> None:
        failures.append(f"{source.name}: {provider}: {why}")
        print(failures[-1], flush=True)

    pair = source.make()
    judge = _judge(source.task) if quality and source.task else None
    for exact in (True, False):  # apart, so that fewer processes wait in memory at once
        group = [p for p in chosen if p.name in missing and p.promises_exact is exact]
        if not group:
            continue
        copy = [p for p in providers() if p.name == COPY and p not in group]
        with tempfile.TemporaryDirectory(dir=folder) as name:
            group = [with_budget(provider, pair, Path(name)) for provider in group]
            found = measure(pair, [*copy, *group], repeats, Path(name), report, judge)
        if COPY not in found:
            raise SystemExit(f"{source.name}: the plain copy failed; nothing reported")
        for provider in group:
            if provider.name not in found:
                continue
            fields = row(source, pair, provider, found[provider.name], found[COPY])
            kept[source.name, provider.name] = {
                name: str(value) for name, value in {**fields, **environment}.items()
            }
            rows.write(result, FIELDS, kept.values())
            print(
                f"{provider.name:32}{fields['result']:>6}{fields['bits_per_param']:>9} bits"
                f"{fields['relative_error']:>10} off{fields['retained']:>8} kept"
                f"{fields['encode_mb_s']:>8} in{fields['decode_mb_s']:>8} out MB/s",
                flush=True,
            )
    return failures


def _is_done(row: Mapping[str, str] | None, source: Source, quality: bool) -> bool:
    if row is None:
        return False
    return not (quality and source.task and row["result"] == "lossy" and not row["retained"])


def _judge(task: str) -> Judge:
    """The share of a fine-tune's score, on test data, that weights keep."""
    import torch

    import quality
    import tasks

    judge = quality.Judge(quality.Pair.of(tasks.build(task)))

    def retained(weights: Tensors) -> float:
        found = {n: torch.from_numpy(_floats(t.words)).view(t.shape) for n, t in weights.items()}
        return judge.retained(judge.score(found))

    return retained


# ----- what came of it


def table(found: Sequence[Mapping[str, str]]) -> str:
    """A block a pair; ``*`` marks the smallest and the fastest of those that are exact."""
    blocks = []
    for name, group in _by_pair(found):
        best = {}
        exact = [r for r in group if r["result"] == "exact" and r["provider"] != COPY]
        for column, pick in (("bits_per_param", min), ("encode_mb_s", max), ("decode_mb_s", max)):
            best[column] = pick((float(r[column]) for r in exact), default=math.nan)
        lines: list[dict[str, object]] = []
        for row in group:
            line = {name: row[name] for name in ("provider", "result", *best)}
            for column, value in best.items():
                line[column] += "*" if row in exact and float(row[column]) == value else ""
            of_row = ("decode_over_copy", "relative_error", "retained")
            line |= {name: row[name] for name in (*of_row, "encode_peak_mib", "decode_peak_mib")}
            lines.append(dict(line))
        blocks.append(f"{name} ({int(group[0]['params']):,} weights)\n{rows.table(lines)}")
    return "\n\n".join(blocks)


def behind(found: Sequence[Mapping[str, str]]) -> list[str]:
    """Where a peer is ahead of ours.

    Of our lossless mode: smaller, or sooner, with an exact result. Of our default: sooner, with a
    lossy one. Of any lossy mode: where both are scored, no larger and no worse.
    """
    lines = []
    speeds = {"encode_mb_s": "MB/s in", "decode_mb_s": "MB/s out"}
    races = {
        "lossless": ("exact", {"bits_per_param": "bits"} | speeds),
        "default": ("lossy", speeds),
    }
    for name, group in _by_pair(found):
        ours = [row for row in group if row["provider"].startswith("ours: ")]
        peers = [row for row in group if row not in ours and row["provider"] != COPY]
        for mode, (result, columns) in races.items():
            mine = [r for r in ours if r["provider"] == f"ours: {mode}" and r["result"] == result]
            for row, column, peer in itertools.product(mine, columns, peers):
                here, there = float(row[column]), float(peer[column])
                ahead = there < here if column == "bits_per_param" else there > here
                if peer["result"] == result and ahead:
                    lines.append(
                        f"{name}: {peer['provider']} {peer[column]}, "
                        f"{row['provider']} {row[column]} {columns[column]}"
                    )
        for row, peer in itertools.product(ours, peers):
            if not row["retained"] or not peer["retained"]:
                continue
            smaller = float(peer["bits_per_param"]) <= float(row["bits_per_param"])
            if smaller and float(peer["retained"]) >= float(row["retained"]):
                lines.append(
                    f"{name}: {peer['provider']} keeps {peer['retained']} in "
                    f"{peer['bits_per_param']} bits, {row['provider']} {row['retained']} in "
                    f"{row['bits_per_param']}"
                )
    return lines


def plot(found: Sequence[Mapping[str, str]], path: Path) -> None:
    """Bits a parameter by provider: a panel a group of pairs, a colour a pair; hollow: lossy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [row for row in found if row["result"] != "WRONG"]
    groups = list(dict.fromkeys(row["group"] for row in found))
    names = [p.name for p in providers() if any(p.name == row["provider"] for row in found)][::-1]
    figure, panels = pyplot.subplots(
        *(1, len(groups)),
        figsize=(5 * len(groups), 6.5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, group in zip(panels.flat, groups, strict=True):
        rows_of = [row for row in found if row["group"] == group]
        for number, pair in enumerate(dict.fromkeys(row["pair"] for row in rows_of)):
            colour = matplotlib.colormaps["tab10"](number)
            for exact in (True, False):
                points = [
                    (float(row["bits_per_param"]), names.index(row["provider"]) - number / 12)
                    for row in rows_of
                    if row["pair"] == pair and (row["result"] == "exact") is exact
                ]
                if points:
                    face = colour if exact else "none"
                    label = pair if exact else "_"
                    style = {"marker": "o", "linestyle": "", "color": colour, "mfc": face}
                    axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set(xscale="log", title=group, xlabel="bits per parameter, everything counted")
        axes.grid(alpha=0.3, which="both", axis="x")
        axes.legend(fontsize=8)
    panels[0][0].set_yticks(range(len(names)), names)
    figure.suptitle("filled: bit for bit the fine-tune; hollow: lossy")
    figure.savefig(path, dpi=90)


def _by_pair(
    found: Sequence[Mapping[str, str]],
) -> Iterator[tuple[str, list[Mapping[str, str]]]]:
    pairs = {source.name: number for number, source in enumerate(storage_pairs.sources(PARAMS))}
    order = {provider.name: number for number, provider in enumerate(providers())}
    for name in sorted({row["pair"] for row in found}, key=lambda name: pairs.get(name, -1)):
        group = [row for row in found if row["pair"] == name]
        yield name, sorted(group, key=lambda row: order.get(row["provider"], -1))


def _floats(words: Any) -> Any:
    return to_float32(words, BY_NAME["BF16"])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shown(path: Path) -> str:
    return str(path.relative_to(PEERS.parent.parent))


def main() -> None:
    names = [source.name for source in storage_pairs.sources(PARAMS)]
    known = [provider.name for provider in providers()]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=f"pairs: {'; '.join(names)}. providers: {'; '.join(known)}.",
    )
    parser.add_argument("--pair", action="append", choices=names, metavar="PAIR")
    parser.add_argument("--provider", action="append", choices=known, metavar="PROVIDER")
    parser.add_argument("--quick", action="store_true", help="small, once; synthetic; not saved")
    parser.add_argument("--params", type=int, help="of synthetic pairs; another size isn't saved")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, help="cores that a provider may use (default: all)")
    parser.add_argument("--quality", action="store_true", help="score what is lossy on test data")
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--plot", action="store_true", help="measure nothing, show what there is")
    arguments = parser.parse_args()
    if arguments.cores:  # which workers inherit
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        os.environ |= {f"{name}_NUM_THREADS": str(_cores()) for name in ("OMP", "NUMBA")}
    params = arguments.params or (2_000_000 if arguments.quick else PARAMS)
    chosen = [p for p in providers() if p.name in (arguments.provider or known)]
    wanted = arguments.pair or [n for n in names if not (arguments.quick and n in _real())]
    repeats = 1 if arguments.quick else arguments.repeats
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        saved = not arguments.quick and params == PARAMS
        result = RESULT if saved else Path(temporary) / RESULT.name
        for source in () if arguments.plot else storage_pairs.sources(params):
            if source.name in wanted:
                print(f"> {source.name}", flush=True)
                at = arguments.folder
                failures += run(source, chosen, repeats, arguments.quality, result, at)
        found = rows.read(result)
        print(f"\n{table(found)}\n")
        for title, lines in (("a peer is ahead", behind(found)), ("not measured", failures)):
            print("\n".join([f"{title}:", *(f"  {line}" for line in lines or ["none"])]))
        if saved and found:
            plot(found, RESULT.with_suffix(".png"))
            print(f"\nrows in {RESULT}, picture beside")
    wrong = [
        row for row in found if row["result"] == "WRONG" and row["provider"].startswith("ours")
    ]
    if wrong:
        raise SystemExit(f"ours is wrong on {', '.join(row['pair'] for row in wrong)}")


def _real() -> set[str]:
    return {s.name for s in storage_pairs.sources(PARAMS) if s.group.startswith("real")}


if __name__ == "__main__":
    main()
