"""Change tensors that stay in memory, on whatever device they are, or multiply what would change.

On CUDA the Triton kernels of nps_compress.kernels, on the CPU numba: rebuild, exchange and switch
with the same bits, delta_matmul within its bound. What is changed, ``Tensors``, and the
``Changes`` of a task or several ``Tasks``, are in nps_compress.kernels.table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nps_compress._jit import jit
from nps_compress._threads import workers
from nps_compress.codecs import BIT_COUNTS, BIT_POSITIONS, Positions
from nps_compress.dtypes import BY_NAME, Words, to_float32
from nps_compress.kernels import form as forms
from nps_compress.kernels import table
from nps_compress.sign_codec import Float32, add_changes
from nps_compress.torch_words import to_numpy

if TYPE_CHECKING:
    import torch

    from nps_compress.kernels.form import Factors, Form
    from nps_compress.kernels.table import Changes, Tasks, Tensors

_BLOCKS = 64  # of a tensor that are changed at once: 2^20 elements, or more
_KEPT = 1 << 17  # where fewer than these change
_ESCAPE, _BLOCK, _MASK_TILE = forms.ESCAPE, forms.BLOCK, forms.MASK_TILE
_DTYPES = {table.BF16: BY_NAME["BF16"], table.F16: BY_NAME["F16"], table.F32: BY_NAME["F32"]}
_FAULT = -1


def rebuild(changes: Changes, out: Tensors) -> None:
    """Write tensors with a task's changes, which must not be active, into others of their sizes.

    Raises:
        ValueError: ``out`` differs in dtype, device or sizes.
    """
    if changes.tensors.device.type == "cuda":
        from nps_compress.kernels.rebuild import rebuild as on_device

        on_device(changes, out)
        return
    table.check_out(changes, out)

    def run(number: int, span: slice) -> None:
        before = to_numpy(changes.tensors.words[number][span])
        after = to_numpy(out.words[number][span])
        np.copyto(after, before)
        found = _kept(changes, number, span)
        if found is None:
            return
        form, positions, ranks = found
        if isinstance(form.values, forms.Words):
            _put(after, positions, to_numpy(form.values.words[ranks]))
        else:
            _move(form, changes.tensors, span.start, positions, ranks, after)

    _for_each_span(run, changes)


def exchange(changes: Changes, old: torch.Tensor | None = None, *, undo: bool = False) -> None:
    """Put a task's words into its tensors; with ``undo`` put the old ones back, bit for bit.

    old: [changes.old_words] of the tensors' word, on their device: filled, and what undoing reads.
    None where all values are words, which swap places with the old ones.

    Raises:
        ValueError: ``old`` does not fit.
    """
    if changes.tensors.device.type == "cuda":
        from nps_compress.kernels.exchange import exchange as on_device

        on_device(changes, old, undo=undo)
        return
    left = to_numpy(changes.check_old(old))
    _for_each_span(lambda number, span: _exchange(changes, number, span, left, undo), changes)


def switch(
    left: Changes,
    right: Changes,
    left_old: torch.Tensor | None = None,
    right_old: torch.Tensor | None = None,
) -> None:
    """Take an active task out of its tensors and put another one in.

    left_old, right_old: as for :func:`exchange`, two buffers.

    Raises:
        ValueError: the tasks are of other tensors, a buffer does not fit or both are one.
    """
    if left.tensors.device.type == "cuda":
        from nps_compress.kernels.switch import switch as on_device

        on_device(left, right, left_old, right_old)
        return
    table.check_switch(left, right, left_old, right_old)
    outgoing, incoming = to_numpy(left.check_old(left_old)), to_numpy(right.check_old(right_old))

    def run(number: int, span: slice) -> None:
        _exchange(left, number, span, outgoing, True)
        _exchange(right, number, span, incoming, False)

    _for_each_span(run, left, right)


def delta_matmul(
    tasks: Tasks, number: int, x: torch.Tensor, y: torch.Tensor, starts: torch.Tensor
) -> None:
    """y += x Δᵀ, where Δ is what each row's own task changes in tensor ``number``, none active.

    The tensor is a matrix of [N, K]. x: [batch, K]; y: [batch, N]; both bfloat16, float16 or
    float32, with any strides. starts: [tasks + 1] int32, ascending: the rows of task i are
    starts[i] to starts[i + 1]; those before the first and from the last on have no task.

    Δ of signs and grids is what they add before the sum is rounded to the weight's dtype; of new
    words their float32 difference to the base's. One that is not finite makes its output so. Sums
    are float32: |error| <= 2^-20 (8 + k) sum |x Δ| for k changed elements in a weight's row, before
    y is rounded to its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit.
    """
    if tasks.tensors.device.type == "cuda":
        from nps_compress.kernels.delta_matmul import delta_matmul as on_device

        on_device(tasks, number, x, y, starts)
        return
    import torch

    table.check_matmul(tasks, number, x, y, starts)
    (batch, columns), outputs = x.shape, y.shape[1]
    bounds = [min(max(start, 0), batch) for start in starts.tolist()]
    at_once = max(1, _BLOCKS * _BLOCK // max(columns, 1))  # rows of the weight
    parts: list[tuple[Changes, int, int, Float32, Float32]] = []
    found: list[tuple[slice, Float32]] = []
    for changes, first, end in zip(tasks.changes, bounds[:-1], bounds[1:], strict=True):
        if first >= end or changes.forms[number] is None:
            continue
        of_task = np.ascontiguousarray(x.detach()[first:end].float().numpy().T)
        totals = np.zeros((outputs, end - first), np.float32)
        found.append((slice(first, end), totals))
        for at in range(0, outputs, at_once):
            parts.append((changes, number, at, of_task, totals[at : at + at_once]))
    if len(found) * columns * outputs < _BLOCKS * _BLOCK:  # sooner done than threads start
        for part in parts:
            _multiply(*part)
    else:
        with ThreadPoolExecutor(workers()) as pool:
            for _ in pool.map(lambda part: _multiply(*part), parts):
                pass
    for rows, totals in found:
        target = y.detach()[rows]
        target.copy_(target.float() + torch.from_numpy(totals.T))


def _multiply(changes: Changes, number: int, output: int, x: Float32, totals: Float32) -> None:
    """Add products of the rows of a weight from ``output`` on. x: [K, n]; totals: [rows, n]."""
    numel = changes.tensors.words[number].numel()
    first, end = output * len(x), (output + len(totals)) * len(x)
    whole = slice(first // _BLOCK * _BLOCK, min(-(-end // _BLOCK) * _BLOCK, numel))
    found = _kept(changes, number, whole)
    if found is None:
        return
    form, positions, ranks = found
    if isinstance(form.values, forms.Words):
        kind = _DTYPES[changes.tensors.float_kind]
        before = to_numpy(changes.tensors.words[number][whole])[positions]
        with np.errstate(invalid="ignore", over="ignore"):
            numbers = to_float32(to_numpy(form.values.words[ranks]), kind)
            numbers = numbers - to_float32(before, kind)
    else:
        numbers = _numbers(form, whole.start, positions, ranks)
    _add_products(positions, numbers, first - whole.start, x, totals)


def _for_each_span(run: Callable[[int, slice], None], *tasks: Changes) -> None:
    """Spans of all tensors: long ones where little changes, as each takes its time to begin."""

    def spans() -> Iterator[tuple[int, slice]]:
        for number, words in enumerate(tasks[0].tensors.words):
            forms = [form for task in tasks if (form := task.forms[number])]
            kept = max((form.nnz for form in forms), default=0)
            blocks = max(_BLOCKS, -(-words.numel() // _BLOCK) * _KEPT // max(kept, 1))
            for start in range(0, words.numel(), blocks * _BLOCK):
                yield number, slice(start, min(start + blocks * _BLOCK, words.numel()))

    with ThreadPoolExecutor(workers()) as pool:
        for _ in pool.map(lambda item: run(*item), spans()):
            pass


def _exchange(changes: Changes, number: int, span: slice, old: Words, undo: bool) -> None:
    found = _kept(changes, number, span)
    if found is None:
        return
    form, positions, ranks = found
    words = to_numpy(changes.tensors.words[number][span])
    if isinstance(form.values, forms.Words):
        _swap(words, positions, to_numpy(form.values.words[ranks]))
        return
    first = changes.first_old[number]
    left = old[first + ranks.start : first + ranks.stop]
    if undo:
        _put(words, positions, left)
    else:
        _take(words, positions, left)
        _move(form, changes.tensors, span.start, positions, ranks, words)


def _kept(changes: Changes, number: int, span: slice) -> tuple[Form, Positions, slice] | None:
    """What changes of a span: positions from its start on, and their numbers among all kept.

    None where nothing does, or where the form is wrong: then its fault is set.
    """
    form = changes.forms[number]
    if form is None:
        return None
    first = span.start // _BLOCK
    size = min(span.stop - span.start, form.nnz)
    positions = np.empty(size + 8, np.uint32)  # a byte of a mask always writes eight
    if isinstance(form.places, forms.Mask):
        tiles = slice(span.start // _MASK_TILE, -(-span.stop // _MASK_TILE))
        counts = to_numpy(form.places.counts)[tiles]
        rank = int(counts[0])
        bits = to_numpy(form.places.bits)[span.start // 32 : -(-span.stop // 32)]
        octets, count = bits.view(np.uint8), span.stop - span.start
        found = _expand_mask(octets, counts - rank, count, BIT_COUNTS, BIT_POSITIONS, positions)
    else:
        anchors = to_numpy(form.places.anchors)
        blocks = -(-span.stop // _BLOCK) - first
        part = anchors[first : first + blocks + 1].astype(np.int64)
        rank = int(part[0, 1])
        part[:, 1] -= rank
        gaps = to_numpy(form.places.gaps)
        found = _expand_gaps(gaps, part, span.stop - span.start, positions[:size])
    if found == _FAULT or rank + found > form.nnz:
        changes.fault[0] = 1
        return None
    return (form, positions[:found], slice(rank, rank + found)) if found else None


def _move(
    form: Form, tensors: Tensors, start: int, positions: Positions, ranks: slice, words: Words
) -> None:
    """Add changes that are numbers. words: [n] from element ``start`` on."""
    numbers = _numbers(form, start, positions, ranks)
    add_changes(positions, numbers, words, words, _DTYPES[tensors.float_kind])


def _numbers(form: Form, start: int, positions: Positions, ranks: slice) -> Float32:
    """How far signs or a grid move what is kept. positions: [n] from ``start`` on -> [n]."""
    numbers = np.empty(positions.size, np.float32)
    values = form.values
    if isinstance(values, forms.Signs):
        sizes, factors = _arrays(values.sizes), _arrays(values.factors)
        minus = to_numpy(values.minus)
        _products(*sizes, *factors, minus, ranks.start, start, positions, numbers)
    else:
        assert isinstance(values, forms.Grid)
        _look_up(*_arrays(values.steps), start, positions, numbers)
        with np.errstate(over="ignore", invalid="ignore"):
            numbers *= values.levels[ranks].numpy()
    return numbers


def _arrays(factors: Factors) -> tuple[npt.NDArray[Any], npt.NDArray[Any], Float32, int]:
    rows, columns, numbers = factors.rows, factors.columns, factors.table
    return rows.numpy(), columns.numpy(), numbers.numpy(), factors.lowest


@jit
def _swap(words, positions, values):  # type: ignore[no-untyped-def]
    for i in range(positions.size):
        at = positions[i]
        before = words[at]
        words[at] = values[i]
        values[i] = before


@jit
def _put(words, positions, values):  # type: ignore[no-untyped-def]
    for i in range(positions.size):
        words[positions[i]] = values[i]


@jit
def _take(words, positions, values):  # type: ignore[no-untyped-def]
    for i in range(positions.size):
        values[i] = words[positions[i]]


@jit
def _expand_mask(  # type: ignore[no-untyped-def]
    octets, counts, numel, bit_counts, bits, positions
):
    found = np.uint64(0)  # numba would check a signed index for wrapping around
    for i in range(octets.size):
        if i % (_MASK_TILE // 8) == 0 and found != counts[i // (_MASK_TILE // 8)]:
            return _FAULT
        byte = np.int64(octets[i])
        at = 8 * i
        if at + 8 > numel:
            byte &= (1 << max(numel - at, 0)) - 1
        size = bit_counts[byte]
        if found + np.uint64(size) > np.uint64(positions.size - 8):
            return _FAULT
        for k in range(8):
            positions[found + np.uint64(k)] = np.uint32(at) + bits[byte, k]
        found += np.uint64(size)
    return np.int64(found)


@jit
def _expand_gaps(gaps, anchors, numel, positions):  # type: ignore[no-untyped-def]
    found = 0
    for block in range(len(anchors) - 1):
        first, end = anchors[block, 0], anchors[block + 1, 0]
        if first > end or end > gaps.size or found != anchors[block, 1]:
            return _FAULT
        position = block * _BLOCK
        stop = min(position + _BLOCK, numel)
        for i in range(first, end):
            position += gaps[i]
            if gaps[i] == _ESCAPE:
                continue
            if position >= stop or found == positions.size:
                return _FAULT
            positions[found] = position
            found += 1
            position += 1
    return found


@jit
def _look_up(rows, columns, numbers, lowest, start, positions, out):  # type: ignore[no-untyped-def]
    row = start // columns.size
    row_end = (row + 1) * columns.size - start
    last = numbers.size - 1
    for i in range(positions.size):
        while positions[i] >= row_end:
            row += 1
            row_end += columns.size
        column = np.int64(positions[i]) - row_end + columns.size
        at = np.int64(rows[row]) + np.int64(columns[column]) - lowest
        out[i] = numbers[min(max(at, 0), last)]


@jit
def _products(  # type: ignore[no-untyped-def]
    rows, columns, numbers, lowest,
    rows_2, columns_2, numbers_2, lowest_2,
    minus, first, start, positions, out,
):  # fmt: skip
    row = start // columns.size
    row_end = (row + 1) * columns.size - start
    last, last_2 = numbers.size - 1, numbers_2.size - 1
    for i in range(positions.size):
        while positions[i] >= row_end:
            row += 1
            row_end += columns.size
        column = np.int64(positions[i]) - row_end + columns.size
        at = np.int64(rows[row]) + np.int64(columns[column]) - lowest
        at_2 = np.int64(rows_2[row]) + np.int64(columns_2[column]) - lowest_2
        size = np.float32(
            numbers[np.uint64(min(max(at, 0), last))]
            * numbers_2[np.uint64(min(max(at_2, 0), last_2))]
        )
        rank = np.uint64(first + i)
        is_minus = (np.uint32(minus[rank >> np.uint64(3)]) >> np.uint32(rank & np.uint64(7))) & 1
        sign = np.uint32(is_minus << 31)
        out[i] = np.uint32(size.view(np.uint32) ^ sign).view(
            np.float32
        )  # no branch: signs are random


@jit
def _add_products(positions, numbers, first, x, totals):  # type: ignore[no-untyped-def]
    columns, rows = x.shape
    output, output_end = -1, np.int64(first)
    for i in range(positions.size):
        position = np.int64(positions[i])
        if position < first:
            continue
        while position >= output_end:
            output += 1
            output_end += columns
        if output == len(totals):
            break
        column = position - output_end + columns
        for row in range(rows):
            totals[output, row] += numbers[i] * x[column, row]
