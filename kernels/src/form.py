"""The form a tensor's changes have on a device: where they are, and what they are.

Where: one bit an element (``Mask``), or a byte for each gap between kept elements (``Gaps``),
whichever is smaller. What: new words, or, smaller still, what new words are computed from:
signs, or small integers. Every part has a fixed length and is found by block, so that any block of
``BLOCK`` elements expands by itself, with one cumulative sum a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 1 << 14  # elements that a program of a kernel changes
MASK_TILE = 1024  # elements that have a count of their own in a mask
ESCAPE = 255  # a gap's byte that skips so many elements and keeps none
MAX_ENTRIES = (1 << 32) - 1  # of a tensor: counts are unsigned 32-bit integers
MAX_COLUMNS = 1 << 30

_ALIGNMENT = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Mask:
    """Where changes are, by a bit an element.

    bits: [ceil(numel / 32)] int32, least significant bit first.
    counts: [ceil(numel / MASK_TILE)] int32, to be read as unsigned: kept before each tile.
    """

    bits: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Gaps:
    """Where changes are, by the elements skipped before each within its block.

    gaps: [entries] uint8; ``ESCAPE`` skips 255 elements, keeps none, and the gap goes on. A block
    begins anew: its first gap counts from its first element.
    anchors: [blocks + 1, 2] int32, to be read as unsigned: entries, and kept elements, before.
    """

    gaps: torch.Tensor
    anchors: torch.Tensor


@dataclass(frozen=True)
class Factors:
    """A float32 number for each element of a matrix, by the sum of its row's and column's exponent.

    rows: [R] int8; columns: [C] int8; table: [n] float32, from the sum ``lowest`` on.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    table: torch.Tensor
    lowest: int

    @classmethod
    def of(cls, rows: npt.ArrayLike, columns: npt.ArrayLike, table: npt.ArrayLike) -> Factors:
        """The part of a table that occurs. table: [2 h + 1], of the sums -h to h.

        rows, columns: exponents; below -h for what is never kept.

        Raises:
            ValueError: an exponent does not fit a byte.
        """
        parts = [np.asarray(part, np.int64) for part in (rows, columns)]
        numbers = np.asarray(table, np.float32)
        half = len(numbers) // 2
        used = [part[part >= -half] for part in parts]
        for exponent in (int(e) for part in used if part.size for e in (part.min(), part.max())):
            if not -128 <= exponent <= 127:
                raise ValueError(f"an exponent of {exponent}")
        low = sum(int(part.min()) for part in used if part.size)
        high = sum(int(part.max()) for part in used if part.size)
        occurring = torch.from_numpy(numbers[half + low : half + high + 1].copy())
        own, other = (torch.from_numpy(np.clip(part, -128, 127).astype(np.int8)) for part in parts)
        return cls(own, other, occurring, low)


@dataclass(frozen=True)
class Words:
    """What changes are, by themselves. words: [nnz] int8, int16, int32 or int64.

    New words; while the task is active, the base's: an exchange swaps them.
    """

    words: torch.Tensor


@dataclass(frozen=True)
class Signs:
    """Changes that are plus or minus sizes x factors (format_spec/SPEC.md, 6.2).

    minus: [ceil(nnz / 8)] uint8, a bit each, least significant first.
    """

    minus: torch.Tensor
    sizes: Factors
    factors: Factors


@dataclass(frozen=True)
class Grid:
    """Changes that are integers x steps (format_spec/SPEC.md, 6.4). levels: [nnz] int8."""

    levels: torch.Tensor
    steps: Factors


@dataclass(frozen=True)
class Form:
    """A tensor's changes on one device.

    Raises:
        ValueError: parts that don't fit each other.
    """

    numel: int
    nnz: int
    places: Mask | Gaps
    values: Words | Signs | Grid

    def __post_init__(self) -> None:
        blocks = -(-self.numel // BLOCK)
        if isinstance(self.places, Mask):
            expect("bits", self.places.bits, torch.int32, -(-self.numel // 32))
            expect("counts", self.places.counts, torch.int32, -(-self.numel // MASK_TILE))
        else:
            expect("gaps", self.places.gaps, torch.uint8, None)
            expect("anchors", self.places.anchors, torch.int32, blocks + 1, 2)
        if isinstance(self.values, Words):
            expect("words", self.values.words, self.values.words.dtype, self.nnz)
        elif isinstance(self.values, Signs):
            expect("minus", self.values.minus, torch.uint8, -(-self.nnz // 8))
            self._check(self.values.sizes)
            self._check(self.values.factors)
            if self.values.sizes.columns.numel() != self.values.factors.columns.numel():
                raise ValueError("sizes and factors are of matrices of different shapes")
        else:
            expect("levels", self.values.levels, torch.int8, self.nnz)
            self._check(self.values.steps)
        if not 0 <= self.nnz <= min(self.numel, MAX_ENTRIES):
            raise ValueError(f"{self.nnz} of {self.numel} elements are kept")
        if len({tensor.device for tensor in parts_of(self)}) > 1:
            raise ValueError("parts of a form are on several devices")

    def _check(self, factors: Factors) -> None:
        rows, columns = factors.rows.numel(), factors.columns.numel()
        expect("rows", factors.rows, torch.int8, None)
        expect("columns", factors.columns, torch.int8, None)
        expect("table", factors.table, torch.float32, None)
        if rows * columns != self.numel or columns > MAX_COLUMNS or not factors.table.numel():
            raise ValueError(
                f"factors of {rows} rows and {columns} columns, a table of "
                f"{factors.table.numel()}, for {self.numel} elements"
            )

    @property
    def nbytes(self) -> int:
        """Bytes it takes on its device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in parts_of(self))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(parts_of(self)).device

    def to(self, device: torch.device | str) -> Form:
        """The same on a device: itself where it is there."""
        return to_device([self], device)[0]


def form_of(
    numel: int, positions: npt.NDArray[np.unsignedinteger], values: Words | Signs | Grid
) -> Form:
    """Changes at ascending positions, [nnz], in the smaller of the two forms, on the CPU.

    Raises:
        ValueError: positions that don't ascend or are not below ``numel``; too many of them.
    """
    at = positions.astype(np.int64)
    if at.size and (at[0] < 0 or at[-1] >= numel or (np.diff(at) <= 0).any()):
        raise ValueError(f"positions do not ascend within {numel} elements")
    mask_bytes = 4 * (-(-numel // 32) + -(-numel // MASK_TILE))
    room = min(mask_bytes - 8 * (-(-numel // BLOCK) + 1), MAX_ENTRIES + 1)  # for fewer gaps
    if at.size < room:
        gaps = gaps_of(numel, at)
        if gaps.gaps.numel() < room:
            return Form(numel, at.size, gaps, values)
    return Form(numel, at.size, mask_of(numel, at), values)


def mask_of(numel: int, positions: npt.NDArray[np.int64]) -> Mask:
    """Ascending positions, [nnz], as a mask."""
    kept = np.zeros(-(-numel // 32) * 32, np.uint8)
    kept[positions] = 1
    bits = np.packbits(kept, bitorder="little").view(np.int32)
    counts = np.searchsorted(positions, np.arange(0, numel, MASK_TILE))
    return Mask(torch.from_numpy(bits), _counts(counts))


def gaps_of(numel: int, positions: npt.NDArray[np.int64]) -> Gaps:
    """Ascending positions, [nnz], as gaps."""
    before = np.empty_like(positions)
    before[:1], before[1:] = 0, positions[:-1] + 1
    skipped = positions - np.maximum(before, positions & -BLOCK)
    escapes = skipped // ESCAPE
    ends = np.cumsum(escapes + 1)
    gaps = np.full(int(ends[-1]) if len(ends) else 0, ESCAPE, np.uint8)
    gaps[ends - 1] = skipped - ESCAPE * escapes
    kept = np.searchsorted(positions, np.arange(-(-numel // BLOCK) + 1) * BLOCK)
    entries = np.concatenate([np.zeros(1, np.int64), ends])[kept]
    return Gaps(torch.from_numpy(gaps), _counts(np.stack([entries, kept], axis=1)))


def to_device(
    forms: Sequence[Form], device: torch.device | str, stream: torch.cuda.Stream | None = None
) -> list[Form]:
    """Forms on a device, their parts copied there at once; those that are there stay.

    stream: what copies; the current stream has to wait for it before the forms are used.
    """
    target = torch.device(device)
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    away = [form for form in forms if form.device != target]
    tensors = [tensor for form in away for tensor in parts_of(form)]
    ends = np.cumsum([0] + [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors])
    held = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=target.type == "cuda")
    starts = ends[:-1].tolist()
    for tensor, start in zip(tensors, starts, strict=True):
        held[start : start + tensor.nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
    if stream is None:
        there = held.to(target, non_blocking=True)
    else:
        there = torch.empty(held.shape, dtype=held.dtype, device=target)
        # The memory may have been freed by what the current stream is still to do.
        stream.wait_stream(torch.cuda.current_stream(target))
        with torch.cuda.stream(stream):
            there.copy_(held, non_blocking=True)
    moved = iter(
        [
            there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(tensors, starts, strict=True)
        ]
    )
    return [form if form.device == target else _with(form, moved) for form in forms]


def expect(name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int | None) -> None:
    """Raise ValueError unless a contiguous tensor has this dtype and shape; None: any size."""
    fits = len(shape) == tensor.dim() and all(
        want is None or want == found for want, found in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, {dtype} {list(shape)}, "
            f"not {tensor.dtype} {list(tensor.shape)}"
        )


def parts_of(part: object) -> Iterator[torch.Tensor]:
    """The tensors that a form, or a part of one, consists of."""
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from parts_of(value)


def _with(part: T, tensors: Iterator[torch.Tensor]) -> T:
    """A copy whose tensors are the next ones, in the order of :func:`parts_of`."""
    changes: dict[str, object] = {}
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, torch.Tensor):
            changes[field.name] = next(tensors)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _with(value, tensors)
    return dataclasses.replace(part, **changes)  # type: ignore[type-var]


def _counts(counts: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(counts.astype(np.uint32).view(np.int32))
