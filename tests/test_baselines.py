"""The published baselines do what their papers say, at the bits they claim."""

from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT


def _load():
    path = ROOT / "benchmarks" / "baselines.py"
    spec = importlib.util.spec_from_file_location("baselines", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["baselines"] = module
    spec.loader.exec_module(module)
    return module


baselines = _load()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from several, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).float()


def model(shapes: dict[str, tuple[int, ...]], seed: int = 0, scale: float = 2e-3):
    """A base and a fine-tune at bfloat16's values, float32; some changes are zero."""
    generator = torch.Generator().manual_seed(seed)
    base, tuned = {}, {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        base[name] = bf16(torch.randn(shape, generator=generator) * 0.05)
        tuned[name] = bf16(base[name] + noise * noise.abs() * scale)
    return base, tuned


SHAPES = {"up": (96, 64), "norm": (64,), "down": (48, 128), "scale": (), "conv": (8, 4, 3, 3)}


@pytest.fixture(scope="module")
def pair():
    return model(SHAPES)


METHODS = {
    "magnitude": lambda b, t, n: baselines.magnitude(b, t, n, 0.1),
    "magnitude x1.5, 4 bits": lambda b, t, n: baselines.magnitude(b, t, n, 0.1, 1.5, 4),
    "fixed nps": lambda b, t, n: baselines.fixed_nps(b, t, n, 0.1, [0.5, 1.0, 2.0]),
    "dare": lambda b, t, n: baselines.dare(b, t, n, 0.1, 3),
    "dare, 4 bits": lambda b, t, n: baselines.dare(b, t, n, 0.1, 3, 4),
    "della": lambda b, t, n: baselines.della(b, t, n, 0.1, 3, 0.12),
    "della, 4 bits": lambda b, t, n: baselines.della(b, t, n, 0.1, 3, value_bits=4),
    "bitdelta": lambda b, t, n: baselines.bitdelta(b, t, n),
    "bitdelta per row": lambda b, t, n: baselines.bitdelta(b, t, n, "row"),
    "low rank": lambda b, t, n: baselines.low_rank(b, t, n, 3.0),
    "low rank by error": lambda b, t, n: baselines.low_rank(b, t, n, 3.0, "error"),
    "compeft": lambda b, t, n: baselines.compeft(b, t, n, 0.1),
    "compeft, alpha": lambda b, t, n: baselines.compeft(b, t, n, 0.1, 3.0),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_rounds_and_leaves_its_arguments_alone(pair, method):
    base, tuned = ({k: v.clone() for k, v in part.items()} for part in pair)
    names = [name for name in SHAPES if name != "down"]
    result = METHODS[method](base, tuned, names)
    assert list(result.weights) == names
    for name, weight in result.weights.items():
        assert weight.shape == base[name].shape
        assert weight.dtype == torch.float32
        assert torch.equal(weight, bf16(weight))
        assert not torch.equal(weight, base[name]) or name == "scale"
    assert all(torch.equal(base[k], pair[0][k]) for k in SHAPES)
    assert all(torch.equal(tuned[k], pair[1][k]) for k in SHAPES)
    assert result.bits_per_param == result.bits / sum(base[n].numel() for n in names)
    again = METHODS[method](base, tuned, names)
    assert again.bits == result.bits
    assert all(torch.equal(again.weights[n], result.weights[n]) for n in names)


def test_rounding_is_to_nearest_even():
    # Halfway between two bfloat16 neighbours of 1: down to 1 (even), up to 1 + 2^-6 (even).
    base = {"w": torch.tensor([[1.0, 1.0 + 2**-7]])}
    tuned = {"w": base["w"] + 2**-8}
    result = baselines.magnitude(base, tuned, ["w"], 1.0)
    assert result.weights["w"].tolist() == [[1.0, 1.0 + 2**-6]]


@pytest.mark.parametrize("method", METHODS)
def test_differences_that_cannot_be_compressed_are_refused(pair, method):
    for bad in (torch.full(SHAPES["up"], math.nan), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="up: "):
            METHODS[method](pair[0], {**pair[1], "up": bad}, ["norm", "up"])


# Selection by magnitude


def flat(tensors, names):
    return torch.cat([tensors[name].reshape(-1) for name in names])


@pytest.mark.parametrize("density", [0.0005, 0.05, 0.3, 0.9])
def test_magnitude_keeps_exactly_the_largest_of_all_tensors(density):
    # Base zero, so that no rounding hides a survivor.
    _, tuned = model(SHAPES, 1)
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    names = list(SHAPES)
    result = baselines.magnitude(base, tuned, names, density)
    tau, out = flat(tuned, names), flat(result.weights, names)
    assert (tau != 0).all()
    kept = out != 0
    assert int(kept.sum()) == round(density * tau.numel())
    assert torch.equal(out[kept], tau[kept])
    assert tau[kept].abs().min() >= tau[~kept].abs().max()


def test_ties_are_spread_and_zeros_never_kept():
    tuned = {"a": torch.full((100, 10), 0.5), "b": torch.full((1000,), -0.5)}
    tuned["b"][::2] = 0.0
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    out = baselines.magnitude(base, tuned, ["a", "b"], 0.3).weights
    assert int((out["a"] != 0).sum()) + int((out["b"] != 0).sum()) == 600
    assert int((out["a"] != 0).sum()) == 400
    assert int((out["a"][:50] != 0).sum()) == 200
    everything = baselines.magnitude(base, tuned, ["a", "b"], 1.0)
    masks = [torch.ones(100, 10, dtype=torch.bool), torch.arange(1000) % 2 == 1]
    assert all(torch.equal(everything.weights[name], tuned[name]) for name in tuned)
    assert everything.bits == 16 * 1500 + sum(map(baselines.position_bits, masks))


def test_rescale_multiplies_every_survivor():
    _, tuned = model(SHAPES, 1)
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    once = baselines.magnitude(base, tuned, ["up", "down"], 0.1)
    twice = baselines.magnitude(base, tuned, ["up", "down"], 0.1, 1.75)
    for name in ("up", "down"):
        assert torch.equal(twice.weights[name], bf16(once.weights[name] * 1.75))
    assert once.bits == twice.bits


def test_equal_coefficients_are_magnitude_times_one_factor(pair):
    # By a power of two, so that the product keeps the order of the magnitudes exactly.
    names = list(SHAPES)
    control = baselines.fixed_nps(*pair, names, 0.07, [2.0] * 8)
    plain = baselines.magnitude(*pair, names, 0.07, 2.0)
    assert control.bits == plain.bits
    assert all(torch.equal(control.weights[n], plain.weights[n]) for n in names)


def test_fixed_coefficients_reweight_subspaces_of_equal_count_before_the_cut():
    generator = torch.Generator().manual_seed(5)
    # Distinct magnitudes that bfloat16 holds, as is every product with a power of two.
    values = torch.arange(128, 228).float() * (
        torch.randint(0, 2, (100,), generator=generator) - 0.5
    )
    tuned = {"w": values[torch.randperm(100, generator=generator)].reshape(10, 10)}
    base = {"w": torch.zeros(10, 10)}
    result = baselines.fixed_nps(base, tuned, ["w"], 0.25, [8.0, 1.0, 1.0, 0.25])
    tau = tuned["w"].reshape(-1)
    smallest = tau.abs().argsort()[:25]
    expected = torch.zeros(100)
    expected[smallest] = tau[smallest] * 8
    assert torch.equal(result.weights["w"].reshape(-1), expected)


# Random dropping


def test_dare_meets_the_density_and_divides_by_it():
    _, tuned = model({"w": (400, 500)}, 2)
    base = {"w": torch.zeros(400, 500)}
    for density in (0.25, 0.01):
        out = baselines.dare(base, tuned, ["w"], density, 7).weights["w"]
        kept = out != 0
        spread = math.sqrt(density * (1 - density) * kept.numel())
        assert abs(int(kept.sum()) - density * kept.numel()) < 5 * spread
        assert torch.equal(out[kept], bf16(tuned["w"][kept] / density))


def test_draws_depend_on_seed_and_name():
    tensor = torch.ones(100, 100)
    base, tuned = (dict.fromkeys("ab", tensor * scale) for scale in (0.0, 1.0))
    first = baselines.dare(base, tuned, ["a", "b"], 0.5, 1).weights
    other = baselines.dare(base, tuned, ["b"], 0.5, 2).weights
    alone = baselines.dare(base, tuned, ["b"], 0.5, 1).weights
    assert torch.equal(first["b"], alone["b"])
    for left, right in ((first["a"], first["b"]), (first["b"], other["b"])):
        assert abs(int((left == right).sum()) - 5000) < 250


def unbiased(sample, tau, probability, draws=400):
    """The mean of the samples against tau, in standard errors; tau: [n], without zeros."""
    mean = sum(sample(seed).reshape(-1).double() for seed in range(draws)) / draws
    ratio = mean / tau.reshape(-1).double() - 1
    variance = (1 / probability.reshape(-1).double() - 1) / draws
    n = ratio.numel()
    # Each element within its own error, and all of them, and each quarter by magnitude, as one.
    assert float((ratio**2 / variance).mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / n) + 0.05)
    for part in (torch.arange(n), *tau.reshape(-1).abs().argsort().chunk(4)):
        error = math.sqrt(float(variance[part].mean()) / part.numel())
        assert error < 0.01
        assert abs(float(ratio[part].mean())) < 4 * error


def test_dare_is_unbiased():
    _, tuned = model({"w": (64, 96)}, 3)
    base = {"w": torch.zeros(64, 96)}
    unbiased(
        lambda seed: baselines.dare(base, tuned, ["w"], 0.2, seed).weights["w"],
        tuned["w"],
        torch.full((64, 96), 0.2),
    )


def test_della_is_unbiased():
    _, tuned = model({"w": (64, 96)}, 4)
    base = {"w": torch.zeros(64, 96)}
    unbiased(
        lambda seed: baselines.della(base, tuned, ["w"], 0.2, seed, 0.2).weights["w"],
        tuned["w"],
        baselines.keep_probabilities(tuned["w"], 0.2, 0.2),
    )


def test_della_keeps_with_a_probability_linear_in_the_rank_within_the_row():
    _, tuned = model({"w": (2000, 11)}, 5)
    # Rows of very different scales: only the rank within the row may count.
    tuned["w"] *= 2.0 ** (torch.arange(2000) % 7).unsqueeze(1)
    base = {"w": torch.zeros(2000, 11)}
    kept = torch.zeros(2000, 11)
    draws = 40
    for seed in range(draws):
        kept += baselines.della(base, tuned, ["w"], 0.3, seed, 0.4).weights["w"] != 0
    by_rank = kept.gather(1, tuned["w"].abs().argsort(1)).mean(0) / draws
    expected = torch.linspace(0.1, 0.5, 11)
    assert (by_rank.diff() > 0).all()
    assert torch.allclose(by_rank, expected, atol=5 * math.sqrt(0.25 / (2000 * draws)))
    assert float(kept.mean() / draws) == pytest.approx(0.3, abs=0.004)


@pytest.mark.parametrize("shape", [(7, 30), (30,), (5, 1), (), (4, 3, 2)])
def test_della_probabilities_average_to_the_density(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    keep = baselines.keep_probabilities(delta, 0.2, 0.3)
    rows = keep.reshape(shape[0] if len(shape) > 1 else 1, -1)
    assert keep.shape == delta.shape
    assert torch.allclose(rows.mean(1), torch.tensor(0.2))
    if rows.shape[1] > 1:
        assert torch.allclose(rows.amin(1), torch.tensor(0.05), atol=1e-6)
        assert torch.allclose(rows.amax(1), torch.tensor(0.35), atol=1e-6)


@pytest.mark.parametrize(("density", "window"), [(0.2, 0.2), (0.9, 0.1), (1.0, 0.0)])
def test_della_window_by_default(pair, density, window):
    found = baselines.della(*pair, ["up"], density, 3).weights["up"]
    same = baselines.della(*pair, ["up"], density, 3, window).weights["up"]
    assert torch.allclose(found, same, rtol=2**-7)
    assert not torch.equal(found, baselines.della(*pair, ["up"], 0.5, 3, 0.0).weights["up"])


@pytest.mark.parametrize(("density", "window"), [(0.1, 0.2), (0.9, 0.3), (0.5, -0.1)])
def test_della_refuses_impossible_probabilities(pair, density, window):
    with pytest.raises(ValueError, match="leave"):
        baselines.della(*pair, ["up"], density, 0, window)


# One bit


def squared_error(left, right):
    return float((left.double() - right.double()).square().sum())


@pytest.mark.parametrize("per", ["matrix", "row"])
def test_bitdelta_takes_every_sign_and_the_scale_of_least_squared_error(per):
    _, tuned = model({"w": (32, 200)}, 6)
    tuned["w"] *= torch.linspace(1, 3, 32).unsqueeze(1)
    tuned["w"][:, ::7] = 0.0
    base = {"w": torch.zeros(32, 200)}
    out = baselines.bitdelta(base, tuned, ["w"], per).weights["w"]
    assert torch.equal(out < 0, tuned["w"] < 0)
    parts = zip(out, tuned["w"], strict=True) if per == "row" else [(out, tuned["w"])]
    for found, wanted in parts:
        assert found.abs().unique().numel() == 1
        least = squared_error(found, wanted)
        # bfloat16 may put the scale up to 2^-9 off the optimum.
        assert all(squared_error(found * (1 + d), wanted) > least for d in (-0.01, 0.01))
    scales = out.abs()[:, 0].unique().numel()
    assert scales == 1 if per == "matrix" else scales > 20


def test_bitdelta_costs_and_exact_tensors(pair):
    base, tuned = pair
    names = list(SHAPES)
    elements = 96 * 64 + 48 * 128 + 8 * 36
    per_matrix = baselines.bitdelta(base, tuned, names)
    assert per_matrix.bits == elements + 16 * 3 + 16 * (64 + 1)
    per_row = baselines.bitdelta(base, tuned, names, "row")
    assert per_row.bits == elements + 16 * (96 + 48 + 8) + 16 * (64 + 1)
    with_exact = baselines.bitdelta(base, tuned, names, exact=["up"])
    assert with_exact.bits == per_matrix.bits + 15 * 96 * 64 - 16
    for result, exact in ((per_matrix, ["norm", "scale"]), (with_exact, ["norm", "scale", "up"])):
        assert [n for n in names if torch.equal(result.weights[n], tuned[n])] == [
            n for n in names if n in exact
        ]


def test_compeft_is_ternary_with_one_scalar_for_all():
    _, tuned = model(SHAPES, 1)
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    names = list(SHAPES)
    tau = flat(tuned, names)
    count = round(0.1 * tau.numel())
    found = baselines.compeft(base, tuned, names, 0.1)
    out = flat(found.weights, names)
    kept = out != 0
    assert int(kept.sum()) == count
    assert tau[kept].abs().min() >= tau[~kept].abs().max()
    assert torch.equal(out[kept].sign(), tau[kept].sign())
    assert out[kept].abs().unique().tolist() == [float(bf16(tau[kept].abs().mean()))]
    least = squared_error(out, tau)
    assert all(squared_error(out * (1 + d), tau) > least for d in (-0.01, 0.01))
    published = flat(baselines.compeft(base, tuned, names, 0.1, 3.0).weights, names)
    assert published[kept].abs().unique().tolist() == [float(bf16(3.0 * tau.std(correction=0)))]
    # Cost, from the published formula per tensor: entropy of the ternary symbols, and the scalar.
    expected = 16.0
    for name in names:
        k, n = int((found.weights[name] != 0).sum()), tuned[name].numel()
        symbols = [k / n / 2, k / n / 2, 1 - k / n]
        expected += n * -sum(p * math.log2(p) for p in symbols if p)
    overhead = sum(1 + math.log2(tensor.numel() + 1) for tensor in tuned.values())
    assert found.bits <= expected + overhead + 1e-6
    assert found.bits == pytest.approx(expected + overhead, rel=0.02)
    positions = sum(baselines.position_bits(weight != 0) for weight in found.weights.values())
    assert found.bits == pytest.approx(positions + count + 16)


# Low rank


@pytest.mark.parametrize("share", ["equal", "error"])
@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (30, 6, 15)])
def test_low_rank_has_the_error_of_the_truncated_svd(shape, share):
    _, tuned = model({"w": shape}, 8, scale=1.0)
    base = {"w": torch.zeros(shape)}
    matrix = tuned["w"].reshape(shape[0], -1).double().numpy()
    values = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 5, 17):
        cost = 16 * rank * sum(matrix.shape) + 16
        budget = (cost + 1) / matrix.size
        result = baselines.low_rank(base, tuned, ["w"], budget, share)
        assert result.bits == cost
        found = result.weights["w"].reshape(matrix.shape).double().numpy()
        best = math.sqrt((values[rank:] ** 2).sum())
        assert best * (1 - 1e-3) <= np.linalg.norm(found - matrix) <= best * (1 + 2e-3)
        assert baselines.low_rank(base, tuned, ["w"], (cost - 1) / matrix.size, share).bits < cost


def test_low_rank_finds_what_is_low_rank_and_spends_no_more_on_it():
    generator = torch.Generator().manual_seed(9)
    left, right = (torch.randn(n, 3, generator=generator) for n in (70, 50))
    tuned = {"w": left @ right.T}
    result = baselines.low_rank({"w": torch.zeros(70, 50)}, tuned, ["w"], 16.0)
    assert result.bits == 16 * 3 * 120 + 16
    assert torch.linalg.norm(result.weights["w"] - tuned["w"]) < 0.006 * torch.linalg.norm(
        tuned["w"]
    )


@pytest.mark.parametrize("budget", [0.3, 0.7, 1.5, 4.0])
@pytest.mark.parametrize("share", ["equal", "error"])
def test_low_rank_stays_within_the_budget_and_uses_it(budget, share):
    shapes = {"a": (200, 60), "norm": (20,), "b": (64, 64), "c": (50, 300)}
    base, tuned = model(shapes, 10)
    names = list(shapes)
    numel = sum(math.prod(shape) for shape in shapes.values())
    result = baselines.low_rank(base, tuned, names, budget, share)
    smallest_step = 16 * (64 + 64)
    assert budget * numel - smallest_step < result.bits <= budget * numel
    assert torch.equal(result.weights["norm"], tuned["norm"])


def test_equal_ranks_are_equal_in_bits_per_element():
    shapes = {"large": (200, 200), "wide": (60, 40)}
    _, tuned = model(shapes, 11, scale=1.0)
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    ranks = {"large": 25, "wide": 6}  # 4 bits an element each
    cost = sum(16 * ranks[name] * sum(shapes[name]) + 16 for name in shapes)
    result = baselines.low_rank(base, tuned, list(shapes), cost / (40_000 + 2400))
    assert result.bits == cost
    for name, rank in ranks.items():
        values = torch.linalg.svdvals(tuned[name].double())
        error = torch.linalg.norm(result.weights[name].double() - tuned[name])
        assert float(error) == pytest.approx(float(torch.linalg.norm(values[rank:])), rel=2e-3)


def test_ranks_by_error_leave_less_error_than_equal_ones():
    shapes = {"large": (80, 80), "small": (80, 80)}
    base, tuned = model(shapes, 11)
    tuned["large"] = base["large"] + (tuned["large"] - base["large"]) * 8
    errors = {}
    for share in ("equal", "error"):
        result = baselines.low_rank(base, tuned, list(shapes), 4.0, share)
        errors[share] = sum(squared_error(result.weights[n], tuned[n]) for n in shapes)
    assert errors["error"] < 0.9 * errors["equal"]


def test_low_rank_refuses_a_budget_below_what_is_exact(pair):
    with pytest.raises(ValueError, match="alone take"):
        baselines.low_rank(*pair, ["up", "norm"], 0.1)


# Costs


def entropy(k: int, n: int) -> float:
    return -sum(c * math.log2(c / n) for c in (k, n - k) if c)


def test_position_bits_are_the_empirical_entropy():
    generator = torch.Generator().manual_seed(12)
    mask = torch.rand(300, 200, generator=generator) < 0.05
    k, n = int(mask.sum()), mask.numel()
    found = baselines.position_bits(mask)
    assert found == pytest.approx(entropy(k, n) + math.log2(n + 1) + 1)
    # Enough for an enumerative code of that count, and close to the random mask's formula.
    log2_binomial = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    assert log2_binomial <= found <= log2_binomial + 25
    assert baselines.random_position_bits(n, 0.05) == pytest.approx(
        n * -(0.05 * math.log2(0.05) + 0.95 * math.log2(0.95))
    )
    assert found == pytest.approx(baselines.random_position_bits(n, 0.05), rel=0.05)


def test_position_bits_see_rows_that_are_empty():
    mask = torch.zeros(300, 200, dtype=torch.bool)
    mask[::10] = torch.rand(30, 200, generator=torch.Generator().manual_seed(13)) < 0.5
    by_row = sum(entropy(int(row.sum()), 200) + math.log2(201) for row in mask)
    assert baselines.position_bits(mask) == pytest.approx(by_row + 1)
    assert by_row < 0.6 * entropy(int(mask.sum()), mask.numel())


@pytest.mark.parametrize("shape", [(), (9,), (3, 4)])
def test_positions_of_an_empty_or_full_mask_cost_only_their_count(shape):
    for mask in (torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)):
        assert baselines.position_bits(mask) == pytest.approx(1 + math.log2(mask.numel() + 1))


def test_costs_of_the_sparse_methods_recomputed():
    # All changes are far above the base's rounding, so what was kept shows in the result.
    generator = torch.Generator().manual_seed(14)
    base, tuned = model({"a": (80, 100), "b": (3000,)}, 14)
    for name in base:
        change = torch.randn(base[name].shape, generator=generator)
        tuned[name] = bf16(base[name] + 4 * change.sign() + change)
    tuned["a"][:20] = base["a"][:20]
    names = ["a", "b"]

    def positions(result):
        return sum(baselines.position_bits(result.weights[n] != base[n]) for n in names)

    def kept(result):
        return sum(int((result.weights[n] != base[n]).sum()) for n in names)

    sparse = baselines.magnitude(base, tuned, names, 0.05)
    assert kept(sparse) == round(0.05 * 11_000)
    assert sparse.bits == pytest.approx(positions(sparse) + 16 * kept(sparse))
    assert sparse.bits <= sum(
        baselines.random_position_bits(base[n].numel(), float((w != base[n]).double().mean()))
        + math.log2(base[n].numel() + 1)
        + 1
        for n, w in sparse.weights.items()
    ) + 16 * kept(sparse)
    della = baselines.della(base, tuned, names, 0.05, 1)
    assert della.bits == pytest.approx(positions(della) + 16 * kept(della))
    dare = baselines.dare(base, tuned, names, 0.05, 1)
    # DARE also pays for the zeros that it draws: 2,000 of the elements are unchanged.
    drawn = (dare.bits - 64) / 16
    assert drawn - kept(dare) == pytest.approx(0.05 * 2000, abs=50)
    assert drawn == pytest.approx(0.05 * 11_000, abs=5 * math.sqrt(0.05 * 11_000))
    assert baselines.dare(base, tuned, names, 1.0, 1).bits == 64 + 16 * 11_000
    short = baselines.dare(base, tuned, names, 0.05, 1, 4)
    assert short.bits <= 64 + 4 * drawn + 2 * (8 * 16 + 1)


# The quantiser of 4 bits


def test_quantiser_has_signs_and_eight_magnitudes_of_least_error():
    generator = torch.Generator().manual_seed(15)
    values = torch.randn(20_000, generator=generator)
    values *= values.abs()
    found, bits = baselines.quantise(values)
    levels = found.abs().unique()
    assert levels.numel() == 8
    assert torch.equal(levels, bf16(levels))
    assert torch.equal(found < 0, values < 0)
    # The conditions of Lloyd's optimum: nearest level, and each level the mean of its values.
    nearest = (values.abs().unsqueeze(1) - levels).abs().amin(1)
    assert torch.allclose((values.abs() - found.abs()).abs(), nearest, atol=1e-6)
    for level in levels:
        mean = float(values[found.abs() == level].abs().mean())
        assert float(level) == pytest.approx(mean, rel=0.01)
    uniform = (torch.arange(8) + 0.5) / 8 * values.abs().max()
    assert float(nearest.square().sum()) < 0.5 * float(
        (values.abs().unsqueeze(1) - uniform).abs().amin(1).square().sum()
    )
    _, counts = found.unique(return_counts=True)
    share = counts.double() / values.numel()
    coded = -float((share * share.log2()).sum()) * values.numel() + 16 * math.log2(20_001)
    assert bits == pytest.approx(8 * 16 + 1 + min(4 * 20_000, coded))
    assert bits < 4 * 20_000


def test_quantiser_of_few_or_equal_values():
    for values in ([], [0.5], [0.0, 0.0], [-0.25] * 50, [0.5, -0.5, 0.25]):
        tensor = torch.tensor(values)
        found, bits = baselines.quantise(tensor)
        assert torch.equal(found, tensor)
        assert 0 <= bits <= 8 * 16 + 1 + 4 * len(values)


def test_four_bit_dare_stays_close_to_sixteen(pair):
    base, tuned = pair
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    change = {name: tuned[name] - base[name] for name in base}
    fine = baselines.dare(zero, change, ["up"], 0.5, 1)
    coarse = baselines.dare(zero, change, ["up"], 0.5, 1, 4)
    assert squared_error(coarse.weights["up"], fine.weights["up"]) < 0.04 * squared_error(
        fine.weights["up"], zero["up"]
    )
    # The levels are means, so that no quarter of the sum is lost.
    ratio = float(coarse.weights["up"].abs().sum() / fine.weights["up"].abs().sum())
    assert ratio == pytest.approx(1, abs=0.003)
    assert coarse.bits < 0.27 * fine.bits
