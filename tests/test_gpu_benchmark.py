"""The GPU benchmark, on the CPU: its gate sees what is wrong, and no time of a CPU is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nps_compress import resident
from nps_compress.bench.shapes import parameters
from nps_compress.kernels import reference


@pytest.fixture(scope="module")
def gpu(benchmark):
    return benchmark("gpu")


@pytest.fixture(scope="module")
def cases(benchmark):
    return benchmark("gpu_cases")


@pytest.fixture
def model(gpu, cases):
    return cases.Model.of("tiny", gpu.TINY.layer(0), "cpu")


def nothing(*_arguments, **_options) -> None:
    """An operation that does not do its work."""


@pytest.mark.parametrize("name", ["rebuild", "exchange", "switch", "delta_matmul"])
def test_the_gate_sees_what_is_wrong(cases, monkeypatch, name):
    monkeypatch.setattr(resident, name, nothing)
    with pytest.raises(cases.WrongResultError, match=f"{name}|undo"):
        cases.check_all("cpu")


def test_the_gate_sees_a_product_that_is_slightly_wrong(cases, monkeypatch):
    right = resident.delta_matmul

    def wrong(tasks, number, x, y, starts):
        right(tasks, number, x, y, starts)
        y *= 1.001

    monkeypatch.setattr(resident, "delta_matmul", wrong)
    with pytest.raises(cases.WrongResultError, match="delta_matmul is off by"):
        cases.check_all("cpu")


@pytest.mark.parametrize("undo", [False, True])
def test_nothing_is_timed_that_is_wrong_at_full_size(gpu, cases, model, monkeypatch, undo):
    right = resident.exchange

    def half(changes, old=None, *, undo_is=undo, **options):
        if options.get("undo", False) is not undo_is:
            right(changes, old, **options)

    monkeypatch.setattr(resident, "exchange", half)
    rows = gpu.measure_changes(gpu.Clock("cpu"), model, 0.1, "signs", 1, False)
    with pytest.raises(cases.WrongResultError, match="undoing" if undo else "exchange differs"):
        next(rows)


def test_a_run_without_a_card_measures_all_and_keeps_nothing(gpu, monkeypatch, tmp_path, capsys):
    found = []
    measure = gpu.measure

    def kept(*arguments):
        for row in measure(*arguments, tmp_path):
            found.append(row)
            yield row

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "measure", kept)
    monkeypatch.setattr(gpu, "RESULT", tmp_path / "gpu.csv")
    gpu.main(["--densities", "0.05"])
    said = capsys.readouterr().out
    assert "no time is of a GPU" in said
    assert "nothing was written" in said
    assert not list(tmp_path.iterdir())
    assert all(set(row) <= set(gpu.FIELDS) and float(row["seconds"]) > 0 for row in found)
    ways = {
        section: {r["way"] for r in found if r["section"] == section} for section in gpu.SECTIONS
    }
    changed = {"copy", "rebuild", "exchange", "switch", "switch from host", "1 bit"}
    assert ways["changes"] == changed | {"index_put_", "masked_scatter_", "NaN patch"}
    assert {f"load {state}" for state in ("cold", "warm")} < ways["load"]
    assert {"decode", "copy", "expand"} < ways["load"]
    assert ways["matmul"] == {"base", "delta_matmul", "dense", "LoRA 16"}
    assert {row["tasks"] for row in found if row["section"] == "matmul"} == {1, 4, 16}


def test_a_wrong_result_ends_the_run(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resident, "switch", nothing)
    with pytest.raises(SystemExit, match="nothing more is timed"):
        gpu.main(["--densities", "0.05"])


def test_bytes_are_those_of_the_kernels_readme(cases, model):
    """64 x 64 and smaller matrices, 16 elements a sector."""
    left, right = (cases.task(model, 0.25, kind, 1) for kind in ("words", "signs"))
    kept = [sum(form.nnz for form in one.forms if form) for one in (left, right)]
    assert kept[0] == kept[1] == pytest.approx(0.25 * model.params, rel=0.1)
    dense = 2 * model.params
    assert cases.rebuild_bytes(model, left) == 2 * dense + left.nbytes
    share = 1 - 0.75**16
    assert cases.exchange_bytes(model, left, 0.25) == pytest.approx(
        left.nbytes + 2 * share * dense + 2 * kept[0]
    )
    both = 1 - 0.75**32
    assert cases.switch_bytes(model, left, right, 0.25) == pytest.approx(
        left.nbytes + right.nbytes + 2 * both * dense + 4 * kept[0]
    )
    numbers = sum(
        form.places.bits.nbytes + form.places.counts.nbytes for form in right.forms if form
    )
    assert cases.switch_bytes(model, right, left, 0.25) == pytest.approx(
        numbers + left.nbytes + 2 * both * dense + 4 * kept[0]
    )


def test_made_tasks_have_the_density_that_is_said(cases):
    rng = np.random.default_rng(0)
    for density in (0.0, 0.002, 0.2, 1.0):
        at = cases.positions(rng, 1_000_000, density)
        assert (np.diff(at) > 0).all()
        assert at.size == pytest.approx(1_000_000 * density, rel=0.1)
        assert not at.size or (at[0] >= 0 and at[-1] < 1_000_000)


def test_other_ways_of_products_compute_them(cases):
    weight = (0.1 * torch.randn(24, 40)).to(torch.bfloat16)
    forms = list(cases.random_forms([(24, 40)], 0.1, "signs", 1).values()) * 2
    batch = cases.Batch.of(weight, forms, 6)
    batch.check()
    batch.dense()()
    product = (batch.x.double() @ weight.double().T).float()
    assert torch.allclose(batch.y.float(), product, rtol=0.02, atol=0.05)
    batch.ours()
    wanted = product.double()
    reference.delta_matmul(batch.tasks, 0, batch.x, wanted, batch.starts)
    assert torch.allclose(batch.y.double(), wanted, rtol=0.02, atol=0.05)


def test_the_lora_beside_is_one(cases):
    forms = list(cases.random_forms([(24, 40)], 0.1, "signs", 1).values()) * 2
    batch = cases.Batch.of(torch.zeros(24, 40, dtype=torch.bfloat16), forms, 6)
    torch.manual_seed(5)
    batch.lora(8)()
    torch.manual_seed(5)
    down, up = (0.01 * torch.randn(2, *shape, dtype=torch.bfloat16) for shape in ((40, 8), (8, 24)))
    wanted = torch.bmm(torch.bmm(batch.x.view(2, 3, 40).float(), down.float()), up.float())
    assert torch.allclose(batch.y.float(), wanted.view(6, 24), rtol=0.02, atol=2e-5)
    assert wanted.abs().max() > 1e-3


def test_the_models_are_those_of_public_shapes(gpu):
    assert parameters(gpu.shapes.MODELS["llama-8b"].tensors()) == pytest.approx(8.03e9, rel=0.01)
    assert set(gpu.MODELS) == {"llama-1b", "llama-8b", "llama-70b"}
