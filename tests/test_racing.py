"""Racing: who is dropped, what is reported of them, and what it costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nps_compress.measured import Measured, join
from nps_compress.racing import Outcome, race, rounds

EXAMPLES, PART = 800, 40
PARTS = EXAMPLES // PART


class Track:
    """Scores of candidates by example, of which it remembers what was asked for."""

    def __init__(self, sums, counts=None):
        self.sums = np.asarray(sums, np.float64)
        self.counts = np.ones(self.sums.shape[1], np.int64) if counts is None else counts
        self.asked: list[tuple[tuple[int, ...], range]] = []

    def __call__(self, numbers, span):
        self.asked.append((tuple(numbers), span))
        at = slice(span.start * PART, span.stop * PART)
        return [Measured(self.sums[n, at], self.counts[at]) for n in numbers]

    def full(self, number):
        return Measured(self.sums[number], self.counts).score

    def race(self, is_mean=True):
        return race(len(self.sums), rounds(self.sums.shape[1] // PART, is_mean), self)


def track(rng, offsets, noise=0.3, shared=1.0):
    """Candidates that differ by an offset and a little noise; examples that differ by more."""
    common = rng.normal(-2, shared, EXAMPLES)
    return Track([common + offset + rng.normal(0, noise, EXAMPLES) for offset in offsets])


def test_rounds():
    assert rounds(8, True) == [range(1), range(1, 2), range(2, 4), range(4, 8)]
    assert rounds(8, False) == [range(8)]
    assert rounds(1, True) == [range(1)]
    assert rounds(2, True) == [range(1), range(1, 2)]
    for parts in range(1, 50):
        found = rounds(parts, True)
        assert [n for span in found for n in span] == list(range(parts))
        assert all(found)


def test_hopeless_candidates_are_dropped_early(rng):
    offsets = [0, 0.01, 0.02, -0.01, -3, -2, 0.03, -4]
    found = track(rng, offsets)
    found.sums[:, : 5 * PART] -= 1  # the first part is hard, and stands for no score by itself
    outcomes = found.race()
    assert [outcome.share for outcome in outcomes] == [1, 1, 1, 1, 0.1, 0.1, 1, 0.1]
    assert found.asked[0] == (tuple(range(8)), range(2))
    assert found.asked[1] == ((0, 1, 2, 3, 6), range(2, 5))
    for number, outcome in enumerate(outcomes):
        if outcome.share == 1:
            assert outcome.score == found.full(number)
        else:
            assert outcome.score == pytest.approx(found.full(number), abs=0.1)
    ranked = np.argsort([-outcome.score for outcome in outcomes])
    assert list(ranked[-3:]) == [5, 4, 7]


def test_what_is_close_on_the_first_part_is_told_apart_on_the_second(rng):
    found = track(rng, [0.0] * 6)
    found.sums[4:, 5 * PART :] -= 0.5
    outcomes = found.race()
    assert [outcome.share for outcome in outcomes] == [1, 1, 1, 1, 0.5, 0.5]
    # What it is behind by on half of the data, where the other half is as the second quarter.
    assert outcomes[5].score == pytest.approx(found.full(5) + 0.125, abs=0.05)


def test_the_winner_is_that_of_the_full_data(rng):
    for _ in range(30):
        offsets = rng.normal(0, 0.5, 9)
        offsets[rng.integers(9)] = 2
        found = track(rng, offsets)
        outcomes = found.race()
        best = int(np.argmax([outcome.score for outcome in outcomes]))
        assert best == np.argmax(offsets) == np.argmax([found.full(n) for n in range(9)])
        assert outcomes[best] == Outcome(found.full(best), 1)
        # Ranks, which the optimiser goes by, are those of the full data but for close calls.
        full = np.array([found.full(number) for number in range(9)])
        scores = np.array([outcome.score for outcome in outcomes])
        close = np.abs(full[:, None] - full) < 0.15
        assert (close | (np.sign(full[:, None] - full) == np.sign(scores[:, None] - scores))).all()
        assert sum(outcome.share for outcome in outcomes) < 9


def test_equal_candidates_stay(rng):
    common = rng.normal(0, 1, EXAMPLES)
    assert [o.share for o in Track([common] * 6).race()] == [1] * 6
    # Those that differ by noise alone are seldom dropped: one of 44 comparisons, on three rounds.
    dropped = sum(outcome.share < 1 for _ in range(40) for outcome in track(rng, [0.0] * 8).race())
    assert dropped < 0.05 * 40 * 8


def test_at_least_half_go_on(rng):
    for number in range(1, 12):
        found = track(rng, rng.normal(0, 5, number))
        outcomes = found.race()
        assert sum(outcome.share == 1 for outcome in outcomes) >= (number + 1) // 2


def test_shares_add_up_to_what_was_measured(rng):
    found = track(rng, [0, 0, 0, 0, 0, 0, -1, -1, -1, -0.1])
    found.sums[5, 5 * PART :] -= 1
    outcomes = found.race()
    measured = sum(len(numbers) * len(span) for numbers, span in found.asked)
    assert sum(outcome.share for outcome in outcomes) * PARTS == pytest.approx(measured)
    assert {outcome.share for outcome in outcomes} == {0.1, 0.5, 1}


def test_a_candidate_dropped_behind_one_that_is_dropped_later(rng):
    """Its score goes by that of the other, which goes by a third's."""
    found = track(rng, [0, 0, 0, -0.1, -0.1, -3], noise=0.6)
    found.sums[2, : 2 * PART] -= 0.02  # the worst of the best half on the first part
    found.sums[2, 2 * PART :] -= 2
    outcomes = found.race()
    assert [outcomes[2].share, outcomes[5].share] == [0.25, 0.1]
    assert outcomes[5].score < outcomes[2].score < outcomes[0].score
    assert outcomes[5].score == pytest.approx(found.full(5), abs=1.6)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
@pytest.mark.parametrize("number", [1, 3, 5, 6])
def test_broken_candidates(rng, broken, number):
    """They are dropped, unless more than half are broken; none of them ever wins."""
    found = track(rng, [0.0] * 6)
    found.sums[:number] = broken
    outcomes = found.race()
    for outcome in outcomes[:number]:
        assert math.isnan(outcome.score) or outcome.score == -math.inf
        assert outcome.share < 1 or number >= 3
    for candidate, outcome in enumerate(outcomes[number:], number):
        assert outcome == Outcome(found.full(candidate), 1)
    # Also where a single example breaks it.
    found = track(rng, [0.0] * 6)
    found.sums[2, 7] = broken
    outcomes = found.race()
    assert not math.isfinite(outcomes[2].score)
    assert outcomes[2].share == 0.1
    assert all(math.isfinite(o.score) for n, o in enumerate(outcomes) if n != 2)


def test_a_part_that_predicts_nothing_drops_nobody(rng):
    found = track(rng, [0, -1, -2, -3])
    found.counts[: 10 * PART] = 0
    found.sums[:, : 10 * PART] = 0
    assert [outcome.share for outcome in found.race()] == [1] * 4


def test_examples_of_different_weight(rng):
    counts = rng.integers(1, 100, EXAMPLES)
    means = [rng.normal(-2 + offset, 0.2, EXAMPLES) for offset in (0, 0, -1, -1)]
    found = Track(np.array(means) * counts, counts)
    outcomes = found.race()
    assert [outcome.share for outcome in outcomes] == [1, 1, 0.1, 0.1]
    for number, outcome in enumerate(outcomes):
        assert outcome.score == pytest.approx(found.full(number), abs=0.05)


@pytest.mark.parametrize("how", ["perplexity", "spearman"])
def test_what_is_no_mean_is_measured_whole(rng, how):
    sums = rng.normal(0, 1, (3, EXAMPLES))
    targets = sums[0].copy() if how == "spearman" else None
    ones = np.ones(EXAMPLES, np.int64)

    def measure(numbers, span):
        assert (list(numbers), span) == ([0, 1, 2], range(PARTS))
        return [Measured(sums[n], ones, how, targets) for n in numbers]

    outcomes = race(3, rounds(PARTS, False), measure)
    for number, outcome in enumerate(outcomes):
        assert outcome == Outcome(join([Measured(sums[number], ones, how, targets)]).score, 1)
