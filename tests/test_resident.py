"""Tensors changed in memory: kernels, CPU path and reference give the same bits.

The kernels run in Triton's interpreter where there is no card, and are compiled for one all the
same.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bits, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from random_forms import (
    FLOATS,
    GUARD,
    SIGNED,
    guarded,
    lies,
    random_form,
    random_tensor,
    random_words,
)

import nps_compress
from nps_compress import resident
from nps_compress._threads import workers
from nps_compress.errors import BaseMismatchError, FormatError, InvalidArgumentError
from nps_compress.kernels import form as forms
from nps_compress.kernels import reference
from nps_compress.kernels.form import BLOCK, Factors, Form, Grid, Mask, Signs, Words, form_of
from nps_compress.kernels.table import INTEGER, Changes, Tensors
from nps_compress.rank_one import POWERS
from nps_compress.recipe import Recipe

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Overflow and NaN are cases of the tests; numpy, which interprets, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIZES = [(0, 3), (1, 1), (3, 11), (1, BLOCK - 1), (5, (BLOCK + 1025) // 5)]


@dataclass(frozen=True)
class Way:
    """One implementation of the three operations, and where its tensors are."""

    device: str
    rebuild: Any
    exchange: Any
    switch: Any


def way_of(name: str) -> Way:
    if name == "kernels":
        from nps_compress.kernels.exchange import exchange
        from nps_compress.kernels.rebuild import rebuild
        from nps_compress.kernels.switch import switch

        return Way("cpu", rebuild, exchange, switch)
    device = "cuda" if name == "card" else "cpu"
    return Way(device, resident.rebuild, resident.exchange, resident.switch)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("card", marks=pytest.mark.gpu),
        pytest.param("kernels", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled")),
    ]
)
def way(request) -> Way:
    return way_of(request.param)


def poison(like: list[torch.Tensor]) -> list[torch.Tensor]:
    return [
        torch.full_like(tensor.view(SIGNED[tensor.element_size()]), 0x5A).view(tensor.dtype)
        for tensor in like
    ]


def on(device: str, tensors: list[torch.Tensor]) -> Tensors:
    return Tensors([tensor.to(device, copy=True) for tensor in tensors])


def assert_same(found: Tensors, wanted: list[torch.Tensor]) -> None:
    for words, tensor in zip(found.words, wanted, strict=True):
        assert bits(words.cpu()) == bits(tensor)


def expected(base: list[torch.Tensor], made: list[Form | None]) -> list[torch.Tensor]:
    """What the reference makes of these."""
    out = poison(base)
    reference.rebuild(Changes(Tensors(base), made), Tensors(out))
    return out


def assert_all_agree(way: Way, base: list[torch.Tensor], left_forms, right_forms) -> None:
    """Every operation on these gives the reference's bits, and undoing the base's."""
    want_left, want_right = expected(base, left_forms), expected(base, right_forms)
    tensors = on(way.device, base)
    left, right = (
        Changes(tensors, [form and copied(form, way.device) for form in made])
        for made in (left_forms, right_forms)
    )
    out = on(way.device, poison(base))
    way.rebuild(left, out)
    assert_same(out, want_left)
    assert_same(tensors, base)

    old, other_old = (
        torch.full((changes.old_words + 3,), 0x5A, dtype=tensors.word, device=way.device)
        for changes in (left, right)
    )
    way.exchange(left, old)
    assert_same(tensors, want_left)
    way.switch(left, right, old, other_old)
    assert_same(tensors, want_right)
    way.exchange(right, other_old, undo=True)
    assert_same(tensors, base)
    way.rebuild(left, out)  # the values that words left behind have come back too
    assert_same(out, want_left)
    for changes, buffer in ((left, old), (right, other_old)):
        assert not changes.fault.item()
        assert (buffer[changes.old_words :] == 0x5A).all()


def copied(form: Form, device: str) -> Form:
    """Words are exchanged, so that every way needs its own."""
    values = form.values
    if isinstance(values, Words):
        values = Words(values.words.clone())
    return replace(form, values=values).to(device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_ways_give_the_bits_of_the_reference(way, rng, dtype):
    base = [random_tensor(rng, shape, dtype) for shape in SIZES]
    kinds = ["signs", "grid", "words", "signs", "grid"]
    densities = [0.5, 1.0, 0.4, 0.01, 0.2]
    left = [random_form(rng, *each) for each in zip(kinds, densities, base, strict=True)]
    kinds = ["words", "signs", "grid", "words", "signs"]
    right = [random_form(rng, *each) for each in zip(kinds, densities, base, strict=True)]
    assert isinstance(left[3].places, forms.Gaps)
    assert isinstance(left[4].places, Mask)
    assert_all_agree(way, base, left, right)


@pytest.mark.parametrize("in_mask", [False, True])
def test_where_changes_are_may_be_said_either_way(way, rng, in_mask):
    """Escapes, several tiles of gaps in a block, blocks without any, and tensors without a form."""
    shapes = [(3, BLOCK), (1, 2000), (2, 9000)]
    base = [random_tensor(rng, shape, torch.bfloat16) for shape in shapes]
    left = [random_form(rng, "signs", 0.003, base[0], in_mask), None]
    left.append(random_form(rng, "grid", 0.08, base[2], in_mask))
    positions = np.array([0, 254, 510, 766, 2 * BLOCK - 1, 2 * BLOCK + 255, 3 * BLOCK - 1])
    make = forms.mask_of if in_mask else forms.gaps_of
    words = Words(random_words(rng, positions.size, 2))
    right = [Form(3 * BLOCK, positions.size, make(3 * BLOCK, positions), words)]
    right += [random_form(rng, "words", 0.5, base[1], in_mask), None]
    assert_all_agree(way, base, left, right)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_are_rounded_to_even(way, rng, dtype):
    """Halves of a unit in the last place, of subnormals too, and sums that reach infinity."""
    half = torch.finfo(dtype).eps / 2
    least = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}[dtype]
    largest = torch.finfo(dtype).max
    at = torch.from_numpy(rng.integers(0, 128, (3, 600))).double()
    numbers = torch.stack([1 + at[0] * 2 * half, at[1] * least, largest * (1 - at[2] % 4 * half)])
    numbers *= torch.from_numpy(rng.choice([-1.0, 1.0], (3, 600)))
    base = [numbers.to(dtype)]
    steps = torch.tensor([half, max(least / 2, 2.0**-149), largest * half / 4]).float()
    rows = torch.arange(3, dtype=torch.int8)
    levels = torch.from_numpy(rng.integers(-9, 10, 1800).astype(np.int8))
    grid = Grid(levels, Factors(rows, torch.zeros(600, dtype=torch.int8), steps, 0))
    made = [form_of(1800, np.arange(1800), grid)]
    in_halves = (base[0][0].double() + levels[:600] * half) / half
    assert (in_halves % 2 == 1).sum() > 200
    assert_all_agree(way, base, made, [None])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_change_too_small_leaves_the_sign_of_zero(way, dtype):
    """-0.0 plus what rounds to 0.0 is the same number: the base's word stays."""
    shape = (1, 64)
    base = [torch.tensor([-0.0, 0.0] * 32, dtype=dtype).reshape(shape)]
    other = -120 if dtype == torch.float32 else -20
    sizes, factors = (Factors.of([at], np.full(64, at), POWERS) for at in (-120, other))
    minus = torch.from_numpy(np.array([0b0110_0110] * 8, np.uint8))
    made = [form_of(64, np.arange(64), Signs(minus, sizes, factors))]
    assert bits(expected(base, made)[0]) == bits(base[0])
    assert_all_agree(way, base, made, [None])


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float64, torch.int32], ids=str
)
def test_any_dtype_takes_words(way, rng, dtype):
    if dtype is torch.bool:
        base = [torch.from_numpy(rng.random(shape) < 0.5) for shape in ((7, 9), (2, 600))]
    else:
        base = [random_tensor(rng, shape, dtype) for shape in ((7, 9), (2, 600))]
    left, right = (
        [random_form(rng, "words", density, tensor) for tensor in base] for density in (0.01, 0.3)
    )
    assert_all_agree(way, base, left, right)


@st.composite
def cases(draw, blocks: int):
    """Tensors of any dtype with two forms each, at densities from nothing to everything."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(FLOATS))
    base, left, right = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        columns = draw(st.integers(1, 400))
        rows = draw(st.integers(0, blocks * BLOCK // columns))
        tensor = random_tensor(rng, (rows, columns), dtype)
        base.append(tensor)
        for made in (left, right):
            kind = draw(st.sampled_from(["words", "signs", "grid", None]))
            density = draw(st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0]))
            in_mask = draw(st.sampled_from([None, True, False]))
            made.append(kind and random_form(rng, kind, density, tensor, in_mask))
    return base, left, right


@settings(max_examples=60, deadline=None)
@given(case=cases(3))
def test_the_cpu_agrees_on_anything(case):
    assert_all_agree(way_of("cpu"), *case)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled")
@settings(max_examples=4, deadline=None)
@given(case=cases(1))
def test_kernels_agree_on_anything(case):
    assert_all_agree(way_of("kernels"), *case)


@pytest.mark.gpu
@settings(max_examples=200, deadline=None)
@given(case=cases(8))
def test_a_card_agrees_on_anything(case):
    assert_all_agree(way_of("card"), *case)


def test_rebuild_may_write_in_place(way, rng):
    base = [random_tensor(rng, (2, 9000), torch.bfloat16)]
    made = [random_form(rng, "signs", 0.02, base[0])]
    tensors = on(way.device, base)
    way.rebuild(Changes(tensors, [made[0].to(way.device)]), tensors)
    assert_same(tensors, expected(base, made))


# -- forms that lie ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["words", "signs"])
@pytest.mark.parametrize("in_mask", [False, True])
def test_a_form_that_lies_writes_nothing_out_of_bounds(way, rng, kind, in_mask):
    tensor = random_tensor(rng, (3, 6000), torch.bfloat16)
    honest = random_form(rng, kind, 0.02, tensor, in_mask)
    assert honest.nnz
    for name, form in lies(honest).items():
        whole, words = guarded(tensor.reshape(-1).view(torch.int16), way.device)
        values_whole = None
        form = form.to(way.device)
        if kind == "words":
            values_whole, values = guarded(honest.values.words, way.device)
            form = replace(form, values=Words(values))
        changes = Changes(Tensors([words.view(torch.bfloat16)]), [form])
        old_whole, old = guarded(torch.zeros(changes.old_words, dtype=torch.int16), way.device)
        out_whole, out = guarded(torch.zeros(tensor.numel(), dtype=torch.int16), way.device)
        way.rebuild(changes, Tensors([out.view(torch.bfloat16)]))
        with pytest.raises(InvalidArgumentError, match="places or values beyond them"):
            changes.check()
        changes.check()  # reported once
        way.exchange(changes, old)
        assert changes.fault.item(), name
        way.exchange(changes, old, undo=True)
        for memory in (whole, values_whole, old_whole, out_whole):
            if memory is not None:
                assert (memory[:GUARD] == 0x5A).all(), name
                assert (memory[-GUARD:] == 0x5A).all(), name


def test_gaps_past_their_block_leave_the_next_one_alone(way, rng):
    tensor = random_tensor(rng, (1, 2 * BLOCK), torch.int16)
    anchors = torch.tensor([[0, 0], [80, 80], [80, 80]], dtype=torch.int32)
    gaps = forms.Gaps(torch.full((80,), 250, dtype=torch.uint8), anchors)
    words = torch.full((80,), 77, dtype=torch.int16)
    form = Form(2 * BLOCK, 80, gaps, Words(words)).to(way.device)
    tensors = on(way.device, [tensor])
    changes = Changes(tensors, [form])
    way.exchange(changes)
    assert changes.fault.item()
    assert bits(tensors.words[0][BLOCK:].cpu()) == bits(tensor[0, BLOCK:])


def test_what_does_not_fit_is_refused(way, rng):
    base = random_tensor(rng, (4, 9), torch.bfloat16).to(way.device)
    other = base.clone()
    words = random_form(rng, "words", 0.5, base).to(way.device)
    signs = random_form(rng, "signs", 1.0, base).to(way.device)
    tensors = Tensors([base])
    with pytest.raises(ValueError, match="no tensors"):
        Tensors([])
    with pytest.raises(ValueError, match="float16"):
        Tensors([base, base.to(torch.float16)])
    with pytest.raises(ValueError, match="not contiguous"):
        Tensors([base.T])
    with pytest.raises(ValueError, match="2 forms for 1 tensors"):
        Changes(tensors, [words, words])
    with pytest.raises(ValueError, match="36 elements"):
        Changes(Tensors([base[:3]]), [words])
    with pytest.raises(ValueError, match="int16"):
        Changes(Tensors([base.float()]), [words])
    with pytest.raises(ValueError, match=r"numbers for torch\.int16"):
        Changes(Tensors([base.view(torch.int16)]), [signs])
    changes, more = Changes(tensors, [signs]), Changes(tensors, [signs])
    old = torch.zeros(72, dtype=torch.int16, device=way.device)
    for wrong in (None, old[:35], old.to(torch.int32), old.view(2, 36)):
        with pytest.raises(ValueError, match="a buffer of 36"):
            way.exchange(changes, wrong)
    with pytest.raises(ValueError, match="overlap"):
        way.switch(changes, more, old[:40], old[30:70])
    with pytest.raises(ValueError, match="different tensors"):
        way.switch(changes, Changes(Tensors([other]), [signs]), old[:36], old[36:])
    with pytest.raises(ValueError, match="out is"):
        way.rebuild(changes, Tensors([base[:3]]))
    assert bits(base.cpu()) == bits(other.cpu())


def test_a_form_whose_parts_do_not_fit_is_refused(rng):
    tensor = random_tensor(rng, (4, 9), torch.bfloat16)
    words, signs = (random_form(rng, kind, 1.0, tensor, True) for kind in ("words", "signs"))
    gaps = random_form(rng, "words", 1.0, tensor, False).places
    with pytest.raises(ValueError, match="129"):
        Factors.of([129, 0], [-128], POWERS)
    short = Factors.of(np.zeros(3), np.zeros(9), POWERS)
    turned = Factors.of(np.zeros(9), np.zeros(4), POWERS)
    for wrong in (
        {"numel": 70},
        {"nnz": 35},
        {"places": replace(words.places, bits=words.places.bits.long())},
        {"places": replace(words.places, counts=words.places.counts[:0])},
        {"places": replace(gaps, anchors=gaps.anchors[1:])},
        {"values": Words(words.values.words[:-1])},
        {"values": replace(signs.values, minus=signs.values.minus[1:])},
        {"values": replace(signs.values, sizes=short)},
        {"values": replace(signs.values, sizes=turned)},
        {"values": replace(signs.values, sizes=replace(short, table=short.table[:0]))},
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            replace(words, **wrong)
    for positions in ([3, 2], [2, 2], [36], [-1, 4]):
        with pytest.raises(ValueError, match="do not ascend within 36"):
            form_of(36, np.array(positions), words.values)


# -- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.15, 0.5])
def test_a_mask_takes_what_the_docs_say(rng, density):
    numel = 1 << 20
    tensor = torch.empty(1024, 1024, dtype=torch.bfloat16)
    form = random_form(rng, "words", density, tensor, True)
    assert form.nbytes == numel // 8 + numel // 256 + 2 * form.nnz
    assert form.nbytes <= 1.05 * (numel / 8 + 2 * form.nnz)


@pytest.mark.parametrize("density", [0.002, 0.01, 0.05])
def test_gaps_take_what_the_docs_say(rng, density):
    tensor = torch.empty(1024, 4096, dtype=torch.bfloat16)
    form = random_form(rng, "words", density, tensor)
    assert isinstance(form.places, forms.Gaps)
    missed = (1 - density) ** 255
    per_kept = 8 / (1 - missed) + 64 / (BLOCK * density) + 16
    assert 8 * form.nbytes / form.nnz == pytest.approx(per_kept, rel=0.02)


def test_the_smaller_form_is_taken(rng):
    for density in (0.001, 0.03, 0.1, 0.12, 0.14, 0.3, 1.0):
        tensor = torch.empty(100, 3000, dtype=torch.bfloat16)
        seeds = [np.random.default_rng(5) for _ in range(3)]
        taken, mask, gaps = (
            random_form(seed, "words", density, tensor, in_mask).nbytes
            for seed, in_mask in zip(seeds, (None, True, False), strict=True)
        )
        assert taken == min(mask, gaps)


def test_an_8b_task_of_signs_at_density_1_percent_takes_120_mb_at_most(rng):
    """All matrices of an 8B Llama: what places and signs take is measured on one of them."""
    tensor = torch.empty(2048, 4096, dtype=torch.bfloat16)
    form = random_form(rng, "signs", 0.01, tensor)
    factors = 2 * (2048 + 4096)
    tables = 4 * (len(form.values.sizes.table) + len(form.values.factors.table))
    per_element = (form.nbytes - factors - tables) / tensor.numel()
    layer = 2 * [(4096, 4096)] + 2 * [(1024, 4096)] + 3 * [(14336, 4096)]
    shapes = 32 * layer + 2 * [(128256, 4096)]
    numel = sum(rows * columns for rows, columns in shapes)
    assert numel == pytest.approx(8.03e9, rel=0.001)
    # A table is never longer than all sums of two exponents.
    total = sum(per_element * r * c + 2 * (r + c) + 2 * 4 * len(POWERS) for r, c in shapes)
    assert total <= 120e6
    assert 8 * total / (0.01 * numel) <= 12


# -- forms of files ---------------------------------------------------------------------------


RECIPES = {
    "lossless": {"lossless": True},
    "fast": {"lossless": True, "level": "fast"},
    "magnitude": {"recipe": Recipe(prune="magnitude", density=0.1, coefficients=(1.3,))},
    "signs": {"recipe": Recipe(prune="signs", density=0.1, seed=3)},
    "sampled": {"recipe": Recipe(prune="sampled", density=0.3, seed=3)},
    "sampled finely": {"recipe": Recipe(prune="sampled", density=0.999, seed=3)},
}


def model_pair(tmp_path, rng):
    """Tensors of all kinds: large, small, unchanged, not of floats, of one element, new."""
    base, tuned = {}, {}
    for name, dtype in zip(("b", "h", "f"), FLOATS, strict=True):
        base[f"{name}.matrix"] = torch.from_numpy(rng.normal(0, 0.05, (150, 130))).to(dtype)
        base[f"{name}.bias"] = torch.from_numpy(rng.normal(0, 0.05, 130)).to(dtype)
        base[f"{name}.same"] = torch.ones(7, dtype=dtype)
    base |= {"i": torch.arange(400), "d": torch.from_numpy(rng.normal(0, 1, (20, 20)))}
    for name, tensor in base.items():
        tuned[name] = tensor.clone()
        if name.endswith("same"):
            continue
        if tensor.dtype.is_floating_point:
            change = torch.from_numpy(rng.normal(0, 0.01, tuple(tensor.shape)) ** 3 * 1e4)
            tuned[name] = (tensor.double() + change).to(tensor.dtype)
        else:
            tuned[name][::7] += 5
    tuned["new"] = torch.randn(5, 6)
    folders = (("base", base), ("tuned", tuned))
    return base, *(write_checkpoint(tmp_path / name, tensors) for name, tensors in folders)


@pytest.mark.parametrize("name", RECIPES)
def test_tasks_of_every_rule(way, tmp_path, rng, name):
    base, *folders = model_pair(tmp_path, rng)
    nps_compress.pack(*folders, tmp_path / "t.nps", **RECIPES[name])
    kinds = set()
    with nps_compress.open(tmp_path / "t.nps") as task:
        for dtype in {tensor.dtype for tensor in base.values()}:
            names = [each for each, tensor in base.items() if tensor.dtype == dtype]
            tensors = on(way.device, [base[each] for each in names])
            made = [task.form(each, base[each].to(way.device)) for each in names]
            kinds |= {type(form.values) for form in made}
            wanted = [task.rebuild(each, base[each]) for each in names]
            changes = Changes(tensors, made)
            out = on(way.device, poison(wanted))
            way.rebuild(changes, out)
            assert_same(out, wanted)
            old = torch.zeros(changes.old_words, dtype=tensors.word, device=way.device)
            way.exchange(changes, old)
            assert_same(tensors, wanted)
            way.exchange(changes, old, undo=True)
            assert_same(tensors, [base[each] for each in names])
        whole = task.form("new")
        assert bits(whole.values.words) == bits(task.rebuild("new"))
    fits_bytes = {"signs": {Words, Signs}, "sampled": {Words, Grid}}
    assert kinds == fits_bytes.get(name, kinds)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_forms_of_all_tensors_are_those_of_each(tmp_path, rng, name, device):
    base, *folders = model_pair(tmp_path, rng)
    nps_compress.pack(*folders, tmp_path / "t.nps", **RECIPES[name])
    with nps_compress.open(tmp_path / "t.nps") as task:
        bases = {each: base.get(each) for each in task.names}
        found = task.forms(bases, device)
        assert list(found) == task.names
        for each, made in found.items():
            wanted = task.form(each, bases[each])
            assert made.device.type == device
            pairs = zip(forms.parts_of(made), forms.parts_of(wanted), strict=True)
            assert all(bits(one.cpu()) == bits(other) for one, other in pairs)
            assert (made.numel, made.nnz) == (wanted.numel, wanted.nnz)
        assert task.forms({}, device) == {}


@pytest.mark.skipif(workers() < 2, reason="needs two cores")
def test_forms_are_made_at_the_same_time(tmp_path, rng, monkeypatch):
    _, *folders = model_pair(tmp_path, rng)
    nps_compress.pack(*folders, tmp_path / "t.nps", recipe=Recipe(prune="signs", density=0.1))
    names = ["b.matrix", "h.matrix", "f.matrix", "new"]
    both = threading.Barrier(2)
    chunks = nps_compress.Task._chunks

    def meets(task, entry):
        both.wait(timeout=60)
        return chunks(task, entry)

    with nps_compress.open(tmp_path / "t.nps") as task:
        monkeypatch.setattr(nps_compress.Task, "_chunks", meets)
        assert list(task.forms(dict.fromkeys(names), "cpu")) == names


def test_forms_report_what_form_does(tmp_path, rng):
    base, *folders = model_pair(tmp_path, rng)
    nps_compress.pack(*folders, tmp_path / "t.nps", lossless=True)
    with nps_compress.open(tmp_path / "t.nps") as task:
        names = ["b.matrix", "h.matrix"]
        with pytest.raises(InvalidArgumentError, match=r"the base tensor for 'h\.matrix'"):
            task.forms({"b.matrix": base["b.matrix"], "h.matrix": None}, "cpu")
        with pytest.raises(BaseMismatchError, match="other values"):
            task.forms({name: torch.zeros_like(base[name]) for name in names}, "cpu")
        with pytest.raises(InvalidArgumentError, match="tensor name"):
            task.forms({"nowhere": None}, "cpu")


def test_a_file_against_another_base(tmp_path, rng):
    base, *folders = model_pair(tmp_path, rng)
    nps_compress.pack(*folders, tmp_path / "t.nps", lossless=True)
    with nps_compress.open(tmp_path / "t.nps") as task:
        with pytest.raises(InvalidArgumentError, match="the base tensor for"):
            task.form("b.matrix")
        with pytest.raises(BaseMismatchError, match="other values"):
            task.form("b.matrix", torch.zeros_like(base["b.matrix"]))
        with pytest.raises(BaseMismatchError, match="is F32"):
            task.form("b.matrix", base["b.matrix"].float())


def test_large_integers_of_a_grid_become_words(way, tmp_path, rng):
    """A heavy tail, sampled so finely that a byte does not hold what it takes."""
    base = {"w": torch.from_numpy(rng.normal(0, 1, (200, 100))).float()}
    tuned = {"w": base["w"] + torch.from_numpy(rng.normal(0, 0.1, (200, 100)) ** 5).float()}
    folders = [write_checkpoint(tmp_path / n, t) for n, t in (("base", base), ("tuned", tuned))]
    recipe = Recipe(prune="sampled", density=0.6)
    nps_compress.pack(*folders, tmp_path / "t.nps", recipe=recipe)
    with nps_compress.open(tmp_path / "t.nps") as task:
        (entry,) = task.reader.tensors
        levels = task.reader.read_chunk(entry, 0).planes[0].view(np.int16)
        assert np.abs(levels).max() > 127
        form = task.form("w", base["w"].to(way.device))
        assert isinstance(form.values, Words)
        changes = Changes(on(way.device, [base["w"]]), [form])
        way.exchange(changes)
        assert_same(changes.tensors, [task.rebuild("w", base["w"])])


def test_a_damaged_chunk_is_reported(tmp_path, rng):
    _, *folders = model_pair(tmp_path, rng)
    path = tmp_path / "t.nps"
    nps_compress.pack(*folders, path, recipe=Recipe(prune="signs", density=0.1))
    with nps_compress.open(path) as task:
        entry = task.entry("f.matrix")
        offset = int(task.reader._index.offsets[entry.first_chunk + 1])
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with nps_compress.open(path) as task, pytest.raises(FormatError, match="P-DIGEST"):
        task.form("f.matrix")


# -- the card ---------------------------------------------------------------------------------


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nps_compress.kernels import delta_matmul, exchange, rebuild, switch, table
WORDS = {table.INTEGER: tl.int64, table.BF16: tl.int16, table.F16: tl.int16, table.F32: tl.int32}
KERNELS = {
    exchange._exchange_kernel: WORDS,
    rebuild._rebuild_kernel: (table.INTEGER, table.BF16),
    switch._switch_kernel: (table.F16,),
    delta_matmul._delta_matmul_kernel: (table.BF16, table.F32),
}
NUMBERS = ("number", "tensors", "tasks", "batch", "outputs", "columns")
for kernel, kinds in KERNELS.items():
    for kind in kinds:
        word = WORDS[kind]
        options = {"WORD": word, "FLOAT": kind, "ALIGNED": True, "SEARCH": 9, "UNDO": False}
        # Two of the variants that occur: masks and gaps in decoding, gaps in prefill.
        options |= {"MASKS": kind == table.BF16, "GAPS": True}
        options |= {"ROWS": 16, "WARPS": 4} if kind == table.BF16 else {"ROWS": 64, "WARPS": 8}
        constants = {name: options[name] for name in kernel.arg_names if name in options}
        types = {name: "*i64" for name in kernel.arg_names}
        types |= {name: "i32" for name in types if name in NUMBERS or "stride" in name}
        types |= {name: "*i32" for name in types if "fault" in name or "starts" in name}
        types |= {name: "*bf16" for name in ("x_ptr", "y_ptr") if name in types}
        types |= {name: f"*i{word.primitive_bitwidth}" for name in types if "old" in name}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        warps = options["WARPS"] if "WARPS" in constants else 4
        flags = {"num_warps": warps, "enable_fp_fusion": False}
        if kind != table.INTEGER and kernel is not delta_matmul._delta_matmul_kernel:
            flags["maxnreg"] = 128
        target = GPUTarget("cuda", 90, 32)
        made = triton.compile(source, target=target, options=flags)
        print("KERNEL", kernel.__name__, kind, len(made.asm["cubin"]))
        print(made.asm["ptx"])
"""


def test_kernels_compile_for_a_card_without_one():
    """For Hopper; no product is fused with a sum, nothing is flushed, copies move 16 bytes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True
    )
    kernels = done.stdout.split("KERNEL ")[1:]
    assert len(kernels) == 9
    for text in kernels:
        title = text.splitlines()[0]
        _, kind, size = title.split()
        assert int(size) > 0, title
        assert not re.search(r"\bfma\.|\.ftz", text), title
        assert bool(re.search(r"\bmul\.(rn\.)?f32", text)) == (int(kind) != INTEGER), title
        assert ("mma.sync" in text) == title.startswith("_delta_matmul"), title
        if title.startswith("_rebuild"):
            assert re.search(r"ld\.global\.v[24]\.b(32|64)", text), title
            assert re.search(r"st\.global\.v[24]\.b(32|64)", text), title


@pytest.mark.gpu
def test_exchanges_are_captured_in_a_graph(rng):
    """A graph that exchanges and undoes: no allocation and no synchronisation inside."""
    base = [random_tensor(rng, (300, 1001), torch.bfloat16)]
    made = [random_form(rng, "signs", 0.02, base[0])]
    tensors = on("cuda", base)
    changes = Changes(tensors, [made[0].to("cuda")])
    old = torch.zeros(changes.old_words, dtype=tensors.word, device="cuda")
    for undo in (False, True):  # compile first
        resident.exchange(changes, old, undo=undo)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        resident.exchange(changes, old)
    graph.replay()
    assert_same(tensors, expected(base, made))
    resident.exchange(changes, old, undo=True)
    assert_same(tensors, base)


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31(rng):
    numel = (1 << 31) + 5 * BLOCK + 77
    base = torch.zeros(numel, dtype=torch.int8, device="cuda")
    positions = np.unique(np.concatenate([rng.integers(0, numel, 5000), [0, 1 << 31, numel - 1]]))
    words = torch.from_numpy(rng.integers(1, 100, positions.size).astype(np.int8))
    form = form_of(numel, positions, Words(words.clone())).to("cuda")
    changes = Changes(Tensors([base]), [form])
    resident.exchange(changes)
    at = torch.from_numpy(positions).cuda()
    assert torch.equal(base[at].cpu(), words)
    assert int(base.count_nonzero()) == positions.size
    resident.exchange(changes, undo=True)
    assert not base.any()


@pytest.mark.gpu
def test_task_rebuilds_on_the_device_of_its_base(tiny, tmp_path):
    from safetensors.torch import load_file

    nps_compress.pack(*tiny, tmp_path / "t.nps", lossless=True)
    base = load_file(tiny[0] / "model.safetensors")
    tuned = load_file(tiny[1] / "model.safetensors")
    with nps_compress.open(tmp_path / "t.nps") as task:
        for name in task.names:
            source = task.base_tensor_name(name)
            if source is not None:
                found = task.rebuild(name, base[source].cuda())
                assert found.is_cuda
                assert bits(found.cpu()) == bits(tuned[name])


@pytest.mark.gpu
def test_a_wrong_form_on_the_device_is_an_error_of_ours(tiny, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    nps_compress.pack(*tiny, tmp_path / "t.nps", lossless=True)
    base = load_file(tiny[0] / "model.safetensors")["layer.mlp"].cuda()
    with nps_compress.open(tmp_path / "t.nps") as task:
        honest = task.form("layer.mlp", base.cpu())
        for wrong in lies(honest).values():
            monkeypatch.setattr(task, "form", lambda *_, form=wrong: form.to("cuda"))
            with pytest.raises(InvalidArgumentError, match="places or values beyond them"):
                task.rebuild("layer.mlp", base, verify=False)
