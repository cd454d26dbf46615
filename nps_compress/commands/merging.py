"""``merge`` and ``transfer``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nps_compress.commands.shared import (
    force_option,
    given,
    json_option,
    output,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from nps_compress.merging.contract import Settings
    from nps_compress.merging.driver import Form, MergeReport
    from nps_compress.merging.tuning import TuningOptions
    from nps_compress.transferring import TransferReport

F = TypeVar("F", bound=Callable[..., Any])

METHODS = (
    *("average", "task-arithmetic", "ties", "dare", "della", "consensus", "emr", "nps"),
    *("neuromerging", "evolver"),
)
_PRUNING = ("density", "prune", "scope")
_SEARCH = ("generations", "population", "fitness")

_scale = click.option(
    "--scale",
    type=float,
    help="Lambda, the factor of the merged vector.  [default: 0.4 for task-arithmetic, dare and "
    "consensus, 1 / (1 - sigma) for neuromerging, else 1; a search starts from it]",
)
_density = click.option(
    "--density",
    type=float,
    help="Share of each task vector kept, in (0, 1].  [default: 0.1 for dare, nps and "
    "neuromerging, else 0.2]",
)
_prune = click.option(
    "--prune",
    type=click.Choice(["magnitude", "random", "sampled", "signs"]),
    help="How task vectors are pruned before. magnitude: the largest. random: any, scaled. "
    "sampled, signs: as of pack, right on average.  [default: random for dare, nothing for "
    "task-arithmetic and consensus, else magnitude]",
)
_scope = click.option(
    "--scope",
    type=click.Choice(["global", "tensor"]),
    help="Rank changes over the whole task vector or within each tensor.  [default: global]",
)
_seed = click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of search and sampling."
)
_subspaces = click.option(
    "--subspaces",
    type=int,
    default=8,
    show_default=True,
    help="Of nps: magnitude subspaces, one searched coefficient each (and task).",
)
_cuts = click.option(
    "--cuts",
    type=click.Choice(["tail", "equal"]),
    default="tail",
    show_default=True,
    help="Of nps: subspaces that halve towards the largest changes, or of equal count.",
)
_generations = click.option(
    "--generations",
    type=int,
    help="CMA-ES generations at most (12), or iterations of evolver (15).",
)
_population = click.option(
    "--population", type=int, help="Candidates a generation.  [default: 4 + 3 ln(genes)]"
)
_to = click.option(
    "--to",
    "form",
    type=click.Choice(["checkpoint", "nps"]),
    help="What to write.  [default: a .nps file where OUTPUT is called so, else a checkpoint]",
)


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


@click.command()
@click.argument("base")
@click.argument("tasks", nargs=-1, required=True)
@output("The folder or .nps file to write.")
@click.option("--method", type=click.Choice(METHODS), required=True, help="How to merge.")
@click.option(
    "--calibration",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Development data of a task, once for each TASK in their order; turns tuning on.",
)
@_options(_scale, _density, _prune, _scope)
@click.option(
    "--elect/--no-elect",
    default=None,
    help="Of dare, consensus and nps: average only values of the elected sign, as ties does.",
)
@click.option("--window", type=float, help="Of della: range of probabilities.  [default: density]")
@click.option("--threshold", type=float, help="Of consensus: lambda of TALL masks.  [default: 0.4]")
@click.option("--agreement", type=int, help="Of consensus: tasks that must agree.  [default: 2]")
@click.option("--parallel", type=float, help="Of neuromerging: lambda 1.  [default: 0]")
@click.option("--mutation", type=float, help="Of evolver: F.  [default: 0.5]")
@click.option("--crossover", type=float, help="Of evolver: Cr.  [default: 0.5]")
@click.option(
    "--fitness",
    metavar="NAME",
    help="What is tuned for on calibration data: the mean over tasks of the share that is kept of "
    "it. As of pack.  [default: kl, or embedding]",
)
@_options(_subspaces, _cuts, _generations, _population, _seed)
@click.option(
    "--per-task",
    is_flag=True,
    help="Write a folder with a model for each task: what was merged, and the task's own head. "
    "Always on for emr.",
)
@_options(_to, force_option, json_option)
@click.pass_context
def merge(
    ctx: click.Context,
    base: str,
    tasks: tuple[str, ...],
    output: Path,
    method: str,
    calibration: tuple[Path, ...],
    fitness: str | None,
    subspaces: int,
    cuts: Any,
    per_task: bool,
    form: Form | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge TASKS, checkpoints or .nps files of BASE, into one model.

    Tensors that only some tasks have, or in another shape, are not merged: the result has those of
    BASE, or with --per-task each task keeps its own.

    \b
    Example:
      nps-compress merge base/ law.nps med/ -o both/ --method ties
      nps-compress merge base/ law.nps med/ -o both.nps --method task-arithmetic --scale 0.4
      nps-compress merge base/ law/ med/ -o both/ --method nps --per-task \\
        --calibration law.jsonl --calibration med.jsonl
    """
    from nps_compress.merging.driver import merge as run
    from nps_compress.merging.methods import method_of
    from nps_compress.prune import top_shares

    chosen = method_of(method)
    known = {*chosen.options, "seed", *(_PRUNING if chosen.prunes else ())}
    if "coefficients" in chosen.genes:
        known |= {"subspaces", "cuts"}
    settings_names = {field.name for field in fields(chosen.defaults)} | {"subspaces", "cuts"}
    for option in given(ctx, settings_names - known):
        raise click.UsageError(f"{option} can't be used with --method {method}")
    if not calibration:
        for option in given(ctx, {*_SEARCH}):
            raise click.UsageError(f"{option} needs --calibration")
    elif not chosen.genes:
        for option in given(ctx, {"generations", "population"}):
            raise click.UsageError(
                f"{option} can't be used with --method {method}: nothing to tune"
            )
    settings = _settings(chosen.defaults, options, known)
    if chosen.prunes and settings.prune is None and given(ctx, {"density", "scope"}):
        raise click.UsageError(f"--density and --scope need --prune with --method {method}")
    if "coefficients" in chosen.genes and calibration:
        shares = top_shares(subspaces, settings.density, cuts)
        settings = replace(settings, top_shares=shares)
    report = run(
        base,
        tasks,
        output,
        method=method,
        settings=settings,
        calibration=calibration,
        fitness=fitness,
        tuning=_tuning(options),
        per_task=per_task,
        form=form,
        force=force,
        progress=True,
    )
    if as_json:
        print_json({**asdict(report), "path": str(report.path)})
    else:
        _print_merge(report)


@click.command()
@click.argument("base")
@click.argument("task")
@output("The folder or .nps file to write.")
@click.option(
    "--target",
    required=True,
    type=click.Path(path_type=Path),
    help="Development data of what TASK learnt, with answers (JSONL, or a folder of images).",
)
@click.option(
    "--general",
    required=True,
    type=click.Path(path_type=Path),
    help="Development data of what BASE knew and should not forget, with answers.",
)
@click.option("--scale", type=float, help="Lambda, where the search starts.  [default: 1]")
@click.option(
    "--density",
    type=float,
    help="Share of the task vector kept, in (0, 1].  [default: 0.1]",
)
@click.option(
    "--prune",
    type=click.Choice(["magnitude", "random", "sampled", "signs"]),
    help="How the task vector is pruned, as of merge.  [default: magnitude]",
)
@_options(_scope)
@click.option(
    "--fitness",
    metavar="NAME",
    help="What both are scored by: accuracy, loss, perplexity, exact_match, spearman, or your own "
    "MODULE:FUNCTION, 0 at worst.  [default: accuracy, loss of language models, or spearman]",
)
@_options(_subspaces, _cuts)
@click.option("--generations", type=int, help="CMA-ES generations at most; 0: no search.  [12]")
@_options(_population, _seed)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Write target against general over lambda, with and without the search, as SVG.",
)
@_options(_to, force_option, json_option)
def transfer(
    base: str,
    task: str,
    output: Path,
    target: Path,
    general: Path,
    fitness: str | None,
    subspaces: int,
    cuts: Any,
    generations: int | None,
    plot: Path | None,
    form: Form | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Give BASE what TASK learnt without what it forgot: a pruned, scaled part of its changes.

    Coefficients and lambda are searched for the harmonic mean of the scores on --target and
    --general. TASK is a checkpoint or a .nps file.

    \b
    Example:
      nps-compress transfer base/ law/ -o law2/ --target law.jsonl --general web.jsonl
      nps-compress transfer base/ law.nps -o law2.nps --target law.jsonl --general web.jsonl \\
        --plot law2.svg
    """
    from nps_compress.merging.methods import METHODS as KNOWN
    from nps_compress.transferring import transfer as run

    report = run(
        base,
        task,
        output,
        target,
        general,
        settings=_settings(KNOWN["nps"].defaults, options, set(options)),
        subspaces=subspaces,
        cuts=cuts,
        fitness=fitness,
        tuning=_tuning({**options, "generations": generations or None}),
        search=generations != 0,
        plot=plot,
        form=form,
        force=force,
        progress=True,
    )
    if as_json:
        print_json({**asdict(report), "path": str(report.path)})
    else:
        _print_transfer(report)


def _settings(defaults: Settings, options: dict[str, Any], known: set[str]) -> Settings:
    """The defaults, with what was asked for."""
    names = {field.name for field in fields(defaults)} & known
    asked = {name: options[name] for name in names if options.get(name) is not None}
    return replace(defaults, **asked)


def _tuning(options: dict[str, Any]) -> TuningOptions:
    from nps_compress.merging.tuning import TuningOptions

    return TuningOptions(options["generations"], options["population"])


def _print_merge(report: MergeReport) -> None:
    click.echo(
        f"{report.path}: {len(report.tasks)} tasks merged by {report.method}, "
        f"{report.merged_params:,} weights, {report.nbytes:,} bytes"
    )
    for task, left in report.left.items():
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            click.echo(f"not merged of {task}: {left[0]}{more}")
    if report.tuned:
        tuned, scale = report.tuned, report.settings.scale
        at = f", lambda {scale:.4g}" if scale is not None else ""
        click.echo(
            f"mean share kept on calibration data: {tuned.start:.2%} before tuning, "
            f"{tuned.best:.2%} after {tuned.evaluations} evaluations{at}"
        )
    if report.scores:
        rows = [("task", "share kept")]
        print_table(rows + [(task, f"{share:.2%}") for task, share in report.scores.items()])


def _print_transfer(report: TransferReport) -> None:
    scale = f", lambda {report.settings.scale:.4g}" if report.settings.scale is not None else ""
    how = f"{report.tuned.evaluations} evaluations" if report.tuned else "no search"
    click.echo(f"{report.path}: {report.nbytes:,} bytes, {report.metric}, {how}{scale}")
    rows = [("", "target", "general", "H")]
    balances = ("base", "finetuned", "pruned", "found")
    for name in balances:
        each = getattr(report, name)
        label = {"finetuned": "fine-tune", "found": "written"}.get(name, name)
        row = f"{each.target:.4f}", f"{each.general:.4f}", f"{each.harmonic:.4f}"
        rows.append((label, *row))
    print_table(rows)
