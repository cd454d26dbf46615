"""The compression experiments of Neural Parameter Search, run where their models are.

    python benchmarks/paper.py                                             # what can run here
    python benchmarks/paper.py --config clip-b32 --task svhn --data DATA

Table 3 of arXiv 2505.18713: each fine-tune is kept at density 0.05 after a search of eight
coefficients; beside it stands our own recipe, sampled, at the same density. Nothing is downloaded:
models come from the local Hub cache, or from ``--models FOLDER``, where they lie in
``FOLDER/<config>/base`` and ``FOLDER/<config>/<task>``. Data is the user's, each part JSONL or a
folder of images as nps_compress.calibration reads it:

    DATA/<task>/calibration[.jsonl]    what the search sees; else a tenth of
    DATA/<task>/train[.jsonl]
    DATA/<task>/test[.jsonl]           seen by nothing but the measurement

Rows go to results/paper.csv as they are measured; those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import nps_compress
import rows
from nps_compress.atomic import atomic_directory
from nps_compress.calibration import Example, read_examples
from nps_compress.checkpoint import WEIGHTS, Checkpoint, open_checkpoint
from nps_compress.errors import CheckpointError, NpsError, SearchInterruptedError
from nps_compress.fitness import Fitness
from nps_compress.recipe import Recipe
from nps_compress.report import RATIOS
from nps_compress.searching import SearchOptions

RESULT = rows.RESULTS / "paper.csv"
WORK = Path(__file__).parent / "cache" / "paper"
KEY = ("config", "task", "method", "generations", "seed")
FIELDS = (
    *KEY,
    *("metric", "density", "bits_per_param", "base_score", "finetuned_score", "score"),
    *("normalised", "paper_finetuned", "paper_mean", "paper_normalised", "paper_bits_per_param"),
    *("evaluations", "machine", "versions", "commit"),
)

DENSITY = 0.05  # kept share r of the tuned parameters, the paper's table 12
SUBSPACES = 8  # of equal count; the paper's main vision results are those of 8 in its table 10
# A 32-bit value for each that is kept and a mask of one bit, the paper's appendix C.3.
PAPER_BITS = 32 * DENSITY + 1
# The paper doesn't say how much data its search sees; this is the habit of the code that it builds
# on (PCB-Merging): a tenth of the training set, at most 5,000 examples.
CALIBRATION_SHARE, MAX_CALIBRATION = 0.1, 5000
TOWER = "vision_model."


@dataclass(frozen=True)
class Task:
    """A fine-tune. ``finetuned``: its Hub id, None where no public one is known.

    ``accuracy``: of the paper's own fine-tune, percent, None where it gives none.
    """

    name: str
    finetuned: str | None
    accuracy: float | None


@dataclass(frozen=True)
class Configuration:
    """One column of the paper's table 3.

    ``metric``: a fitness, for the search and for the test data. ``generations``: the paper's
    table 13. ``accuracy`` and ``normalised``: what NPS keeps, the mean over the tasks, percent.
    """

    name: str
    base: str
    metric: str
    generations: int
    accuracy: float
    normalised: float
    tasks: tuple[Task, ...]


# Ids are from model cards, file lists and other people's code; no model could be opened from here.
#
# Fine-tunes: vision towers only, trained again by FusionBench with the text tower frozen; not the
# checkpoints of Task Arithmetic, which the paper is likely to have used. The base of ViT-B/32
# seems to publish pickles only: converted, it is given by --models.
_VISION = {
    # name -> (suffix of the id, percent of ViT-B/32, of ViT-L/14)
    "sun397": ("sun397", 75.3, 82.3),
    "cars": ("stanford-cars", 77.7, 92.4),
    "resisc45": ("resisc45", 96.1, 97.4),
    "eurosat": ("eurosat", 99.7, 100.0),
    "svhn": ("svhn", 97.5, 98.1),
    "gtsrb": ("gtsrb", 98.7, 99.2),
    "mnist": ("mnist", 99.7, 99.7),
    "dtd": ("dtd", 79.4, 84.1),
}
# Fine-tunes by another hand on the paper's tasks, of T5's first version by their size; prompts
# are not documented. Where no trace of an id was found: False.
_TEXT = {
    # name -> (percent of T5-base, of T5-large, whether a T5-large is known)
    "paws": (94.6, 94.5, False),
    "qasc": (98.4, 98.3, False),
    "quartz": (81.1, 88.5, False),
    "story_cloze": (84.9, 91.4, True),
    "wiki_qa": (95.8, 96.2, True),
    "winogrande": (64.5, 74.5, True),
    "wsc": (62.5, 79.2, True),
}


def _t5(size: str, generations: int, accuracy: float, normalised: float) -> Configuration:
    """T5: an answer counts if it is the target word for word; the paper ranks the choices."""
    large = size == "large"
    tasks = tuple(
        Task(
            name,
            f"SeongwooKim/T5-{size}-{name}" if known or not large else None,
            after if large else before,
        )
        for name, (before, after, known) in _TEXT.items()
    )
    return Configuration(
        f"t5-{size}",
        f"google-t5/t5-{size}",
        "exact_match",
        generations,
        accuracy,
        normalised,
        tasks,
    )


def _clip(name: str, model: str, column: int, accuracy: float, normalised: float) -> Configuration:
    tasks = tuple(
        Task(task, f"tanganke/{model}_{row[0]}", (row[1], row[2])[column])
        for task, row in _VISION.items()
    )
    return Configuration(name, f"openai/{model}", "accuracy", 30, accuracy, normalised, tasks)


CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in (
        _clip("clip-b32", "clip-vit-base-patch32", 0, 90.9, 100.4),
        _clip("clip-l14", "clip-vit-large-patch14", 1, 94.3, 100.1),
        _t5("base", 30, 82.9, 99.8),
        _t5("large", 50, 88.8, 99.9),
        # The paper's metrics (choices of CMMLU, the last number of GSM8K's answers, code that runs
        # for HumanEval) are no fitness; loss stands for them. The paper names no id of the code
        # model. These three publish pickles, to be converted and given by --models.
        Configuration(
            "llama2-7b",
            "meta-llama/Llama-2-7b-hf",
            "loss",
            20,
            40.5,
            100.2,
            (
                Task("chinese", "LinkSoul/Chinese-Llama-2-7b", None),
                Task("math", "meta-math/MetaMath-7B-V1.0", None),
                Task("code", "edumunozsala/llama-2-7b-int4-python-code-20k", None),
            ),
        ),
    )
}


@dataclass(frozen=True)
class Places:
    """Where models, data and what is written in between lie; None where not given."""

    models: Path | None = None
    data: Path | None = None
    work: Path = WORK

    def model(self, config: Configuration, part: str, hub_id: str | None) -> Checkpoint:
        """The user's own checkpoint, else the one in the Hub's cache. Raises CheckpointError."""
        own = self.models / config.name / part if self.models else None
        if own and own.exists():
            return open_checkpoint(own)
        if hub_id is None:
            raise CheckpointError(
                f"{config.name}/{part}", "has no known Hub id; give it by --models"
            )
        return open_checkpoint(hub_id)

    def part(self, task: Task, part: str) -> Path | None:
        """A part of a task's data; None where there is none."""
        if self.data is None:
            return None
        found = (self.data / task.name / name for name in (part, f"{part}.jsonl"))
        return next((path for path in found if path.exists()), None)


def missing(config: Configuration, task: Task, places: Places) -> str:
    """What keeps a task from running, the base aside; empty where nothing does."""
    found = []
    try:
        places.model(config, task.name, task.finetuned)
    except CheckpointError as error:
        found.append(f"fine-tune {error}")
    parts = {"calibration or train": ("calibration", "train"), "test": ("test",)}
    lacking = [
        said for said, names in parts.items() if not any(places.part(task, name) for name in names)
    ]
    if lacking:
        where = places.data / task.name if places.data else "give --data"
        found.append(f"no {', no '.join(lacking)} data ({where})")
    return "; ".join(found)


def missing_base(config: Configuration, places: Places) -> str:
    """Why the base can't be used; empty where it can."""
    try:
        places.model(config, "base", config.base)
    except CheckpointError as error:
        return f"base {error}"
    return ""


def listing(places: Places) -> Iterator[str]:
    """What can run here, and a line for each thing that can't and why."""
    for config in CONFIGURATIONS.values():
        no_base = missing_base(config, places)
        lacking = {task.name: missing(config, task, places) for task in config.tasks}
        ready = [name for name, line in lacking.items() if not line and not no_base]
        yield f"{config.name}: {len(ready)} of {len(lacking)} tasks can run"
        if no_base:
            yield f"  {no_base}"
        yield from (f"  {name}: {line}" for name, line in lacking.items() if line)


def calibration_data(task: Task, places: Places, out: Path) -> Path:
    """The user's calibration data, else a tenth of the training data, written to ``out``."""
    given = places.part(task, "calibration")
    if given:
        return given
    train = places.part(task, "train")
    assert train
    examples = read_examples(train)
    count = min(max(1, round(CALIBRATION_SHARE * len(examples))), MAX_CALIBRATION)
    picked = random.Random(0).sample(examples, count)
    out.write_text("".join(json.dumps(_as_line(example)) + "\n" for example in picked))
    return out


def _as_line(example: Example) -> dict[str, object]:
    values = {key: value for key, value in vars(example).items() if value is not None}
    if example.image:
        values["image"] = str(example.image.resolve())
    return values


def full_clip(base: Checkpoint, tower: Checkpoint, out: Path) -> float:
    """Write a CLIPModel: the base with a fine-tuned vision tower.

    -> the tower's share of all elements. transformers saves a tower with or without its prefix,
    depending on its version.

    Raises:
        CheckpointError: not a tower of this base. WriteError.
    """
    tuned = {TOWER + name.removeprefix(TOWER): t for name, t in _weights(tower).items()}
    weights = _weights(base)
    for found in (tuned, weights):  # no weights: 0, 1, 2, ..., which old versions saved too
        for name in [name for name in found if name.endswith("position_ids")]:
            del found[name]
    shapes = {name: t.shape for name, t in weights.items() if name.startswith(TOWER)}
    if shapes != {name: tensor.shape for name, tensor in tuned.items()}:
        raise CheckpointError(tower.path, f"is not a vision tower of {base.name}")
    weights.update(tuned)
    with atomic_directory(out, force=True) as folder:
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
        for name, path in base.side_files.items():
            shutil.copyfile(path, folder / name)
    return sum(t.numel() for t in tuned.values()) / sum(t.numel() for t in weights.values())


def _weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    return {name: t for file in sorted(files) for name, t in load_file(file).items()}


def _is_tower(checkpoint: Checkpoint) -> bool:
    if "config.json" not in checkpoint.side_files:
        return False
    config = json.loads(checkpoint.read_side_file("config.json"))
    return str((config.get("architectures") or [""])[0]).startswith("CLIPVisionModel")


@dataclass(frozen=True)
class Method:
    """A recipe, and the generations of the search before it; 0: none."""

    name: str
    recipe: Recipe
    generations: int


def methods(
    config: Configuration, share: float, generations: int | None, seed: int
) -> list[Method]:
    """The paper's and ours. ``share``: of the elements, those that were tuned.

    Density and subspaces are shares of what was tuned: a frozen tower takes no part in the paper.
    """
    paper = Recipe.with_subspaces(SUBSPACES, "equal", prune="magnitude", density=DENSITY, seed=seed)
    paper = replace(
        paper, density=DENSITY * share, top_shares=tuple(top * share for top in paper.top_shares)
    )
    ours = Recipe(prune="sampled", density=DENSITY * share, seed=seed)
    rounds = config.generations if generations is None else generations
    return [Method("NPS (paper)", paper, rounds), Method("ours: sampled", ours, 0)]


def measure(
    config: Configuration,
    task: Task,
    places: Places,
    environment: Mapping[str, str],
    generations: int | None = None,
    seed: int = 0,
) -> None:
    """Measure what results/paper.csv lacks of a task.

    Raises:
        NpsError: models or data can't be used, or the search was interrupted; called again, it
        goes on.
    """
    done = {tuple(row[key] for key in KEY) for row in rows.read(RESULT)}

    def key(method: Method) -> tuple[str, ...]:
        return config.name, task.name, method.name, str(method.generations), str(seed)

    if all(key(method) in done for method in methods(config, 1.0, generations, seed)):
        return
    base = places.model(config, "base", config.base)
    tuned, share = places.model(config, task.name, task.finetuned), 1.0
    work = places.work / config.name / task.name
    work.mkdir(parents=True, exist_ok=True)
    if _is_tower(tuned):
        share = full_clip(base, tuned, work / "finetuned")
        tuned = open_checkpoint(work / "finetuned")
    calibration = calibration_data(task, places, work / "calibration.jsonl")
    test = places.part(task, "test")
    assert test
    examples = read_examples(test)

    def score(folder: Path) -> float:
        return Fitness(folder, examples, config.metric, source=test).score()

    before, after = score(base.path), score(tuned.path)  # first: bad data shows before hours pass
    for method in methods(config, share, generations, seed):
        if key(method) in done:
            continue
        file = work / f"{method.recipe.prune}-{method.generations}-{seed}.nps"
        report = nps_compress.pack(
            base.path,
            tuned.path,
            file,
            recipe=method.recipe,
            calibration=calibration if method.generations else None,
            search=SearchOptions(fitness=config.metric, generations=method.generations),
            force=True,
            progress=True,
        )
        with tempfile.TemporaryDirectory(dir=work) as folder:
            nps_compress.unpack(base.path, file, Path(folder) / "model")
            found = score(Path(folder) / "model")
        # A loss has no zero: the share of its gain over the base.
        floor = 0.0 if config.metric in RATIOS else before
        kept = (found - floor) / (after - floor) if after != floor else float("nan")
        bits = report.bits_per_param / share
        row = {
            **dict(zip(KEY, key(method), strict=True)),
            "metric": config.metric,
            "density": DENSITY,
            "bits_per_param": f"{bits:.4f}",
            "base_score": f"{before:.5f}",
            "finetuned_score": f"{after:.5f}",
            "score": f"{found:.5f}",
            "normalised": f"{kept:.4f}",
            "paper_finetuned": "" if task.accuracy is None else f"{task.accuracy / 100:.3f}",
            "paper_mean": f"{config.accuracy / 100:.3f}",
            "paper_normalised": f"{config.normalised / 100:.3f}",
            "paper_bits_per_param": f"{PAPER_BITS:.2f}",
            "evaluations": report.recipe.search.get("evaluations", 0) if report.recipe else 0,
            **environment,
        }
        rows.append(RESULT, FIELDS, row)
        print(
            f"{config.name:10} {task.name:12} {method.name:14} {bits:6.3f} bits {found:8.4f} "
            f"{kept:8.2%}   the paper, mean of its tasks: {PAPER_BITS} bits, "
            f"{config.normalised / 100:.1%}",
            flush=True,
        )


def run(
    config: Configuration,
    tasks: Sequence[Task],
    places: Places,
    generations: int | None = None,
    seed: int = 0,
) -> int:
    """Measure tasks, those that can't run are skipped. -> exit status: 1 if any was."""
    no_base = missing_base(config, places)
    if no_base:
        print(f"{config.name}: {no_base}", file=sys.stderr)
        return 1
    status, environment = 0, rows.environment()
    for task in tasks:
        try:
            lacking = missing(config, task, places)
            if not lacking:
                measure(config, task, places, environment, generations, seed)
        except SearchInterruptedError as error:
            print(f"{config.name}, {task.name}: {error}", file=sys.stderr)
            return 1
        except NpsError as error:
            lacking = str(error)
        if lacking:
            print(f"{config.name}, {task.name}: {lacking}", file=sys.stderr)
            status = 1
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="what can run here (the default)")
    parser.add_argument("--config", choices=list(CONFIGURATIONS), help="run this one")
    parser.add_argument("--task", action="append", help="only this one; may be given again")
    parser.add_argument("--data", type=Path, help="folder of the tasks' data")
    parser.add_argument("--models", type=Path, help="folder of models that are not in the cache")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for packed files")
    parser.add_argument("--generations", type=int, help="instead of the paper's, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    places = Places(given.models, given.data, given.work)
    if given.list or not given.config:
        print("\n".join(listing(places)))
        return 0
    config = CONFIGURATIONS[given.config]
    names = [task.name for task in config.tasks]
    unknown = [name for name in given.task or () if name not in names]
    if unknown:
        parser.error(f"{config.name} has no task {unknown[0]!r}, only {', '.join(names)}")
    tasks = [task for task in config.tasks if task.name in (given.task or names)]
    return run(config, tasks, places, given.generations, given.seed)


if __name__ == "__main__":
    sys.exit(main())
