"""Tensors that stay in memory, and a task's changes to them, as tables that one launch walks.

A launch has a program for each block of all tensors, which finds its tensor by bisection in a list
of a few hundred numbers. The other ways were: a second dimension of the grid (most programs of
small tensors have nothing to do), a list that names each program's tensor (as long as the model,
for every task), one flat storage (weights are where the model's framework has put them).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from nps_compress.errors import InvalidArgumentError

from .form import BLOCK, Factors, Form, Mask, Signs, Words, expect

# Columns of a task's rows, one row a tensor. Pointers are addresses, counts are of elements.
(
    PLACES,
    VALUES,
    PLACES_POINTER,
    COUNTS_POINTER,
    ENTRIES,
    VALUES_POINTER,
    NNZ,
    FIRST_OLD,
    COLUMNS,
    ROWS_1,
    COLUMNS_1,
    TABLE_1,
    LOWEST_1,
    LENGTH_1,
    ROWS_2,
    COLUMNS_2,
    TABLE_2,
    LOWEST_2,
    LENGTH_2,
    FIELDS,
) = range(20)
NO_PLACES, MASK_PLACES, GAP_PLACES = range(3)
WORD_VALUES, SIGN_VALUES, GRID_VALUES = range(3)
INTEGER, BF16, F16, F32 = range(4)  # how a word is read where its change is a number

MAX_TASKS = 65535  # of one launch: the second dimension of its grid
MAX_MATMUL_COLUMNS = 1 << 26  # so that 16 rows of a weight are counted in 32 bits
MAX_BATCH = 16 * 65535  # rows: the third

_FLOATS = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_POINTER_ALIGNMENT = 16


class Tensors:
    """Contiguous tensors of one dtype on one device.

    Raises:
        ValueError: there is none, or one is not contiguous, of another dtype or elsewhere.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        if not tensors:
            raise ValueError("no tensors")
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        for tensor in tensors:
            if (tensor.dtype, tensor.device) != (self.dtype, self.device):
                raise ValueError(
                    f"a tensor is {tensor.dtype} on {tensor.device}, "
                    f"another {self.dtype} on {self.device}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"a tensor of shape {list(tensor.shape)} is not contiguous")
        self.itemsize = self.dtype.itemsize
        self.float_kind = _FLOATS.get(self.dtype, INTEGER)
        self.word = _SIGNED[self.itemsize]
        self.words = [tensor.detach().reshape(-1).view(self.word) for tensor in tensors]
        pointers = np.array([words.data_ptr() for words in self.words], np.int64)
        self.aligned = not (pointers % _POINTER_ALIGNMENT).any()
        numels = np.array([words.numel() for words in self.words], np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-numels // BLOCK))])
        self.programs = int(starts[-1])
        # [3, n + 1]: the first program of each tensor, its address, its number of elements.
        table = np.stack([starts, np.append(pointers, 0), np.append(numels, 0)])
        self.table = torch.from_numpy(table).to(self.device)


class Changes:
    """What one task changes in tensors: a form for each, None where it changes nothing.

    ``old_words``: words that an exchange leaves behind where forms don't take them themselves.
    ``fault``: [1] int32 on the device, not 0 once a form told of a place that there is not. No
    launch waits to look at it: :meth:`check` does, when it suits.

    Raises:
        ValueError: forms that don't fit the tensors.
    """

    def __init__(self, tensors: Tensors, forms: Sequence[Form | None]) -> None:
        if len(forms) != len(tensors.words):
            raise ValueError(f"{len(forms)} forms for {len(tensors.words)} tensors")
        self.tensors, self.forms = tensors, tuple(forms)
        self.old_words = 0
        self.first_old = []
        rows = np.zeros((len(forms), FIELDS), np.int64)
        for row, form, words in zip(rows, forms, tensors.words, strict=True):
            self.first_old.append(self.old_words)
            if form is None:
                continue
            _check(form, words, tensors)
            row[:] = _row(form, self.old_words)
            if not isinstance(form.values, Words):
                self.old_words += form.nnz
        self.rows = torch.from_numpy(rows).to(tensors.device)
        self.fault = torch.zeros(1, dtype=torch.int32, device=tensors.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all forms on the device."""
        return sum(form.nbytes for form in self.forms if form)

    def check(self) -> None:
        """Wait for the device, and say whether all forms that were used so far were right.

        Raises:
            InvalidArgumentError: one told of a place or value that there is not. What it says
                beyond its tensor was left out; once.
        """
        if self.fault.item():
            self.fault.zero_()
            raise InvalidArgumentError(
                "changes", "places or values beyond them", "within their tensors and forms"
            )

    def check_old(self, old: torch.Tensor | None) -> torch.Tensor:
        """The buffer an exchange leaves words in. Raises ValueError: one that does not fit."""
        word, device = self.tensors.word, self.tensors.device
        if old is None:
            if self.old_words:
                raise ValueError(f"a buffer of {self.old_words} {word} is needed")
            return self.tensors.words[0]  # of the dtype, and never touched
        fits = old.dtype == word and old.device == device and old.is_contiguous()
        if not fits or old.dim() != 1 or old.numel() < self.old_words:
            raise ValueError(
                f"a buffer of {self.old_words} {word} on {device} is needed, "
                f"not {old.dtype} {list(old.shape)} on {old.device}"
            )
        return old


class Tasks:
    """Several tasks of the same tensors, as one launch multiplies what they change.

    Raises:
        ValueError: there is none, or they are of different tensors, or of tensors without numbers.
    """

    def __init__(self, changes: Sequence[Changes]) -> None:
        if not 0 < len(changes) <= MAX_TASKS:
            raise ValueError(f"{len(changes)} tasks, not 1 to {MAX_TASKS}")
        self.changes, self.tensors = tuple(changes), changes[0].tensors
        if any(one.tensors is not self.tensors for one in changes):
            raise ValueError("the tasks are of different tensors")
        if self.tensors.float_kind == INTEGER:
            raise ValueError(f"changes of {self.tensors.dtype} are not multiplied")
        # [2, n]: the address of each task's rows, and of its fault.
        table = [
            [one.rows.data_ptr() for one in changes],
            [one.fault.data_ptr() for one in changes],
        ]
        self.table = torch.tensor(table, dtype=torch.int64).to(self.tensors.device)


def _check(form: Form, words: torch.Tensor, tensors: Tensors) -> None:
    if form.numel != words.numel() or form.device != tensors.device:
        raise ValueError(
            f"a form of {form.numel} elements on {form.device} "
            f"for {words.numel()} on {tensors.device}"
        )
    if isinstance(form.values, Words):
        if form.values.words.dtype != tensors.word:
            raise ValueError(f"words of {form.values.words.dtype} for {tensors.dtype}")
    elif tensors.float_kind == INTEGER:
        raise ValueError(f"changes that are numbers for {tensors.dtype}")


def _row(form: Form, first_old: int) -> npt.NDArray[np.int64]:
    row = np.zeros(FIELDS, np.int64)
    row[NNZ], row[FIRST_OLD] = form.nnz, first_old
    places, values = form.places, form.values
    if isinstance(places, Mask):
        row[PLACES] = MASK_PLACES
        row[PLACES_POINTER] = places.bits.data_ptr()
        row[COUNTS_POINTER] = places.counts.data_ptr()
    else:
        row[PLACES] = GAP_PLACES
        row[PLACES_POINTER] = places.gaps.data_ptr()
        row[COUNTS_POINTER] = places.anchors.data_ptr()
        row[ENTRIES] = places.gaps.numel()
    if isinstance(values, Words):
        row[VALUES], row[VALUES_POINTER] = WORD_VALUES, values.words.data_ptr()
        return row
    parts: tuple[tuple[int, Factors], ...]
    if isinstance(values, Signs):
        row[VALUES], row[VALUES_POINTER] = SIGN_VALUES, values.minus.data_ptr()
        parts = ((ROWS_1, values.sizes), (ROWS_2, values.factors))
    else:
        row[VALUES], row[VALUES_POINTER] = GRID_VALUES, values.levels.data_ptr()
        parts = ((ROWS_2, values.steps),)
    for at, factors in parts:
        row[COLUMNS] = factors.columns.numel()
        row[at : at + 5] = (
            factors.rows.data_ptr(),
            factors.columns.data_ptr(),
            factors.table.data_ptr(),
            factors.lowest,
            factors.table.numel(),
        )
    return row


def check_switch(
    left: Changes,
    right: Changes,
    left_old: torch.Tensor | None,
    right_old: torch.Tensor | None,
) -> None:
    """Raise ValueError unless two tasks are of the same tensors and leave words in two buffers."""
    if left.tensors is not right.tensors:
        raise ValueError("the tasks are of different tensors")
    if left_old is not None and right_old is not None and left.old_words and right.old_words:
        first, second = left_old.data_ptr(), right_old.data_ptr()
        size = left.tensors.itemsize
        if first < second + size * right.old_words and second < first + size * left.old_words:
            raise ValueError("the buffers of both tasks overlap")


def check_out(changes: Changes, out: Tensors) -> None:
    """Raise ValueError unless ``out`` can take what a task rebuilds."""
    tensors = changes.tensors
    found = (out.dtype, out.device, [words.numel() for words in out.words])
    wanted = (tensors.dtype, tensors.device, [words.numel() for words in tensors.words])
    if found != wanted:
        raise ValueError(
            f"out is {found[0]} on {found[1]} of sizes {found[2]}, not {wanted[0]} on "
            f"{wanted[1]} of {wanted[2]}"
        )


def check_matmul(
    tasks: Tasks, number: int, x: torch.Tensor, y: torch.Tensor, starts: torch.Tensor
) -> None:
    """Raise ValueError unless ``y += x Δᵀ`` can be computed for tensor ``number``."""
    tensors = tasks.tensors
    if not 0 <= number < len(tensors.words):
        raise ValueError(f"tensor {number} of {len(tensors.words)}")
    device, numel = tensors.device, tensors.words[number].numel()
    for name, matrix in (("x", x), ("y", y)):
        if matrix.dtype not in _FLOATS or matrix.dim() != 2 or matrix.device != device:
            raise ValueError(
                f"{name} must be a matrix of bfloat16, float16 or float32 on {device}, "
                f"not {matrix.dtype} {list(matrix.shape)} on {matrix.device}"
            )
    (rows, columns), outputs = x.shape, y.shape[1]
    if y.shape[0] != rows or columns * outputs != numel or columns > MAX_MATMUL_COLUMNS:
        raise ValueError(
            f"x of {list(x.shape)} and y of {list(y.shape)} for a weight of {numel} elements"
        )
    if rows > MAX_BATCH:
        raise ValueError(f"a batch of {rows} rows, at most {MAX_BATCH}")
    if starts.device != device:
        raise ValueError(f"starts are on {starts.device}, not on {device}")
    expect("starts", starts, torch.int32, len(tasks.changes) + 1)
    for changes in tasks.changes:
        form = changes.forms[number]
        if form and not isinstance(form.values, Words):
            factors = form.values.factors if isinstance(form.values, Signs) else form.values.steps
            if factors.columns.numel() != columns:
                raise ValueError(
                    f"changes of a matrix of {factors.columns.numel()} columns, x has {columns}"
                )
