"""Base + task -> the fine-tuned tensor: numba on the CPU, Triton on CUDA, the same bits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nps_compress._threads import MEMORY_SLACK, bounded_map, workers
from nps_compress.codecs import Positions, ValueCodec, apply_payload
from nps_compress.dtypes import Words
from nps_compress.errors import (
    BaseMismatchError,
    FormatError,
    InvalidArgumentError,
    OutOfMemoryError,
)
from nps_compress.format.layout import Op
from nps_compress.format.reader import Chunk, NpsReader, Parameters
from nps_compress.format.records import TensorEntry, has_digest, printable
from nps_compress.grid_codec import GridParameters
from nps_compress.rank_one import RankOne
from nps_compress.sign_codec import Float32, SignParameters, add_changes, level_changes
from nps_compress.ulp_coding import apply_distances

if TYPE_CHECKING:
    import torch

    from nps_compress.kernels.form import Factors, Form, Grid, Signs

BASE_NAME_KEY, FINETUNED_NAME_KEY = "base_name", "finetuned_name"
_PIECE = 1 << 20  # elements that are rebuilt, digested and written while they are in the cache


class Task:
    """An open ``.nps`` file whose tensors are rebuilt one at a time.

    Raises:
        FormatError: the file breaks a rule; OSError: it can't be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.reader = NpsReader(Path(path))
        self.entries = {entry.name: entry for entry in self.reader.tensors}

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self.reader.close()

    @property
    def names(self) -> list[str]:
        """Tensors of the fine-tune, in order of their UTF-8 names."""
        return list(self.entries)

    @property
    def base_name(self) -> str:
        """What the base was called when the task was packed; for people, not for checks."""
        return printable(self.reader.metadata.get(BASE_NAME_KEY, "unnamed base"))

    def base_tensor_name(self, name: str) -> str | None:
        """The base tensor that ``name`` is rebuilt from; None where it is stored whole."""
        index = self.entry(name).base_index
        return None if index is None else self.reader.base[index].name

    def entry(self, name: str) -> TensorEntry:
        """The record of one tensor. Raises InvalidArgumentError for an unknown name."""
        if name not in self.entries:
            raise InvalidArgumentError(
                "tensor name", name, f"one of the task's {len(self.entries)}"
            )
        return self.entries[name]

    def rebuild_words(
        self, name: str, base: Words | None, *, in_place: bool = True, threads: int = 1
    ) -> Words:
        """Rebuild one tensor without checking its digest.

        base: [numel], the base tensor's words, overwritten where ``in_place``; None for a new
        tensor. -> [numel].

        Raises:
            FormatError: a chunk is damaged.
        """
        entry = self.entry(name)
        if base is None:
            try:
                base = np.empty(entry.numel, entry.dtype.word)
            except MemoryError:
                nbytes = entry.numel * entry.dtype.itemsize
                raise OutOfMemoryError(f"tensor {name!r}", nbytes) from None
        elif not in_place and entry.op is Op.COPY:
            return base.copy()
        out = base if in_place else np.empty_like(base)
        size = 1 << entry.chunk_log2
        parameters = self.reader.parameters(entry)

        def run(number: int) -> None:
            span = slice(number * size, min((number + 1) * size, entry.numel))
            before = base[span]
            after = before if in_place else out[span]
            self._rebuild_chunk(entry, number, parameters, before, after)

        everything = range(entry.chunks)
        numbers = self.reader.chunks_to_read(entry) if in_place else everything
        if threads == 1 or len(numbers) == 1:
            for number in numbers:
                run(number)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(run, numbers))
        return out

    def pieces(self, name: str, read: Callable[[Words, int], None] | None) -> Iterator[Words]:
        """Rebuild one tensor piece by piece, without checking its digest: the words in order.

        A piece, [n], holds until the next one is asked for. read: fills a piece with the base's
        words from an element on; None for a new tensor.

        Raises:
            FormatError: a chunk is damaged. What ``read`` raises.
        """
        entry = self.entry(name)
        size = 1 << entry.chunk_log2 if entry.chunks else _PIECE
        chunks_a_piece = max(1, _PIECE // size)
        piece = chunks_a_piece * size
        parameters = self.reader.parameters(entry)
        numbers = deque(self.reader.chunks_to_read(entry) if entry.chunks else ())
        held = np.empty(min(piece, entry.numel), entry.dtype.word)
        for start in range(0, entry.numel, piece):
            words = held[: min(piece, entry.numel - start)]
            if read:
                read(words, start)
            while numbers and numbers[0] * size < start + piece:
                number = numbers.popleft()
                at = number * size - start
                part = words[at : at + size]
                self._rebuild_chunk(entry, number, parameters, part, part)
            yield words

    def _rebuild_chunk(
        self,
        entry: TensorEntry,
        number: int,
        parameters: Parameters | None,
        before: Words,
        after: Words,
    ) -> None:
        """Fill a chunk's words from the base's. before, after: [numel of the chunk], maybe one."""
        chunk = self.reader.read_chunk(entry, number)
        start, dtype = number << entry.chunk_log2, entry.dtype
        if isinstance(parameters, SignParameters):
            assert chunk.positions is not None
            minus = chunk.planes[0]
            parameters.apply(start, chunk.positions, minus, before, after, dtype)
        elif isinstance(parameters, GridParameters):
            assert chunk.positions is not None
            levels = chunk.planes[0].view(np.int16)
            parameters.apply(start, chunk.positions, levels, before, after, dtype)
        elif parameters is not None:
            changes = level_changes(chunk.planes[0].view(np.int8), parameters)
            every = np.arange(chunk.numel, dtype=np.uint32)
            add_changes(every, changes, before, after, dtype)
        else:
            self._apply_words(entry, number, chunk, before, after)

    def _apply_words(
        self, entry: TensorEntry, number: int, chunk: Chunk, before: Words, after: Words
    ) -> None:
        """The same for a chunk that is not stored as numbers."""
        if chunk.streams:
            self._apply_distances(entry, number, chunk, before, after)
        else:
            codec, planes = entry.value_codec, chunk.planes
            apply_payload(codec, planes, chunk.positions, before, after, entry.dtype)

    def _apply_distances(
        self, entry: TensorEntry, number: int, chunk: Chunk, before: Words, after: Words
    ) -> None:
        """The same for one whose distances are coded."""
        if after is not before:
            np.copyto(after, before)
        tokens, low = chunk.streams
        try:
            apply_distances(tokens, low, chunk.positions, after, entry.dtype)
        except FormatError as error:
            detail = f"chunk {number} of {entry.name!r}: {error.detail}"
            raise FormatError(error.rule, detail, self.reader.path) from None

    def matches(self, name: str, words: Words) -> bool:
        """Whether a rebuilt tensor has the digest that the file promises."""
        return has_digest(words, self.entry(name).digest)

    def damaged(self, name: str) -> FormatError:
        """The error for a tensor that came out wrong from the right base."""
        return FormatError(
            "D-DIGEST", f"{name!r} does not have the digest it promises", self.reader.path
        )

    def rebuild(
        self, name: str, base: torch.Tensor | None = None, *, verify: bool = True
    ) -> torch.Tensor:
        """The fine-tuned tensor, on the device of its base.

        base: the base tensor, of the task's dtype and shape, left unchanged; None where the task
        stores the tensor whole (then on the CPU).

        Raises:
            BaseMismatchError: base has another dtype, shape or, with ``verify``, other values.
            FormatError: the file is damaged.
        """
        import torch

        from nps_compress import torch_words

        entry = self.entry(name)
        if entry.op is Op.NEW:
            words = self.rebuild_words(name, None, threads=workers())
            if verify and not self.matches(name, words):
                raise self.damaged(name)
            return torch_words.from_numpy(words, entry.dtype, entry.shape)
        if base is None:
            raise InvalidArgumentError("base", base, f"the base tensor for {name!r}")
        self._check_kind(name, base)
        if base.is_cuda:
            from nps_compress import resident
            from nps_compress.kernels.table import Changes, Tensors

            form = self.form(name, base)
            tensor = torch.empty_like(base, memory_format=torch.contiguous_format)
            changes = Changes(Tensors([base.contiguous()]), [form])
            resident.rebuild(changes, Tensors([tensor]))
            changes.check()
            words = np.empty(0, entry.dtype.word)
            if verify:
                words = torch_words.to_numpy(torch_words.words_of(tensor))
        else:
            before = torch_words.to_numpy(torch_words.words_of(base))
            try:
                words = self.rebuild_words(name, before, in_place=False, threads=workers())
            except FormatError:  # distances don't decode with another base
                self._check_base(name, before)
                raise
            tensor = torch_words.from_numpy(words, entry.dtype, entry.shape).to(base.device)
        if verify and not self.matches(name, words):
            self._check_base(name, torch_words.to_numpy(torch_words.words_of(base)))
            raise self.damaged(name)
        return tensor

    def _check_kind(self, name: str, base: torch.Tensor) -> None:
        """Raise BaseMismatchError where the base tensor has another dtype or shape."""
        from nps_compress import torch_words

        entry = self.entry(name)
        found = (torch_words.dtype_of(base), tuple(base.shape))
        if found != (entry.dtype, entry.shape):
            raise self._wrong_base(
                name,
                f"is {found[0].name} {list(found[1])}, not {entry.dtype.name} {list(entry.shape)}",
            )

    def _check_base(self, name: str, words: Words) -> None:
        """Raise BaseMismatchError where these are not the base tensor's values. words: [numel]."""
        index = self.entry(name).base_index
        assert index is not None
        if not has_digest(words, self.reader.base[index].digest):
            raise self._wrong_base(name, "has other values")

    def _wrong_base(self, name: str, difference: str) -> BaseMismatchError:
        what = f"tensor {self.base_tensor_name(name)!r}"
        return BaseMismatchError("the given tensor", what, difference, self.base_name)

    def kept_positions(self, name: str) -> npt.NDArray[np.int64]:
        """Flat positions of the elements that the file keeps, ascending. [nnz] int64.

        Raises:
            FormatError: a chunk is damaged.
        """
        entry = self.entry(name)
        return _whole_positions(entry, self._chunks(entry))

    def _chunks(self, entry: TensorEntry) -> Iterator[tuple[int, Chunk]]:
        """The chunks that hold anything, with their numbers."""
        for number in self.reader.chunks_to_read(entry):
            yield number, self.reader.read_chunk(entry, number)

    def form(self, name: str, base: torch.Tensor | None = None) -> Form:
        """The tensor's changes as nps_compress.resident takes them, on the device of its base.

        base: the base tensor. It may be None, and the form is then on the CPU, where no base is
        needed: for signs, for grids whose integers fit a byte, for replaced and new words. Else
        the words of the elements that change are read, and what changes them is decoded on the CPU.

        Raises:
            FormatError: a chunk is damaged. BaseMismatchError: the base is another one.
            InvalidArgumentError: there is no base where one is needed.
        """
        form = self._form(name, base)
        return form if base is None else form.to(base.device)

    def forms(
        self, bases: Mapping[str, torch.Tensor | None], device: torch.device | str
    ) -> dict[str, Form]:
        """The forms of several tensors on one device: made by all cores, copied meanwhile.

        To CUDA they cross in pinned memory on a stream of their own, as many bytes as they have
        there. bases: of each tensor's name, as for :meth:`form`, on any device.

        Raises:
            FormatError, BaseMismatchError, InvalidArgumentError: as :meth:`form`.
        """
        import torch

        from nps_compress.kernels.form import to_device

        def cost(name: str) -> int:  # of positions, and what they are made into
            return 24 * self.reader.nnz(self.entry(name))

        target = torch.device(device)
        stream = torch.cuda.Stream(target) if target.type == "cuda" else None
        made = bounded_map(lambda name: self._form(name, bases[name]), bases, cost, MEMORY_SLACK)
        try:
            parts = [to_device([form], target, stream) for form in made]
        finally:
            if stream:
                torch.cuda.current_stream(target).wait_stream(stream)
        return {name: form for name, (form,) in zip(bases, parts, strict=True)}

    def _form(self, name: str, base: torch.Tensor | None) -> Form:
        """As :meth:`form`, on the CPU."""
        import torch

        from nps_compress.kernels import form as forms

        entry = self.entry(name)
        if base is not None:
            self._check_kind(name, base)
        chunks = list(self._chunks(entry))
        positions = _whole_positions(entry, chunks)
        parameters = self.reader.parameters(entry)
        values = _numbers(parameters, [chunk for _, chunk in chunks])
        if values is None:
            words = self._new_words(entry, chunks, parameters, positions, base)
            signed = np.dtype(f"<i{entry.dtype.itemsize}")
            values = forms.Words(torch.from_numpy(words.view(signed)))
        return forms.form_of(entry.numel, positions, values)

    def _new_words(
        self,
        entry: TensorEntry,
        chunks: Sequence[tuple[int, Chunk]],
        parameters: Parameters | None,
        positions: npt.NDArray[np.int64],
        base: torch.Tensor | None,
    ) -> Words:
        """The words of the fine-tune at the kept positions. [nnz]."""
        import torch

        from nps_compress import torch_words

        words = np.zeros(positions.size, entry.dtype.word)
        if entry.op is Op.DELTA and entry.value_codec is not ValueCodec.REPLACE:
            if base is None:
                raise InvalidArgumentError("base", base, f"the base tensor for {entry.name!r}")
            at = torch.from_numpy(positions).to(base.device)
            words = torch_words.to_numpy(torch_words.words_of(base)[at])
        start = 0
        try:
            for number, chunk in chunks:
                changes = _changes(chunk, parameters, number << entry.chunk_log2)
                count = chunk.numel if chunk.positions is None else chunk.positions.size
                part = words[start : start + count]
                every = np.arange(count, dtype=np.uint32)
                if changes is not None:
                    add_changes(every, changes, part, part, entry.dtype)
                else:
                    alone = replace(chunk, numel=count, positions=every)
                    self._apply_words(entry, number, alone, part, part)
                start += count
        except FormatError:  # distances don't decode with another base
            if base is not None:
                self._check_base(entry.name, torch_words.to_numpy(torch_words.words_of(base)))
            raise
        return words


def _whole_positions(
    entry: TensorEntry, chunks: Iterable[tuple[int, Chunk]]
) -> npt.NDArray[np.int64]:
    """Positions in the tensor of what its chunks keep. [nnz]."""
    parts = [_positions(chunk) + np.int64(number << entry.chunk_log2) for number, chunk in chunks]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _positions(chunk: Chunk) -> Positions:
    """What a chunk keeps. [nnz]."""
    if chunk.positions is None:
        return np.arange(chunk.numel, dtype=np.uint32)
    return chunk.positions


def _changes(chunk: Chunk, parameters: Parameters | None, start: int) -> Float32 | None:
    """How far what a chunk keeps moves, where that is a number. [nnz]."""
    if parameters is None:
        return None
    if isinstance(parameters, int):
        return level_changes(chunk.planes[0].view(np.int8), parameters)
    assert chunk.positions is not None
    if isinstance(parameters, SignParameters):
        return parameters.changes(start, chunk.positions, chunk.planes[0])
    return parameters.changes(start, chunk.positions, chunk.planes[0].view(np.int16))


def _numbers(parameters: Parameters | None, chunks: Sequence[Chunk]) -> Signs | Grid | None:
    """What kept elements move by, as a form holds it; None where that takes new words."""
    import torch

    from nps_compress.kernels import form as forms

    def factors(of: RankOne, table: Float32) -> Factors:
        return forms.Factors.of(of.rows, of.columns, table)

    if parameters is None or isinstance(parameters, int):
        return None
    if parameters.sizes.columns.size > forms.MAX_COLUMNS:
        return None
    planes = [chunk.planes[0] for chunk in chunks]
    if isinstance(parameters, SignParameters):
        minus = np.packbits(np.concatenate([np.empty(0, np.uint8), *planes]), bitorder="little")
        sizes, scores = parameters.products
        return forms.Signs(torch.from_numpy(minus), factors(*sizes), factors(*scores))
    levels = np.concatenate([np.empty(0, np.int16), *(each.view(np.int16) for each in planes)])
    if np.abs(levels).max(initial=0) > 127:
        return None
    return forms.Grid(torch.from_numpy(levels.astype(np.int8)), factors(*parameters.products))


def rebuild(
    base: torch.Tensor | None, task: Task, name: str, *, verify: bool = True
) -> torch.Tensor:
    """Rebuild one fine-tuned tensor from its base tensor; see :meth:`Task.rebuild`."""
    return task.rebuild(name, base, verify=verify)
