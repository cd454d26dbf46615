"""Quality kept against bits: published baselines and our files, on real fine-tunes.

    python benchmarks/quality.py            # one seed
    python benchmarks/quality.py --seeds 3
    python benchmarks/quality.py --full     # three seeds, more densities

One row a task, method, setting and seed, appended to results/quality.csv as it is measured: rows
that are there are not measured again. Test data are seen by nothing but the last measurement.

``bits_per_param`` counts everything that is stored, over all parameters of the fine-tune: for ours
the bytes of the file, for a baseline its cost by formula and 16 bits for each element that it
leaves alone (a new head).
``kl`` is the mean divergence from the fine-tune's own outputs on test data, in nats a prediction,
``agreement`` the share of predictions (classes, next tokens) whose likeliest is the fine-tune's.
``cost`` counts passes over the calibration data.

How a search got there is in results/search.csv: the best fitness after each generation.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import baselines
import nps_compress
import rows
import tasks
from nps_compress.checkpoint import open_checkpoint, pair
from nps_compress.dtypes import PRUNABLE
from nps_compress.models import weights_of
from training import IGNORED, Batch

RESULT = rows.RESULTS / "quality.csv"
SEARCHES = rows.RESULTS / "search.csv"
FIELDS = (
    *("task", "metric", "method", "setting", "seed", "bits_per_param", "score"),
    *("retained", "kl", "agreement", "base_score", "finetuned_score", "evaluations", "cost"),
    *("machine", "versions", "commit"),
)
SEARCH_FIELDS = (
    *("task", "method", "setting", "seed", "generation", "evaluations", "fitness", "best"),
    *("start", "finetuned"),
)
KL_BATCHES = 16  # of the test data; what a language model says of all would fill the memory


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
    cost: float = 0.0
    search: Mapping[str, Any] | None = None


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


# How the names of methods end that take minutes.
SEARCHING = (
    "(paper)",
    "NPS over sampled, fisher",
    "NPS over signs, fisher",
    "subspaces",
    "groups",
    "seeds",
    "searched",
)


def ours(
    search: nps_compress.SearchOptions | None = None,
    retain: float | None = None,
    subspaces: int = 1,
    cuts: str = "tail",
    **options: object,
) -> Method:
    """A real file: packed, unpacked, and weighed by its bytes."""

    def run(pair_: Pair, seed: int) -> Packed:
        recipe = nps_compress.Recipe.with_subspaces(subspaces, cuts, seed=seed, **options)  # type: ignore[arg-type]
        task = pair_.task
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            report = nps_compress.pack(
                task.base,
                task.finetuned,
                out / "t.nps",
                recipe=recipe,
                retain=retain,
                calibration=task.calibration,
                search=search or nps_compress.SearchOptions(generations=0),
            )
            nps_compress.unpack(task.base, out / "t.nps", out / "model")
            weights = _weights(out / "model")
        assert report.recipe is not None
        found = report.recipe.search
        trials = len(report.quality.trials) if report.quality else 0
        return Packed(
            weights,
            report.bits_per_param,
            trials or int(found.get("evaluations", 0)),
            trials or float(found.get("cost", 0)),
            found or None,
        )

    return run


def methods(full: bool) -> Iterator[tuple[str, str, bool, Method]]:
    """Name, setting, whether the seed matters, and what to run."""
    yield from _baselines((0.2, 0.1, 0.05, 0.02, 0.01, 0.005) if full else (0.1, 0.05, 0.01))
    for d in (0.2, 0.1, 0.05, 0.02, 0.01, 0.005) if full else (0.2, 0.05, 0.01):
        at = f"density {d}"
        method = ours(prune="sampled", density=d, importance="fisher")
        yield "ours: sampled, fisher", at, True, method
        if d == 0.2 and not full:
            continue
        yield "ours: magnitude", at, False, ours(prune="magnitude", density=d)
        for values in ("auto", "sign"):
            method = ours(prune="magnitude", density=d, values=values)
            yield f"ours: magnitude, {values}", at, False, method
        yield "ours: random", at, True, ours(prune="random", density=d)
        yield "ours: sampled", at, True, ours(prune="sampled", density=d)
        method = ours(prune="sampled", density=d, importance="activation")
        yield "ours: sampled, activation", at, True, method
    for d in (0.02, 0.05, 0.1, 0.2):
        at = f"density {d}"
        yield "ours: signs", at, True, ours(prune="signs", density=d)
        yield "ours: signs, fisher", at, True, ours(prune="signs", density=d, importance="fisher")
    yield from _searches(full)
    for share in (0.99, 0.95) if full else (0.99,):
        yield "ours: --retain", f"retain {share}", True, _retained(share, 0)
        yield "ours: --retain, searched", f"retain {share}", True, _retained(share, 6)


def _retained(share: float, generations: int) -> Method:
    search = nps_compress.SearchOptions(generations=generations)
    return ours(search, share, 8, importance="fisher")


def _baselines(densities: Sequence[float]) -> Iterator[tuple[str, str, bool, Method]]:
    for d in densities:
        at = f"density {d}"
        yield "magnitude (TIES trim)", at, False, baseline(baselines.magnitude, False, density=d)
        rescaled = baseline(baselines.magnitude, False, density=d, rescale=1.5)
        yield "magnitude x1.5 (fixed NPS)", at, False, rescaled
        yield "DARE", at, True, baseline(baselines.dare, True, density=d, value_bits=4)
        yield "DELLA", at, True, baseline(baselines.della, True, density=d, value_bits=4)
        yield "ComPEFT", at, False, baseline(baselines.compeft, False, density=d)
    for per in ("matrix", "row"):
        yield f"BitDelta per {per}", "1 bit", False, baseline(baselines.bitdelta, False, per=per)
    for bits in (1.0, 0.4):
        rank = baseline(baselines.low_rank, False, bits_per_param=bits)
        yield "low rank", f"{bits} bits", False, rank


def _searches(full: bool) -> Iterator[tuple[str, str, bool, Method]]:
    def found(
        genes: str = "subspaces", draws: int = 1, generations: int = 12, **options: object
    ) -> Method:
        search = nps_compress.SearchOptions(
            genes=tuple(genes.split(",")), draws=draws, generations=generations
        )
        return ours(search=search, **options)  # type: ignore[arg-type]

    for d in (0.05, 0.01):
        at = f"density {d}"
        paper = found(subspaces=8, cuts="equal", prune="magnitude", density=d)
        yield "NPS, equal subspaces (paper)", at, True, paper
        if d == 0.01 or full:
            tail = found(subspaces=8, prune="magnitude", density=d)
            yield "NPS, tail subspaces", at, True, tail
            over = found(subspaces=8, prune="sampled", importance="fisher", density=d)
            yield "NPS over sampled, fisher", at, True, over
    for d in (0.02, 0.05, 0.1, 0.2) if full else (0.05, 0.2):
        at = f"density {d}"
        of: dict[str, Any] = {"density": d, "prune": "signs", "importance": "fisher"}
        yield "NPS over signs, fisher", at, True, found(subspaces=8, **of)
        if d == 0.05 or full:
            draws = found(draws=8, generations=1, **of)
            yield "signs, fisher: best of 8 seeds", at, True, draws
            groups = found("groups,group-density", **of)
            yield "NPS over signs, fisher: groups", at, True, groups


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: t.float() for file in files for name, t in load_file(file).items()}


class Judge:
    """Scores weights on a task's test data."""

    def __init__(self, pair_: Pair) -> None:
        self._pair, self._model = pair_, tasks.load_model(pair_.task, pair_.task.finetuned)
        self._parameters = weights_of(self._model)  # by their names in the file, which may differ
        self._batches = tasks.batches(pair_.task)[:KL_BATCHES]
        self.finetuned = self.score(pair_.tuned)
        self._said = [log_shares(self._model, batch) for batch in self._batches]
        self.base = self.score({**pair_.tuned, **pair_.base})

    def score(self, weights: Mapping[str, torch.Tensor]) -> float:
        """The task's metric."""
        known = self._parameters
        written = {known[name].data_ptr() for name in weights}
        left = [name for name, tensor in known.items() if tensor.data_ptr() not in written]
        if left:
            raise SystemExit(f"{self._pair.task.name}: the weights lack {left}")
        for name, tensor in weights.items():
            known[name].copy_(tensor)
        return tasks.evaluate_model(self._pair.task, self._model)

    def retained(self, score: float) -> float:
        """The share of the fine-tune's score, or of its gain where less is better."""
        floor = 0.0 if self._pair.task.higher_is_better else self.base
        return (score - floor) / (self.finetuned - floor)

    def compare(self) -> tuple[float, float]:
        """The weights scored last with the fine-tune; see :func:`compare`."""
        return compare(self._model, self._batches, self._said)


def compare(
    model: torch.nn.Module, batches: Sequence[Batch], said: Sequence[torch.Tensor]
) -> tuple[float, float]:
    """Divergence (nats) and agreement of a model with what another said, a prediction.

    said: the other's log shares, [predictions, classes] a batch.
    """
    total, agreed, count = 0.0, 0, 0
    for batch, wanted in zip(batches, said, strict=True):
        found = log_shares(model, batch)
        total += float((wanted.exp() * (wanted - found)).sum())
        agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        count += len(wanted)
    return total / count, agreed / count


@torch.inference_mode()
def log_shares(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Of the classes, of all predictions that have a target. -> [predictions, classes]."""
    inputs, targets = batch
    logits = model(**inputs).logits.float().flatten(0, -2)
    return torch.log_softmax(logits[targets.flatten() != IGNORED], -1)


def measure(
    name: str,
    chosen: Sequence[tuple[str, str, bool, Method]],
    seeds: range,
    environment: Mapping[str, str],
) -> None:
    task = tasks.build(name)
    done = {(r["task"], r["method"], r["setting"], r["seed"]) for r in rows.read(RESULT)}
    pair_ = Pair.of(task)
    judge = Judge(pair_)
    for method, setting, seeded, run in chosen:
        for seed in seeds if seeded else range(1):
            if (name, method, setting, str(seed)) in done:
                continue
            try:
                packed = run(pair_, seed)
            except nps_compress.RetainError as error:
                print(f"{name}: {method}: {error}", flush=True)
                continue
            found = judge.score(packed.weights)
            kl, agreement = judge.compare()
            key = {"task": name, "method": method, "setting": setting, "seed": seed}
            row = {
                **key,
                "metric": task.metric,
                "bits_per_param": f"{packed.bits_per_param:.4f}",
                "score": f"{found:.5f}",
                "retained": f"{judge.retained(found):.4f}",
                "kl": f"{kl:.5f}",
                "agreement": f"{agreement:.4f}",
                "base_score": f"{judge.base:.5f}",
                "finetuned_score": f"{judge.finetuned:.5f}",
                "evaluations": packed.evaluations,
                "cost": f"{packed.cost:.2f}",
                **environment,
            }
            if packed.search:
                for step in _history(key, packed.search):
                    rows.append(SEARCHES, SEARCH_FIELDS, step)
            rows.append(RESULT, FIELDS, row)
            print(
                f"{name:9} {method:33} {setting:13} {packed.bits_per_param:7.3f} bits "
                f"{found:8.4f}  {row['retained']:>7}  kl {row['kl']}",
                flush=True,
            )


def _history(key: Mapping[str, object], search: Mapping[str, Any]) -> list[dict[str, object]]:
    """The best fitness after each generation."""
    best = search["best_by_generation"]
    draws = 1 + search["evaluations"] - 1 - (len(best) - 1) * search["population"]
    return [
        {
            **key,
            "generation": number,
            "evaluations": draws + number * search["population"],
            "fitness": search["fitness"],
            "best": value,
            "start": search["start"],
            "finetuned": search["finetuned"],
        }
        for number, value in enumerate(best)
    ]


def summary(found: Iterable[Mapping[str, str]]) -> list[dict[str, object]]:
    """Per cent kept: a row a method and setting, the mean over its seeds and how far they span."""
    kept: dict[tuple[str, str], dict[str, list[float]]] = {}
    bits: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in found:
        key, task = (row["method"], row["setting"]), row["task"]
        kept.setdefault(key, {}).setdefault(task, []).append(100 * float(row["retained"]))
        bits.setdefault(key, {}).setdefault(task, []).append(float(row["bits_per_param"]))
    names = sorted({name for by_task in kept.values() for name in by_task})
    table: list[dict[str, object]] = []
    for (method, setting), by_task in kept.items():
        line: dict[str, object] = {"method": method, "setting": setting}
        for name in names:
            seeds = by_task.get(name, [])
            mean = f"{statistics.fmean(seeds):.1f}" if seeds else "-"
            line[name] = f"{mean} ({max(seeds) - min(seeds):.1f})" if len(seeds) > 1 else mean
        whole = len(by_task) == len(names)
        line["mean"] = f"{_mean_of_means(by_task):.1f}" if whole else "-"
        line["bits"] = f"{_mean_of_means(bits[method, setting]):.3f}" if whole else "-"
        line["seeds"] = min(map(len, by_task.values()))
        table.append(line)
    return sorted(table, key=lambda line: str(line["bits"]))


def _mean_of_means(by_task: Mapping[str, Sequence[float]]) -> float:
    return statistics.fmean(map(statistics.fmean, by_task.values()))


def plot(path: Path) -> None:
    """Retained share against bits: a panel a task, a line a method, the mean over its seeds.

    Methods without a range of settings (--retain) are single marks; bars span the seeds.
    """
    from matplotlib import pyplot

    found = rows.read(RESULT)
    names = list(dict.fromkeys(row["task"] for row in found))
    methods_seen = list(dict.fromkeys(row["method"] for row in found))
    looks = _looks(methods_seen)
    figure, panels = pyplot.subplots(
        *(2, -(-len(names) // 2)),
        figsize=(18, 12),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, name in zip(panels.flat, names, strict=False):
        for method in methods_seen:
            settings: dict[str, list[tuple[float, float]]] = {}
            for row in found:
                if (row["task"], row["method"]) == (name, method):
                    at = (float(row["bits_per_param"]), 100 * float(row["retained"]))
                    settings.setdefault(row["setting"], []).append(at)
            means = sorted(
                (
                    statistics.fmean(bits for bits, _ in seeds),
                    statistics.fmean(kept for _, kept in seeds),
                    max(kept for _, kept in seeds) - min(kept for _, kept in seeds),
                )
                for seeds in settings.values()
            )
            if means:
                bits, kept, spread = zip(*means, strict=True)
                half = [width / 2 for width in spread]
                axes.errorbar(bits, kept, half, label=method, **looks[method])
        axes.axhline(100, color="0.6", linewidth=1, linestyle="--")
        axes.set(xscale="log", title=name, xlabel="bits per parameter, everything counted")
        axes.set_ylim(0, 106)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for row_of_panels in panels:
        row_of_panels[0].set_ylabel("kept of the fine-tune's quality, test data (%)")
    _legend(figure, panels.flat)
    figure.savefig(path, dpi=90)


def plot_searches(path: Path) -> None:
    """How near a search came to its end, against evaluations: a panel a task and density."""
    from matplotlib import pyplot

    found = rows.read(SEARCHES)
    names = list(dict.fromkeys(row["task"] for row in found))
    settings = sorted({row["setting"] for row in found})
    looks = _looks(list(dict.fromkeys(row["method"] for row in found)))
    figure, panels = pyplot.subplots(
        *(len(names), len(settings)),
        figsize=(6 * len(settings), 3 * len(names)),
        squeeze=False,
        layout="constrained",
    )
    for (name, setting), axes in zip(itertools.product(names, settings), panels.flat, strict=True):
        runs: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in found:
            if (row["task"], row["setting"]) == (name, setting):
                point = int(row["evaluations"]), -float(row["best"] or "nan")
                runs.setdefault((row["method"], row["seed"]), []).append(point)
        for (method, seed), points in runs.items():
            at, best = zip(*points, strict=True)
            label = method if seed == "0" else "_"
            axes.plot(at, best, label=label, **{**looks[method], "marker": ""})
        if not runs:
            axes.set_visible(False)
        axes.set(yscale="log", title=f"{name}, {setting}", xlabel="evaluations")
        axes.grid(alpha=0.3, which="both")
    for row_of_panels in panels:
        row_of_panels[0].set_ylabel("KL on calibration data")
    _legend(figure, panels.flat)
    figure.savefig(path, dpi=90)


def _looks(methods_seen: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ours in strong lines, baselines in thin ones, no two alike."""
    import matplotlib

    matplotlib.use("Agg")
    colours = [matplotlib.colormaps["tab10"](number) for number in range(10)]
    looks: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(methods_seen):
        is_ours = any(word in method for word in ("ours", "NPS over", "sampled"))
        looks[method] = {
            "color": colours[number % 10],
            "marker": "osD^vP*X"[number // 10 % 8] if not is_ours else "o*XPDv<s"[number % 7],
            "linewidth": 2 if is_ours else 0.8,
            "markersize": 7 if is_ours else 4,
            "linestyle": "-" if is_ours else ":",
        }
    return looks


def _legend(figure: Any, panels: Iterable[Any]) -> None:
    known: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside right center", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed (the default)")
    size.add_argument("--full", action="store_true", help="three seeds and more densities")
    parser.add_argument("--seeds", type=int, help="how many (1, with --full 3)")
    parser.add_argument("--task", action="append", choices=tasks.names(), help="only this one")
    parser.add_argument("--method", action="append", help="only this one, as a row has it")
    parser.add_argument("--setting", action="append", help="only this one, as a row has it")
    parser.add_argument("--no-search", action="store_true", help="leave out methods that search")
    parser.add_argument("--plot", action="store_true", help="measure nothing, plot what there is")
    arguments = parser.parse_args()
    environment = rows.environment()
    for name in () if arguments.plot else arguments.task or tasks.names():
        seeds = range(arguments.seeds or (3 if arguments.full else 1))
        chosen = [
            method
            for method in methods(arguments.full)
            if not (arguments.no_search and method[0].endswith(SEARCHING))
            and (not arguments.method or method[0] in arguments.method)
            and (not arguments.setting or method[1] in arguments.setting)
        ]
        measure(name, chosen, seeds, environment)
    if rows.read(RESULT):
        print(f"\nkept, per cent (span of the seeds)\n{rows.table(summary(rows.read(RESULT)))}\n")
        plot(RESULT.with_suffix(".png"))
        print(f"rows in {RESULT}, picture beside")
    if rows.read(SEARCHES):
        plot_searches(SEARCHES.with_suffix(".png"))
        print(f"searches in {SEARCHES}, picture beside")


if __name__ == "__main__":
    main()
