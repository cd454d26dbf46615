"""Signs with row and column factors: against plain numpy, and what they promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import write_checkpoint

from nps_compress import Recipe, inspect, pack, unpack, verify
from nps_compress.candidates import TINY, Pruner
from nps_compress.checkpoint import open_checkpoint, pair
from nps_compress.draws import short_draw
from nps_compress.dtypes import BY_NAME, round_float32, to_float32
from nps_compress.prune import Elements, plan, select, tensor_seed
from nps_compress.rank_one import LARGEST, RankOne, rows_and_columns
from nps_compress.report import recipe_words
from nps_compress.sign_codec import level_changes
from nps_compress.signs import Scales, levels_of, scales_of
from nps_compress.task_vector import Histogram, Ranking

ROWS, COLUMNS = 400, 300
N = ROWS * COLUMNS
BF16, F32 = BY_NAME["BF16"], BY_NAME["F32"]
NOWHERE = np.empty(0, np.uint32)


@pytest.fixture
def tau(rng):
    """Rows and columns of different sizes, one of each without a change, and single zeros."""
    scale = np.exp(rng.normal(0, 0.7, (ROWS, 1)) + rng.normal(0, 0.7, (1, COLUMNS)))
    scale[7], scale[:, 11] = 0, 0
    found = rng.normal(0, 1e-3, (ROWS, COLUMNS)) * scale * (rng.random((ROWS, COLUMNS)) > 0.02)
    return found.astype(np.float32)


def scales(tau, pieces=(0, 1000, N)):
    flat = tau.reshape(-1)
    parts = [flat[a:b] for a, b in itertools.pairwise(pieces)]
    return scales_of(lambda: parts, *tau.shape)


class TestRankOne:
    def test_products_are_the_nearest_powers(self, rng):
        rows, columns = np.exp(rng.normal(0, 5, 50)), np.exp(rng.normal(0, 5, 70))
        rows[3] = columns[9] = 0
        found = RankOne.of(rows, columns).part(0, 3500).reshape(50, 70)
        assert (found[3] == 0).all()
        assert (found[:, 9] == 0).all()
        some = np.outer(rows, columns) > 0
        ratio = found[some] / np.outer(rows, columns)[some]
        assert np.abs(np.log2(ratio)).max() <= 0.5001  # a quarter of an octave each
        halves = 2 * np.log2(found[some].astype(np.float64))
        assert np.abs(halves - np.rint(halves)).max() < 1e-6

    def test_any_part(self, rng):
        matrix = RankOne.of(rng.random(13) + 0.1, rng.random(17) + 0.1)
        whole = matrix.part(0, 221)
        for start, stop in ((0, 1), (5, 5), (16, 18), (17, 34), (100, 221), (220, 221)):
            assert np.array_equal(matrix.part(start, stop), whole[start:stop])

    def test_products_of_two_and_extremes(self, rng):
        one, other = (RankOne.of(rng.random(5), rng.random(4)) for _ in range(2))
        wanted = one.part(0, 20) * other.part(0, 20)
        assert np.allclose(one.times(other).part(0, 20), wanted, rtol=1e-6)
        largest = RankOne.of([1e300, 1e-300, 0], [1e300, 1e-300, 0])
        product = largest.times(largest).part(0, 9)
        assert np.isfinite(product).all()
        assert product[0] == 2.0 ** (2 * LARGEST)
        assert list(np.flatnonzero(product == 0)) == [2, 5, 6, 7, 8]


class TestScales:
    def test_they_follow_rows_and_columns(self, tau):
        found = scales(tau)
        sizes = found.sizes.part(0, N).reshape(tau.shape) * found.gain
        size = np.abs(tau)
        wanted = np.outer(size.mean(1), size.mean(0)) / size.mean()
        assert (sizes[wanted == 0] == 0).all()
        ratio = sizes[wanted > 0] / wanted[wanted > 0]
        assert np.abs(np.log2(ratio / np.median(ratio))).max() < 0.76
        assert np.median(ratio) == pytest.approx(np.pi / 2, rel=0.1)  # of a Gaussian

    def test_the_projection_is_exact(self, tau):
        signed = scales(tau).signed(tau.reshape(-1), 0).astype(np.float64)
        flat = tau.reshape(-1).astype(np.float64)
        assert signed @ flat == pytest.approx(flat @ flat, rel=1e-5)

    def test_pieces_make_no_difference(self, tau):
        whole, parts = scales(tau, (0, N)), scales(tau, (0, 1, 299, 777, 50_000, N))
        assert np.array_equal(whole.sizes.rows, parts.sizes.rows)
        assert np.array_equal(whole.sizes.columns, parts.sizes.columns)
        assert whole.gain == pytest.approx(parts.gain, rel=1e-6)
        signed = whole.signed(tau.reshape(-1), 0)
        assert np.array_equal(whole.signed(tau.reshape(-1)[777:999], 777), signed[777:999])

    def test_zeros_get_either_sign(self, tau):
        signed = scales(tau).signed(tau.reshape(-1), 0)
        zeros = (tau.reshape(-1) == 0) & (signed != 0)
        assert zeros.sum() > 1000
        assert (signed[zeros] > 0).mean() == pytest.approx(0.5, abs=0.05)
        others = tau.reshape(-1) != 0
        assert np.array_equal(np.sign(signed[others]), np.sign(tau.reshape(-1)[others]))

    def test_nothing_changes(self):
        found = scales_of(lambda: [np.zeros(12, np.float32)], 3, 4)
        assert found.gain == 0
        assert not found.signed(np.zeros(12, np.float32), 0).any()
        assert not found.scores(None, slice(0, 12)).any()

    def test_scores_are_the_same_for_the_same_sum_of_exponents(self, rng):
        """What a reader makes a table of."""
        sizes = RankOne(*(rng.integers(-20, 20, 30).astype(np.int16) for _ in range(2)))
        importance = RankOne(*(rng.integers(-9, 9, 30).astype(np.int16) for _ in range(2)))
        found = Scales(sizes, float(np.float32(0.37))).scores(importance, slice(0, 900))
        total = np.add.outer(sizes.rows + importance.rows, sizes.columns + importance.columns)
        for exponent in np.unique(total):
            assert len(set(found[total.reshape(-1) == exponent])) == 1


class TestRule:
    def kept(self, tau, seed=1, density=0.05, base=None, dtype=F32, importance=None):
        found = scales(tau)
        scores = found.scores(importance, slice(0, N))
        histogram = Histogram.empty()
        histogram.add(scores)
        selection = plan(Ranking.of([histogram]), "signs", density)
        before = np.zeros(N, np.float32) if base is None else base
        elements = Elements(before, found.signed(tau.reshape(-1), 0), scores, NOWHERE)
        return selection, scores, *select(selection, elements, dtype, tensor_seed(seed, "w"))

    def test_where_and_how_much_say_nothing_of_the_signs(self, tau):
        """A reader knows both from factors and seed."""
        _, _, at, values = self.kept(tau)
        _, _, mirrored, negative = self.kept(-tau)
        assert np.array_equal(at, mirrored)
        zeros = tau.reshape(-1)[at] == 0
        assert np.array_equal(values[~zeros], -negative[~zeros])
        assert np.array_equal(values[zeros], negative[zeros])

    @pytest.mark.parametrize("density", [0.01, 0.2, 0.6])
    def test_density_and_values(self, tau, density):
        selection, scores, at, values = self.kept(tau, density=density)
        assert at.size == pytest.approx(density * N, rel=0.05)
        level = np.minimum(
            65536, np.rint(65536.0 * (scores.astype(np.float64) * (1 / selection.step)))
        )
        draws = np.array([short_draw(np.uint64(tensor_seed(1, "w")), i) for i in range(N)])
        assert np.array_equal(at, np.flatnonzero(draws < level))
        size = np.abs(scales(tau).signed(tau.reshape(-1), 0))[at]
        assert np.array_equal(np.abs(values), size * (65536.0 / level[at]).astype(np.float32))

    def test_expectation_is_the_signed_vector(self, tau):
        signed = scales(tau).signed(tau.reshape(-1), 0).astype(np.float64)
        total, seeds = np.zeros(N), 200
        for seed in range(seeds):
            _, scores, at, values = self.kept(tau, seed)
            total[at] += values
        some = (scores > 0.002 * scores.max()) & (signed != 0)
        off = (total / seeds - signed)[some] * np.sign(signed[some])
        error = off.std() / np.sqrt(some.sum())
        assert abs(off.mean()) < 4 * error
        assert 4 * error < 0.02 * np.abs(signed[some]).mean()

    def test_draws_are_uniform_and_independent(self):
        draws = np.array([short_draw(np.uint64(99), i) for i in range(40_000)]) / 65536
        assert np.histogram(draws, 16)[0] == pytest.approx(2500, abs=250)
        for lag in (1, 2, 3, 4, 128):
            assert abs(np.corrcoef(draws[lag:], draws[:-lag])[0, 1]) < 0.02

    def test_importance_moves_what_is_kept(self, tau):
        importance = RankOne.of(np.where(np.arange(ROWS) < 100, 4.0, 1.0), np.ones(COLUMNS))
        _, _, plain, _ = self.kept(tau)
        _, _, moved, values = self.kept(tau, importance=importance)
        top = 100 * COLUMNS
        assert (moved < top).sum() > 1.5 * (plain < top).sum()
        assert moved.size == pytest.approx(plain.size, rel=0.05)
        assert np.median(np.abs(values[moved < top])) < np.median(np.abs(values[moved > top])) / 2

    def test_in_the_dtype_of_the_base(self, tau, rng):
        base = to_float32(round_float32(rng.normal(0, 0.02, N).astype(np.float32), BF16), BF16)
        _, _, at, values = self.kept(tau, base=base, dtype=BF16)
        assert np.array_equal(values, to_float32(round_float32(values, BF16), BF16))
        assert (values != base[at]).all()


def rounded(tau):
    exponent, levels = levels_of(tau)
    return level_changes(levels, exponent)


class TestRounded:
    def test_multiples_near_the_changes(self, rng):
        tau = rng.standard_t(4, 5000).astype(np.float32) * np.float32(1e-3)
        found = rounded(tau)
        step = np.abs(found[found != 0]).min()
        assert step == pytest.approx(np.sqrt(np.square(tau).mean()) / 2, rel=0.2)
        assert np.abs(found - tau).max() <= step / 2 * 1.0001
        levels = found / step
        assert np.abs(levels - np.rint(levels)).max() < 1e-5

    def test_extremes(self):
        spike = np.zeros(100_000, np.float32)
        spike[5] = 1
        found = rounded(spike)
        assert 0 < found[5] < 1  # as far as a byte goes
        assert levels_of(spike)[1].max() == 127
        assert not rounded(np.zeros(4, np.float32)).any()
        assert rounded(np.empty(0, np.float32)).size == 0


def test_tensors_as_matrices():
    assert rows_and_columns(()) == (1, 1)
    assert rows_and_columns((5,)) == (1, 5)
    assert rows_and_columns((5, 3, 2)) == (5, 6)


@pytest.fixture
def folders(tmp_path):
    generator = torch.Generator().manual_seed(1)
    shapes = {"mlp.weight": (300, 200), "mlp.bias": (300,), "head.weight": (16, 200), "e": (0, 4)}
    assert 16 * 200 < TINY < 300 * 200
    base = {n: 0.05 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    tuned = {n: t + 0.002 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    names = ("base", "tuned")
    return [
        write_checkpoint(tmp_path / name, {n: t.bfloat16() for n, t in tensors.items()})
        for name, tensors in zip(names, (base, tuned), strict=True)
    ]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_pack(folders, tmp_path, scope):
    """Matrices as signs, small tensors rounded."""
    recipe = Recipe(prune="signs", density=0.1, scope=scope, seed=3)
    report = pack(*folders, tmp_path / "t.nps", recipe=recipe)
    verify(folders[0], tmp_path / "t.nps")
    words = recipe_words(inspect(tmp_path / "t.nps")["metadata"])
    assert words.startswith("signs of 0.1 of the changes")
    assert 0.9 < report.relative_error < 5
    stored = {t["name"]: t["codecs"] for t in inspect(tmp_path / "t.nps")["tensors"]}
    assert stored["mlp.weight"] == ["drawn", "parameters", "signs"]
    assert stored["mlp.bias"] == ["full", "parameters", "levels"]
    unpack(folders[0], tmp_path / "t.nps", tmp_path / "out")
    rebuilt = open_checkpoint(tmp_path / "out")
    pruner = Pruner(pair(*map(open_checkpoint, folders)), recipe)
    pruner.count(1 << 30)
    shared = pruner.selection()
    for name, numel in (("mlp.weight", 60_000), ("mlp.bias", 300), ("head.weight", 3200)):
        loaded = pruner.load(name)
        before, after = to_float32(*loaded[:2]), to_float32(*loaded[2:])
        words = pruner.prune(name, loaded, shared)
        assert np.array_equal(rebuilt.read(name), words)
        moved = to_float32(words, BF16) - before
        if name == "mlp.weight":
            assert np.count_nonzero(moved) == pytest.approx(0.1 * numel, rel=0.05)
        else:
            assert np.linalg.norm(moved - (after - before)) < 0.3 * np.linalg.norm(after - before)
        assert bool(pruner.factors(name)) == (name == "mlp.weight")
