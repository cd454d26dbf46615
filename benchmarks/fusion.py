"""Several fine-tunes of one base merged into one encoder, each task with its own head.

    python benchmarks/fusion.py                  # one seed, data-free and tuned settings
    python benchmarks/fusion.py --full           # three seeds, the ablations
    python benchmarks/fusion.py --training 1     # the same on fine-tunes of other seeds
    python benchmarks/fusion.py --family digits  # four tasks on a small vision transformer

Two families: six text tasks on all-MiniLM-L6-v2, four questions about images of handwritten digits.
``normalised`` is the mean over tasks of the merged model's test accuracy over that of the task's
own fine-tune (the paper's normalised accuracy), ``each`` has it by task. ``tuned`` says by which
score on development data the setting was found (data-free: none); test data are seen by nothing but
the row's last measurement. ``finetuned`` is the fine-tunes' own mean accuracy: other machines train
others. Rows that are there are not measured again, but for other fine-tunes.

Matrix products round their factors to bfloat16 where the processor is faster so, as in training,
for the merged models and for the fine-tunes that they are compared with.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import rows
import tasks
from nps_compress.calibration import Example, read_examples
from nps_compress.checkpoint import open_checkpoint
from nps_compress.dtypes import to_float32
from nps_compress.merging.contract import Settings
from nps_compress.merging.exams import Exam, Exams
from nps_compress.merging.merger import Merger, Plan
from nps_compress.merging.methods import METHODS
from nps_compress.merging.tuning import TuningOptions, tune
from nps_compress.models import weights_of
from nps_compress.prune import Rule, top_shares

RESULT = rows.RESULTS / "fusion.csv"
FAMILIES = {
    "text": ("packages", "kinds", "topics", "tokens", "errors", "verbs"),
    "digits": ("digits", "parity", "thirds", "loops"),
}
EXAMPLES = {"text": 128, "digits": 256}  # development examples a task
FIELDS = (
    *("family", "finetuned", "method", "setting", "tuned", "seed"),
    *("density", "subspaces", "calibration"),
    *("normalised", "spread", "accuracy", "each", "development", "scale", "evaluations"),
    *("seconds", "machine", "versions", "commit"),
)
UNBIASED: tuple[Rule, ...] = ("sampled", "signs")
# Of the paper (arXiv 2505.18713), ViT-B/32 on 8 tasks: merged over fine-tuned average accuracy.
PAPER = {
    "average": 65.8 / 90.5,
    "task-arithmetic": 70.1 / 90.5,
    "ties": 73.6 / 90.5,
    "consensus": 73.5 / 90.5,
    "nps": 76.5 / 90.5,
}
PAPER_ABLATIONS: dict[str, dict[float, float]] = {
    "density": {0.03: 75.8, 0.05: 76.5, 0.1: 76.3, 0.2: 75.2, 0.3: 72.1},
    "subspaces": {1: 74.8, 2: 75.6, 4: 76.2, 8: 76.5},
    "calibration": {0.25: 75.9, 0.5: 76.3, 1.0: 76.5},
}
METRIC = "accuracy"  # the paper's
_DENSITIES = (0.05, 0.1, 0.2)  # of methods that trim by magnitude; development data choose


@dataclass(frozen=True)
class Run:
    """One row to measure. ``tuned``: None where nothing is; ``share``: of the development data."""

    method: str
    setting: str
    settings: Settings
    tuned: str | None = None
    seed: int = 0
    subspaces: int = 1
    share: float = 1.0
    generations: int | None = None

    @property
    def key(self) -> dict[str, str]:
        """What no two rows of the same fine-tunes share."""
        return {
            "method": self.method,
            "setting": self.setting,
            "tuned": self.tuned or "data-free",
            "seed": str(self.seed),
            "density": f"{self.settings.density:g}",
            "subspaces": str(self.subspaces),
            "calibration": f"{self.share:g}",
        }


def runs(full: bool, seeds: range) -> Iterator[Run]:
    """In the order of what is asked first."""
    yield from _data_free(seeds)
    yield from _tuned(full, seeds)
    if full:
        yield from _ablations(seeds)


def _data_free(seeds: range) -> Iterator[Run]:
    of = {name: method.defaults for name, method in METHODS.items()}
    yield Run("average", "1 / T", of["average"])
    yield Run("task-arithmetic", "0.4", of["task-arithmetic"])
    yield Run("ties", "1.0, density 0.2", of["ties"])
    yield Run("consensus", "0.4, task arithmetic", of["consensus"])
    elected = replace(of["consensus"], prune="magnitude", elect=True, scale=1.0)
    yield Run("consensus", "1.0, TIES", elected)
    yield Run("emr", "a mask a task", of["emr"])
    yield Run("nps", "1.0, coefficients 1", of["nps"])
    yield Run("neuromerging", "lambda 1 / (1 - sigma)", of["neuromerging"])
    for seed in seeds:
        dare = replace(of["dare"], seed=seed)
        yield Run("dare", "0.4, random", dare, seed=seed)
        yield Run("dare", "1.0, elected", replace(dare, elect=True, scale=1.0), seed=seed)
        yield Run("della", "1.0", replace(of["della"], seed=seed), seed=seed)
        # The unbiased rules in the place of each method's own.
        for rule in UNBIASED:
            for name in ("task-arithmetic", "ties", "nps", "neuromerging"):
                density = 0.1 if name == "task-arithmetic" else of[name].density
                by = replace(of[name], prune=rule, density=density, seed=seed)
                yield Run(name, f"{of[name].scale or 'free'}, {rule}", by, seed=seed)


def _tuned(full: bool, seeds: range) -> Iterator[Run]:
    of = {name: method.defaults for name, method in METHODS.items()}
    yield Run("task-arithmetic", "lambda", of["task-arithmetic"], METRIC)
    for density in _DENSITIES:
        yield Run("ties", "lambda", replace(of["ties"], density=density), METRIC)
    for seed in seeds:
        for density in _DENSITIES:
            yield _nps(METRIC, density, 8, seed)
    for name in ("consensus", "neuromerging"):
        yield Run(name, "lambda", of[name], METRIC)
    for seed in seeds:
        for name in ("dare", "della"):
            yield Run(name, "lambda", replace(of[name], seed=seed), METRIC, seed)
        sampled = replace(of["task-arithmetic"], prune="sampled", density=0.1, seed=seed)
        yield Run("task-arithmetic", "lambda, sampled", sampled, METRIC, seed)
        yield _nps(METRIC, 0.1, 8, seed, "sampled")
        yield Run("evolver", "average", replace(of["evolver"], seed=seed), METRIC, seed)
    if full:  # without labels: how far the outputs are from the fine-tunes'
        yield Run("task-arithmetic", "lambda", of["task-arithmetic"], "kl")
        yield Run("ties", "lambda", of["ties"], "kl")
        yield _nps("kl", 0.1, 8, 0)


def _nps(
    metric: str, density: float, subspaces: int, seed: int, rule: str = "", share: float = 1.0
) -> Run:
    by = replace(
        METHODS["nps"].defaults,
        density=density,
        seed=seed,
        top_shares=top_shares(subspaces, density, "tail"),
        prune=rule or "magnitude",  # type: ignore[arg-type]
    )
    setting = f"lambda, coefficients{f', {rule}' if rule else ''}"
    return Run("nps", setting, by, metric, seed, subspaces, share)


def _ablations(seeds: range) -> Iterator[Run]:
    """As the paper's, around density 0.05 and 8 subspaces."""
    for seed in seeds:
        for density in PAPER_ABLATIONS["density"]:
            yield _nps(METRIC, density, 8, seed)
        for subspaces in PAPER_ABLATIONS["subspaces"]:
            yield _nps(METRIC, 0.05, int(subspaces), seed)
        for share in PAPER_ABLATIONS["calibration"]:
            yield _nps(METRIC, 0.05, 8, seed, share=share)


class Bench:
    """A family: its weights in memory, models to test, and examples to tune on."""

    def __init__(self, family: str, training: int) -> None:
        self.family = family
        self._tasks = [tasks.build(name, training=training) for name in FAMILIES[family]]
        bases = {task.base for task in self._tasks}
        assert len(bases) == 1, bases
        finetuned = [open_checkpoint(task.finetuned) for task in self._tasks]
        self.merger = Merger(open_checkpoint(bases.pop()), finetuned, held=True)
        self._development = [
            read_examples(task.calibration)[: EXAMPLES[family]] for task in self._tasks
        ]
        self._models: list[Any] = [tasks.load_model(task, task.finetuned) for task in self._tasks]
        self.finetuned = self._test()
        self._exams: dict[tuple[str, float, int], Exams] = {}

    def names(self) -> list[str]:
        return [task.name for task in self._tasks]

    def base(self) -> list[float]:
        """Test accuracy of the base with each task's own tensors that are not merged."""
        before = {name: [self.merger.base.read(name)] for name in self.merger.names}
        return self._test_words(before.items())

    def run(self, run: Run) -> dict[str, object]:
        """The figures of a row."""
        started, method = time.perf_counter(), METHODS[run.method]
        self.merger.count(run.settings)
        settings, development, evaluations = run.settings, "", 0
        if run.tuned:
            exams = self._examined(run.tuned, run.share, run.seed)

            def judge(plan: Plan) -> float:
                pairs = zip(exams.yardsticks, exams.measure(plan), strict=True)
                return statistics.fmean(yardstick.share(found) for yardstick, found in pairs)

            options = TuningOptions(run.generations)
            tuned, _ = tune(self.merger, method, settings, judge, options, None, {}, progress=False)
            settings, evaluations = tuned.settings, tuned.evaluations
            development = f"{tuned.best:.4f}"
        plan = self.merger.plan(method, settings)
        found = self._test_words(self.merger.each_merged(plan))
        shares = [score / best for score, best in zip(found, self.finetuned, strict=True)]
        return {
            "normalised": f"{statistics.fmean(shares):.4f}",
            "spread": f"{statistics.pstdev(shares):.4f}",
            "accuracy": f"{statistics.fmean(found):.4f}",
            "each": " ".join(f"{n}={s:.4f}" for n, s in zip(self.names(), shares, strict=True)),
            "development": development,
            "scale": "" if settings.scale is None else f"{settings.scale:.4g}",
            "evaluations": evaluations,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _examined(self, metric: str, share: float, seed: int) -> Exams:
        key = metric, share, seed if share < 1 else 0
        if key not in self._exams:
            self._exams.clear()  # a model a task in memory
            exams = [
                Exam(number, task.finetuned, _part(examples, share, seed), metric, task.calibration)
                for number, (task, examples) in enumerate(
                    zip(self._tasks, self._development, strict=True)
                )
            ]
            self._exams[key] = Exams(self.merger, exams)
        return self._exams[key]

    def _test_words(self, merged: Any) -> list[float]:
        weights = [weights_of(model) for model in self._models]
        for name, words in merged:
            tensor = self.merger.base.tensors[name]
            for number, found_in in enumerate(self.merger.found_in):
                mine = words[number] if len(words) > 1 else words[0]
                values = torch.from_numpy(to_float32(mine, tensor.dtype)).view(tensor.shape)
                weights[number][found_in[name]].copy_(values)
        return self._test()

    def _test(self) -> list[float]:
        pairs = zip(self._tasks, self._models, strict=True)
        return [tasks.evaluate_model(task, model) for task, model in pairs]


def _part(examples: Sequence[Example], share: float, seed: int) -> Sequence[Example]:
    count = round(share * len(examples))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator)[:count]
    return [examples[i] for i in sorted(order.tolist())]


def measure(family: str, chosen: Sequence[Run], training: int) -> None:
    def key(row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("family", "finetuned", *chosen[0].key))

    done = {key(row) for row in rows.read(RESULT)}
    environment, bench = rows.environment(), Bench(family, training)
    of = {"family": family, "finetuned": f"{statistics.fmean(bench.finetuned):.4f}"}
    reference = {"method": "base", "tuned": "data-free", "seed": "0"}
    known = dict.fromkeys(chosen[0].key, "") | of | reference
    if key(known) not in done:
        shares = [b / f for b, f in zip(bench.base(), bench.finetuned, strict=True)]
        each = " ".join(f"{n}={s:.4f}" for n, s in zip(bench.names(), shares, strict=True))
        figures = {"normalised": f"{statistics.fmean(shares):.4f}", "each": each}
        rows.append(RESULT, FIELDS, {**known, **figures, **environment})
    for run in chosen:
        row = {**of, **run.key}
        if key(row) in done:
            continue
        done.add(key(row))
        found = bench.run(run)
        rows.append(RESULT, FIELDS, {**row, **found, **environment})
        print(
            f"{family:7}{run.method:17}{run.setting:34}{row['tuned']:10}{row['seed']:3}"
            f"density {row['density']:5} {found['normalised']}  {found['seconds']} s",
            flush=True,
        )


def table(family: str) -> str:
    """A line a method and setting: a column for each set of fine-tunes, by their own accuracy.

    The mean over seeds, in brackets how many where there are more than one.
    """
    names = ("method", "setting", "tuned", "density", "subspaces", "calibration")
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows.read(RESULT):
        if row["family"] == family:
            group = found.setdefault(tuple(row[name] for name in names), {})
            group.setdefault(row["finetuned"], []).append(100 * float(row["normalised"]))
    trainings = sorted({finetuned for group in found.values() for finetuned in group})
    lines: list[dict[str, object]] = []
    for key, group in sorted(found.items(), key=lambda item: _mean(item[1].values())):
        line: dict[str, object] = dict(zip(names, key, strict=True))
        for finetuned in trainings:
            scores = group.get(finetuned, [])
            seeds = f" ({len(scores)})" if len(scores) > 1 else ""
            line[finetuned] = f"{statistics.fmean(scores):.1f}{seeds}" if scores else ""
        lines.append(line)
    return rows.table(lines) if lines else "no rows"


def _flat(groups: Mapping[str, Sequence[float]]) -> list[float]:
    return [value for group in groups.values() for value in group]


def _mean(groups: Iterable[Sequence[float]]) -> float:
    return statistics.fmean(map(statistics.fmean, groups))


def as_chosen(family: str) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Normalised accuracies (%) of a method and what it is tuned by, ascending by their mean.

    By fine-tunes, one for each seed, of the setting that the development data choose there;
    data-free of the method's defaults. What draws nothing has a row at seed 0 only, and is a
    choice at every seed. An unbiased rule in the place of a method's own makes another method.
    """
    groups: dict[tuple[str, str, str], dict[int, dict[tuple[str, str], Mapping[str, str]]]] = {}
    defaults: dict[str, str] = {}
    for row in rows.read(RESULT):
        if row["family"] != family or not _is_main(row):
            continue
        rule = row["setting"].split(", ")[-1]
        method = row["method"] + (f", {rule}" if rule in UNBIASED else "")
        free = row["tuned"] == "data-free"
        if not free or defaults.setdefault(method, row["setting"]) == row["setting"]:
            group = groups.setdefault((method, row["tuned"], row["finetuned"]), {})
            group.setdefault(int(row["seed"]), {})[row["setting"], row["density"]] = row
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (method, tuned, finetuned), seeds in groups.items():
        values = found.setdefault((method, tuned), {}).setdefault(finetuned, [])
        for settings in seeds.values():
            choices = (seeds.get(0, {}) | settings).values()
            best = max(choices, key=lambda row: float(row["development"] or 0))
            values.append(100 * float(best["normalised"]))
    return dict(sorted(found.items(), key=lambda item: _mean(item[1].values())))


def _is_main(row: Mapping[str, str]) -> bool:
    """No ablation: those are one method's, and would be more to choose from."""
    if row["method"] != "nps" or row["tuned"] == "data-free":
        return True
    return (
        row["calibration"] == "1"
        and row["subspaces"] == "8"
        and float(row["density"]) in _DENSITIES
    )


def summary(family: str) -> str:
    """A line a method, beside the paper's: the mean over fine-tunes and the range of all runs."""
    lines: list[dict[str, object]] = []
    for (method, tuned), found in as_chosen(family).items():
        values, paper = _flat(found), PAPER.get(method)
        lines.append(
            {
                "method": method,
                "tuned": tuned,
                "normalised": f"{_mean(found.values()):.1f}",
                "range": f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else "",
                "fine-tunes": len(found),
                "runs": len(values),
                "paper (ViT-B/32)": f"{100 * paper:.1f}" if paper else "",
            }
        )
    return rows.table(lines) if lines else "no rows"


def ablation(name: str) -> dict[str, dict[float, list[float]]]:
    """Normalised accuracies (%) of NPS on digits, by fine-tunes and by the values of a setting.

    One a seed, of those seeds that have all values that the paper has.
    """
    others = {"density": "0.05", "subspaces": "8", "calibration": "1"}
    others.pop(name)
    runs: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows.read(RESULT):
        if (
            (row["family"], row["method"], row["tuned"]) == ("digits", "nps", METRIC)
            and row["setting"] == "lambda, coefficients"
            and all(row[key] == value for key, value in others.items())
        ):
            scores = runs.setdefault((row["finetuned"], row["seed"]), {})
            scores[float(row[name])] = 100 * float(row["normalised"])
    found: dict[str, dict[float, list[float]]] = {}
    for (finetuned, _), scores in runs.items():
        if scores.keys() >= PAPER_ABLATIONS[name].keys():
            for value in PAPER_ABLATIONS[name]:
                found.setdefault(finetuned, {}).setdefault(value, []).append(scores[value])
    return found


def plot(path: Path) -> None:
    """Left: each method as development scores choose it; right: ablations beside the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 5, figsize=(24, 6), layout="constrained")
    for axes, family in zip(panels, FAMILIES, strict=False):
        chosen = as_chosen(family)
        names = [f"{method} ({tuned})" for method, tuned in chosen]
        axes.barh(names, [_mean(found.values()) for found in chosen.values()], alpha=0.5)
        for name, found in zip(names, chosen.values(), strict=True):
            values = _flat(found)
            axes.plot(values, [name] * len(values), "k.", markersize=4)
        axes.set(
            title=f"{family}: by development score, or the defaults",
            xlabel="normalised accuracy (%); dots: fine-tunes and seeds",
        )
    for axes, (name, paper) in zip(panels[2:], PAPER_ABLATIONS.items(), strict=True):
        for finetuned, scores in ablation(name).items():
            means = [statistics.fmean(values) for values in scores.values()]
            axes.plot(list(scores), means, "o-", label=f"NPS, digits of {finetuned}")
        axes.plot(list(paper), [100 * y / 90.5 for y in paper.values()], "s--", label="the paper's")
        axes.set(title=name, xlabel=name, ylabel="normalised accuracy (%)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed, main rows (the default)")
    size.add_argument("--full", action="store_true", help="three seeds, ablations")
    parser.add_argument("--seeds", type=int, help="how many (1, with --full 3)")
    parser.add_argument("--training", type=int, default=0, help="fine-tunes of other seeds (0)")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this one")
    parser.add_argument("--no-search", action="store_true", help="data-free settings only")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this one")
    parser.add_argument("--plot", action="store_true", help="measure nothing, plot what there is")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_flash_sdp(False)  # of CPUs too, where short texts take it longer
    seeds = range(arguments.seeds or (3 if arguments.full else 1))
    chosen = [
        run
        for run in runs(arguments.full, seeds)
        if not (arguments.no_search and run.tuned)
        and (not arguments.method or run.method in arguments.method)
    ]
    for family in () if arguments.plot else arguments.family or FAMILIES:
        measure(family, chosen, arguments.training)
    for family in FAMILIES:
        print(f"\n{family}\n{table(family)}\n\n{family}, by development data\n{summary(family)}")
    if rows.read(RESULT):
        plot(RESULT.with_suffix(".png"))
        print(f"\nrows in {RESULT}, picture beside")


if __name__ == "__main__":
    main()
