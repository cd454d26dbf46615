"""The optimiser: deterministic, resumable, and quiet towards NumPy's global generator."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from nps_compress.errors import InvalidArgumentError, RecipeError, SearchInterruptedError
from nps_compress.search import population_size, search


def bowl(coefficients):
    return -sum((math.log(c) - 0.1 * i) ** 2 for i, c in enumerate(coefficients))


def test_finds_the_maximum_from_ones():
    result = search(bowl, 8, generations=60)
    assert result.start_fitness == pytest.approx(bowl((1.0,) * 8))
    assert result.fitness > -1e-3
    assert bowl(result.coefficients) == result.fitness


def test_one_coefficient():
    assert search(lambda c: -((c[0] - 2) ** 2), 1, 15).coefficients[0] == pytest.approx(2, abs=0.01)


def test_same_seed_same_history_and_global_state_untouched():
    before = np.random.get_state()[1].copy()
    first, second, other = (search(bowl, 4, 5, seed=s) for s in (3, 3, 4))
    assert first == second
    assert first.history != other.history
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("stop_at", [1, 2, 9, 17, 30])
def test_resumed_search_equals_the_uninterrupted_one(tmp_path, stop_at):
    state = tmp_path / "state.json"
    calls = []

    def interrupted(coefficients):
        calls.append(coefficients)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return bowl(coefficients)

    with pytest.raises(SearchInterruptedError) as caught:
        search(interrupted, 4, 6, state=state, identity={"x": 1})
    assert (caught.value.state == state) == (stop_at > 1)
    fresh = []
    resumed = search(lambda c: fresh.append(c) or bowl(c), 4, 6, state=state, identity={"x": 1})
    assert resumed == search(bowl, 4, 6)
    assert len(fresh) == 1 + 6 * population_size(4) - (stop_at - 1)


def test_state_of_another_search_is_refused(tmp_path):
    state = tmp_path / "state.json"
    search(bowl, 4, 1, state=state, identity={"density": 0.05})
    with pytest.raises(RecipeError, match=r"density was 0\.05, is now 0\.1"):
        search(bowl, 4, 1, state=state, identity={"density": 0.1})
    state.write_text("{")
    with pytest.raises(RecipeError, match="not the state of a search"):
        search(bowl, 4, 1, state=state)


def test_state_is_plain_json(tmp_path):
    state = tmp_path / "state.json"
    result = search(bowl, 2, 2, state=state)
    saved = json.loads(state.read_text())
    assert saved["fitness"] == [f for generation in result.history for f in generation]


def test_candidate_that_breaks_the_model_is_not_chosen():
    result = search(lambda c: math.nan if c[0] > 1.05 else c[0], 2, 10)
    assert math.isfinite(result.fitness)
    assert result.coefficients[0] <= 1.05


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dimensions": 0}, "subspaces"),
        ({"dimensions": 2, "generations": 0}, "generations"),
        ({"dimensions": 2, "population": 1}, "population"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(InvalidArgumentError, match=name):
        search(bowl, **options)
