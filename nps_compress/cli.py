"""The ``nps-compress`` command: parse, call the library, print."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nps_compress import __version__
from nps_compress.bench.shapes import MODELS
from nps_compress.commands.merging import merge, transfer
from nps_compress.commands.serving import serve
from nps_compress.commands.shared import force_option as _force
from nps_compress.commands.shared import given as _given
from nps_compress.commands.shared import json_option as _json
from nps_compress.commands.shared import output as _out
from nps_compress.commands.shared import print_json as _print_json
from nps_compress.commands.shared import print_table as _print_table
from nps_compress.errors import NpsError, SearchInterruptedError

if TYPE_CHECKING:
    from nps_compress.bench.results import Report
    from nps_compress.bundle import BundledTask
    from nps_compress.encoding import Level
    from nps_compress.packing import PackReport
    from nps_compress.prune import Rule
    from nps_compress.recipe import Recipe
    from nps_compress.report import Quality
    from nps_compress.searching import SearchOptions

_MOSTLY_STILL = 0.5

F = TypeVar("F", bound=Callable[..., Any])


class _Interrupted(click.ClickException):
    """As a failure, with the exit code of a process ended by Ctrl-C."""

    exit_code = 130


class _Group(click.Group):
    """Turns the library's errors and Ctrl-C into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SearchInterruptedError as error:
            raise _Interrupted(str(error)) from None
        except NpsError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except KeyboardInterrupt:
            raise _Interrupted("interrupted; nothing was written") from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nps-compress")
def main() -> None:
    """Store fine-tunes of a shared base model as a few percent of their size.

    BASE and FINETUNED are a folder with safetensors weights, a .safetensors file, or a Hub id
    that is in the local cache.

    \b
    Example:
      nps-compress pack base/ finetuned/ -o task.nps
      nps-compress unpack base/ task.nps -o rebuilt/
    """


_task_argument = click.argument("task", type=click.Path(path_type=Path))


def _recipe_options(function: F) -> F:
    options = (
        click.option(
            "--density",
            type=float,
            help="Share of the weights kept, in (0, 1].  [default: 0.2 with --prune signs, else "
            "0.05]",
        ),
        click.option(
            "--prune",
            type=click.Choice(["signs", "sampled", "magnitude", "random"]),
            help="signs: keep the signs of changes, drawn in proportion to the mean change of "
            "their row and column, which give their sizes. sampled: round changes at random to "
            "multiples of a step, so that the expectation is exact. "
            "magnitude: keep the largest changes. random: keep any with the same probability, "
            "scaled (DARE).  [default: signs; with --retain the best of all but random]",
        ),
        click.option(
            "--values",
            type=click.Choice(["auto", "exact", "int8", "int4", "int3", "int2", "sign"]),
            help="How precisely --prune magnitude and random store what they keep. intB: in B "
            "bits, a sign and 2^(B - 1) sizes, multiples of a step of the tensor. sign: one size. "
            "auto: in the fewest bits that lose at most 0.5 % of each tensor's squares; with "
            "--retain, what makes the smallest file.  [default: auto]",
        ),
        click.option(
            "--scope",
            type=click.Choice(["global", "tensor"]),
            default="global",
            show_default=True,
            help="Rank changes over the whole model or within each tensor.",
        ),
        click.option(
            "--importance",
            type=click.Choice(["magnitude", "fisher", "activation"]),
            help="What ranks changes. fisher: magnitude times how much the fine-tune's outputs "
            "react, from gradients on the calibration data. activation: times the size of the "
            "input, without gradients.  [default: fisher with --calibration and --prune signs or "
            "sampled, else magnitude]",
        ),
        click.option(
            "--fitness",
            metavar="NAME",
            help="What is measured on calibration data. Without labels, against the fine-tune's "
            "own outputs: kl, agreement, hidden, embedding. With them: loss, perplexity, accuracy, "
            "exact_match, spearman. Or your own MODULE:FUNCTION. By default kl, or embedding for "
            "encoders; with --retain accuracy where there are labels, loss for language models, "
            "spearman where there are scores, else agreement or embedding.",
        ),
        click.option(
            "--subspaces",
            type=int,
            default=8,
            show_default=True,
            help="Magnitude subspaces, one searched coefficient each.",
        ),
        click.option(
            "--cuts",
            type=click.Choice(["tail", "equal"]),
            default="tail",
            show_default=True,
            help="tail: subspaces that halve towards the largest changes. equal: of equal count.",
        ),
        click.option(
            "--genes",
            default="subspaces",
            show_default=True,
            help="What is searched, separated by commas: subspaces (a coefficient each), groups "
            "(of embeddings, attention, MLP), subspace-density, group-density (how much of each "
            "is kept).",
        ),
        click.option(
            "--draws",
            type=int,
            default=1,
            show_default=True,
            help="Seeds tried before the search, of which the best is kept.",
        ),
        click.option(
            "--generations",
            type=int,
            default=12,
            show_default=True,
            help="CMA-ES generations at most; `pack` with 0 does not search.",
        ),
        click.option(
            "--population",
            type=int,
            default=None,
            help="Candidates a generation.  [default: 4 + 3 ln(genes)]",
        ),
        click.option(
            "--workers",
            type=int,
            default=None,
            help="Candidates in work at once, a model in memory each.  [default: one a GPU, or 1]",
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, help="Seed of search and sampling."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@main.command()
@click.argument("base")
@click.argument("finetuned")
@_out("The .nps file to write.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help='JSONL, for a classifier of texts {"text": ..., "label": ...} a line, or a folder of '
    "images with one folder a class; turns the search on.",
)
@click.option(
    "--retain",
    type=float,
    help="Find the smallest file that keeps this share of the fine-tune's quality (0.99) on the "
    "calibration data, by the rule that needs the fewest bits unless told which.",
)
@_recipe_options
@click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path),
    help="Use the result of `nps-compress search`.",
)
@click.option("--lossless", is_flag=True, help="Keep every changed bit.")
@click.option(
    "--level",
    type=click.Choice(["fast", "default", "max"]),
    default="default",
    show_default=True,
    help="Time against size where values are stored exactly (--lossless, --values exact): fast is "
    "quickest to pack and unpack, max is smallest.",
)
@_force
@_json
@click.pass_context
def pack(
    ctx: click.Context,
    base: str,
    finetuned: str,
    output: Path,
    calibration: Path | None,
    retain: float | None,
    recipe_path: Path | None,
    lossless: bool,
    level: Level,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Pack FINETUNED into a .nps file that is small beside BASE.

    \b
    Example:
      nps-compress pack base/ law/ -o law.nps
      nps-compress pack base/ law/ -o law.nps --density 0.05
      nps-compress pack base/ law/ -o law.nps --calibration law.jsonl
      nps-compress pack base/ law/ -o law.nps --calibration law.jsonl --retain 0.99
    """
    from nps_compress.packing import pack as run
    from nps_compress.recipe import Recipe

    searched = {"subspaces", "cuts", "genes", "draws", "generations", "population", "workers"}
    others = {"calibration", "recipe_path", "retain"}
    _refuse_together(ctx, "--lossless", lossless, {*options, *others})
    _refuse_together(ctx, "--recipe", recipe_path, {*options, "retain"})
    _refuse_together(ctx, "--retain", retain is not None, {"density"})
    if calibration is None:
        for option in _given(ctx, {"fitness", "importance", "retain", *searched}):
            raise click.UsageError(f"{option} needs --calibration")
    recipe: Recipe | None = None
    rules: tuple[Rule, ...] = ()
    if recipe_path:
        recipe = Recipe.read(recipe_path)
        if recipe.importance == "magnitude":
            _refuse_together(ctx, "--recipe", recipe_path, {"calibration"})
        options["generations"] = 0
    elif retain is not None:
        rules = (options["prune"],) if options["prune"] else ()
        recipe = _recipe(options, calibrated=True)
    elif not lossless:
        recipe = _recipe(options, calibrated=calibration is not None)
    report = run(
        base,
        finetuned,
        output,
        recipe=recipe,
        lossless=lossless,
        retain=retain,
        calibration=calibration,
        search=_search_options(options),
        rules=rules,
        level=level,
        force=force,
        progress=True,
    )
    _print_pack(report, as_json)
    if as_json:
        return
    if calibration is None and recipe_path is None and not lossless:
        click.echo("no calibration data: nothing was searched, all coefficients are 1")
    elif report.recipe and report.recipe.search:
        _print_search(report.recipe)
    if report.quality:
        _print_quality(report.quality, report.recipe)


@main.command()
@click.argument("base")
@click.argument("finetuned")
@_out("The recipe (JSON) to write.")
@click.option(
    "--calibration",
    required=True,
    type=click.Path(path_type=Path),
    help='JSONL, for a classifier of texts {"text": ..., "label": ...} a line, or a folder of '
    "images with one folder a class.",
)
@_recipe_options
@_force
@_json
def search(
    base: str,
    finetuned: str,
    output: Path,
    calibration: Path,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Search the factors alone; the recipe feeds `pack --recipe`.

    Every evaluation is saved beside the output: after Ctrl-C the same command goes on.

    \b
    Example:
      nps-compress search base/ law/ -o law.json --calibration law.jsonl
      nps-compress pack base/ law/ -o law.nps --recipe law.json --calibration law.jsonl
    """
    from nps_compress.searching import search_recipe

    recipe = search_recipe(
        base,
        finetuned,
        calibration,
        output,
        _recipe(options, calibrated=True),
        _search_options(options),
        force=force,
        progress=True,
    )
    if as_json:
        _print_json(recipe.to_dict())
    else:
        genes = (f"{name} {value:.3f}" for name, value in recipe.search["genes"].items())
        click.echo(f"{output}: {', '.join(genes)}")
        _print_search(recipe)


@main.command()
@click.argument("base")
@_task_argument
@_out("The folder to write.")
@click.option(
    "--max-shard-size",
    type=float,
    default=5.0,
    show_default=True,
    help="Largest weight file, in GB (10^9 bytes).",
)
@click.option("--max-size", type=float, help="Refuse a result of more weights than this many GB.")
@_force
@_json
def unpack(
    base: str,
    task: Path,
    output: Path,
    max_shard_size: float,
    max_size: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Rebuild the fine-tune of TASK as a folder that from_pretrained loads.

    \b
    Example:
      nps-compress unpack base/ law.nps -o law/
    """
    from nps_compress.unpacking import unpack as run

    if not 0 < max_shard_size < math.inf:
        raise click.BadParameter(f"{max_shard_size} GB", param_hint="--max-shard-size")
    if max_size is not None and not 0 < max_size < math.inf:
        raise click.BadParameter(f"{max_size} GB", param_hint="--max-size")
    report = run(
        base,
        task,
        output,
        max_shard_bytes=max(int(max_shard_size * 1e9), 1),
        max_bytes=None if max_size is None else int(max_size * 1e9),
        force=force,
        progress=True,
    )
    if as_json:
        _print_json({**asdict(report), "path": str(report.path)})
    else:
        files = f" and {', '.join(report.files)}" if report.files else ""
        click.echo(
            f"{report.path}: {report.tensors} tensors, {report.nbytes:,} bytes of weights{files}; "
            "every digest matched"
        )


@main.command(options_metavar="[OPTIONS]")
@click.argument("paths", nargs=-1, required=True, metavar="[BASE] TASK")
@_json
def verify(paths: tuple[str, ...], as_json: bool) -> None:
    """Check all that TASK promises: its bytes, the whole BASE, every rebuilt tensor.

    Without BASE: all that can be checked from the file alone, which is every byte of it, but not
    that a base and the file make the fine-tune.

    \b
    Example:
      nps-compress verify base/ law.nps
      nps-compress verify law.nps
    """
    from nps_compress.unpacking import verify as run

    if len(paths) > 2:
        raise click.UsageError(f"expected [BASE] TASK, received {len(paths)} arguments")
    base, task = paths if len(paths) == 2 else (None, paths[0])
    names: list[str] = []
    report = run(base, task, progress=True, on_tensor=lambda entry: names.append(entry.name))
    if as_json:
        _print_json({"ok": True, **asdict(report), "verified": names})
    elif base is None:
        click.echo(
            f"{task}: ok: every byte of the file is as it promises; checking the rebuilt tensors "
            "needs the base"
        )
    else:
        click.echo(
            f"{task}: ok: {report.base_tensors} base tensors match, {report.tensors} rebuilt "
            f"tensors and {report.files} files have the digests they promise"
        )


@main.command()
@_task_argument
@_json
def inspect(task: Path, as_json: bool) -> None:
    """Show what a .nps file holds, tensor by tensor; needs no base.

    \b
    Example:
      nps-compress inspect law.nps
      nps-compress inspect law.nps --json | jq .bits_per_param
    """
    from nps_compress.inspection import inspect as run
    from nps_compress.report import ERROR_MEANING, Quality, recipe_words

    found = run(task)
    if as_json:
        _print_json(found)
        return
    has_errors = any(tensor["relative_error"] is not None for tensor in found["tensors"])
    rows: list[tuple[str, ...]] = [
        ("tensor", "op", "dtype", "shape", "density", "bytes", "bits/param", "codecs")
        + ("error",) * has_errors
    ]
    for tensor in found["tensors"]:
        name, base_tensor = tensor["name"], tensor["base_tensor"]
        if base_tensor not in (None, name):
            name = f"{name} (from {base_tensor})"
        rows.append(
            (
                name,
                tensor["op"],
                tensor["dtype"],
                "x".join(map(str, tensor["shape"])) or "scalar",
                f"{tensor['density']:.4f}",
                f"{tensor['stored_bytes']:,}",
                f"{tensor['bits_per_param']:.3f}",
                "+".join(tensor["codecs"]),
            )
            + (_or_nothing(tensor["relative_error"]),) * has_errors
        )
    _print_table(rows)
    for file in found["files"]:
        click.echo(f"file {file['name']}: {file['bytes']:,} bytes, from the {file['from']}")
    click.echo(
        f"{found['total_params']:,} parameters, {found['nnz']:,} kept (density "
        f"{found['density']:.5f}), {found['file_bytes']:,} bytes, "
        f"{found['bits_per_param']:.4g} bits per parameter"
    )
    recipe = recipe_words(found["metadata"])
    if recipe:
        click.echo(f"recipe: {recipe}")
    if found["relative_error"] is not None:
        click.echo(f"relative error {_or_nothing(found['relative_error'])} ({ERROR_MEANING})")
    quality = Quality.from_metadata(found["metadata"])
    if quality:
        click.echo("quality, as measured by who packed:")
        _print_table([(f"  {label}", value) for label, value in quality.rows()])
    click.echo(
        f"base {found['base_name']}: {found['base_tensors']} tensors, root {found['base_root']}"
    )
    click.echo(f"content digest {found['content_digest']}\nfile sha256 {found['file_sha256']}")


@main.command()
@_task_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The file to write (README.md).  [default: standard output]",
)
@_force
def card(task: Path, output: Path | None, force: bool) -> None:
    """Write a model card (Markdown, as the Hugging Face Hub reads) from what TASK says of itself.

    \b
    Example:
      nps-compress card law.nps -o README.md
    """
    from nps_compress.cards import model_card, write_card

    if output is None:
        click.echo(model_card(task), nl=False)
    else:
        write_card(task, output, force=force)
        click.echo(f"{output}: written")


@main.command()
@_task_argument
@click.option("--base", required=True, help="The base that TASK was packed against.")
@click.option(
    "--to",
    type=click.Choice(["sparse-safetensors"]),
    default="sparse-safetensors",
    show_default=True,
    help="sparse-safetensors: NAME.indices and NAME.values, as TRL, verl and vLLM read.",
)
@_out("The .safetensors file to write.")
@_force
@_json
def export(task: Path, base: str, to: str, output: Path, force: bool, as_json: bool) -> None:
    """Write the changes of TASK for other tools; `import` undoes it.

    \b
    Example:
      nps-compress export law.nps --base base/ --to sparse-safetensors -o law-patch.safetensors
    """
    from nps_compress.sparse_safetensors import export_sparse

    report = export_sparse(base, task, output, force=force, progress=True)
    if as_json:
        _print_json({**asdict(report), "path": str(report.path)})
    else:
        click.echo(
            f"{report.path}: {report.file_bytes:,} bytes, {report.nnz:,} elements of "
            f"{report.changed_tensors} tensors, {report.new_tensors} tensors whole"
        )


@main.command("import")
@click.argument("patch", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The base that PATCH changes.")
@_out("The .nps file to write.")
@_force
@_json
def import_(patch: Path, base: str, output: Path, force: bool, as_json: bool) -> None:
    """Pack PATCH, a sparse safetensors file of `export` or of another tool, bit for bit.

    \b
    Example:
      nps-compress import law-patch.safetensors --base base/ -o law.nps
    """
    from nps_compress.sparse_safetensors import import_sparse

    _print_pack(import_sparse(base, patch, output, force=force, progress=True), as_json)


@main.command(options_metavar="[OPTIONS]")
@click.argument("paths", nargs=-1, metavar="BASE TASK...")
@click.option(
    "--like",
    type=click.Choice(list(MODELS)),
    help="In place of BASE and TASK: made weights in the shapes of this model.",
)
@click.option("--tasks", type=int, help="Tasks to project.  [default: those given, or 100]")
@click.option(
    "--downloads",
    type=int,
    help="Times that a task is downloaded, over all tasks and machines.  [default: tasks x "
    "machines]",
)
@click.option(
    "--machines",
    type=int,
    default=1,
    show_default=True,
    help="Machines, each of which downloads the base once.",
)
@click.option(
    "--egress-price", type=float, default=0.09, show_default=True, help="USD for 10^9 bytes."
)
@click.option(
    "--bandwidth", type=float, default=10.0, show_default=True, help="Of the network, in Gbit/s."
)
@click.option(
    "--resident", type=int, default=8, show_default=True, help="Tasks in one machine's memory."
)
@click.option(
    "--lora-rank", type=int, default=16, show_default=True, help="Rank of the LoRA to compare with."
)
@click.option(
    "--density", type=float, help="As of pack.  [default: 0.2 with --prune signs, else 0.05]"
)
@click.option(
    "--prune",
    type=click.Choice(["signs", "sampled", "magnitude", "random"]),
    help="As of pack.  [default: signs]",
)
@click.option("--lossless", is_flag=True, help="Keep every changed bit.")
@click.option(
    "--repeat", type=int, default=3, show_default=True, help="Rounds that medians are taken of."
)
@click.option(
    "--sample",
    type=float,
    default=0.5,
    show_default=True,
    help="With --like, how much is really packed: GB of bf16 weights, as many whole layers as fit.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where to work, on the disk to be measured.  [default: for temporary files]",
)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write every figure.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write a page, plots.")
@_force
@_json
@click.pass_context
def bench(
    ctx: click.Context,
    paths: tuple[str, ...],
    like: str | None,
    tasks: int | None,
    downloads: int | None,
    machines: int,
    egress_price: float,
    bandwidth: float,
    resident: int,
    lora_rank: int,
    density: float | None,
    prune: Rule | None,
    lossless: bool,
    repeat: int,
    sample: float,
    folder: Path | None,
    csv_path: Path | None,
    html_path: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure size and speed of TASKs on this machine, and project what a fleet of them takes.

    A TASK is a fine-tune of BASE, which is packed, or a .nps file. Every figure is marked:
    measured here, projected, or reported by others; none is given unless all that was rebuilt has
    the digests that the files promise.

    \b
    Example:
      nps-compress bench base/ law/ med/ --tasks 200
      nps-compress bench --like llama-8b --tasks 500 --html report.html
    """
    from nps_compress.bench.projection import Plan
    from nps_compress.bench.results import refuse_outputs
    from nps_compress.bench.run import Settings, bench_model, bench_tasks
    from nps_compress.packed import is_packed
    from nps_compress.recipe import DEFAULT_RULE, Recipe, default_density, default_values

    _refuse_together(ctx, "--lossless", lossless, {"density", "prune"})
    if like is not None and paths:
        raise click.UsageError(f"BASE and TASK can't be used with --like, received {paths[0]!r}")
    if like is None:
        if len(paths) < 2:
            raise click.UsageError(f"expected BASE TASK... or --like, received {len(paths)} paths")
        for option in _given(ctx, {"sample"}):
            raise click.UsageError(f"{option} needs --like")
        if all(map(is_packed, paths[1:])):
            for option in _given(ctx, {"density", "prune", "lossless"}):
                raise click.UsageError(f"{option} needs a fine-tune to pack, received .nps files")
    if not 0 < sample < math.inf:
        raise click.BadParameter(f"{sample} GB", param_hint="--sample")
    rule = prune or DEFAULT_RULE
    recipe = None
    if not lossless:
        share = default_density(rule) if density is None else density
        recipe = Recipe(prune=rule, density=share, values=default_values(rule))
    count = tasks if tasks is not None else max(len(paths) - 1, 0) or 100
    plan = Plan(
        count,
        downloads if downloads is not None else count * machines,
        machines,
        egress_price,
        resident,
        bandwidth,
        lora_rank,
    )
    settings = Settings(recipe, repeat, folder, int(sample * 1e9))
    refuse_outputs(csv_path, html_path, paths, force)
    if like is not None:
        report = bench_model(like, plan, settings, progress=True)
    else:
        report = bench_tasks(paths[0], paths[1:], plan, settings, progress=True)
    report.write(csv_path, html_path, force)
    if as_json:
        _print_json(report.to_dict())
    else:
        _print_bench(report)


main.add_command(serve)


@main.group()
def bundle() -> None:
    """Keep many tasks of one base in a folder, where they share the base's table.

    A task of a bundle is a file as any other for all commands, as long as FOLDER/base.nps stays
    beside it.

    \b
    Example:
      nps-compress bundle add tasks/ law.nps med.nps
      nps-compress unpack base/ tasks/law.nps -o law/
    """


_folder_argument = click.argument("folder", type=click.Path(path_type=Path))


@bundle.command("add")
@_folder_argument
@click.argument("tasks", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--name", help="What to call the one TASK.  [default: its file's name]")
@click.option("--force", is_flag=True, help="Replace a task of the same name.")
@_json
def bundle_add(
    folder: Path, tasks: tuple[Path, ...], name: str | None, force: bool, as_json: bool
) -> None:
    """Put copies of TASKS into the bundle FOLDER, which is made where it is not there.

    \b
    Example:
      nps-compress bundle add tasks/ law.nps med.nps
      nps-compress bundle add tasks/ law.nps --name law-2
    """
    from nps_compress.bundle import add

    added = add(folder, tasks, name=name, force=force)
    if as_json:
        _print_json({"path": str(folder), "tasks": [_bundled(task) for task in added]})
        return
    for task in added:
        click.echo(
            f"{folder / task.name}.nps: {task.file_bytes:,} bytes, "
            f"{task.standalone_bytes - task.file_bytes:,} less than by itself"
        )


@bundle.command("list")
@_folder_argument
@_json
def bundle_list(folder: Path, as_json: bool) -> None:
    """Show the tasks of the bundle FOLDER and what each costs.

    \b
    Example:
      nps-compress bundle list tasks/
    """
    from nps_compress.bundle import inspect

    found = inspect(folder)
    saved = found.standalone_bytes - found.file_bytes
    if as_json:
        _print_json(
            {
                "path": str(found.path),
                "base_name": found.base_name,
                "base_root": found.base_root,
                "base_bytes": found.base_bytes,
                "tasks": [_bundled(task) for task in found.tasks],
                "file_bytes": found.file_bytes,
                "standalone_bytes": found.standalone_bytes,
                "mean_task_bytes": found.mean_task_bytes,
            }
        )
        return
    rows: list[tuple[str, ...]] = [("task", "bytes", "bits/param", "index bytes", "by itself")]
    rows += [
        (
            task.name,
            f"{task.file_bytes:,}",
            f"{task.bits_per_param:.4g}",
            f"{task.index_bytes:,}",
            f"{task.standalone_bytes:,}",
        )
        for task in found.tasks
    ]
    _print_table(rows)
    click.echo(
        f"{len(found.tasks)} tasks and {found.base_bytes:,} bytes that they share: "
        f"{found.file_bytes:,} bytes, {abs(saved):,} {'less' if saved >= 0 else 'more'} than "
        "by themselves"
    )
    if found.tasks:
        click.echo(f"one more task costs {found.mean_task_bytes:,.0f} bytes on average")
    click.echo(f"base {found.base_name}: root {found.base_root}")


@bundle.command("remove")
@_folder_argument
@click.argument("name")
def bundle_remove(folder: Path, name: str) -> None:
    """Delete the task NAME from the bundle FOLDER.

    \b
    Example:
      nps-compress bundle remove tasks/ law
    """
    from nps_compress.bundle import remove

    remove(folder, name)
    click.echo(f"{folder / name}.nps: removed")


@bundle.command("extract")
@_folder_argument
@click.argument("name")
@_out("The .nps file to write.")
@_force
def bundle_extract(folder: Path, name: str, output: Path, force: bool) -> None:
    """Write the task NAME of the bundle FOLDER as a file that needs no other.

    \b
    Example:
      nps-compress bundle extract tasks/ law -o law.nps
    """
    from nps_compress.bundle import extract

    extract(folder, name, output, force=force)
    click.echo(f"{output}: {output.stat().st_size:,} bytes")


def _bundled(task: BundledTask) -> dict[str, Any]:
    return {**asdict(task), "bits_per_param": task.bits_per_param}


def _recipe(options: dict[str, Any], calibrated: bool) -> Recipe:
    from nps_compress.recipe import (
        DEFAULT_RULE,
        ROUNDED,
        Recipe,
        default_density,
        default_importance,
        default_values,
    )

    names = ("density", "scope", "seed")
    plain = {name: options[name] for name in names}
    plain["prune"] = options["prune"] or DEFAULT_RULE
    if plain["density"] is None:
        plain["density"] = default_density(plain["prune"])
    if options["values"] is not None and plain["prune"] not in ROUNDED:
        what = f"--values {options['values']} needs --prune {' or '.join(ROUNDED)}"
        raise click.UsageError(f"{what}, received {plain['prune']}")
    plain["values"] = options["values"] or default_values(plain["prune"])
    plain["importance"] = options["importance"] or default_importance(plain["prune"], calibrated)
    if not calibrated or not options["generations"]:
        return Recipe(**plain)
    return Recipe.with_subspaces(options["subspaces"], options["cuts"], **plain)


def _search_options(options: dict[str, Any]) -> SearchOptions:
    from nps_compress.searching import SearchOptions

    names = ("cuts", "fitness", "generations", "population", "draws", "workers")
    genes = tuple(gene.strip() for gene in options["genes"].split(",") if gene.strip())
    return SearchOptions(genes=genes, **{name: options[name] for name in names})


def _refuse_together(ctx: click.Context, flag: str, given: object, others: set[str]) -> None:
    """A choice that settles everything else must not silently override what was asked for."""
    for option in _given(ctx, others) if given else ():
        raise click.UsageError(f"{option} can't be used with {flag}")


def _print_pack(report: PackReport, as_json: bool) -> None:
    if report.still_share > _MOSTLY_STILL:
        click.echo(
            f"note: the fine-tune leaves {report.still_share:.0%} of the weights alone that signs "
            "may move; --lossless or --prune sampled know which",
            err=True,
        )
    if as_json:
        _print_json(
            {
                **asdict(report),
                "path": str(report.path),
                "density": report.density,
                "bits_per_param": report.bits_per_param,
                "ratio": report.ratio,
            }
        )
        return
    click.echo(
        f"{report.path}: {report.file_bytes:,} bytes, {report.bits_per_param:.4g} bits per "
        f"parameter, {report.ratio:.1f}x smaller than the fine-tune; "
        f"{report.nnz:,} of {report.total_params:,} weights kept ({report.density:.3%})"
    )


def _print_search(recipe: Recipe) -> None:
    found = recipe.search
    click.echo(
        f"{found['fitness']} on calibration data: fine-tune {found['finetuned']:.5g}, all "
        f"factors 1 {found['start']:.5g}, found {found['best']:.5g} "
        f"in {found['evaluations']} evaluations"
    )


def _print_bench(report: Report) -> None:
    click.echo(f"{report.title}\n{report.verified}")
    for table in report.tables:
        click.echo(f"\n{table.title}")
        _print_table(table.rows())
        for note in table.notes:
            click.echo(f"  {note}")
    click.echo()
    for note in report.notes:
        click.echo(f"- {note}")


def _or_nothing(error: float | None) -> str:
    return "" if error is None else f"{error:.3g}"


def _print_quality(quality: Quality, recipe: Recipe | None) -> None:
    said = (
        f"{quality.metric} on {quality.examples} calibration examples: base {quality.base:.5g}, "
        f"fine-tune {quality.finetuned:.5g}, packed {quality.packed:.5g}"
    )
    if quality.retained is None:
        said += ", of which no share can be stated"
    elif recipe:
        values = f" --values {recipe.values}" if recipe.values != "exact" else ""
        how = f"--prune {recipe.prune}{values} at density {quality.density:.3g}"
        said += f": {quality.retained:.2%} kept by {how}"
    if quality.trials:
        said += f", found in {len(quality.trials)} trials"
    if quality.low is not None and quality.high is not None:
        # Coefficients are fitted to these very examples: no promise for others follows from them.
        where = "on other data of this kind expect" if quality.trials else "95 % interval"
        said += f"; {where} {quality.low:.2%} to {quality.high:.2%}"
    click.echo(said)
    if quality.target is not None and quality.examples_needed > (quality.examples or 0):
        click.echo(
            f"warning: {quality.examples} examples are too few to promise {quality.target:.2%}; "
            f"about {quality.examples_needed} would be enough",
            err=True,
        )


main.add_command(merge)
main.add_command(transfer)


if __name__ == "__main__":
    main()
