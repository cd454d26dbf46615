"""Pack a fine-tune into a ``.nps`` file: select, encode, write, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from nps_compress import __version__
from nps_compress._progress import bar
from nps_compress._threads import Buffers, bounded_map, workers
from nps_compress.atomic import atomic_file, refuse_existing, refuse_input_as_output
from nps_compress.candidates import Pruner
from nps_compress.checkpoint import Checkpoint, Pair, open_checkpoint, pair
from nps_compress.distortion import Distortion, total
from nps_compress.encoding import Encoded, Encoder, Level, effort_of, identify, reading
from nps_compress.errors import BaseMismatchError, InvalidArgumentError
from nps_compress.format.records import base_root, printable
from nps_compress.format.writer import NpsWriter, check_name
from nps_compress.genotype import check_genes
from nps_compress.prune import Rule
from nps_compress.recipe import DEFAULT_RULE, Recipe, default_density, default_importance
from nps_compress.reconstruct import BASE_NAME_KEY, FINETUNED_NAME_KEY
from nps_compress.report import Quality, errors_to_metadata
from nps_compress.searching import (
    RetainJob,
    SearchJob,
    SearchOptions,
    counted,
    delete,
    input_files,
    memory_budget,
)

# Side files up to this size are stored even where the base has the same: a config is often
# rewritten when a base is saved again, a vocabulary hardly ever.
ALWAYS_STORED_BYTES = 16 * 1024
RETAIN_RULES: tuple[Rule, ...] = ("signs", "sampled")


@dataclass(frozen=True)
class PackReport:
    """What was packed. ``density`` counts kept elements among all of the fine-tune's.

    ``quality``: what was kept, where it was measured: with a search, or a share asked for.
    ``relative_error``: of the pruned tensors (see distortion.py); None where none were pruned.
    ``still_share``: of the elements that signs may move, those that the fine-tune leaves alone.
    """

    path: Path
    file_bytes: int
    total_params: int
    nnz: int
    finetuned_bytes: int
    base_root: str
    recipe: Recipe | None
    quality: Quality | None = None
    relative_error: float | None = None
    still_share: float = 0.0

    @property
    def density(self) -> float:
        """Share of the fine-tune's elements that the file holds."""
        return self.nnz / self.total_params if self.total_params else 0.0

    @property
    def bits_per_param(self) -> float:
        """Bits of file per element of the fine-tune."""
        return 8 * self.file_bytes / self.total_params if self.total_params else 0.0

    @property
    def ratio(self) -> float:
        """How many times smaller than the fine-tune's weights."""
        return self.finetuned_bytes / self.file_bytes


def pack(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    lossless: bool = False,
    retain: float | None = None,
    calibration: str | Path | None = None,
    search: SearchOptions | None = None,
    rules: Sequence[Rule] = (),
    level: Level = "default",
    force: bool = False,
    progress: bool = False,
) -> PackReport:
    """Write ``out``, a ``.nps`` file that turns ``base`` into (nearly) ``finetuned``.

    base, finetuned: folder, ``.safetensors`` file, or Hub id in the local cache. ``recipe`` says
    what is kept (default: :func:`default_recipe`). With ``calibration`` its factors are searched
    first, as ``search`` says. ``retain`` asks for a share of the fine-tune's quality
    instead of a density, measured by ``search.fitness`` (default: what people judge such a model
    by); of the ``rules`` (default: RETAIN_RULES) the one that needs the least density is taken.
    ``lossless`` keeps every changed bit. ``level``: the time that exact values may take to encode,
    and a reader to decode: ``fast``, ``default`` or ``max``, which is smallest. Tensors that only
    the fine-tune has, or whose shape or kind rules pruning out, are kept exactly, as are small ones
    where that costs under 1 %.

    Raises:
        OutputExistsError, CheckpointError, CalibrationError, InvalidArgumentError, RecipeError,
        RetainError, SearchInterruptedError, WriteError.
    """
    out = Path(out)
    refuse_existing(out, force)
    effort_of(level)
    if lossless and (recipe is not None or calibration is not None or retain is not None):
        raise InvalidArgumentError("lossless", True, "used without recipe, calibration and retain")
    options = search or SearchOptions()
    job: SearchJob | None = None
    rules = (rules or RETAIN_RULES) if retain is not None else ()
    if retain is not None:
        if calibration is None:
            raise InvalidArgumentError("retain", retain, "used with calibration data")
        job = RetainJob(Path(calibration), options, out, retain, rules)
    elif calibration is not None and options.generations:
        job = SearchJob(Path(calibration), options, out)
    examples = job.examples if job else None
    if calibration is not None and examples is None:
        from nps_compress.calibration import read_examples

        examples = read_examples(Path(calibration))
    recipe = recipe or default_recipe(calibration is not None)
    if job:
        check_genes(options.genes, rules or (recipe.prune,))
    pair_ = pair(open_checkpoint(base), open_checkpoint(finetuned))
    refuse_input_as_output(out, input_files(pair_, calibration))
    for name in (*pair_.base.tensors, *pair_.finetuned.tensors):
        check_name(name)
    pruner = None if lossless else counted(pair_, recipe, examples, calibration, progress, rules)
    quality = None
    if pruner and job:
        quality = job.run(pruner, progress)
    metadata = quality.to_metadata() if quality else {}
    report = write(pair_, pruner, out, metadata, force, progress, level=level)
    if job:
        delete(job.states)
    return replace(report, quality=quality)


def default_recipe(calibrated: bool) -> Recipe:
    """What is kept where nothing is asked for; with calibration data ranked by importance, and in
    eight subspaces for a search."""
    options = {
        "prune": DEFAULT_RULE,
        "density": default_density(DEFAULT_RULE),
        "importance": default_importance(DEFAULT_RULE, calibrated),
    }
    return Recipe.with_subspaces(8 if calibrated else 1, "tail", **options)


def write(
    pair_: Pair,
    pruner: Pruner | None,
    out: Path,
    metadata: Mapping[str, str],
    force: bool,
    progress: bool,
    required_base_root: str | None = None,
    level: Level = "default",
) -> PackReport:
    """Write a paired fine-tune, pruned or (pruner None) with every changed bit.

    metadata: beside, or instead of, what every file says of itself.

    Raises:
        OutputExistsError, CheckpointError, WriteError.
        BaseMismatchError: the base has another root than is required.
    """
    base, finetuned, effort = pair_.base, pair_.finetuned, effort_of(level)
    base_index = {name: index for index, name in enumerate(base.tensors)}
    selection = pruner.selection() if pruner else None
    groups = pruner.pruned_groups() if pruner else []
    prunable = {name for name in pruner.names if pruner.group(name) in groups} if pruner else set()

    buffers = Buffers()

    said = {BASE_NAME_KEY: base.name, FINETUNED_NAME_KEY: finetuned.name}
    said["tool"] = f"nps-compress {__version__}"
    if pruner:
        said["recipe"] = json.dumps(pruner.recipe.to_dict())
    nnz, known = 0, {}
    distortions: list[Distortion] = []
    with atomic_file(out, force) as stream, ThreadPoolExecutor(workers()) as pool:
        writer = NpsWriter(stream)
        encoder = Encoder(pair_, pruner, prunable, selection, base_index, effort, pool)

        def encode(name: str) -> Encoded:
            with reading(buffers) as read:
                return encoder.encode(name, read)

        with bar(len(finetuned.tensors), "packing", "tensor", progress) as advance:
            for encoded in bounded_map(
                encode,
                finetuned.tensors,
                lambda name: 3 * finetuned.tensors[name].nbytes,
                memory_budget(pair_),
            ):
                writer.add_chunks(encoded.chunks)
                writer.add_tensor(encoded.entry)
                distortions.append(encoded.distortion)
                nnz += sum(chunk.nnz for chunk in encoded.chunks)
                if encoded.base:
                    known[encoded.base.name] = encoded.base
                advance()
        for name, data, from_base in _side_files(base, finetuned):
            if from_base:
                writer.add_base_file(name, data)
            else:
                writer.add_file(name, data)
        table = [known.get(name) or identify(base, name, base.read(name)) for name in base.tensors]
        root = base_root(table).hex()
        if required_base_root not in (None, root):
            made_from = metadata.get(BASE_NAME_KEY, "unnamed base")
            what = f"root {required_base_root}"
            raise BaseMismatchError(base.path, what, f"is {root}", printable(made_from))
        overall = total(distortions).relative if pruner else None
        if overall is not None:
            said |= errors_to_metadata(overall, [each.relative for each in distortions])
        file_bytes = writer.finish(table, {**said, **metadata})
    return PackReport(
        out,
        file_bytes,
        finetuned.total_params,
        nnz,
        sum(tensor.nbytes for tensor in finetuned.tensors.values()),
        root,
        pruner.recipe if pruner else None,
        relative_error=overall,
        still_share=pruner.still_share if pruner and pruner.recipe.prune == "signs" else 0.0,
    )


def _side_files(base: Checkpoint, finetuned: Checkpoint) -> Iterator[tuple[str, bytes, bool]]:
    """Side files of the fine-tune by name: content, and whether the base's is to be used."""
    for name in sorted(finetuned.side_files):
        data = finetuned.read_side_file(name)
        large = len(data) > ALWAYS_STORED_BYTES
        yield name, data, large and name in base.side_files and base.read_side_file(name) == data
