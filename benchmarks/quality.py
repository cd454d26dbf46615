"""Quality kept against bits: published baselines and our files, on real fine-tunes.

    python benchmarks/quality.py           # one seed
    python benchmarks/quality.py --full    # three seeds, more densities

One row a task, method, setting and seed, appended to results/quality.csv as it is measured: rows
that are there are not measured again. Test data are seen by nothing but the last measurement.
``bits_per_param`` counts everything that is stored, over all parameters of the fine-tune: for ours
the bytes of the file, for a baseline its cost by formula and 16 bits for each element that it
leaves alone (a new head).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import baselines
import nps_compress
import rows
import tasks
from nps_compress.checkpoint import open_checkpoint, pair
from nps_compress.dtypes import PRUNABLE

RESULT = rows.RESULTS / "quality.csv"
FIELDS = (
    *("task", "metric", "method", "setting", "seed", "bits_per_param", "score", "retained"),
    *("base_score", "finetuned_score", "evaluations", "machine", "versions", "commit"),
)
SEARCHABLE = ("sequence", "causal")  # what the search can load as yet
GENERATIONS, POPULATION = 8, 8


@dataclass(frozen=True)
class Pair:
    """A task's weights in float32 under the fine-tune's names; ``names``: those compressed."""

    task: tasks.Task
    base: Mapping[str, torch.Tensor]
    tuned: Mapping[str, torch.Tensor]
    names: list[str]

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.tuned.values())

    @classmethod
    def of(cls, task: tasks.Task) -> Pair:
        found = pair(open_checkpoint(task.base), open_checkpoint(task.finetuned))
        before, after = _weights(task.base), _weights(task.finetuned)
        names = [
            name for name in found.base_of if found.finetuned.tensors[name].dtype.name in PRUNABLE
        ]
        base = {name: before[found.base_of[name]] for name in names}
        return cls(task, base, after, names)


@dataclass(frozen=True)
class Packed:
    """What a method made of a fine-tune: all weights, and what they cost."""

    weights: Mapping[str, torch.Tensor]
    bits_per_param: float
    evaluations: int = 0


Method = Callable[[Pair, int], Packed]


def baseline(function: Callable[..., baselines.Result], seeded: bool, **settings: object) -> Method:
    """A baseline at one setting."""

    def run(pair_: Pair, seed: int) -> Packed:
        arguments = {**settings, **({"seed": seed} if seeded else {})}
        found = function(pair_.base, pair_.tuned, pair_.names, **arguments)
        rest = sum(t.numel() for name, t in pair_.tuned.items() if name not in found.weights)
        weights = {**pair_.tuned, **found.weights}
        return Packed(weights, (found.bits + 16 * rest) / pair_.numel)

    return run


def ours(
    search: bool = False, retain: float | None = None, cuts: str = "tail", **options: object
) -> Method:
    """A real file: packed, unpacked, and weighed by its bytes."""

    def run(pair_: Pair, seed: int) -> Packed:
        fisher = options.get("importance") == "fisher"
        if search:
            recipe = nps_compress.Recipe.with_subspaces(8, cuts, seed=seed, **options)  # type: ignore[arg-type]
        else:
            recipe = nps_compress.Recipe(seed=seed, **options)  # type: ignore[arg-type]
        task = pair_.task
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            report = nps_compress.pack(
                task.base,
                task.finetuned,
                out / "t.nps",
                recipe=recipe,
                retain=retain,
                calibration=task.calibration if search or retain or fisher else None,
                generations=GENERATIONS if search else 0,
                population=POPULATION,
            )
            nps_compress.unpack(task.base, out / "t.nps", out / "model")
            weights = _weights(out / "model")
        evaluations = 0
        if report.quality:
            evaluations = len(report.quality.trials)
        elif report.recipe:
            evaluations = int(report.recipe.search.get("evaluations", 0))
        return Packed(weights, report.bits_per_param, evaluations)

    return run


def methods(full: bool) -> Iterator[tuple[str, str, bool, Method]]:
    """Name, setting, whether the seed matters, and what to run."""
    densities = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005) if full else (0.1, 0.05, 0.01)
    for d in densities:
        at = f"density {d}"
        yield "magnitude (TIES trim)", at, False, baseline(baselines.magnitude, False, density=d)
        yield (
            *("magnitude x1.5", at, False),
            baseline(baselines.magnitude, False, density=d, rescale=1.5),
        )
        yield "DARE", at, True, baseline(baselines.dare, True, density=d, value_bits=4)
        yield "DELLA", at, True, baseline(baselines.della, True, density=d, value_bits=4)
        yield "ComPEFT", at, False, baseline(baselines.compeft, False, density=d)
        yield "ours: magnitude", at, False, ours(prune="magnitude", density=d)
        yield "ours: sampled", at, True, ours(prune="sampled", density=d)
        yield (
            *("ours: sampled, Fisher", at, True),
            ours(prune="sampled", density=d, importance="fisher"),
        )
    for per in ("matrix", "row"):
        yield f"BitDelta per {per}", "1 bit", False, baseline(baselines.bitdelta, False, per=per)
    for bits in (1.0, 0.4):
        rank = baseline(baselines.low_rank, False, bits_per_param=bits)
        yield "low rank", f"{bits} bits", False, rank
    for d in (0.05,) if not full else (0.05, 0.01):
        at = f"density {d}"
        for cuts, name in (
            ("equal", "NPS, equal subspaces (paper)"),
            ("tail", "NPS, tail subspaces"),
        ):
            yield name, at, False, ours(search=True, cuts=cuts, prune="magnitude", density=d)
        yield (
            *("NPS over sampled", at, True),
            ours(search=True, prune="sampled", density=d),
        )
    for share in (0.99,) if not full else (0.99, 0.95):
        yield "ours: --retain", f"retain {share}", True, ours(retain=share, prune="sampled")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: t.float() for file in files for name, t in load_file(file).items()}


def score(task: tasks.Task, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> float:
    """The task's metric on its test data, of the model with these weights."""
    model.load_state_dict(dict(weights), strict=False)
    return tasks.evaluate_model(task, model)


def measure(name: str, full: bool, seeds: range, environment: Mapping[str, str]) -> None:
    task = tasks.build(name)
    done = {(r["task"], r["method"], r["setting"], r["seed"]) for r in read()}
    pair_, model = Pair.of(task), tasks.load_model(task, task.finetuned)
    finetuned = score(task, model, pair_.tuned)
    base = score(task, model, {**pair_.tuned, **pair_.base})
    floor = base if not task.higher_is_better else 0.0
    for method, setting, seeded, run in methods(full):
        needs_data = method.startswith("NPS") or method.endswith(("retain", "Fisher"))
        if needs_data and task.kind not in SEARCHABLE:
            continue
        for seed in seeds if seeded else range(1):
            if (name, method, setting, str(seed)) in done:
                continue
            try:
                packed = run(pair_, seed)
            except nps_compress.RetainError as error:
                print(f"{name}: {method}: {error}", flush=True)
                continue
            found = score(task, model, packed.weights)
            retained = (found - floor) / (finetuned - floor)
            row = {
                "task": name,
                "metric": task.metric,
                "method": method,
                "setting": setting,
                "seed": seed,
                "bits_per_param": f"{packed.bits_per_param:.4f}",
                "score": f"{found:.5f}",
                "retained": f"{retained:.4f}",
                "base_score": f"{base:.5f}",
                "finetuned_score": f"{finetuned:.5f}",
                "evaluations": packed.evaluations,
                **environment,
            }
            append(row)
            print(
                f"{name:10} {method:30} {setting:14} {packed.bits_per_param:7.3f} bits "
                f"{found:8.4f}  {retained:7.2%}",
                flush=True,
            )


def read() -> list[dict[str, str]]:
    """The rows measured so far."""
    if not RESULT.exists():
        return []
    with RESULT.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append(row: Mapping[str, object]) -> None:
    new = not RESULT.exists()
    RESULT.parent.mkdir(exist_ok=True)
    with RESULT.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def plot(path: Path) -> None:
    """Retained share against bits: a panel a task, a line a method, the mean over its seeds.

    Methods without a range of settings (searches, --retain) are single marks.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = read()
    names = list(dict.fromkeys(row["task"] for row in found))
    methods_seen = list(dict.fromkeys(row["method"] for row in found))
    palette = pyplot.get_cmap("tab20")
    colours = {method: palette(number) for number, method in enumerate(methods_seen)}
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(5 * len(names), 5), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, name in zip(panels[0], names, strict=True):
        for method in methods_seen:
            settings: dict[str, list[tuple[float, float]]] = {}
            for row in found:
                if (row["task"], row["method"]) == (name, method):
                    at = (float(row["bits_per_param"]), 100 * float(row["retained"]))
                    settings.setdefault(row["setting"], []).append(at)
            means = sorted(
                (sum(b for b, _ in seeds) / len(seeds), sum(r for _, r in seeds) / len(seeds))
                for seeds in settings.values()
            )
            width = 2.5 if method.startswith("ours") else 1.0
            line, marks = [b for b, _ in means], [r for _, r in means]
            colour = colours[method]
            axes.plot(line, marks, marker="o", linewidth=width, color=colour, label=method)
        axes.axhline(100, color="0.6", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_title(name)
        axes.set_xlabel("bits per parameter, everything counted")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("kept of the fine-tune's quality, test data (%)")
    panels[0][0].set_ylim(bottom=0, top=106)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="three seeds and more densities")
    parser.add_argument("--task", action="append", choices=tasks.names(), help="only this one")
    parser.add_argument("--plot", type=Path, default=rows.RESULTS / "quality.png")
    arguments = parser.parse_args()
    environment = rows.environment()
    for name in arguments.task or tasks.names():
        measure(name, arguments.full, range(3 if arguments.full else 1), environment)
    if read():
        plot(arguments.plot)
        print(f"rows in {RESULT}, picture in {arguments.plot}")


if __name__ == "__main__":
    main()
