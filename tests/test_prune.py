"""Selection rules against plain numpy, and the statistics they promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pruning import prune

from nps_compress.dtypes import BY_NAME, round_float32, to_float32
from nps_compress.prune import (
    Elements,
    Reach,
    Weighting,
    plan,
    reach,
    select,
    tensor_seed,
    top_shares,
    within,
)
from nps_compress.task_vector import Histogram, Ranking, keys_of

F32, BF16, F16 = BY_NAME["F32"], BY_NAME["BF16"], BY_NAME["F16"]
N = 200_000


@pytest.fixture
def vectors(rng):
    base = rng.normal(0, 0.02, N).astype(np.float32)
    return base, base + rng.standard_t(4, N).astype(np.float32) * np.float32(1e-3)


def ranking_of(base, tuned) -> Ranking:
    histogram = Histogram.empty()
    assert histogram.add(tuned - base)
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
        assert not Histogram.empty().add(tuned - base)


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
    from nps_compress.rounding import rounded

    values = (rng.normal(0, 1, 20_000) * 2.0 ** rng.integers(-30, 15, 20_000)).astype(np.float32)
    for dtype, dropped in ((BF16, 16), (F16, 13), (F32, 0)):
        inside = np.array([rounded(v, np.uint32(dropped)) for v in values], np.float32)
        assert np.array_equal(inside, to_float32(round_float32(values, dtype), dtype))


def at_random(base, tuned, seeds, dtype=F32, **options):
    """Moves summed over seeds, in float64, and the mean number of elements that are kept."""
    ranking = ranking_of(to_float32(base, dtype), to_float32(tuned, dtype))
    selection = plan(ranking, **options)
    before, total, kept = to_float32(base, dtype).astype(np.float64), np.zeros(base.size), 0
    for seed in range(seeds):
        out = prune(selection, base, dtype, tuned, dtype, tensor_seed(seed, "w"))
        total += to_float32(out, dtype) - before
        kept += np.count_nonzero(out != base)
    return selection, total / seeds, kept / seeds


def assert_unbiased(mean, tau, deviation, seeds):
    """As far as so many draws of this standard deviation can tell; along the sign of tau."""
    error = np.sqrt(np.square(deviation).sum() / seeds)
    assert abs((mean * np.sign(tau)).sum() - np.abs(tau).sum()) < 4 * error
    assert 4 * error < 0.02 * np.abs(tau).sum()  # or the test could not fail
    some = deviation > 0
    z = (mean - tau)[some] / deviation[some] * np.sqrt(seeds)
    assert abs(z.mean()) < 4 / np.sqrt(some.sum())
    assert np.mean(np.square(z)) == pytest.approx(1, rel=0.05)


class TestRandom:
    def test_density_values_and_expectation(self, vectors):
        base, tuned = np.zeros(N, np.float32), vectors[1] - vectors[0]
        _, mean, kept = at_random(
            base.view(np.uint32), tuned.view(np.uint32), 60, rule="random", density=0.1
        )
        assert kept == pytest.approx(0.1 * N, rel=0.01)
        assert_unbiased(mean, tuned.astype(np.float64), np.abs(tuned) * np.sqrt(1 / 0.1 - 1), 60)
        selection = plan(ranking_of(base, tuned), "random", 0.1)
        out = run(selection, base, tuned).view(np.float32)
        assert np.allclose(out[out != 0], tuned[out != 0] / 0.1, rtol=1e-6, atol=0)
        # Size plays no part: as many of the small ones are kept as of the large ones.
        small = np.abs(tuned) < np.median(np.abs(tuned))
        assert (out[small] != 0).mean() == pytest.approx((out[~small] != 0).mean(), rel=0.05)

    def test_all_is_kept_at_density_one(self, vectors):
        base, tuned = vectors
        out = run(plan(ranking_of(base, tuned), "random", 1.0), base, tuned).view(np.float32)
        assert np.array_equal(out, base + (tuned - base))

    def test_importance_and_coefficients_leave_the_choice_alone(self, vectors):
        base, tuned = np.zeros(N, np.float32), vectors[1] - vectors[0]
        plain = run(plan(ranking_of(base, tuned), "random", 0.1), base, tuned).view(np.float32)
        weighting = Weighting(np.array([[0.5, 2.0]]), np.array([[3.0, 0.1]]))
        selection = plan(ranking_of(base, tuned), "random", 0.1, (0.5,), weighting)
        out = run(selection, base, tuned).view(np.float32)
        assert np.array_equal(out != 0, plain != 0)
        ratio = out[out != 0] / plain[out != 0]
        assert set(np.round(ratio, 5)) == {0.5, 2.0}


class TestGrid:
    def test_values_are_multiples_of_the_step(self, vectors):
        base, tuned = np.zeros(N, np.float32), vectors[1] - vectors[0]
        ranking = ranking_of(base, tuned)
        selection = plan(ranking, "sampled", 0.1)
        out = run(selection, base, tuned).view(np.float32)
        levels = out.astype(np.float64) / selection.step
        assert np.abs(levels - np.rint(levels)).max() < 1e-4
        assert {1, 2, 3, 4} <= set(np.abs(np.rint(levels)).astype(int))
        certain = np.abs(tuned) >= selection.step
        kept = certain & (out != 0)
        assert (np.abs(out - tuned)[kept] < selection.step * 1.0001).all()

    def test_multiples_are_handed_over(self, vectors):
        base, tuned = np.zeros(N, np.float32), vectors[1] - vectors[0]
        selection = plan(ranking_of(base, tuned), "sampled", 0.1)
        levels = np.zeros(N, np.int16)
        everywhere = np.empty(0, np.uint32)
        elements = Elements(base, tuned, np.full(1, 2, np.float32), everywhere)
        indices, values = select(selection, elements, F32, 3, levels=levels)
        assert np.array_equal(np.flatnonzero(levels), indices)
        step = np.float32(selection.step / 2)
        assert np.array_equal(values, levels[indices].astype(np.float32) * step)

    def test_what_is_too_large_stays_at_the_largest_multiple(self):
        tuned = np.array([1e6, -1e6, 1.0], np.float32)
        selection = plan(ranking_of(np.zeros(3, np.float32), tuned), "sampled", 0.5)
        selection = replace(selection, step=1.0, unit=np.ones(1))
        levels = np.zeros(3, np.int16)
        elements = Elements(np.zeros(3, np.float32), tuned, ONE, np.empty(0, np.uint32))
        _, values = select(selection, elements, F32, 0, levels=levels)
        assert levels.tolist() == [32767, -32767, 1]
        assert values.tolist() == [32767, -32767, 1]

    def test_expectation(self, vectors):
        base, tuned = np.zeros(N, np.float32), vectors[1] - vectors[0]
        tau, seeds = tuned.astype(np.float64), 150
        words = base.view(np.uint32), tuned.view(np.uint32)
        selection, mean, kept = at_random(*words, seeds, rule="sampled", density=0.4)
        assert kept == pytest.approx(0.4 * N, rel=0.01)
        part = np.abs(tau) / selection.step % 1
        assert_unbiased(mean, tau, selection.step * np.sqrt(part * (1 - part)), seeds)
        above = np.abs(tau) > selection.step
        assert above.mean() > 0.05
        part = part[above]
        error = selection.step * np.sqrt((part * (1 - part)).sum() / seeds)
        off = ((mean - tau) * np.sign(tau))[above].sum()
        assert abs(off) < 4 * error

    @pytest.mark.parametrize("density", [0.5, 0.7, 0.85])
    def test_expectation_after_rounding(self, rng, density):
        base = round_float32(rng.uniform(0.5, 4, N).astype(np.float32), BF16)
        tuned = (base + rng.integers(-9, 10, N)).astype(np.uint16)  # floats further on
        before, after = to_float32(base, BF16), to_float32(tuned, BF16)
        tau, seeds = (after - before).astype(np.float64), 60
        selection, mean, _ = at_random(base, tuned, seeds, BF16, rule="sampled", density=density)
        for low, high in ((0, 1), (1, np.inf)):  # below the step, and above
            ratio = np.abs(tau) / selection.step
            here = (ratio > low) & (ratio <= high)
            assert here.mean() > 0.05
            off = ((mean - tau) * np.sign(tau))[here].sum()
            error = np.sqrt((0.75 * selection.step) ** 2 * here.sum() / seeds)
            assert abs(off) < 4 * error, (low, off / np.abs(tau[here]).sum())
            assert 4 * error < 0.01 * np.abs(tau[here]).sum()


class TestGroups:
    """Two groups of tensors, the second with changes ten times as large."""

    @pytest.fixture
    def taus(self, rng):
        small = rng.standard_t(4, N).astype(np.float32) * np.float32(1e-3)
        return small, rng.standard_t(4, N // 4).astype(np.float32) * np.float32(1e-2)

    def plan(self, taus, rule, density, scale, rank, **options):
        histograms = [Histogram.empty() for _ in taus]
        for histogram, tau in zip(histograms, taus, strict=True):
            assert histogram.add(tau)
        weighting = Weighting(np.array([scale]).T, np.array([rank]).T)
        return plan(Ranking.of(histograms), rule, density, (), weighting, **options)

    def kept(self, selection, taus, seed=1):
        return [
            prune(
                selection, (0 * tau).view(np.uint32), F32, tau.view(np.uint32), F32, seed, 0, ONE, g
            ).view(np.float32)
            for g, tau in enumerate(taus)
        ]

    @pytest.mark.parametrize("rule", ["magnitude", "sampled"])
    @pytest.mark.parametrize("density", [0.01, 0.1])
    def test_a_density_factor_moves_the_budget(self, taus, rule, density):
        numbers = []
        for factor in (0.25, 1.0, 4.0):
            kept = self.kept(self.plan(taus, rule, density, [1, 1], [factor, 1]), taus)
            numbers.append([np.count_nonzero(k) for k in kept])
            assert sum(numbers[-1]) == pytest.approx(density * 1.25 * N, rel=0.05)
        few, same, many = numbers
        assert few[0] < 0.7 * same[0]
        assert many[0] > 1.4 * same[0]
        plain = np.concatenate(taus)
        out = run(plan(ranking_of(0 * plain, plain), rule, density), 0 * plain, plain)
        assert np.count_nonzero(out.view(np.float32)[:N]) == pytest.approx(same[0], rel=0.05)

    def test_magnitude_keeps_values_and_the_largest_of_each(self, taus):
        kept = self.kept(self.plan(taus, "magnitude", 0.05, [1, 1], [3, 1]), taus)
        edges = []
        for tau, out in zip(taus, kept, strict=True):
            assert np.array_equal(out[out != 0], tau[out != 0])
            assert np.abs(tau[out == 0]).max() <= np.abs(out[out != 0]).min() * 1.002
            edges.append(np.abs(out[out != 0]).min())
        assert edges[1] / edges[0] == pytest.approx(3, rel=0.005)

    def test_sampled_stays_unbiased(self, taus):
        selection = self.plan(taus, "sampled", 0.05, [1, 1], [4, 1])
        seeds = 60
        totals = [np.zeros(tau.size) for tau in taus]
        for seed in range(seeds):
            kept = self.kept(selection, taus, tensor_seed(seed, "w"))
            totals = [total + out for total, out in zip(totals, kept, strict=True)]
        for rank, tau, total in zip((4, 1), taus, totals, strict=True):
            tau = tau.astype(np.float64)
            ratio = np.abs(tau) * rank / selection.step
            part = ratio % 1
            deviation = selection.step / rank * np.sqrt(part * (1 - part))
            assert_unbiased(total / seeds, tau, deviation, seeds)

    @pytest.mark.parametrize("rule", ["magnitude", "sampled", "random"])
    def test_a_scale_factor_multiplies_values(self, taus, rule):
        plain = self.kept(self.plan(taus, rule, 0.05, [1, 1], [1, 1]), taus)
        # What a scale takes from the rank, the density factor gives back.
        kept = self.kept(self.plan(taus, rule, 0.05, [2, 0.5], [0.5, 2]), taus)
        for factor, before, after in zip((2, 0.5), plain, kept, strict=True):
            assert np.allclose(after, before * factor, rtol=1e-6, atol=0)
        if rule != "random":
            scaled = self.kept(self.plan(taus, rule, 0.05, [2, 0.5], [1, 1]), taus)
            assert np.count_nonzero(scaled[0]) > 1.2 * np.count_nonzero(plain[0])

    @pytest.mark.parametrize("rule", ["magnitude", "sampled"])
    def test_the_density_is_met_whatever_the_factors(self, taus, rng, rule):
        for _ in range(8):
            factors = np.exp(rng.normal(0, 0.7, (4, 2)))
            histograms = [Histogram.empty() for _ in taus]
            for histogram, tau in zip(histograms, taus, strict=True):
                histogram.add(tau)
            if rule == "sampled":  # one step a tensor
                factors[2:] = factors[2:, :1]
            weighting = Weighting(factors[:2], factors[2:])
            density = float(np.exp(rng.uniform(-5, -0.5)))
            selection = plan(Ranking.of(histograms), rule, density, (0.03,), weighting)
            number = sum(np.count_nonzero(out) for out in self.kept(selection, taus))
            wanted = density * 1.25 * N
            assert abs(number - wanted) < 5 * np.sqrt(wanted) + 1e-3 * wanted


ONE = np.ones(1, np.float32)


class TestShortList:
    """What a search looks at instead of the whole task vector."""

    @pytest.fixture(params=[F32, BF16], ids=["F32", "BF16"])
    def elements(self, request, rng):
        base = round_float32(rng.normal(0, 0.02, N).astype(np.float32), request.param)
        before = to_float32(base, request.param)
        tuned = round_float32(
            before + rng.standard_t(3, N).astype(np.float32) * 1e-3, request.param
        )
        tau = to_float32(tuned, request.param) - before
        importance = np.exp2(np.rint(rng.normal(0, 2, N)) / 2).astype(np.float32)
        return request.param, before, tau, importance

    def candidates(self, elements, rng, rule):
        _, _, tau, importance = elements
        histogram = Histogram.empty()
        histogram.add(tau, importance)
        ranking = Ranking.of([histogram])
        for _ in range(30):
            factors = np.exp(rng.normal(0, 0.3, (2, 1, 4)))
            if rule == "sampled":
                factors[1] = factors[1, 0, 0]
            density = float(0.02 * np.exp(rng.normal(0, 0.2)))
            if rule == "random":
                density = 0.02  # not what a search varies
            yield plan(ranking, rule, density, (0.1, 0.05, 0.01), Weighting(*factors))

    @pytest.mark.parametrize("rule", ["magnitude", "sampled", "signs", "random"])
    def test_what_is_within_reach_gives_the_same_words(self, elements, rng, rule):
        dtype, before, tau, importance = elements
        seed, nothing = tensor_seed(1, "w"), np.empty(0, np.uint32)
        if rule == "signs":
            importance = np.abs(tau) * importance  # the scores themselves
        whole = Elements(before, tau, importance, nothing)
        limits: Reach | None = None
        covered = 0
        for selection in self.candidates(elements, rng, rule):
            needed = reach(selection)
            assert needed.covers(needed)
            assert needed.widened().covers(needed)
            if limits is None:
                limits = needed.widened()
                parts = [
                    within(
                        limits,
                        selection,
                        Elements(before[at], tau[at], importance[at], nothing, at.start),
                        seed,
                    )
                    for at in (slice(0, 777), slice(777, N))
                ]
                fields = (np.concatenate([getattr(p, f) for p in parts]) for f in FIELDS)
                short = Elements(*fields)
                assert len(short.at) < 0.2 * N
            if not limits.covers(needed):
                continue
            covered += 1
            indices, values = select(selection, whole, dtype, seed)
            found, alike = select(selection, short, dtype, seed)
            assert np.array_equal(short.at[found], indices)
            assert np.array_equal(alike.view(np.uint32), values.view(np.uint32))
            assert indices.size > 0.003 * N
        assert covered >= 3

    def test_a_candidate_beyond_reach_is_not_covered(self, elements):
        """And would have lost something."""
        dtype, before, tau, importance = elements
        histogram = Histogram.empty()
        histogram.add(tau, importance)
        seed, nothing = tensor_seed(1, "w"), np.empty(0, np.uint32)
        whole = Elements(before, tau, importance, nothing)
        for rule in ("magnitude", "sampled"):
            near, far = (plan(Ranking.of([histogram]), rule, d) for d in (0.01, 0.1))
            limits = reach(near).widened()
            assert reach(far).covers(reach(near))
            assert not limits.covers(reach(far))
            short = within(limits, near, whole, seed)
            assert len(select(far, short, dtype, seed)[0]) < len(select(far, whole, dtype, seed)[0])
        everything = plan(Ranking.of([histogram]), "sampled", 1.0)
        assert not limits.covers(reach(everything))
        assert reach(everything).covers(reach(far))


FIELDS = ("before", "tau", "importance", "at")
