"""What the GPU benchmark runs: models and tasks of random numbers, the gate, and the other ways."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nps_compress import resident
from nps_compress.bench.shapes import Shapes
from nps_compress.kernels import reference
from nps_compress.kernels.form import (
    Factors,
    Form,
    Signs,
    Words,
    form_of,
    gaps_of,
    mask_of,
    parts_of,
)
from nps_compress.kernels.table import Changes, Tasks, Tensors
from nps_compress.rank_one import POWERS

BF16 = torch.bfloat16
WORD = torch.int16  # of one bf16 element
SECTOR = 32  # bytes: the least that a GPU's memory moves
GATE_SHAPES = [(0, 3), (1, 1), (70, 33), (3, 11_000), (129, 257)]
GATE_DENSITIES = (0.0, 0.01, 0.3, 1.0)


class WrongResultError(Exception):
    """Something gave another result than it should: nothing of it is timed."""


@dataclass(frozen=True)
class Model:
    """Weights on a device, and memory for as many more. ``name``: what they are the shapes of."""

    name: str
    tensors: Tensors
    out: Tensors
    shapes: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, name: str, shapes: Shapes, device: str) -> Model:
        """Normal numbers of the size of weights, in bf16."""
        found = list(shapes.values())
        weights = [0.02 * torch.randn(shape, device=device, dtype=BF16) for shape in found]
        return cls(name, Tensors(weights), Tensors([torch.zeros_like(w) for w in weights]), found)

    @property
    def params(self) -> int:
        """How many weights."""
        return sum(words.numel() for words in self.tensors.words)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.params * BF16.itemsize


def positions(rng: np.random.Generator, numel: int, density: float) -> np.ndarray:
    """Ascending, each element with the same probability."""
    if density >= 1:
        return np.arange(numel)
    if density <= 0:
        return np.arange(0)
    expected = numel * density
    at = np.cumsum(rng.geometric(density, int(expected + 8 * math.sqrt(expected) + 16))) - 1
    return at[at < numel]


def random_form(
    rng: np.random.Generator, shape: tuple[int, ...], density: float, kind: str
) -> Form:
    """Changes of a matrix on the CPU: signs, of sizes about 2^-10, or words of such weights."""
    numel = math.prod(shape)
    at = positions(rng, numel, density)
    if kind == "words":
        numbers = torch.from_numpy(0.02 * rng.standard_normal(at.size, np.float32))
        return form_of(numel, at, Words(numbers.to(BF16).view(WORD)))
    minus = torch.from_numpy(rng.integers(0, 256, -(-at.size // 8), np.uint8))

    def factors(centre: int) -> Factors:
        exponents = (rng.integers(-6, 7, size) + centre // 2 for size in shape)
        return Factors.of(*exponents, POWERS)

    return form_of(numel, at, Signs(minus, factors(-20), factors(0)))


def random_forms(
    shapes: Sequence[tuple[int, ...]], density: float, kind: str, seed: int
) -> dict[tuple[int, ...], Form]:
    """A form for each shape, on the CPU."""
    return {
        shape: random_form(np.random.default_rng([seed, *shape]), shape, density, kind)
        for shape in dict.fromkeys(shapes)
    }


def task(model: Model, density: float, kind: str, seed: int) -> Changes:
    """A task that changes every matrix of a model; alike matrices have the same changes."""
    made = random_forms([shape for shape in model.shapes if len(shape) == 2], density, kind, seed)
    device = model.tensors.device
    forms = [copy.deepcopy(made[s]).to(device) if len(s) == 2 else None for s in model.shapes]
    return Changes(model.tensors, forms)


def old_words(changes: Changes) -> torch.Tensor:
    """The buffer that an exchange leaves words in."""
    return torch.zeros(changes.old_words, dtype=WORD, device=changes.tensors.device)


# ----- bytes that must move


def touched(densities: Sequence[float]) -> float:
    """The share of sectors in which any of several tasks changes anything."""
    intact = math.prod(1 - density for density in densities)
    return 1 - intact ** (SECTOR / BF16.itemsize)


def rebuild_bytes(model: Model, changes: Changes) -> float:
    """Base and form read, result written."""
    return 2 * model.nbytes + changes.nbytes


def exchange_bytes(model: Model, changes: Changes, density: float) -> float:
    """Form read, touched sectors read and written, the base's words put aside."""
    put_aside = sum(form.nnz for form in changes.forms if form) * BF16.itemsize
    return changes.nbytes + 2 * touched([density]) * model.nbytes + put_aside


def switch_bytes(model: Model, left: Changes, right: Changes, density: float) -> float:
    """Both forms read (of the left one signs are not needed), what they share touched once, words
    brought back and put aside."""
    kept = sum(form.nnz for changes in (left, right) for form in changes.forms if form)
    once = 2 * touched([density, density]) * model.nbytes
    undone = sum(
        form.nbytes
        if isinstance(form.values, Words)
        else sum(part.nbytes for part in parts_of(form.places))
        for form in left.forms
        if form
    )
    return undone + right.nbytes + once + kept * BF16.itemsize


# ----- the gate


def check_all(device: str) -> int:
    """Every operation on small tensors against the reference; how many cases. WrongResultError."""
    rng = np.random.default_rng()
    cases = 0
    for density in GATE_DENSITIES:
        for kind in ("words", "signs"):
            base = [(0.02 * torch.randn(shape)).to(BF16) for shape in GATE_SHAPES]
            forms = [random_form(rng, shape, density, kind) for shape in GATE_SHAPES]
            for make in (mask_of, gaps_of):
                made = [
                    replace(form, places=make(form.numel, reference.positions(form).numpy()))
                    for form in forms
                ]
                _check_changes(device, base, made)
                _check_matmul(device, base[-1], [made[-1], forms[-1]])
                cases += 1
    return cases


def _check_changes(device: str, base: list[torch.Tensor], forms: list[Form]) -> None:
    wanted = Tensors([torch.zeros_like(tensor) for tensor in base])
    reference.rebuild(Changes(Tensors(base), forms), wanted)
    tensors = Tensors([tensor.to(device, copy=True) for tensor in base])
    out = Tensors([torch.full_like(tensor, float("nan"), device=device) for tensor in base])
    changes, other = (
        Changes(tensors, [copy.deepcopy(form).to(device) for form in forms]) for _ in range(2)
    )
    buffers = old_words(changes), old_words(other)
    resident.rebuild(changes, out)
    _expect_same("rebuild", out.words, wanted.words)
    resident.exchange(changes, buffers[0])
    _expect_same("exchange", tensors.words, wanted.words)
    resident.switch(changes, other, *buffers)
    _expect_same("switch", tensors.words, wanted.words)
    resident.exchange(other, buffers[1], undo=True)
    _expect_same("undo", tensors.words, Tensors(base).words)
    for one in (changes, other):
        one.check()


def _check_matmul(device: str, base: torch.Tensor, forms: list[Form]) -> None:
    tensors = Tensors([base])
    tasks = Tasks([Changes(tensors, [form]) for form in forms])
    x, starts = torch.randn(9, base.shape[1]), torch.tensor([1, 4, 8], dtype=torch.int32)
    wanted = torch.zeros(9, len(base), dtype=torch.float64)
    reference.delta_matmul(tasks, 0, x, wanted, starts)
    weight = Tensors([base.to(device, copy=True)])
    there = Tasks([Changes(weight, [copy.deepcopy(form).to(device)]) for form in forms])
    found = torch.zeros(9, len(base), device=device)
    resident.delta_matmul(there, 0, x.to(device), found, starts.to(device))
    for one in there.changes:
        one.check()
    expect_close("delta_matmul", found, wanted)


def _expect_same(what: str, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        if not torch.equal(one, other.to(one.device)):
            raise WrongResultError(f"{what} differs from what it should give")


def expect_same(what: str, found: Tensors, wanted: Tensors) -> None:
    """Raise WrongResultError unless all words are the same."""
    _expect_same(what, found.words, wanted.words)


def expect_close(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise WrongResultError unless a product is right but for rounding to its dtype."""
    wanted = wanted.to(found.device).double()
    # Of the largest: what cancels is not known better than its parts.
    limit = 4 * torch.finfo(found.dtype).eps * max(wanted.abs().max().item(), 1e-30) + 1e-12
    limit = max(limit, 1e-5 * wanted.abs().max().item())
    error = (found.double() - wanted).abs().max().item()
    if not error <= limit:
        raise WrongResultError(f"{what} is off by {error:.3g}, at most {limit:.3g} is due")


# ----- the other ways, in torch


def other_ways(model: Model, changes: Changes) -> dict[str, Callable[[], object]]:
    """Ways to make ``model.out``, which has the base's words, a task's.

    They have absolute words, and what else they need, in memory.
    """
    parts = []
    resident.rebuild(changes, model.out)
    for form, base, out in zip(changes.forms, model.tensors.words, model.out.words, strict=True):
        if form:
            at = reference.positions(form)
            parts.append((out, at, out[at], base))
    masks = [torch.zeros_like(out, dtype=torch.bool) for out, *_ in parts]
    for mask, (_, at, *_) in zip(masks, parts, strict=True):
        mask[at] = True

    def index_put() -> None:
        for out, at, values, _ in parts:
            out.index_put_((at,), values)

    def masked_scatter() -> None:
        for (out, _, values, _), mask in zip(parts, masks, strict=True):
            out.masked_scatter_(mask, values)

    def nan_patch() -> None:  # vLLM's checkpoint_weight_patch: a NaN is an element to leave alone
        for out, at, values, _ in parts:
            patch = torch.full_like(out.view(BF16), float("nan"))
            patch[at] = values.view(BF16)
            weight = out.view(BF16)
            weight.copy_(torch.where(patch.isnan(), weight, patch))

    return {"index_put_": index_put, "masked_scatter_": masked_scatter, "NaN patch": nan_patch}


def one_bit(model: Model) -> Callable[[], object]:
    """BitDelta's rebuild (arXiv 2402.10193) in torch: the base, plus or minus a scale by a bit."""
    device = model.tensors.device
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    bits = [
        torch.randint(0, 256, (-(-words.numel() // 8),), dtype=torch.uint8, device=device)
        for words in model.tensors.words
    ]

    def run() -> None:
        for packed, base, out in zip(bits, model.tensors.words, model.out.words, strict=True):
            signs = ((packed[:, None] >> shifts) & 1).reshape(-1)[: base.numel()]
            torch.add(base.view(BF16), signs.to(BF16) * 2e-3 - 1e-3, out=out.view(BF16))

    return run


# ----- products


@dataclass(frozen=True)
class Batch:
    """Rows of several tasks for one weight. ``rows``: of each task."""

    weight: torch.Tensor
    tasks: Tasks
    x: torch.Tensor
    y: torch.Tensor
    starts: torch.Tensor
    rows: int

    @classmethod
    def of(cls, weight: torch.Tensor, forms: Sequence[Form], batch: int) -> Batch:
        """As many rows of each task, of ``batch`` in all, in bf16."""
        device, rows = weight.device, batch // len(forms)
        x = torch.randn(batch, weight.shape[1], dtype=BF16, device=device)
        y = torch.zeros(batch, weight.shape[0], dtype=BF16, device=device)
        tensors = Tensors([weight])
        tasks = Tasks([Changes(tensors, [form.to(device)]) for form in forms])
        starts = torch.arange(len(forms) + 1, dtype=torch.int32, device=device) * rows
        return cls(weight, tasks, x, y, starts, rows)

    def base(self) -> None:
        """The base's product alone."""
        torch.mm(self.x, self.weight.T, out=self.y)

    def ours(self) -> None:
        """The base's product and what tasks change."""
        self.base()
        resident.delta_matmul(self.tasks, 0, self.x, self.y, self.starts)

    def check(self) -> None:
        """Compare what tasks change with float64, for the first task. Raises WrongResultError."""
        y = torch.zeros(self.y.shape, dtype=torch.float32, device=self.y.device)
        resident.delta_matmul(self.tasks, 0, self.x, y, self.starts)
        first = Tasks(self.tasks.changes[:1])
        wanted = torch.zeros(self.rows, len(self.weight), dtype=torch.float64, device=y.device)
        starts = self.starts[:2]
        reference.delta_matmul(first, 0, self.x[: self.rows], wanted, starts)
        expect_close("delta_matmul", y[: self.rows], wanted)
        self.tasks.changes[0].check()

    def dense(self) -> Callable[[], None]:
        """A dense weight for each task, and a product with each."""
        weights = [self.weight.clone() for _ in self.tasks.changes]

        def run() -> None:
            for i, weight in enumerate(weights):
                rows = slice(i * self.rows, (i + 1) * self.rows)
                torch.mm(self.x[rows], weight.T, out=self.y[rows])

        return run

    def lora(self, rank: int) -> Callable[[], None]:
        """The base's product and a LoRA for each task, all tasks in two batched products."""
        count, (outputs, inputs) = len(self.tasks.changes), self.weight.shape
        device = self.weight.device
        down = torch.randn(count, inputs, rank, dtype=BF16, device=device) * 0.01
        up = torch.randn(count, rank, outputs, dtype=BF16, device=device) * 0.01
        middle = torch.empty(count, self.rows, rank, dtype=BF16, device=device)
        whole = count * self.rows
        x = self.x[:whole].view(count, self.rows, inputs)
        y = self.y[:whole].view(count, self.rows, outputs)

        def run() -> None:
            self.base()
            torch.bmm(x, down, out=middle)
            torch.baddbmm(y, middle, up, out=y)

        return run
