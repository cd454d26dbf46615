"""Figures by example: against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nps_compress.divergence import SMALL_VOCABULARY, TOP, divergence, reference
from nps_compress.measured import Measured, join, spearman


def measured(sums, counts, how="mean", targets=None):
    targets = None if targets is None else np.array(targets, np.float64)
    return Measured(np.array(sums, np.float64), np.array(counts), how, targets)


def test_means_and_perplexity():
    assert measured([-1, -3, -2], [1, 2, 1]).score == pytest.approx(-1.5)
    found = measured([-math.log(2), -3 * math.log(4)], [1, 3], "perplexity")
    assert found.score == pytest.approx(-(2 ** (7 / 4)))
    assert measured([-1e6], [1], "perplexity").score == -math.inf
    assert math.isnan(measured([0], [0]).score)
    assert math.isnan(measured([math.nan], [1], "perplexity").score)


def test_spearman():
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    assert spearman(np.arange(5.0), np.array([20, 10, 40, 30, 50.0])) == pytest.approx(0.8)
    assert spearman(np.array([1, 2, 9.0]), np.array([-3, -2, 7.0])) == pytest.approx(1)
    # Ties share their mean rank: 1.5 1.5 3 against 1 2 3.
    assert spearman(np.array([5, 5, 6.0]), np.arange(3.0)) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(spearman(np.ones(3), np.arange(3.0)))
    assert math.isnan(spearman(np.array([1, math.nan]), np.arange(2.0)))
    assert measured([1, 3, 2], [1, 1, 1], "spearman", [1, 2, 3]).score == pytest.approx(0.5)


@pytest.mark.parametrize(("how", "targets"), [("perplexity", None), ("spearman", [4, 1, 2, 3])])
def test_parts_and_samples(how, targets):
    whole = measured([-1, -2, -4, -3], [1, 2, 3, 1], how, targets)
    joined = join(whole.take(np.array(part)) for part in ([0], [1, 2], [3]))
    assert joined.score == whole.score
    assert joined.how == how
    twice = whole.take(np.array([0, 1, 2, 3] * 2))
    assert twice.score == pytest.approx(whole.score)
    assert len(twice.counts) == 8


class TestDivergence:
    """Of a small vocabulary exact, of a large one a lower bound."""

    def logits(self, classes, scale=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(5, classes, generator=generator, dtype=torch.float64) * scale
        return logits.log_softmax(-1).float()

    def exact(self, p, q):
        return (p.double().exp() * (p.double() - q.double())).sum(-1)

    def test_small(self):
        p, q = self.logits(SMALL_VOCABULARY), self.logits(SMALL_VOCABULARY, seed=1)
        assert torch.allclose(divergence(reference(p), q).double(), self.exact(p, q), rtol=1e-4)

    @pytest.mark.parametrize("scale", [1.0, 5.0])
    def test_large(self, scale):
        p, q = self.logits(4000, scale), self.logits(4000, scale, seed=1)
        kept = reference(p)
        assert kept.likely.shape == (5, TOP)
        found, exact = divergence(kept, q).double(), self.exact(p, q)
        assert (found <= exact * 1.0001).all()
        assert (found > 0).all()
        if scale == 5:  # nearly all the probability is kept
            assert (found > 0.95 * exact).all()
        assert divergence(kept, p).abs().max() < 1e-5

    def test_what_is_impossible(self):
        """No probability left for the rest, or none in the candidate where there was some."""
        p = torch.full((1, 2000), -torch.inf)
        p[0, 0] = 0
        assert divergence(reference(p), self.logits(2000)[:1]) == pytest.approx(
            -float(self.logits(2000)[0, 0]), rel=1e-5
        )
        assert divergence(reference(self.logits(2000)[:1]), p) == torch.inf
        nan = torch.full((1, 2000), torch.nan)
        assert divergence(reference(self.logits(2000)[:1]), nan).isnan()
