"""One tensor of a fine-tune as the chunks that a ``.nps`` file holds of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from nps_compress._threads import Buffers
from nps_compress.candidates import SLICE, Loaded, Pruner, kind_of
from nps_compress.checkpoint import Checkpoint, Pair
from nps_compress.codecs import (
    EXACT_CODECS,
    MOST_WORK,
    Bytes,
    EncodedChunk,
    ValueCodec,
    best_value_codec,
    encode_chunk,
)
from nps_compress.distortion import Distortion, distortion
from nps_compress.dtypes import DType, Words, digest
from nps_compress.errors import InvalidArgumentError
from nps_compress.format.layout import MIN_CHUNK_LOG2, Op
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.grid_codec import GridParameters, encode_grid
from nps_compress.mask_coding import Place
from nps_compress.prune import Levels, Selection
from nps_compress.rank_one import rows_and_columns
from nps_compress.sign_codec import (
    encode_levels,
    encode_signs,
    levels_parameters,
    parameter_chunk,
)

_KEPT_PER_CHUNK = 16384  # enough that a frame's header and a record cost under 1 %
_NEW_CHUNK_LOG2 = 20
_MAX_EXAMINED_PER_KEPT = 1024
_SMALL = 1 << 20  # elements of a tensor that one thread does as fast
_FACTORS_PAY = 50  # where the rest of a tensor takes so many times their bytes, they surely do

T = TypeVar("T")
R = TypeVar("R")
Level = Literal["fast", "default", "max"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Effort:
    """What exact values may cost to encode: the level of zstd, the codecs to choose from, and
    whether masks may be learned ones, which take several times as long to decode."""

    zstd: int
    codecs: Sequence[ValueCodec] = EXACT_CODECS
    learned_masks: bool = False


def effort_of(level: str) -> Effort:
    """What a level stands for. Raises InvalidArgumentError for an unknown one."""
    efforts = {
        "fast": Effort(1, [codec for codec in EXACT_CODECS if codec != ValueCodec.CODED_ULP]),
        "default": Effort(3),
        "max": Effort(19, learned_masks=True),
    }
    if level not in efforts:
        raise InvalidArgumentError("level", level, f"one of {', '.join(LEVELS)}")
    return efforts[level]


@dataclass(frozen=True)
class Encoded:
    """A tensor's record and chunks, its base tensor's identity (None: it has none), and how far
    pruning moved it."""

    entry: TensorEntry
    chunks: list[EncodedChunk]
    base: BaseTensor | None
    distortion: Distortion = Distortion()  # noqa: RUF009


Read = Callable[[Checkpoint, str], Words]


@contextlib.contextmanager
def reading(buffers: Buffers) -> Iterator[Read]:
    """Reads tensors, by checkpoint and name, into memory that is used again when the block ends."""
    with contextlib.ExitStack() as held:

        def read(checkpoint: Checkpoint, name: str) -> Words:
            tensor = checkpoint.tensors[name]
            words = held.enter_context(buffers.held(tensor.nbytes)).view(tensor.dtype.word)
            checkpoint.read_into(name, words)
            return words

        yield read


@dataclass(frozen=True)
class Encoder:
    """Encodes tensors of a fine-tune, several at a time.

    pruner: None where every changed bit is kept, as in tensors that are not among ``prunable``;
    base_index: numbers of the base's tensors; pool: what does the parts of a large tensor.
    """

    pair: Pair
    pruner: Pruner | None
    prunable: Collection[str]
    selection: Selection | None
    base_index: Mapping[str, int]
    effort: Effort
    pool: Executor

    def encode(self, name: str, read: Read) -> Encoded:
        """A tensor of the fine-tune as it is stored. read: see :func:`reading`."""
        pair, effort = self.pair, self.effort
        pruner = self.pruner if name in self.prunable else None
        stored = pair.finetuned.tensors[name]
        base_name = pair.base_of.get(name)
        base_dtype = pair.base.tensors[base_name].dtype if base_name else None
        if base_name is None or (pruner is None and base_dtype != stored.dtype):
            return _encode_new(name, stored.dtype, stored.shape, read(pair.finetuned, name), effort)
        assert base_dtype is not None
        moved, multiples = Distortion(), None
        kind = kind_of(pruner.recipe.prune) if pruner else "exact"
        if pruner:
            loaded = pruner.load(name)
            before = loaded[0]
            rounding = pruner.rounding(name, loaded, self.selection)
            if kind == "grid" or rounding.step:
                multiples = np.zeros(before.size, np.int16)
            after = pruner.prune(name, loaded, self.selection, multiples, rounding)
            moved = distortion(*loaded, after)
        else:
            before, after = read(pair.base, base_name), read(pair.finetuned, name)
        digests = self._map(digest, [before, after], before.size)
        bits, changed = _differences(before, after)
        op, codec, chunk_log2 = Op.COPY, ValueCodec.NONE, 0
        chunks: list[EncodedChunk] = []
        # Where fewer are kept, positions cost less than a factor for each row and column, and a
        # reader would draw or decode more than the format allows.
        stored_apart = multiples is not None or kind == "signs"
        if pruner and stored_apart and changed * _MAX_EXAMINED_PER_KEPT >= before.size > 0:
            levels = pruner.levels(name, loaded)
            if levels is not None:
                codec, chunk_log2, chunks = _encode_levels(*levels)
            elif multiples is None:
                codec, chunk_log2, chunks = _encode_signs(
                    pruner, name, loaded, changed, self.selection
                )
            else:
                step = pruner.step(name, loaded, self.selection, rounding)
                if step:
                    found = pruner.grid_parameters(name, loaded, step)
                    codec, chunk_log2, chunks = _encode_grid(found, multiples, changed)
                    work = sum(chunk.raw_bytes + chunk.work for chunk in chunks)
                    if work > MOST_WORK * _stored_bytes(chunks):
                        chunks = []
        if chunks:
            op = Op.DELTA
        elif changed:
            op, chunk_log2 = Op.DELTA, _chunk_log2(before.size, changed)
            size = 1 << chunk_log2
            parts = [slice(start, start + size) for start in range(0, before.size, size)]
            middle = parts[len(parts) // 2]
            codec = best_value_codec(before[middle], after[middle], base_dtype, effort.codecs)
            columns = rows_and_columns(stored.shape)[1]

            def encode(part: slice) -> EncodedChunk:
                place = Place(part.start, columns) if effort.learned_masks else None
                words = before[part], after[part], base_dtype
                of_part = bits[part.start // 8 : part.stop // 8]
                return encode_chunk(*words, codec, effort.zstd, place, of_part)

            chunks += self._map(encode, parts, before.size)
        of_base, of_tuned = digests
        number = self.base_index[base_name]
        entry = TensorEntry(name, base_dtype, stored.shape, op, codec, chunk_log2, number, of_tuned)
        of = pair.base.tensors[base_name]
        return Encoded(entry, chunks, BaseTensor(base_name, of.dtype, of.shape, of_base), moved)

    def _map(self, function: Callable[[T], R], items: Iterable[T], numel: int) -> Iterable[R]:
        """Results in order; of a large tensor they are worked on at the same time."""
        return self.pool.map(function, items) if numel > _SMALL else map(function, items)


def _differences(before: Words, after: Words) -> tuple[Bytes, int]:
    """A bit for each element, set where words differ, and how many are. -> [numel / 8]."""
    bits = np.empty(-(-before.size // 8), np.uint8)
    for start in range(0, before.size, SLICE):
        part = np.packbits(
            before[start : start + SLICE] != after[start : start + SLICE], bitorder="little"
        )
        bits[start // 8 : start // 8 + part.size] = part
    return bits, int(np.bitwise_count(bits).sum(dtype=np.int64))


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


def _encode_new(
    name: str, dtype: DType, shape: tuple[int, ...], words: Words, effort: Effort
) -> Encoded:
    size = 1 << _NEW_CHUNK_LOG2
    chunks = [
        encode_chunk(None, words[start : start + size], dtype, ValueCodec.REPLACE, effort.zstd)
        for start in range(0, words.size, size)
    ]
    entry = TensorEntry(
        name, dtype, shape, Op.NEW, ValueCodec.REPLACE, _NEW_CHUNK_LOG2, None, digest(words)
    )
    return Encoded(entry, chunks, None)


def identify(base: Checkpoint, name: str, words: Words) -> BaseTensor:
    """What a file says of a base tensor. words: [numel]."""
    tensor = base.tensors[name]
    return BaseTensor(name, tensor.dtype, tensor.shape, digest(words))


def _chunk_log2(numel: int, changed: int) -> int:
    """Chunks that keep about ``_KEPT_PER_CHUNK`` elements: 2^18 to 2^22, or the tensor."""
    wanted = math.ceil(math.log2(_KEPT_PER_CHUNK * numel / changed))
    needed = max(MIN_CHUNK_LOG2, math.ceil(math.log2(numel))) if numel > 1 else MIN_CHUNK_LOG2
    return min(max(wanted, 18), 22, needed)
