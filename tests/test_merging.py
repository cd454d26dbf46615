"""Every method of merging on an example worked out by hand, and what all have in common."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nps_compress.errors import InvalidArgumentError
from nps_compress.merging import della, emr, evolver, neuromerging
from nps_compress.merging.consensus import tall_masks
from nps_compress.merging.contract import Block, Exchange, Settings
from nps_compress.merging.elect import elected_mean, mean_of_nonzero
from nps_compress.merging.methods import METHODS, check_settings, method_of
from nps_compress.merging.pruning import TaskPruner

# Three tasks, one row of five elements.
TAUS = [
    [[4.0, -2.0, 1.0, 0.0, 3.0]],
    [[2.0, 6.0, -1.0, 0.0, 3.0]],
    [[-3.0, -2.0, 0.0, 5.0, 3.0]],
]


def block(taus=TAUS, base=None, whole=None, is_vector=False):
    taus = np.array(taus, np.float32)
    base = np.zeros(taus.shape[1:], np.float32) if base is None else np.array(base, np.float32)
    whole = taus if whole is None else np.array(whole, np.float32)
    return Block("w", base, taus, whole, 0, is_vector)


def merged(name, by=None, of=None, totals=None):
    totals = np.zeros((3, 2)) if totals is None else totals
    found = METHODS[name].merge(of or block(), by or METHODS[name].defaults, totals)
    assert found.dtype == np.float32
    return found.tolist()


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_average():
    close(merged("average"), [[1, 2 / 3, 0, 5 / 3, 3]])


def test_task_arithmetic():
    close(merged("task-arithmetic", Settings(scale=0.5)), [[1.5, 1, 0, 2.5, 4.5]])


def test_ties_averages_what_has_the_sign_of_the_sum():
    # Sums 3, 2, 0, 5, 9: all positive but the third, whose 0 counts as positive.
    close(merged("ties", Settings(scale=2.0)), [[6, 12, 2, 10, 6]])


def test_ties_of_a_negative_sum_and_of_nothing():
    found = elected_mean(np.array([[-4.0, 0, 0.0], [1, 0, -0.0], [-2, 0, 0]], np.float32))
    assert found.tolist() == [-3, 0, 0]


def test_dare_adds_up_or_elects():
    close(merged("dare", Settings(scale=0.5)), [[1.5, 1, 0, 2.5, 4.5]])
    close(merged("dare", Settings(scale=2.0, elect=True)), [[6, 12, 2, 10, 6]])


def test_della_keeps_by_the_rank_in_the_row():
    tau = np.array([[3.0, -1.0, 0.5, -2.0, 4.0], [0, 0, 0, 0, 0]], np.float32)
    keep = della.keep_probabilities(tau, 0.4, 0.2)
    close(keep[0], [0.45, 0.35, 0.3, 0.4, 0.5])
    close(keep[1], [0.3, 0.35, 0.4, 0.45, 0.5])  # ties in their order
    close(della.keep_probabilities(tau[:, :1], 0.4, 0.2), [[0.4], [0.4]])


def test_della_divides_by_the_probability():
    """With density 1 nothing is dropped; below, what is kept is tau / p and right on average."""
    close(merged("della", Settings(scale=2.0, density=1.0)), [[6, 12, 2, 10, 6]])
    one = block(np.tile(np.array([[1.0, 2.0, 3.0, 4.0]], np.float32), (1, 4000, 1)))
    found = np.array(merged("della", Settings(density=0.5, window=0.4), one))
    for column, keep in enumerate((0.3, 0.3 + 0.4 / 3, 0.3 + 0.8 / 3, 0.7)):
        kept = found[:, column][found[:, column] != 0]
        close(kept, (column + 1) / keep)
        assert abs(kept.size / 4000 - keep) < 0.05
    again = np.array(merged("della", Settings(density=0.5, window=0.4), one))
    assert (again == found).all()
    other = np.array(merged("della", Settings(density=0.5, window=0.4, seed=1), one))
    assert (other != found).any()


@pytest.mark.parametrize("window", [-0.1, 1.01, 0.8])
def test_della_refuses_a_window_that_leaves_the_range(window):
    with pytest.raises(InvalidArgumentError, match="window"):
        della.window_of(Settings(density=0.4 if window < 1 else 0.5, window=window))


def test_tall_masks():
    taus = np.array([[4.0, 1.0], [1.0, 1.0]], np.float32)
    merged_ = taus.sum(0)  # 5, 2; differences 1 and 4, 1 and 1
    assert tall_masks(taus, merged_, 0.5).tolist() == [[True, True], [False, True]]


def test_consensus_drops_what_few_use():
    # Sums 3, 2, 0, 5, 9. |tau| >= 0.4 |sum - tau|: both of 4 vs 1, 2 vs 1, 3 vs 6 ...
    users = [[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]]
    found = tall_masks(np.array(TAUS, np.float32)[:, 0], np.float32([3, 2, 0, 5, 9]), 0.4)
    assert found.T.astype(int).tolist() == users
    close(merged("consensus", Settings(scale=0.5)), [[1.5, 1, 0, 0, 4.5]])
    close(merged("consensus", Settings(scale=0.5, agreement=1)), [[1.5, 1, 0, 2.5, 4.5]])
    strict = Settings(scale=1.0, threshold=0.6, agreement=3)
    close(merged("consensus", strict), [[0, 0, 0, 0, 0]])


def test_consensus_uses_the_whole_task_vectors_for_its_masks():
    pruned = [[[4.0]], [[0.0]]]
    of = block(pruned, whole=[[[4.0]], [[3.0]]])
    close(merged("consensus", Settings(scale=1.0), of, np.zeros((2, 2))), [[4]])
    of = block(pruned, whole=[[[4.0]], [[0.5]]])
    close(merged("consensus", Settings(scale=1.0), of, np.zeros((2, 2))), [[0]])


def test_emr_elects_masks_and_rescales():
    taus = np.array(TAUS, np.float32)
    assert emr.unified(taus).tolist() == [[4, 6, 1, 5, 3]]
    totals = emr.measure(block())
    # Sizes of the task vectors, and of what the masks keep: 4 1 3, 4 6 3, 5 3.
    assert totals.tolist() == [[10, 8], [12, 13], [13, 8]]
    close(
        merged("emr", totals=totals),
        [
            [[5, 0, 1.25, 0, 3.75]],
            [[4 * 12 / 13, 6 * 12 / 13, 0, 0, 3 * 12 / 13]],
            [[0, 0, 0, 5 * 13 / 8, 3 * 13 / 8]],
        ],
    )


def test_nps_averages_what_was_kept():
    close(merged("nps", Settings(scale=2.0)), [[2, 4 / 3, 0, 10, 6]])
    close(merged("nps", Settings(scale=2.0, elect=True)), [[6, 12, 2, 10, 6]])
    close(mean_of_nonzero(np.array([[0.0, 2.0], [0.0, 0.0]], np.float32)), [0, 2])


def test_neuromerging_of_one_neuron():
    """w = (2, 0): parts along it 1, 3, -1 times w; across (0, 1), (0, 3), (0, -2)."""
    taus = [[[2.0, 1.0]], [[6.0, 3.0]], [[-2.0, -2.0]]]
    of = block(taus, base=[[2.0, 0.0]])
    both = Settings(scale=1.0, parallel=1.0)
    close(merged("neuromerging", both, of), [[4, 2]])  # (1 + 3) / 2 * w, (1 + 3) / 2 across
    close(merged("neuromerging", Settings(scale=2.0), of), [[0, 4]])
    vector = block(taus, base=[[2.0, 0.0]], is_vector=True)
    close(merged("neuromerging", both, vector), [[4, 2]])  # as TIES


def test_neuromerging_merges_in_singular_directions():
    """Two orthogonal parts are their own directions: each keeps its own."""
    across = np.array([[[3.0, 0, 0], [0, 1.0, 0]]])
    close(neuromerging.merge_across(across), [[3, 1, 0]])
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((5, 3, 7))
    found = neuromerging.merge_across(parts)
    for row, part in zip(found, parts, strict=True):  # against the SVD itself
        _, _, directions = np.linalg.svd(part, full_matrices=False)
        with_signs = [elected_mean(part @ direction) * direction for direction in directions]
        np.testing.assert_allclose(row, np.sum(with_signs, 0), atol=1e-9)


def test_neuromerging_without_data_scales_by_what_pruning_dropped():
    of = block([[[3.0, 0.0]], [[0.0, 8.0]]], whole=[[[3.0, 1.0]], [[2.0, 8.0]]])
    totals = neuromerging.measure(of)
    assert totals.tolist() == [[4, 3], [10, 8]]
    assert neuromerging.free_scale(totals) == pytest.approx(4 / 3)
    assert neuromerging.free_scale(np.zeros((2, 2))) == 1


def test_evolver_without_exchanges_is_the_average():
    close(merged("evolver"), merged("average"))


def test_evolver_mixes_members_where_the_mask_says():
    by = Settings(mutation=0.25, crossover=1.0, exchanges=(Exchange(0, 1, 7), Exchange(2, 0, 8)))
    members = evolver.population(block(), by)
    first = 0.75 * np.array(TAUS[0]) + 0.25 * np.array(TAUS[1])
    close(members, [first, TAUS[1], 0.75 * np.array(TAUS[2]) + 0.25 * first])
    wide = block(np.stack([np.zeros((1, 4000)), np.ones((1, 4000))]))
    some = replace(by, crossover=0.3, mutation=1.0, exchanges=(Exchange(0, 1, 7),))
    taken = evolver.population(wide, some)[0]
    assert set(np.unique(taken)) == {0, 1}
    assert abs(taken.mean() - 0.3) < 0.05
    assert (evolver.population(wide, some)[0] == taken).all()


finite = st.floats(-10, 10, width=32)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (3, 2, 4), elements=finite), st.permutations(range(3)))
def test_the_order_of_tasks_does_not_matter(taus, order):
    for name in ("average", "task-arithmetic", "ties", "nps", "consensus", "evolver"):
        by = METHODS[name].defaults
        first, second = (
            METHODS[name].merge(block(each), by, np.zeros((3, 2)))
            for each in (taus, taus[list(order)])
        )
        if name in ("ties", "consensus"):  # sums near 0 round differently in another order
            clear = np.abs(taus.sum(0)) > 1e-3
            margin = np.abs(np.abs(taus) - 0.4 * np.abs(taus.sum(0) - taus)).min(0) > 1e-3
            first, second = (np.where(clear & margin, each, 0) for each in (first, second))
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (2, 4), elements=finite))
def test_of_equal_tasks_the_mean_is_the_task(tau):
    for name in ("average", "ties", "nps", "evolver"):
        found = METHODS[name].merge(
            block([tau, tau, tau]), METHODS[name].defaults, np.zeros((3, 2))
        )
        np.testing.assert_allclose(found, tau, rtol=1e-5, atol=1e-6)


def test_unknown_method_and_numbers_out_of_range():
    with pytest.raises(InvalidArgumentError, match="received 'soup'"):
        method_of("soup")
    for wrong in (
        {"scale": float("nan")},
        {"scale": 1e9},
        {"density": 0.0},
        {"prune": "best"},
        {"scope": "row"},
        {"agreement": 4},
        {"agreement": 0},
        {"seed": -1},
        {"threshold": -1.0},
        {"mutation": 0.0},
        {"crossover": 1.1},
    ):
        with pytest.raises(InvalidArgumentError):
            check_settings(METHODS["consensus"], Settings(**wrong), 3)
    check_settings(METHODS["consensus"], Settings(), 2)
    check_settings(METHODS["ties"], Settings(agreement=4), 2)


def pruned(rule, tau, by, scope="global", task=0):
    pruner, shape = TaskPruner(task, rule, scope), tau.shape
    flat = tau.reshape(-1)
    pruner.count("w", shape, lambda: [flat[:5], flat[5:]])
    selection = pruner.selection("w", shape, lambda: [flat], by)
    return pruner.prune("w", selection, flat, 0, by.seed).reshape(tau.shape)


def test_magnitude_keeps_the_largest_as_they_are():
    tau = np.float32([[0.1, -4, 0.2, 3], [2, -0.3, 0.4, -1]])
    for scope in ("global", "tensor"):
        found = pruned("magnitude", tau, Settings(density=0.5), scope)
        assert found.tolist() == np.float32([[0, -4, 0, 3], [2, 0, 0, -1]]).tolist()
    assert pruned("magnitude", tau, Settings(density=1.0)).tolist() == tau.tolist()


def test_coefficients_decide_what_is_kept_and_at_which_value():
    """The upper half doubled stays; the lower half times 20 takes its place."""
    tau = np.float32([[1, -4, 1.5, 3], [2, -1.25, 1.75, -5]])
    halves = Settings(density=0.5, top_shares=(0.5,))
    found = pruned("magnitude", tau, replace(halves, coefficients=((1.0, 2.0),)))
    assert found.tolist() == [[0, -8, 0, 6], [4, 0, 0, -10]]
    found = pruned("magnitude", tau, replace(halves, coefficients=((20.0, 1.0),)))
    assert found.tolist() == [[20, 0, 30, 0], [0, -25, 35, 0]]


@pytest.mark.parametrize("rule", ["random", "sampled", "signs"])
def test_sampled_task_vectors_are_right_on_average(rule, rng):
    tau = (rng.standard_normal((80, 64)) ** 3).astype(np.float32)
    draws = [pruned(rule, tau, Settings(density=0.2, seed=seed)) for seed in range(60)]
    assert abs(np.mean([(d != 0).mean() for d in draws]) - 0.2) < 0.02
    assert len({d.tobytes() for d in draws}) == 60
    mean = np.mean(draws, 0)
    # Unbiased: along the true vector the mean is the vector.
    assert float((mean * tau).sum() / (tau * tau).sum()) == pytest.approx(1, abs=0.1)
    if rule != "signs":  # whose sizes are those of rows and columns
        error = np.linalg.norm(mean - tau) / np.linalg.norm(tau)
        single = np.mean([np.linalg.norm(d - tau) for d in draws]) / np.linalg.norm(tau)
        assert error < 1.3 * single / np.sqrt(60)


def test_tasks_draw_apart(rng):
    """Equal task vectors lose different elements, or errors would add up instead of out."""
    tau, by = rng.standard_normal((80, 64)).astype(np.float32), Settings(density=0.2)
    for rule in ("random", "sampled", "signs"):
        first, second = (pruned(rule, tau, by, task=task) != 0 for task in (0, 1))
        assert 0.02 < (first & second).mean() < 0.12, rule


def test_vectors_are_whole_where_a_sample_says_too_little():
    tau = np.float32([1, -2, 3, -4, 5, -6, 7, 8, 9, 10])
    by = Settings(density=0.3)
    for rule in ("sampled", "signs"):
        assert (pruned(rule, tau, by) == tau).all()
    assert np.count_nonzero(pruned("magnitude", tau, by)) == 3
