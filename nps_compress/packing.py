"""Pack a fine-tune into a ``.nps`` file: select, encode, write, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nps_compress import __version__
from nps_compress._progress import bar
from nps_compress._threads import bounded_map
from nps_compress.atomic import atomic_file, refuse_existing, refuse_input_as_output
from nps_compress.candidates import SLICE, Loaded, Pruner, kind_of
from nps_compress.checkpoint import Checkpoint, Pair, open_checkpoint, pair
from nps_compress.codecs import EncodedChunk, ValueCodec, best_value_codec, encode_chunk
from nps_compress.distortion import Distortion, distortion, total
from nps_compress.dtypes import DType, Words, digest
from nps_compress.errors import BaseMismatchError, InvalidArgumentError
from nps_compress.format.layout import MIN_CHUNK_LOG2, Op
from nps_compress.format.records import BaseTensor, TensorEntry, base_root, printable
from nps_compress.format.writer import NpsWriter, check_name
from nps_compress.genotype import check_genes
from nps_compress.grid_codec import GridParameters, encode_grid
from nps_compress.prune import Levels, Rule, Selection
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
from nps_compress.sign_codec import (
    encode_levels,
    encode_signs,
    levels_parameters,
    parameter_chunk,
)

# Side files up to this size are stored even where the base has the same: a config is often
# rewritten when a base is saved again, a vocabulary hardly ever.
ALWAYS_STORED_BYTES = 16 * 1024
_KEPT_PER_CHUNK = 16384  # enough that a frame's header and a record cost under 1 %
_NEW_CHUNK_LOG2 = 20
_MAX_EXAMINED_PER_KEPT = 1024
_FACTORS_PAY = 50  # where the rest of a tensor takes so many times their bytes, they surely do
RETAIN_RULES: tuple[Rule, ...] = ("signs", "sampled")


@dataclass(frozen=True)
class PackReport:
    """What was packed. ``density`` counts kept elements among all of the fine-tune's.

    ``quality``: what was kept, where it was measured: with a search, or a share asked for.
    ``relative_error``: of the pruned tensors (see distortion.py); None where none were pruned.
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
    force: bool = False,
    progress: bool = False,
) -> PackReport:
    """Write ``out``, a ``.nps`` file that turns ``base`` into (nearly) ``finetuned``.

    base, finetuned: folder, ``.safetensors`` file, or Hub id in the local cache. ``recipe`` says
    what is kept (default: :func:`default_recipe`). With ``calibration`` its factors are searched
    first, as ``search`` says. ``retain`` asks for a share of the fine-tune's quality
    instead of a density, measured by ``search.fitness`` (default: what people judge such a model
    by); of the ``rules`` (default: RETAIN_RULES) the one that needs the least density is taken.
    ``lossless`` keeps every changed bit. Tensors that only the fine-tune has, or whose shape or
    kind rules pruning out, are kept exactly, as are small ones where that costs under 1 %.

    Raises:
        OutputExistsError, CheckpointError, CalibrationError, InvalidArgumentError, RecipeError,
        RetainError, SearchInterruptedError, WriteError.
    """
    out = Path(out)
    refuse_existing(out, force)
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
    report = write(pair_, pruner, out, metadata, force, progress)
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


@dataclass(frozen=True)
class _Encoded:
    entry: TensorEntry
    chunks: list[EncodedChunk]
    base: BaseTensor | None
    distortion: Distortion = Distortion()  # noqa: RUF009


def write(
    pair_: Pair,
    pruner: Pruner | None,
    out: Path,
    metadata: Mapping[str, str],
    force: bool,
    progress: bool,
    required_base_root: str | None = None,
) -> PackReport:
    """Write a paired fine-tune, pruned or (pruner None) with every changed bit.

    metadata: beside, or instead of, what every file says of itself.

    Raises:
        OutputExistsError, CheckpointError, WriteError.
        BaseMismatchError: the base has another root than is required.
    """
    base, finetuned = pair_.base, pair_.finetuned
    base_index = {name: index for index, name in enumerate(base.tensors)}
    selection = pruner.selection() if pruner else None
    groups = pruner.pruned_groups() if pruner else []
    prunable = {name for name in pruner.names if pruner.group(name) in groups} if pruner else set()

    def encode(name: str) -> _Encoded:
        return _encode(pair_, name, pruner if name in prunable else None, selection, base_index)

    said = {BASE_NAME_KEY: base.name, FINETUNED_NAME_KEY: finetuned.name}
    said["tool"] = f"nps-compress {__version__}"
    if pruner:
        said["recipe"] = json.dumps(pruner.recipe.to_dict())
    nnz, known = 0, {}
    distortions: list[Distortion] = []
    with atomic_file(out, force) as stream:
        writer = NpsWriter(stream)
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
        table = [known.get(name) or _identify(base, name, base.read(name)) for name in base.tensors]
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
    )


def _encode(
    pair_: Pair,
    name: str,
    pruner: Pruner | None,
    selection: Selection | None,
    base_index: dict[str, int],
) -> _Encoded:
    stored = pair_.finetuned.tensors[name]
    base_name = pair_.base_of.get(name)
    base_dtype = pair_.base.tensors[base_name].dtype if base_name else None
    if base_name is None or (pruner is None and base_dtype != stored.dtype):
        return _encode_new(name, stored.dtype, stored.shape, pair_.finetuned.read(name))
    assert base_dtype is not None
    moved, multiples = Distortion(), None
    kind = kind_of(pruner.recipe.prune) if pruner else "exact"
    if pruner:
        loaded = pruner.load(name)
        before = loaded[0]
        if kind == "grid":
            multiples = np.zeros(before.size, np.int16)
        after = pruner.prune(name, loaded, selection, multiples)
        moved = distortion(*loaded, after)
    else:
        before, after = pair_.base.read(base_name), pair_.finetuned.read(name)
    identity = _identify(pair_.base, base_name, before)
    changed = sum(
        int(np.count_nonzero(before[start : start + SLICE] != after[start : start + SLICE]))
        for start in range(0, before.size, SLICE)
    )
    op, codec, chunk_log2 = Op.COPY, ValueCodec.NONE, 0
    chunks: list[EncodedChunk] = []
    # Where fewer are kept, positions cost less than a factor for each row and column, and a reader
    # would draw or decode more than the format allows.
    if pruner and kind != "exact" and changed * _MAX_EXAMINED_PER_KEPT >= before.size > 0:
        levels = pruner.levels(name, loaded)
        if levels is not None:
            codec, chunk_log2, chunks = _encode_levels(*levels)
        elif multiples is None:
            codec, chunk_log2, chunks = _encode_signs(pruner, name, loaded, changed, selection)
        else:
            found = pruner.grid_parameters(name, loaded, selection)
            if found:
                codec, chunk_log2, chunks = _encode_grid(found, multiples, changed)
    if chunks:
        op = Op.DELTA
    elif changed:
        op, chunk_log2 = Op.DELTA, _chunk_log2(before.size, changed)
        size = 1 << chunk_log2
        parts = [slice(start, start + size) for start in range(0, before.size, size)]
        middle = parts[len(parts) // 2]
        codec = best_value_codec(before[middle], after[middle], base_dtype)
        chunks = [encode_chunk(before[part], after[part], base_dtype, codec) for part in parts]
    sha256 = digest(after)
    entry = TensorEntry(
        name, base_dtype, stored.shape, op, codec, chunk_log2, base_index[base_name], sha256
    )
    return _Encoded(entry, chunks, identity, moved)


_Streams = tuple[ValueCodec, int, list[EncodedChunk]]  # chunks are of 2^(the number) elements


def _encode_levels(exponent: int, levels: npt.NDArray[np.int8]) -> _Streams:
    """A small tensor. levels: [numel]."""
    log2 = _chunk_log2(levels.size, levels.size)
    parts = (slice(start, start + (1 << log2)) for start in range(0, levels.size, 1 << log2))
    first = parameter_chunk(levels_parameters(exponent))
    return ValueCodec.LEVELS, log2, [first, *(encode_levels(levels[part]) for part in parts)]


def _encode_signs(
    pruner: Pruner, name: str, loaded: Loaded, changed: int, selection: Selection | None
) -> _Streams:
    """A tensor as signs."""
    numel = loaded[0].size
    parameters = pruner.sign_parameters(name, loaded, selection)
    log2 = _chunk_log2(numel, max(1, changed // 8))  # of bits
    chunks = [parameter_chunk(parameters.to_bytes())]
    for start in range(0, numel, 1 << log2):
        part = slice(start, min(start + (1 << log2), numel))
        signed, _ = pruner.changes(name, loaded, part, for_signs=True)
        chunks.append(encode_signs(parameters, start, signed))
    return ValueCodec.SIGNS, log2, chunks


def _encode_grid(parameters: Sequence[GridParameters], multiples: Levels, changed: int) -> _Streams:
    """A tensor as multiples of a step, with whichever parameters make that smallest."""
    log2 = _chunk_log2(multiples.size, max(1, changed // 8))
    best: list[EncodedChunk] = []
    for each in parameters:
        chunks = [parameter_chunk(each.to_bytes())]
        factors = len(chunks[0].data)
        for start in range(0, multiples.size, 1 << log2):
            chunks.append(encode_grid(each, start, multiples[start : start + (1 << log2)]))
        if not best or _stored_bytes(chunks) < _stored_bytes(best):
            best = chunks
        if factors * _FACTORS_PAY <= _stored_bytes(chunks):
            break
    return ValueCodec.GRID, log2, best


def _stored_bytes(chunks: Sequence[EncodedChunk]) -> int:
    return sum(len(chunk.data) for chunk in chunks)


def _encode_new(name: str, dtype: DType, shape: tuple[int, ...], words: Words) -> _Encoded:
    size = 1 << _NEW_CHUNK_LOG2
    chunks = [
        encode_chunk(None, words[start : start + size], dtype, ValueCodec.REPLACE)
        for start in range(0, words.size, size)
    ]
    sha256 = digest(words)
    entry = TensorEntry(
        name, dtype, shape, Op.NEW, ValueCodec.REPLACE, _NEW_CHUNK_LOG2, None, sha256
    )
    return _Encoded(entry, chunks, None)


def _identify(base: Checkpoint, name: str, words: Words) -> BaseTensor:
    tensor = base.tensors[name]
    return BaseTensor(name, tensor.dtype, tensor.shape, digest(words))


def _chunk_log2(numel: int, changed: int) -> int:
    """Chunks that keep about ``_KEPT_PER_CHUNK`` elements: 2^18 to 2^22, or the tensor."""
    wanted = math.ceil(math.log2(_KEPT_PER_CHUNK * numel / changed))
    needed = max(MIN_CHUNK_LOG2, math.ceil(math.log2(numel))) if numel > 1 else MIN_CHUNK_LOG2
    return min(max(wanted, 18), 22, needed)


def _side_files(base: Checkpoint, finetuned: Checkpoint) -> Iterator[tuple[str, bytes, bool]]:
    """Side files of the fine-tune by name: content, and whether the base's is to be used."""
    for name in sorted(finetuned.side_files):
        data = finetuned.read_side_file(name)
        large = len(data) > ALWAYS_STORED_BYTES
        yield name, data, large and name in base.side_files and base.read_side_file(name) == data
