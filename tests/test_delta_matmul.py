"""y += x Δᵀ for batches of several tasks: kernel and CPU path against float64, within the bound."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from random_forms import FLOATS, SIGNED, lies, random_factors, random_form, random_tensor

from nps_compress import resident
from nps_compress.kernels import form as forms
from nps_compress.kernels import reference
from nps_compress.kernels.form import BLOCK, Form, Grid, Signs, Words, form_of
from nps_compress.kernels.table import MAX_TASKS, Changes, Tasks, Tensors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Overflow and NaN are cases of the tests; numpy, which interprets, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HUGE = 2.0**100  # sums of such numbers may leave float32
TINY = 2.0**-100  # parts of such numbers may vanish


@dataclass(frozen=True)
class Way:
    """One implementation, and where its tensors are."""

    device: str
    delta_matmul: Callable[..., None]


def way_of(name: str) -> Way:
    if name == "kernel":
        from nps_compress.kernels.delta_matmul import delta_matmul

        return Way("cpu", delta_matmul)
    return Way("cuda" if name == "card" else "cpu", resident.delta_matmul)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("card", marks=pytest.mark.gpu),
        pytest.param("kernel", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled")),
    ]
)
def way(request) -> Way:
    return way_of(request.param)


def normal(rng, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 1, shape)).to(dtype)


def usual_form(rng, kind: str, density: float, base: torch.Tensor, in_mask=None) -> Form:
    """Changes of the sizes that fine-tuning makes."""
    numel = base.numel()
    positions = np.flatnonzero(rng.random(numel) < density)
    if kind == "words":
        new = base.reshape(-1)[positions].float() + 0.01 * normal(rng, positions.size)
        values = Words(new.to(base.dtype).view(SIGNED[base.element_size()]))
    elif kind == "grid":
        levels = torch.from_numpy(rng.integers(-127, 128, positions.size).astype(np.int8))
        values = Grid(levels, random_factors(rng, *base.shape, -20))
    else:
        minus = torch.from_numpy(rng.integers(0, 256, -(-positions.size // 8)).astype(np.uint8))
        factors = (random_factors(rng, *base.shape, centre) for centre in (-20, 6))
        values = Signs(minus, *factors)
    found = form_of(numel, positions, values)
    if in_mask is not None:
        make = forms.mask_of if in_mask else forms.gaps_of
        found = replace(found, places=make(numel, positions))
    return found


def tasks_of(device: str, base: torch.Tensor, made: list[Form | None]) -> Tasks:
    tensors = Tensors([base.to(device, copy=True)])
    return Tasks([Changes(tensors, [form and form.to(device)]) for form in made])


def outputs(rng, shape: tuple[int, int], dtype: torch.dtype, device: str, turned: bool):
    """Numbers, in the midst of NaN and -0.0, which adding 0 changes: the whole, and the part."""
    rows, columns = shape[0] + 2, shape[1] + 5
    whole = torch.empty((columns, rows)[:: 1 if turned else -1], dtype=dtype, device=device)
    whole = whole.T if turned else whole
    is_odd = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 1
    whole.copy_(torch.where(is_odd, -0.0, float("nan")))
    part = whole[1:-1, 2:-3]
    part.copy_(normal(rng, *shape))
    return whole, part


def assert_within_bound(base, made, starts, x, before, found) -> None:
    """found: [batch, N], what came of ``before``."""
    tasks = tasks_of("cpu", base, made)
    wanted = before.double()
    reference.delta_matmul(tasks, 0, x, wanted, starts)
    # The same of what is not negative: sum |x Δ|, and how many elements of each row change.
    sizes, counts = torch.zeros_like(wanted), torch.zeros_like(wanted)
    words = tasks.tensors.words[0]
    bounds = [min(max(start, 0), len(x)) for start in starts.tolist()]
    for form, first, end in zip(made, bounds[:-1], bounds[1:], strict=True):
        if form is None or end <= first:
            continue
        at = reference.positions(form)
        delta, kept = (torch.zeros(base.numel(), dtype=torch.float64) for _ in range(2))
        delta[at] = reference.numbers(form, words[at], base.dtype).double().abs()
        kept[at] = 1
        sizes[first:end] = x[first:end].double().abs() @ delta.view(base.shape).T
        counts[first:end] = kept.view(base.shape).sum(1)
    error = (found.double() - wanted).abs()
    limit = 2.0**-20 * (8 + counts) * (sizes + TINY)
    # Twice rounded: the sum to float32, which is then rounded to the dtype, as far as that goes.
    of_dtype = torch.finfo(found.dtype)
    limit += wanted.abs() * (2.0**-23 + of_dtype.eps) + of_dtype.smallest_normal * of_dtype.eps
    usual = sizes < min(HUGE, of_dtype.max / 2)  # NaN is not
    assert (error[usual] <= limit[usual]).all()
    assert not found[sizes.isnan()].isfinite().any()
    same = counts == 0
    assert bits(found[same]) == bits(before[same])


def check(way: Way, rng, base, made, starts, x, dtype: torch.dtype, turned: bool) -> None:
    """A batch comes out within the bound, twice alike, and nothing around it is touched."""
    tasks = tasks_of(way.device, base, made)
    whole, y = outputs(rng, (len(x), len(base)), dtype, way.device, turned)
    before, untouched = y.clone(), whole.clone()
    there = x.to(way.device)
    if turned:
        there = there.T.contiguous().T
    way.delta_matmul(tasks, 0, there, y, starts.to(way.device))
    assert_within_bound(base, made, starts, x, before.cpu(), y.cpu())
    found = y.clone()
    y.copy_(before)
    assert bits(whole.cpu()) == bits(untouched.cpu())
    way.delta_matmul(tasks, 0, there, y, starts.to(way.device))
    assert bits(y.cpu()) == bits(found.cpu())
    assert bits(tasks.tensors.words[0].cpu()) == bits(base)
    assert not any(changes.fault.item() for changes in tasks.changes)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(19, 310), (16, 128), (40, 3), (1, 1), (17, 64)], ids=str)
def test_products_of_every_form(way, rng, shape, dtype):
    base = 0.05 * normal(rng, *shape)
    base = base.to(dtype)
    made = [
        usual_form(rng, "signs", 0.01, base, False),
        usual_form(rng, "words", 0.3, base, True),
        None,
        usual_form(rng, "grid", 0.05, base, False),
        usual_form(rng, "signs", 0.2, base, True),
        usual_form(rng, "words", 0.02, base, False),
        usual_form(rng, "grid", 1.0, base),
        usual_form(rng, "words", 0.0, base, False),
        usual_form(rng, "grid", 0.0, base, True),
    ]
    # Rows of the base alone before, between and behind; a task without any.
    starts = torch.tensor([1, 3, 4, 6, 6, 8, 9, 10, 11, 12], dtype=torch.int32)
    x_dtype, y_dtype = rng.choice(3, 2)
    x = normal(rng, 14, shape[1], dtype=FLOATS[x_dtype])
    check(way, rng, base, made, starts, x, FLOATS[y_dtype], bool(rng.integers(2)))


@pytest.mark.parametrize("shape", [(3, BLOCK + 700), (33, 700)], ids=str)
def test_blocks_and_tiles_that_do_not_end_with_a_row(way, rng, shape):
    """Blocks of gaps within a row, and in the midst of two programs' rows."""
    base = (0.05 * normal(rng, *shape)).to(torch.bfloat16)
    made = [usual_form(rng, *each) for each in (("signs", 0.03, base), ("words", 0.01, base))]
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    check(way, rng, base, made, starts, normal(rng, 5, shape[1]), *Y)


def test_the_cpu_does_a_weight_in_parts(rng, monkeypatch):
    """Parts of rows that begin and end within blocks."""
    monkeypatch.setattr(resident, "_BLOCKS", 1)
    base = 0.05 * normal(rng, 70, 1100)
    made = [usual_form(rng, kind, 0.03, base, m) for kind in ("signs", "words") for m in (0, 1)]
    starts = torch.tensor([0, 2, 3, 4, 5], dtype=torch.int32)
    check(way_of("cpu"), rng, base, made, starts, normal(rng, 5, 1100), *Y)


@pytest.mark.parametrize("batch", [16, 17, 33, 70])
def test_a_task_may_have_many_rows(way, rng, batch):
    base = 0.05 * normal(rng, 20, 300)
    made = [usual_form(rng, "signs", 0.05, base, in_mask) for in_mask in (True, False)]
    starts = torch.tensor([0, batch // 4, batch], dtype=torch.int32)
    check(way, rng, base, made, starts, normal(rng, batch, 300), *Y)
    starts = torch.tensor([1, batch], dtype=torch.int32)
    check(way, rng, base, made[:1], starts, normal(rng, batch, 300), *Y)


Y = (torch.float32, False)


def test_starts_beyond_the_batch_are_bounded(way, rng):
    base = 0.05 * normal(rng, 20, 300)
    made = [usual_form(rng, "signs", 0.05, base) for _ in range(3)]
    for starts in ([-(2**31), 2, 2**31 - 1, 2**31 - 1], [5, 4, 3, 2], [-7, -3, -3, -1]):
        check(
            way, rng, base, made, torch.tensor(starts, dtype=torch.int32), normal(rng, 6, 300), *Y
        )


def test_changes_that_are_not_finite_stay_in_their_output(way, rng):
    """NaN and infinity in base, words and sums: the outputs beside are as they should be."""
    base = random_tensor(rng, (24, 500), torch.bfloat16)
    made = [random_form(rng, kind, 0.02, base, m) for kind in ("words", "signs") for m in (0, 1)]
    starts = torch.tensor([0, 2, 3, 4, 5], dtype=torch.int32)
    check(way, rng, base, made, starts, normal(rng, 6, 500), *Y)


def test_a_sum_that_is_subnormal_is_rounded_once(way):
    base, values = torch.zeros(1, 1), Words(torch.ones(1).view(torch.int32))
    made = [form_of(1, np.zeros(1, np.int64), values)]
    x, y = torch.full((1, 1), 1.5e-8), torch.full((1, 1), 2.0**-17, dtype=torch.float16)
    found, starts = y.clone().to(way.device), torch.tensor([0, 1], dtype=torch.int32)
    tasks = tasks_of(way.device, base, made)
    way.delta_matmul(tasks, 0, x.to(way.device), found, starts.to(way.device))
    assert bits(found) == bits(y)  # 2^-24 is the least that float16 can add
    assert_within_bound(base, made, starts, x, y, found.cpu())


@st.composite
def cases(draw, elements: int):
    """A weight of any dtype and shape, tasks of any form, and rows for each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    columns = draw(st.integers(1, 600))
    rows = draw(st.integers(1, max(1, elements // columns)))
    base = (0.05 * normal(rng, rows, columns)).to(draw(st.sampled_from(FLOATS)))
    made = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["words", "signs", "grid", None]))
        density = draw(st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0]))
        in_mask = draw(st.sampled_from([None, True, False]))
        made.append(kind and usual_form(rng, kind, density, base, in_mask))
    counts = draw(st.lists(st.integers(0, 20), min_size=len(made) + 1, max_size=len(made) + 1))
    starts = torch.tensor(np.cumsum(counts), dtype=torch.int32)
    batch = int(starts[-1]) + draw(st.integers(0, 2))
    x = normal(rng, batch, columns, dtype=draw(st.sampled_from(FLOATS)))
    return rng, base, made, starts, x, draw(st.sampled_from(FLOATS)), draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(case=cases(3 * BLOCK))
def test_the_cpu_agrees_on_anything(case):
    check(way_of("cpu"), *case)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled")
@settings(max_examples=4, deadline=None)
@given(case=cases(BLOCK // 4))
def test_the_kernel_agrees_on_anything(case):
    check(way_of("kernel"), *case)


@pytest.mark.gpu
@settings(max_examples=200, deadline=None)
@given(case=cases(16 * BLOCK))
def test_a_card_agrees_on_anything(case):
    check(way_of("card"), *case)


@pytest.mark.parametrize("kind", ["words", "signs"])
@pytest.mark.parametrize("in_mask", [False, True])
def test_a_form_that_lies_is_reported_and_does_no_harm(way, rng, kind, in_mask):
    base = 0.05 * normal(rng, 30, 600)
    honest = usual_form(rng, kind, 0.02, base, in_mask)
    starts = torch.tensor([0, 2, 4], dtype=torch.int32)
    x = normal(rng, 5, 600)
    for name, form in lies(honest).items():
        tasks = tasks_of(way.device, base, [form, honest])
        whole, y = outputs(rng, (5, 30), torch.float32, way.device, False)
        before, untouched = y.clone(), whole.clone()
        way.delta_matmul(tasks, 0, x.to(way.device), y, starts.to(way.device))
        faults = [changes.fault.item() for changes in tasks.changes]
        # What is never read, such as counts within a row of the kernel's, does no harm.
        is_found = name != "too many" or way.delta_matmul is resident.delta_matmul
        assert faults == [int(is_found), 0], name
        rows = slice(2 if is_found else 0, None)
        held, own = before[rows].cpu(), y[rows].cpu()
        assert_within_bound(base, [honest] * 2, starts - rows.start, x[rows], held, own)
        y.copy_(before)
        assert bits(whole.cpu()) == bits(untouched.cpu()), name


def test_a_task_that_was_exchanged_in_memory_may_be_another_tensor(way, rng):
    """Tasks have forms for all tensors of a model; only the one that is asked for counts."""
    bases = [0.05 * normal(rng, *shape) for shape in ((4, 9), (20, 300), (7, 7))]
    made = [[usual_form(rng, "grid", 0.1, base) for base in bases] for _ in range(2)]
    tensors = Tensors([base.to(way.device) for base in bases])
    tasks = Tasks([Changes(tensors, [form.to(way.device) for form in task]) for task in made])
    starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    for number, base in enumerate(bases):
        x, before = normal(rng, 3, base.shape[1]), normal(rng, 3, base.shape[0])
        y = before.to(way.device, copy=True)
        way.delta_matmul(tasks, number, x.to(way.device), y, starts.to(way.device))
        assert_within_bound(base, [task[number] for task in made], starts, x, before, y.cpu())


def test_what_does_not_fit_is_refused(way, rng):
    base = normal(rng, 4, 9).to(way.device)
    signs = usual_form(rng, "signs", 0.5, base.cpu()).to(way.device)
    changes = Changes(Tensors([base]), [signs])
    with pytest.raises(ValueError, match="0 tasks"):
        Tasks([])
    with pytest.raises(ValueError, match=f"{MAX_TASKS + 1} tasks"):
        Tasks([changes] * (MAX_TASKS + 1))
    with pytest.raises(ValueError, match="different tensors"):
        Tasks([changes, Changes(Tensors([base]), [signs])])
    with pytest.raises(ValueError, match="int32 are not multiplied"):
        Tasks([Changes(Tensors([base.view(torch.int32)]), [None])])
    tasks = Tasks([changes])
    x, y = (torch.zeros(2, n, device=way.device) for n in (9, 4))
    starts = torch.tensor([0, 2], dtype=torch.int32, device=way.device)
    for match, *wrong in (
        ("tensor 1 of 1", 1, x, y, starts),
        ("x must be a matrix", 0, x.double(), y, starts),
        ("y must be a matrix", 0, x, y[0], starts),
        ("y must be a matrix", 0, x, y.int(), starts),
        ("for a weight of 36", 0, x[:, :8], y, starts),
        ("for a weight of 36", 0, x[:1], y, starts),
        ("of 9 columns, x has 4", 0, y, x, starts),
        ("starts must be", 0, x, y, starts[:1]),
        ("starts must be", 0, x, y, starts.long()),
        ("x must be a matrix", 0, x.to("meta"), y, starts),
        ("starts are on meta", 0, x, y, starts.to("meta")),
    ):
        with pytest.raises(ValueError, match=match):
            way.delta_matmul(tasks, *wrong)
    assert not y.any()


def test_nothing_to_multiply_is_nothing(way):
    for rows, columns, batch in ((0, 5, 3), (5, 0, 3), (4, 9, 0)):
        base = torch.zeros(rows, columns, device=way.device)
        tasks = Tasks([Changes(Tensors([base]), [None])])
        y = torch.ones(batch, rows, device=way.device)
        starts = torch.tensor([0, batch], dtype=torch.int32, device=way.device)
        way.delta_matmul(tasks, 0, torch.ones(batch, columns, device=way.device), y, starts)
        assert (y == 1).all()


@pytest.mark.gpu
def test_a_graph_takes_other_rows_with_other_starts(rng):
    """No allocation and no synchronisation inside: what the graph reads decides."""
    base = 0.05 * normal(rng, 64, 2048)
    made = [usual_form(rng, kind, 0.02, base) for kind in ("signs", "words")]
    tasks = tasks_of("cuda", base, made)
    x, starts = normal(rng, 8, 2048), torch.tensor([0, 3, 5], dtype=torch.int32)
    there, where = x.cuda(), starts.cuda()
    y = torch.zeros(8, 64, device="cuda")
    resident.delta_matmul(tasks, 0, there, y, where)  # compile first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        resident.delta_matmul(tasks, 0, there, y, where)
    for other in (starts, torch.tensor([1, 1, 8], dtype=torch.int32)):
        where.copy_(other)
        y.zero_()
        graph.replay()
        assert_within_bound(base, made, other, x, torch.zeros(8, 64), y.cpu())
