"""What the kernels compute, in plain torch: slow, short, and the truth they are tested against.

Forms are believed here: what a kernel does with one that lies is tested by itself.
"""

from __future__ import annotations

import torch

from .form import BLOCK, ESCAPE, Factors, Form, Mask, Signs, Words
from .table import Changes, Tasks, Tensors


def positions(form: Form) -> torch.Tensor:
    """Which elements change, ascending. -> [nnz] int64."""
    places = form.places
    if isinstance(places, Mask):
        shifts = torch.arange(32, dtype=torch.int32, device=places.bits.device)
        kept = ((places.bits[:, None] >> shifts) & 1) != 0
        return kept.flatten()[: form.numel].nonzero().flatten()
    gaps = places.gaps.long()
    is_kept = gaps != ESCAPE
    passed = torch.cumsum(gaps + is_kept, 0)
    firsts = places.anchors[:, 0].long() & 0xFFFFFFFF
    entries = torch.arange(gaps.numel(), device=gaps.device)
    block = torch.searchsorted(firsts, entries, right=True) - 1
    before = torch.cat([passed.new_zeros(1), passed])[firsts[block]]
    return (block * BLOCK + passed - before - 1)[is_kept]


def new_words(form: Form, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the base's words at the form's positions become. words: [nnz] intN -> [nnz] intN."""
    if isinstance(form.values, Words):
        return form.values.words
    before = words.view(dtype)
    after = (before.float() + numbers(form, words, dtype)).to(dtype)
    moves = before.isfinite() & after.isfinite() & (before != after)
    return torch.where(moves, after, before).view(words.dtype)


def numbers(form: Form, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far the base's words at the form's positions move. words: [nnz] intN -> [nnz] float32.

    Of signs and grids, what is added; of new words, their difference to the base's.
    """
    if isinstance(form.values, Words):
        return form.values.words.view(dtype).float() - words.view(dtype).float()
    at = positions(form)
    if isinstance(form.values, Signs):
        values = form.values
        bits = torch.arange(form.nnz, device=at.device)
        is_minus = ((values.minus[bits // 8] >> (bits % 8)) & 1) != 0
        size = _look_up(values.sizes, at) * _look_up(values.factors, at)
        return torch.where(is_minus, -size, size)
    return form.values.levels.float() * _look_up(form.values.steps, at)


def _look_up(factors: Factors, at: torch.Tensor) -> torch.Tensor:
    columns = factors.columns.numel()
    exponents = factors.rows[at // columns].long() + factors.columns[at % columns].long()
    return factors.table[exponents - factors.lowest]


def rebuild(changes: Changes, out: Tensors) -> None:
    """As the kernel of this name."""
    for form, words, target in zip(changes.forms, changes.tensors.words, out.words, strict=True):
        target.copy_(words)
        if form:
            at = positions(form)
            target[at] = new_words(form, words[at], changes.tensors.dtype)


def exchange(changes: Changes, old: torch.Tensor | None = None, *, undo: bool = False) -> None:
    """As the kernel of this name."""
    for form, words, first in zip(
        changes.forms, changes.tensors.words, changes.first_old, strict=True
    ):
        if not form:
            continue
        at = positions(form)
        before = words[at]
        if isinstance(form.values, Words):
            words[at] = form.values.words
            form.values.words.copy_(before)
            continue
        assert old is not None
        left = old[first : first + form.nnz]
        if undo:
            words[at] = left
        else:
            words[at] = new_words(form, before, changes.tensors.dtype)
            left.copy_(before)


def switch(
    left: Changes,
    right: Changes,
    left_old: torch.Tensor | None = None,
    right_old: torch.Tensor | None = None,
) -> None:
    """As the kernel of this name."""
    exchange(left, left_old, undo=True)
    exchange(right, right_old)


def delta_matmul(
    tasks: Tasks, number: int, x: torch.Tensor, y: torch.Tensor, starts: torch.Tensor
) -> None:
    """As the kernel of this name, but in float64, rounded once to the dtype of y."""
    tensors = tasks.tensors
    words = tensors.words[number]
    bounds = [min(max(start, 0), len(x)) for start in starts.tolist()]
    for changes, first, end in zip(tasks.changes, bounds[:-1], bounds[1:], strict=True):
        form = changes.forms[number]
        if form and end > first:
            at = positions(form)
            delta = torch.zeros(words.numel(), dtype=torch.float64, device=words.device)
            delta[at] = numbers(form, words[at], tensors.dtype).double()
            more = x[first:end].double() @ delta.view(y.shape[1], x.shape[1]).T
            y[first:end] = (y[first:end].double() + more).to(y.dtype)
