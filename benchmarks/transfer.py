"""What a fine-tune learns and what it forgets: dense, pruned, and by `nps-compress transfer`.

    python benchmarks/transfer.py            # one seed
    python benchmarks/transfer.py --full     # three seeds

Two fine-tunes whose base knows something in the same words or classes:

``source``  a small language model that has read docstrings, fine-tuned on Python source. General:
            docstrings it was not trained on. Scores are likelihoods of a token, exp(-loss).
``turned``  a vision transformer that reads handwritten digits, fine-tuned on digits that lie on
            their side or stand on their head. General: upright ones. Scores are accuracies.

H is the harmonic mean of target and general, on test data; searches see development data only.
``*_accuracy`` is the share of next tokens, or classes, that are predicted. Rows that are there are
not measured again; the pictures are those of the command, on development data.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import causal_lm
import rows
import tasks
from nps_compress.merging.contract import Settings
from nps_compress.merging.methods import METHODS
from nps_compress.transferring import Balance, transfer
from training import Batch, class_measures

RESULT = rows.RESULTS / "transfer.csv"
FIELDS = (
    *("task", "method", "setting", "seed", "density", "target", "general", "h"),
    *("target_accuracy", "general_accuracy", "scale", "evaluations", "seconds"),
    *("machine", "versions", "commit"),
)
DENSITY = 0.1
_GENERAL = (256, 1000)  # development and test docstrings


@dataclass(frozen=True)
class Setting:
    """A row to measure: settings of transfer, and whether they are where a search starts."""

    method: str
    setting: str
    settings: Settings
    search: bool = False
    subspaces: int = 8


def settings(seeds: range) -> Iterator[tuple[int, Setting]]:
    plain = replace(METHODS["nps"].defaults, density=DENSITY)
    whole = replace(plain, density=1.0)
    yield 0, Setting("magnitude", "lambda 1", plain)
    for seed in seeds:
        of = replace(plain, seed=seed)
        yield seed, Setting("dare", "lambda 1", replace(of, prune="random"))
        yield seed, Setting("sampled", "lambda 1", replace(of, prune="sampled"))
        yield seed, Setting("nps", "searched", of, True)
        yield seed, Setting("nps over sampled", "searched", replace(of, prune="sampled"), True)
        yield seed, Setting("magnitude", "lambda searched", of, True, 1)
        yield seed, Setting("dense", "lambda searched", replace(whole, seed=seed), True, 1)


@dataclass(frozen=True)
class Job:
    """A fine-tune with the two kinds of data. ``parts``: test batches, target and general."""

    name: str
    task: tasks.Task
    development: tuple[Path, Path]
    parts: tuple[Sequence[Batch], Sequence[Batch]]
    is_loss: bool

    def scores(self, folder: Path) -> tuple[Balance, Balance]:
        """Of a model on test data: what is searched for, and accuracies."""
        model = tasks.load_model(self.task, folder)
        found = [class_measures(model, part) for part in self.parts]
        accuracies = Balance(*(each["accuracy"] for each in found))
        if not self.is_loss:
            return accuracies, accuracies
        likely = (float(torch.tensor(-each["loss"]).exp()) for each in found)
        return Balance(*likely), accuracies


def _turned() -> Job:
    turned, upright = tasks.build("turned"), tasks.build("digits")
    development = turned.calibration, upright.calibration
    parts = tasks.batches(turned), tasks.batches(upright)
    return Job("turned", turned, development, parts, False)


def _source() -> Job:
    source = tasks.build("source")
    general = _prose(source)
    test = causal_lm.batches(source.finetuned, _read(general / "test.jsonl"))
    development = source.calibration, general / "calibration.jsonl"
    return Job("source", source, development, (tasks.batches(source), test), True)


JOBS = {"turned": _turned, "source": _source}


def _prose(source: tasks.Task) -> Path:
    """Docstrings that the base was not trained on, in a folder of the cache."""
    folder = tasks.CACHE / "prose"
    if not (folder / "test.jsonl").exists():
        pretraining = source.calibration.with_name("pretraining.jsonl")
        seen = {row["text"] for row in _read(pretraining)}
        texts = sorted({item.row["text"] for item in causal_lm.collect()[1]} - seen)
        random.Random(0).shuffle(texts)
        folder.mkdir(exist_ok=True)
        first, second = _GENERAL
        for name, part in (("calibration", texts[:first]), ("test", texts[first:][:second])):
            lines = (json.dumps({"text": text}) + "\n" for text in part)
            (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def measure(job: Job, seeds: range) -> None:
    def key(row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("task", "method", "setting", "seed"))

    done = {key(row) for row in rows.read(RESULT)}
    environment = rows.environment()

    def add(row: Mapping[str, object], folder: Path) -> None:
        found, accuracies = job.scores(folder)
        figures = {
            "target": f"{found.target:.4f}",
            "general": f"{found.general:.4f}",
            "h": f"{found.harmonic:.4f}",
            "target_accuracy": f"{accuracies.target:.4f}",
            "general_accuracy": f"{accuracies.general:.4f}",
        }
        rows.append(RESULT, FIELDS, {**row, **figures, **environment})
        print(
            f"{job.name:8}{row['method']:18}{row['setting']:17}{row['seed']:<3}"
            f"target {figures['target']} general {figures['general']} H {figures['h']}",
            flush=True,
        )

    for method, folder in (("base", job.task.base), ("fine-tune", job.task.finetuned)):
        row = {"task": job.name, "method": method, "setting": "dense", "seed": 0}
        if key(row) not in done:
            add(row, folder)
    for seed, each in settings(seeds):
        row = {"task": job.name, "method": each.method, "setting": each.setting, "seed": seed}
        if key(row) in done:
            continue
        started = time.perf_counter()
        picture = RESULT.with_name(f"transfer-{job.name}.svg")
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "out"
            report = transfer(
                job.task.base,
                job.task.finetuned,
                out,
                *job.development,
                settings=each.settings,
                subspaces=each.subspaces,
                search=each.search,
                plot=picture if (each.method, seed) == ("nps", 0) else None,
                force=True,
            )
            more = {
                "density": each.settings.density,
                "scale": f"{report.settings.scale:.4g}",
                "evaluations": report.tuned.evaluations if report.tuned else 0,
                "seconds": round(time.perf_counter() - started, 1),
            }
            add({**row, **more}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed (the default)")
    size.add_argument("--full", action="store_true", help="three seeds")
    parser.add_argument("--seeds", type=int, help="how many (1, with --full 3)")
    parser.add_argument("--task", action="append", choices=JOBS, help="only this one")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("medium")  # as fusion.py, for all models alike
    for name in arguments.task or JOBS:
        measure(JOBS[name](), range(arguments.seeds or (3 if arguments.full else 1)))
    print(f"rows in {RESULT}, pictures beside")


if __name__ == "__main__":
    main()
