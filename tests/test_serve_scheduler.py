"""The scheduler by itself, on a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nps_compress.serve.scheduler import MIXED, CycleScheduler, QueueFullError

TASKS = (None, "a", "b", "c", "d")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(clock, *, cycle_s=1.0, max_waiting=100, max_batch=2, max_running=4, mixed=()):
    return CycleScheduler(
        clock,
        cycle_s=cycle_s,
        max_waiting=max_waiting,
        max_batch=max_batch,
        max_running=max_running,
        is_mixed=lambda task: task in mixed,
    )


def test_keeps_its_turn_until_the_cycle_is_over():
    clock = Clock()
    found = scheduler(clock)
    found.add("a", [1, 2, 3])
    assert found.turn() == ("a",)
    assert found.take(("a",)) == [1, 2]
    found.add("b", [4])
    clock.now = 0.9
    assert found.turn() == ("a",)
    assert found.upcoming() == ["b"]
    clock.now = 1.0
    assert found.turn() == ("b",)
    assert found.take(("b",)) == [4]
    found.finish("b")
    assert found.turn() == ("a",)  # whose items still run
    assert found.take(("a",)) == []
    found.finish("a", 2)
    assert found.take(("a",)) == [3]
    found.finish("a")
    assert found.turn() is None
    assert found.waiting() == found.running() == {}


def test_alone_it_goes_on_and_gives_way_at_once_when_its_time_is_over():
    clock = Clock()
    found = scheduler(clock)
    found.add("a", [1])
    assert found.turn() == ("a",)
    found.take(("a",))
    clock.now = 50.0
    assert found.turn() == ("a",)
    found.add(None, [2])
    assert found.turn() == (None,)


def test_whoever_has_been_without_for_longest_is_next():
    clock = Clock()
    found = scheduler(clock, cycle_s=0.0, max_batch=1)
    for task in ("a", "b", "c"):
        found.add(task, list(range(9)))
    order = []
    for _ in range(9):
        clock.now += 1
        (task,) = found.turn()
        found.take((task,))
        found.finish(task)
        order.append(task)
    assert "".join(order) == "abcabcabc"


def test_all_or_none_are_queued():
    found = scheduler(Clock(), max_waiting=3)
    found.add("a", [1, 2])
    with pytest.raises(QueueFullError, match="3 requests"):
        found.add("a", [3, 4])
    assert found.waiting() == {"a": 2}
    found.add("b", [1, 2, 3])  # another task's line is not full
    with pytest.raises(QueueFullError):
        found.add("c", [1, 2, 3, 4])
    assert found.waiting() == {"a": 2, "b": 3}


def test_withdraws_only_what_waits():
    found = scheduler(Clock(), max_batch=1)
    found.add("a", [1, 2, 3])
    found.turn()
    assert found.take(("a",)) == [1]
    assert found.withdraw("a", [1, 3]) == [3]
    assert found.waiting() == {"a": 1}
    assert found.withdraw("other", [1]) == []


def test_a_free_place_goes_to_a_task_that_has_none():
    clock = Clock()
    found = scheduler(clock, max_batch=4, max_running=4)
    found.add("a", list(range(9)))
    found.turn()
    assert len(found.take(("a",))) == 4
    found.add("b", [1])
    clock.now = 5.0
    assert found.turn() == ("a",)  # all places are taken
    found.finish("a")
    assert found.take(("a",)) == []  # which is kept free
    assert found.turn() == ("b",)
    assert found.take(("b",)) == [1]


def test_mixed_tasks_share_a_turn_and_its_places():
    clock = Clock()
    found = scheduler(clock, max_batch=3, max_running=5, mixed=(None, "a", "b"))
    found.add("a", ["a1", "a2", "a3", "a4", "a5"])
    found.add("b", ["b1"])
    found.add(None, ["base"])
    found.add("c", ["c1"])
    assert found.turn() == MIXED
    assert found.upcoming() == ["c"]
    assert found.take(MIXED) == ["a1", "b1", "base", "a2", "a3"]  # all places, as none ran
    assert found.take(MIXED) == []
    found.finish("a")
    assert found.take(MIXED) == []  # kept for the task that has none
    clock.now = 1.0
    assert found.turn() == ("c",)
    assert found.upcoming() == ["a", "b", None]
    assert found.take(("c",)) == ["c1"]
    found.finish("c")
    assert found.turn() == MIXED
    assert found.take(MIXED) == ["a4"]


def test_who_floods_a_mix_does_not_hold_up_the_others():
    """One place, that goes round; a task that comes and goes is not always first."""
    found = scheduler(Clock(), max_batch=1, max_running=1, mixed="abc")
    found.add("a", ["a"] * 50)
    order = ""
    for _ in range(12):
        for task in "bc":
            if task not in found.waiting():
                found.add(task, [task])
        assert found.turn() == MIXED
        (item,) = found.take(MIXED)
        found.finish(item)
        order += item
    assert order == "abc" * 4


def test_a_task_that_is_mixed_no_more_has_turns_of_its_own():
    clock, mixed = Clock(), {"a", "b"}
    found = scheduler(clock, mixed=mixed)
    found.add("a", [1])
    found.add("b", [2])
    assert found.turn() == MIXED
    assert found.take(MIXED) == [1, 2]
    mixed.remove("b")
    clock.now = 1.0
    assert found.turn() == ("b",)
    found.finish("b")
    assert found.turn() == MIXED


def test_no_more_finish_than_run():
    found = scheduler(Clock())
    found.add("a", [1])
    with pytest.raises(ValueError, match="1 items of 'a' finish, 0 run"):
        found.finish("a")


@dataclass(eq=False)
class Work:
    task: str | None
    steps: int


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(TASKS), st.integers(1, 6)), max_size=25
)


@settings(max_examples=150, deadline=None)
@given(
    ARRIVALS,
    st.sampled_from([0.0, 1.0, 3.5]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sets(st.sampled_from(TASKS)),
)
def test_everything_finishes_in_its_order_and_nobody_waits_for_long(
    arrivals, cycle_s, max_batch, max_running, mixed
):
    """Steps of one second each, new items arriving between them."""
    clock = Clock()
    limits = {"max_batch": max_batch, "max_running": max_running}
    found = scheduler(clock, cycle_s=cycle_s, mixed=mixed, **limits)
    pending = sorted(arrivals, key=lambda each: each[0])
    running: dict[str | None, list[Work]] = {task: [] for task in TASKS}
    started: dict[str | None, list[Work]] = {task: [] for task in TASKS}
    arrived: dict[str | None, list[Work]] = {task: [] for task in TASKS}
    without: dict[str | None, float] = {}  # since when a task that could run has had no step
    while pending or any(len(started[t]) < len(arrived[t]) or running[t] for t in TASKS):
        while pending and pending[0][0] <= clock.now:
            _, task, steps = pending.pop(0)
            work = Work(task, steps)
            arrived[task].append(work)
            found.add(task, [work])
        turn = found.turn()
        if turn is None:
            assert found.waiting() == found.running() == {}
            clock.now += 1
            continue
        tasks = mixed if turn == MIXED else set(turn)
        for work in found.take(turn):
            assert work.task in tasks
            started[work.task].append(work)
            running[work.task].append(work)
        assert any(running[task] for task in tasks), "a turn with nothing to do"
        assert max(len(running[task]) for task in tasks) <= max_batch
        assert sum(map(len, running.values())) <= max_running
        assert found.running() == {t: len(r) for t, r in running.items() if r}
        clock.now += 1
        for task in tasks:
            for work in running[task]:
                work.steps -= 1
            ended = [work for work in running[task] if not work.steps]
            running[task] = [work for work in running[task] if work.steps]
            if ended:
                found.finish(task, len(ended))
        for other in TASKS:
            if other in tasks or not running[other]:
                without.pop(other, None)
            else:
                since = without.setdefault(other, clock.now)
                # a turn of each other task, of its cycle and the step in which that ended
                assert clock.now - since <= (len(TASKS) - 1) * (cycle_s + 1)
    for task in TASKS:
        assert started[task] == arrived[task]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 8),
    st.sampled_from([0.0, 2.0]),
    st.sets(st.sampled_from("abc")),
)
def test_a_single_request_is_served_under_sustained_load_of_others(
    max_batch, max_running, steps, cycle_s, mixed
):
    """Two tasks never run dry; one request of a third comes in at second 10."""
    clock = Clock()
    limits = {"max_batch": max_batch, "max_running": max_running}
    found = scheduler(clock, cycle_s=cycle_s, mixed=mixed, **limits)
    left: dict[tuple[str, int], int] = {}
    numbers = iter(range(10**6))
    by_task: dict[str, list[tuple[str, int]]] = {"a": [], "b": [], "c": []}
    single: tuple[str, int] | None = ("c", -1)
    while single:
        for task in ("a", "b"):
            if found.waiting().get(task, 0) < 3:
                found.add(task, [(task, next(numbers))])
        if clock.now == 10:
            single = ("c", next(numbers))
            found.add("c", [single])
        turn = found.turn()
        for item in found.take(turn):
            left[item] = steps
            by_task[item[0]].append(item)
        clock.now += 1
        for task in mixed if turn == MIXED else turn:
            for item in list(by_task[task]):
                left[item] -= 1
                if not left[item]:
                    by_task[task].remove(item)
                    found.finish(task)
                    if item == single:
                        single = None
        # A place is free after the items that had all of them, then its steps come in turns.
        assert clock.now < 10 + (max_running + steps + 1) * (steps + 3) * (cycle_s + 1)
