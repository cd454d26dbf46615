"""The optimiser: deterministic, resumable, and quiet towards NumPy's global generator."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from nps_compress.errors import InvalidArgumentError, RecipeError, SearchInterruptedError
from nps_compress.search import GENERATIONS, PATIENCE, population_size, search


def bowl(factors):
    return -sum((math.log(c) - 0.1 * i) ** 2 for i, c in enumerate(factors))


def each(function):
    """A score for every candidate of a generation, none remembered."""
    return lambda generation, memory: [function(factors) for factors in generation]


def remembering(function):
    """As a search on files does it: what is in memory is not measured again."""

    def evaluate(generation, memory):
        for number, factors in enumerate(generation):
            if memory.get(str(number)) is None:
                memory.put(str(number), function(factors))
        return [memory.get(str(number)) for number in range(len(generation))]

    return evaluate


def test_finds_the_maximum_from_ones():
    result = search(each(bowl), 8, generations=60, patience=60)
    assert result.start_fitness == pytest.approx(bowl((1.0,) * 8))
    assert result.fitness > -1e-3
    assert bowl(result.factors) == result.fitness


def test_one_factor():
    result = search(each(lambda c: -((c[0] - 2) ** 2)), 1, 15, patience=15)
    assert result.factors[0] == pytest.approx(2, abs=0.01)


def test_same_seed_same_history_and_global_state_untouched():
    before = np.random.get_state()[1].copy()
    first, second, other = (search(each(bowl), 4, 5, seed=s) for s in (3, 3, 4))
    assert first == second
    assert first.history != other.history
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("stop_at", [1, 2, 9, 10, 17, 30])
def test_resumed_search_equals_the_uninterrupted_one(tmp_path, stop_at):
    """Also where it was interrupted inside a generation; nothing is measured twice."""
    state = tmp_path / "state.json"
    calls = []

    def interrupted(factors):
        calls.append(factors)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return bowl(factors)

    with pytest.raises(SearchInterruptedError) as caught:
        search(remembering(interrupted), 4, 6, state=state, identity={"x": 1})
    assert (caught.value.state == state) == (stop_at > 1)
    fresh = []
    again = remembering(lambda c: fresh.append(c) or bowl(c))
    resumed = search(again, 4, 6, state=state, identity={"x": 1})
    assert resumed == search(each(bowl), 4, 6)
    assert len(fresh) == 1 + 6 * population_size(4) - (stop_at - 1)
    assert not set(fresh) & set(calls[: stop_at - 1])


def test_an_interruption_before_anything_is_known_names_no_state(tmp_path):
    def evaluate(generation, memory):
        raise KeyboardInterrupt

    state = tmp_path / "state.json"
    for path in (None, state):
        with pytest.raises(SearchInterruptedError) as caught:
            search(evaluate, 2, 1, state=path)
        assert caught.value.state is None
    assert not state.exists()


def test_the_memory_of_a_generation_ends_with_it(tmp_path):
    seen = []

    def evaluate(generation, memory):
        assert memory.get("mark") is None
        memory.put("mark", len(seen))
        seen.append(memory.kept.get("first"))
        memory.keep("first", memory.kept.get("first", 41) + 1)
        return list(map(bowl, generation))

    result = search(evaluate, 2, 3, state=tmp_path / "s.json")
    assert seen == [None, 42, 43, 44]
    assert result.kept == {"first": 45}
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["kept"] == {"first": 45}
    assert saved["begun"] == {}

    def nothing_is_left(generation, memory):
        pytest.fail("asked again")

    assert search(nothing_is_left, 2, 3, state=tmp_path / "s.json") == result


def test_it_stops_where_nothing_is_gained():
    """After the first generation, each scores better or not as the list says, at random."""

    def generations(best):
        rng = np.random.default_rng(0)
        steps = iter(best)

        def evaluate(generation, memory):
            top = next(steps)
            return [top] + [top - rng.random() for _ in generation[1:]]

        return len(search(evaluate, 3, 50).history) - 1

    # A gain of one so far: less than a hundredth of it in six generations is next to nothing.
    assert generations([0, 0.5, 0.6, 0.7, 0.8, 0.995, *[1.0] * 40]) == 11
    assert generations([0, 0.5, 0.6, 0.7, 0.8, 0.985, *[1.0] * 40]) == 12
    assert generations([0, -1, -2, *[-3] * 40]) == PATIENCE + 1
    # A search that still gains goes on; one where all are alike is at an end.
    assert generations([0.1 * n for n in range(60)]) == 50
    assert len(search(each(lambda c: 1.0), 3, 50).history) < PATIENCE + 2
    assert search(each(lambda c: math.nan), 3, 50).fitness == -math.inf


def test_state_of_another_search_is_refused(tmp_path):
    state = tmp_path / "state.json"
    search(each(bowl), 4, 1, state=state, identity={"density": 0.05})
    with pytest.raises(RecipeError, match=r"density was 0\.05, is now 0\.1"):
        search(each(bowl), 4, 1, state=state, identity={"density": 0.1})
    with pytest.raises(RecipeError, match="dimensions was 4, is now 3"):
        search(each(bowl), 3, 1, state=state, identity={"density": 0.05})
    state.write_text("{")
    with pytest.raises(RecipeError, match="not the state of a search"):
        search(each(bowl), 4, 1, state=state)


def test_old_and_corrupt_states_are_refused_in_one_line(tmp_path):
    state = tmp_path / "state.json"
    search(each(bowl), 2, 2, state=state)
    good = json.loads(state.read_text())
    broken = [
        {"nps_search": 1},
        {"nps_search": None},
        {"fitness": [1.0, 2.0]},
        {"fitness": None},
        {"fitness": [[0.0], [0.0]]},  # a generation of one candidate
        {"fitness": [[0.0, 0.0]]},
        {"fitness": [[]]},
        {"fitness": [["a"]]},
        {"fitness": {"a": 1}},
        {"fitness": [["\x1b[31m"]]},
        {"begun": []},
        {"begun": None},
        {"kept": 3},
        {"settings": "x"},
        {"settings": {}},
    ]
    texts = [json.dumps({**good, **change}) for change in broken]
    texts += ["", "null", "[]", "3", "[" * 100_000, "\x00", json.dumps({"nps_search": 2})]
    for text in texts:
        state.write_text(text)
        with pytest.raises(RecipeError) as caught:
            search(each(bowl), 2, 2, state=state)
        assert len(str(caught.value).splitlines()) == 1, text
        assert "\x1b" not in str(caught.value)
    state.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="not the state of a search"):
        search(each(bowl), 2, 2, state=state)
    state.write_text(json.dumps({**good, "nps_search": 1}))
    with pytest.raises(RecipeError, match="search state of version 1"):
        search(each(bowl), 2, 2, state=state)


def test_state_is_plain_json(tmp_path):
    state = tmp_path / "state.json"
    result = search(each(bowl), 2, 2, state=state)
    saved = json.loads(state.read_text())
    assert saved["fitness"] == result.history


def test_candidate_that_breaks_the_model_is_not_chosen():
    result = search(each(lambda c: math.nan if c[0] > 1.05 else c[0]), 2, 10)
    assert math.isfinite(result.fitness)
    assert result.factors[0] <= 1.05


def test_a_broken_start_can_be_left(tmp_path):
    """A state with infinities is read again."""

    def score(factors):
        return math.nan if factors == (1.0, 1.0) else bowl(factors)

    state = tmp_path / "s.json"
    first = search(each(score), 2, GENERATIONS, state=state)
    assert first.start_fitness == -math.inf
    assert math.isfinite(first.fitness)
    assert search(each(score), 2, GENERATIONS, state=state) == first


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
        search(each(bowl), **options)
