"""Transfer what a fine-tune has learnt, and forget little of what its base knew.

theta = base + lambda * (mask * sum of w_m q_m) (NPS, arXiv 2505.18713, eqs. 2, 4 and 6): a pruned
task vector with a coefficient for each subspace of magnitude. Coefficients and lambda are searched
for the harmonic mean H of two scores, on data of the target and on general data that the base is
good at (the measure of the paper's LLaVA experiment).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nps_compress._progress import bar
from nps_compress.atomic import (
    atomic_directory,
    atomic_file,
    refuse_existing,
    refuse_input_as_output,
    refuse_unrelated_content,
)
from nps_compress.checkpoint import content_digest, open_checkpoint
from nps_compress.errors import CalibrationError, InvalidArgumentError
from nps_compress.measured import Measured
from nps_compress.merging.contract import Settings
from nps_compress.merging.driver import Form, description, inputs_of, model_folder
from nps_compress.merging.merger import Merger, Plan
from nps_compress.merging.methods import METHODS, check_settings
from nps_compress.merging.output import METADATA_KEY, merged_task, write_checkpoint, write_packed
from nps_compress.merging.tuning import Tuned, TuningOptions, tune
from nps_compress.packed import is_packed, open_finetuned
from nps_compress.prune import Cuts, top_shares
from nps_compress.searching import delete
from nps_compress.transfer_plot import Curve, plot_curves
from nps_compress.unpacking import is_ours

if TYPE_CHECKING:
    from nps_compress.merging.exams import Exams

# Against which a share of the fine-tune's own outputs says nothing about forgetting.
_OWN_OUTPUTS = ("kl", "agreement", "hidden", "embedding")
LAMBDAS = tuple(step / 5 for step in range(13))  # of the plot: 0 to 2.4


@dataclass(frozen=True)
class Balance:
    """Two scores, 0 at worst, and their harmonic mean."""

    target: float
    general: float

    @property
    def harmonic(self) -> float:
        """H; 0 where either is 0, or not a number."""
        both = self.target + self.general
        product = 2 * self.target * self.general
        return product / both if both > 0 and math.isfinite(product) else 0.0


@dataclass(frozen=True)
class TransferReport:
    """What was transferred. ``nbytes``: of the weights written, or of the ``.nps`` file.

    ``base``, ``finetuned``: as they are; ``pruned``: lambda and all coefficients 1; ``found``: what
    was written. ``curves``: by name, lambda and balance of each point of the plot.
    """

    path: Path
    metric: str
    nbytes: int
    settings: Settings
    tuned: Tuned | None
    base: Balance
    finetuned: Balance
    pruned: Balance
    found: Balance
    curves: Mapping[str, Sequence[tuple[float, Balance]]]


def transfer(
    base: str | Path,
    task: str | Path,
    out: str | Path,
    target: str | Path,
    general: str | Path,
    *,
    settings: Settings | None = None,
    subspaces: int = 8,
    cuts: Cuts = "tail",
    fitness: str | None = None,
    tuning: TuningOptions | None = None,
    search: bool = True,
    plot: str | Path | None = None,
    form: Form | None = None,
    force: bool = False,
    progress: bool = False,
) -> TransferReport:
    """Write ``base`` with as much of ``task`` as is best for both data sets.

    task: a checkpoint or a ``.nps`` file. target, general: development data that ``fitness`` has
    answers in (None: accuracy, loss or spearman, as the model has it). Losses are scored as the
    likelihood of a token, exp(-loss). ``settings``: the start (density 0.1, the largest magnitudes,
    lambda 1), in so many ``subspaces`` where it has no coefficients; where ``search`` is False they
    are what is written. ``plot``: an SVG of target
    against general over lambda, before and after the search.

    Raises:
        As merging.driver.merge.
    """
    out = Path(out)
    method = METHODS["nps"]
    settings = settings or method.defaults
    check_settings(method, settings, 1)
    if not settings.coefficients:
        settings = replace(settings, top_shares=top_shares(subspaces, settings.density, cuts))
    form = form or ("nps" if is_packed(out) else "checkpoint")
    if form == "nps":
        refuse_existing(out, force)
    else:
        refuse_unrelated_content(out, force, is_ours)
    if plot is not None:
        refuse_existing(Path(plot), force)
    base_ = open_checkpoint(base)
    task_ = open_finetuned(base_, task)
    refuse_input_as_output(out, inputs_of(base_, [task_], [target, general]))
    merger = Merger(base_, [task_], held=True)
    with bar(len(merger.names), "reading", "tensor", progress) as advance:
        merger.count(settings, advance)
    with _exams(merger, Path(target), Path(general), fitness) as (exams, metric, digests):

        def weigh(plan: Plan) -> Balance:
            return _balance(metric, exams.measure(plan))

        tuned, states = None, list[Path]()
        pruned = weigh(merger.plan(method, settings))
        found = settings
        if search:
            identity = {
                "base": content_digest(base_),
                "task": content_digest(task_),
                "fitness": metric,
                "data": digests,
            }
            state = out.with_name(f"{out.name}.search.json")
            options = tuning or TuningOptions()
            tuned, states = tune(
                merger,
                method,
                settings,
                lambda plan: weigh(plan).harmonic,
                options,
                state,
                identity,
                progress,
            )
            found = tuned.settings
        curves = {}
        if plot is not None:
            kinds = {"pruned": settings} | ({"searched": found} if tuned else {})
            with bar(len(kinds) * len(LAMBDAS), "plotting", "merge", progress) as advance:
                for name, each in kinds.items():
                    curves[name] = list[tuple[float, Balance]]()
                    for scale in LAMBDAS:
                        at = merger.plan(method, replace(each, scale=scale))
                        curves[name].append((scale, weigh(at)))
                        advance()
        yardsticks = exams.yardsticks
        before = _balance(metric, [each.base for each in yardsticks])
        dense = _balance(metric, [each.finetuned for each in yardsticks])
        after = weigh(merger.plan(method, found))
    model = merged_task(merger, merger.plan(method, found), 0)
    if form == "nps":
        told = {METADATA_KEY: json.dumps(description("transfer", [task_.name], found))}
        nbytes = write_packed(model, out, told, force, progress)
    else:
        with atomic_directory(out, force, is_ours) as folder:
            nbytes = write_checkpoint(model, folder, progress)
    report = TransferReport(out, metric, nbytes, found, tuned, before, dense, pruned, after, curves)
    if plot is not None:
        with atomic_file(Path(plot), force) as stream:
            stream.write(_picture(report).encode())
    delete(states)
    return report


@contextlib.contextmanager
def _exams(
    merger: Merger, target: Path, general: Path, fitness: str | None
) -> Iterator[tuple[Exams, str, list[str]]]:
    from nps_compress.calibration import data_digest, read_examples
    from nps_compress.fitness import check_fitness, natural_metric
    from nps_compress.merging.exams import Exam, Exams

    if fitness is not None:
        check_fitness(fitness)
    paths = target, general
    data = [read_examples(path) for path in paths]
    with model_folder(merger.base, merger.tasks[0]) as folder:
        metrics = [fitness or natural_metric(folder, each) for each in data]
        if fitness in _OWN_OUTPUTS:
            expected = "measured against the data (accuracy, loss, ...)"
            raise InvalidArgumentError("fitness", fitness, expected)
        for path, metric in zip(paths, metrics, strict=True):
            if metric in _OWN_OUTPUTS or metric != metrics[0]:
                raise CalibrationError(path, "lacks the labels, scores or texts to be scored by")
        exams = [
            Exam(0, folder, examples, metrics[0], path)
            for path, examples in zip(paths, data, strict=True)
        ]
        yield Exams(merger, exams), metrics[0], [data_digest(each) for each in data]


def _balance(metric: str, found: Sequence[Measured]) -> Balance:
    return Balance(*(_unit(metric, each.score) for each in found))


def _unit(metric: str, score: float) -> float:
    """A score that is 0 at worst: of losses the likelihood of a token."""
    if not math.isfinite(score):
        return 0.0
    if metric == "loss":
        return math.exp(score)
    if metric == "perplexity":
        return -1 / score
    return max(score, 0.0)


def _picture(report: TransferReport) -> str:
    curves = [
        Curve(name, [(b.general, b.target, f"{scale:g}") for scale, b in points])
        for name, points in report.curves.items()
    ]
    marks = {"base": report.base, "fine-tune": report.finetuned, "written": report.found}
    name = {"loss": "exp(-loss)", "perplexity": "1 / perplexity"}.get(report.metric, report.metric)
    return plot_curves(
        f"{name} of target against general, for lambda from {LAMBDAS[0]:g} to {LAMBDAS[-1]:g}",
        (f"general: {name}", f"target: {name}"),
        curves,
        {label: (each.general, each.target) for label, each in marks.items()},
    )
