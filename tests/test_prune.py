"""Selection rules against plain numpy, and the statistics they promise."""

from __future__ import annotations

import numpy as np
import pytest

from nps_compress.dtypes import BY_NAME, round_float32, to_float32
from nps_compress.prune import Weighting, plan, prune, tensor_seed, top_shares
from nps_compress.task_vector import Histogram, Ranking, keys_of

F32, BF16, F16 = BY_NAME["F32"], BY_NAME["BF16"], BY_NAME["F16"]
N = 200_000


@pytest.fixture
def vectors(rng):
    base = rng.normal(0, 0.02, N).astype(np.float32)
    return base, base + rng.standard_t(4, N).astype(np.float32) * np.float32(1e-3)


def ranking_of(base, tuned) -> Ranking:
    histogram = Histogram.empty()
    assert histogram.add(base, tuned)
    return Ranking.of([histogram])


def run(selection, base, tuned, dtype=F32, seed=1, start=0):
    return prune(
        selection, base.view(dtype.word), dtype, tuned.view(dtype.word), dtype, seed, start
    )


@pytest.mark.parametrize("density", [0.001, 0.05, 0.3, 1.0])
def test_magnitude_keeps_the_largest(vectors, density):
    base, tuned = vectors
    out = run(plan(ranking_of(base, tuned), "magnitude", density), base, tuned).view(np.float32)
    tau = np.abs(tuned - base)
    kept = out != base
    assert kept.sum() == pytest.approx(density * N, rel=0.01)
    # Only the key at the threshold may mix kept and dropped: 2^-10 of a magnitude.
    assert tau[kept].min() >= tau[~kept].max() * (1 - 2**-9) if (~kept).any() else True
    assert np.array_equal(out[kept], (base + (tuned - base))[kept])


def test_ties_are_broken_to_meet_the_density(rng):
    base = np.zeros(N, np.float32)
    tuned = np.where(rng.random(N) < 0.5, np.float32(0.25), np.float32(-0.25))
    out = run(plan(ranking_of(base, tuned), "magnitude", 0.1), base, tuned).view(np.float32)
    assert (out != 0).sum() == pytest.approx(0.1 * N, rel=0.05)
    assert set(np.unique(out)) == {-0.25, 0.0, 0.25}


def test_sampled_is_unbiased_and_meets_the_density(vectors):
    base, tuned = vectors
    tau = (tuned - base).astype(np.float64)
    selection = plan(ranking_of(base, tuned), "sampled", 0.05)
    total = np.zeros(N)
    draws = 200
    for seed in range(draws):
        out = run(selection, base, tuned, seed=tensor_seed(seed, "w")).view(np.float32)
        total += out.astype(np.float64) - base
        assert (out != base).sum() == pytest.approx(0.05 * N, rel=0.05)
    mean = total / draws
    probability = np.minimum(1, np.abs(tau) / selection.step)
    deviation = np.sqrt(tau**2 * (1 / np.maximum(probability, 1e-12) - 1) / draws)
    z = (mean - tau)[deviation > 0] / deviation[deviation > 0]
    assert abs(z.mean()) < 0.01
    assert z.std() == pytest.approx(1, rel=0.02)


def test_sampled_values_are_one_constant_with_a_sign(vectors):
    base, tuned = np.zeros(N, np.float32), vectors[1] - vectors[0]
    selection = plan(ranking_of(base, tuned), "sampled", 0.01)
    out = run(selection, base, tuned).view(np.float32)
    certain = np.abs(tuned) >= selection.step
    assert set(np.abs(out[(out != 0) & ~certain])) == {np.float32(selection.step)}
    assert np.all(np.sign(out[out != 0]) == np.sign(tuned[out != 0]))


@pytest.mark.parametrize("rule", ["magnitude", "sampled"])
def test_coefficients_reweight_subspaces(vectors, rule):
    base, tuned = np.zeros(N, np.float32), vectors[1] - vectors[0]
    ranking = ranking_of(base, tuned)
    shares, coefficients = (0.5, 0.1), (0.5, 1.0, 2.0)
    weighting = Weighting(np.array([coefficients]), np.ones((1, 3)))
    selection = plan(ranking, rule, 0.05, shares, weighting)
    out = run(selection, base, tuned).view(np.float32)
    rank = np.argsort(np.argsort(-np.abs(tuned)))
    factor = np.select([rank < 0.1 * N, rank < 0.5 * N], [2.0, 1.0], 0.5)
    weighted = np.abs(tuned * factor)
    kept = out != 0
    assert kept.sum() == pytest.approx(0.05 * N, rel=0.05)
    if rule == "magnitude":
        assert kept[np.argsort(-weighted)[: int(0.045 * N)]].mean() > 0.999
        assert np.mean(np.isclose(np.abs(out[kept]), weighted[kept])) > 0.999
    else:
        probability = np.minimum(1, weighted / selection.step)
        assert kept[probability == 1].all()
        assert kept.sum() == pytest.approx(probability.sum(), rel=0.05)


@pytest.mark.parametrize("rule", ["magnitude", "sampled"])
def test_slices_do_not_change_the_outcome(vectors, rule):
    base, tuned = vectors
    selection = plan(ranking_of(base, tuned), rule, 0.05)
    whole = run(selection, base, tuned)
    parts = [
        run(selection, base[i : i + 777], tuned[i : i + 777], start=i) for i in range(0, N, 777)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["BF16", "F16"])
def test_result_is_rounded_and_dropped_weights_are_untouched(vectors, dtype):
    base, tuned = (round_float32(v, dtype) for v in vectors)
    ranking = ranking_of(to_float32(base, dtype), to_float32(tuned, dtype))
    out = prune(plan(ranking, "magnitude", 0.1), base, dtype, tuned, dtype, 0)
    changed = out != base
    assert changed.sum() == pytest.approx(0.1 * N, rel=0.02)
    assert np.array_equal(out[changed], tuned[changed])


def test_density_above_the_changed_share_keeps_every_change():
    base = np.zeros(1000, np.float32)
    tuned = base.copy()
    tuned[::100] = 0.5
    for rule in ("magnitude", "sampled"):
        out = run(plan(ranking_of(base, tuned), rule, 0.5), base, tuned).view(np.float32)
        assert np.array_equal(out, tuned)


def test_unchanged_pair_keeps_nothing():
    base = np.ones(1000, np.float32)
    for rule in ("magnitude", "sampled"):
        out = run(plan(ranking_of(base, base), rule, 0.05), base, base)
        assert np.array_equal(out.view(np.float32), base)


def test_histogram_reports_what_is_not_finite():
    base = np.ones(10, np.float32)
    for value in (np.nan, np.inf, -np.inf):
        tuned = base.copy()
        tuned[3] = value
        assert not Histogram.empty().add(base, tuned)


def test_edges_cut_at_the_asked_ranks(vectors):
    base, tuned = vectors
    ranking = ranking_of(base, tuned)
    edges = ranking.subspace_edges((0.5, 0.1, 0.01))
    keys = keys_of(np.abs(tuned - base).astype(np.float64))
    for edge, share in zip(edges, (0.5, 0.1, 0.01), strict=True):
        assert np.mean(keys >= edge) == pytest.approx(share, rel=0.02)


def test_cuts():
    assert top_shares(4, 0.05, "equal") == (0.75, 0.5, 0.25)
    assert top_shares(8, 0.05, "tail") == (0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625)
    assert top_shares(1, 0.05, "tail") == ()


@pytest.mark.parametrize("density", [0.1, 0.15, 0.3])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["BF16", "F16"])
def test_sampled_stays_unbiased_after_rounding(dtype, density, rng):
    base = round_float32(rng.uniform(0.5, 4, N).astype(np.float32), dtype)
    move = rng.integers(-3, 4, N).astype(np.int64)  # steps between neighbouring floats
    tuned = (base.astype(np.int64) + move).astype(np.uint16)
    before, after = to_float32(base, dtype), to_float32(tuned, dtype)
    selection = plan(ranking_of(before, after), "sampled", density)
    total = np.zeros(N)
    draws = 60
    for seed in range(draws):
        out = prune(selection, base, dtype, tuned, dtype, tensor_seed(seed, "w"))
        total += to_float32(out, dtype).astype(np.float64) - before
    tau = (after - before).astype(np.float64)
    for sign in (-1, 1):  # a bias of rounding would have the sign of the change
        here = np.sign(tau) == sign
        mean = total[here].sum() / draws
        noise = np.sqrt((np.abs(tau[here]) * selection.step * 1.5).sum() / draws)
        assert abs(mean - tau[here].sum()) < 4 * noise
        assert 4 * noise < 0.01 * abs(tau[here].sum())


def test_sampled_stays_unbiased_across_a_power_of_two():
    # From the last float below 2, half a spacing above 2 rounds back to 2: half of the step.
    base, tuned = np.full(N, 0x3FFF, np.uint16), np.full(N, 0x4000, np.uint16)
    before, after = to_float32(base, BF16), to_float32(tuned, BF16)
    selection = plan(ranking_of(before, after), "sampled", 0.5)
    moved = to_float32(prune(selection, base, BF16, tuned, BF16, 1), BF16) - before
    assert moved.mean() == pytest.approx((after - before).mean(), rel=0.02)


@pytest.mark.parametrize("rule", ["magnitude", "sampled"])
def test_nothing_finite_becomes_infinite(rule):
    base = round_float32(np.full(4000, 65000, np.float32), F16)
    tuned = round_float32(np.full(4000, 65472, np.float32), F16)
    ranking = ranking_of(to_float32(base, F16), to_float32(tuned, F16))
    out = prune(plan(ranking, rule, 0.01), base, F16, tuned, F16, 0)
    assert np.isfinite(to_float32(out, F16)).all()
    wide = np.full(1000, 1e5, np.float32)
    zero = np.zeros(1000, np.float32)
    selection = plan(ranking_of(zero, wide), rule, 1.0)
    out = prune(
        selection, zero.astype(np.float16).view(np.uint16), F16, wide.view(np.uint32), F32, 0
    )
    assert np.isfinite(to_float32(out, F16)).all()


def test_rounding_inside_the_kernel_is_the_rounding_outside(rng):
    from nps_compress.prune import _rounded

    values = (rng.normal(0, 1, 20_000) * 2.0 ** rng.integers(-30, 15, 20_000)).astype(np.float32)
    for dtype, dropped in ((BF16, 16), (F16, 13), (F32, 0)):
        inside = np.array([_rounded(v, np.uint32(dropped)) for v in values], np.float32)
        assert np.array_equal(inside, to_float32(round_float32(values, dtype), dtype))
