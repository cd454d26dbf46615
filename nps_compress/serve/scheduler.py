"""Whose turn it is: requests in batches of one task, or mixed, and no task waits for ever."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar

Item = TypeVar("Item")
MIXED: Final = "mixed"
Turn = tuple[str | None] | Literal["mixed"]  # of a task, or of all those that share one


class QueueFullError(Exception):
    """A task has as many waiting items as it may. ``limit``: how many."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"{limit} requests of this task are waiting")


@dataclass
class _Line(Generic[Item]):
    """What a task has to do."""

    waiting: deque[Item] = field(default_factory=deque)
    running: int = 0


class CycleScheduler(Generic[Item]):
    """Items wait, are taken, run over any number of steps, and finish.

    One task has the turn. It keeps it while it has work, for ``cycle_s`` at least where others
    have work too; then the turn goes to the one that has been without for longest. Items that
    run when a turn ends stay taken, and go on when it is their task's turn again. So a task with
    work waits for at most one turn of each other task with work (LoRAX names the limit
    ``adapter-cycle-time-s``).

    At most ``max_batch`` items of a task run, and ``max_running`` of all. A task none of whose
    items run has the next free place before any that has some.

    Tasks that are mixed share one turn, in which a free place goes to the one that has fewest items
    running, and of several such to the one that got none for longest.

    Not thread-safe. clock: seconds, never going back. ``None`` is a task like others: the base.
    is_mixed: whether a task shares the turn, as of now.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        cycle_s: float,
        max_waiting: int,
        max_batch: int,
        max_running: int,
        is_mixed: Callable[[str | None], bool] = lambda task: False,
    ) -> None:
        self._clock, self._cycle_s, self._is_mixed = clock, cycle_s, is_mixed
        self._max_waiting, self._max_batch, self._max_running = max_waiting, max_batch, max_running
        self._lines: dict[str | None, _Line[Item]] = {}  # of the tasks with work
        self._numbers = itertools.count(1)
        self._left: dict[Turn, int] = {}  # the number of the last turn that ended, or of a place
        self._current: Turn = MIXED
        self._since: float | None = None  # when the current turn began; None: nobody has it
        self._running = 0

    def add(self, task: str | None, items: Sequence[Item]) -> None:
        """Let items wait, all or none. Raises QueueFullError."""
        line = self._lines.get(task)
        if len(items) + (len(line.waiting) if line else 0) > self._max_waiting:
            raise QueueFullError(self._max_waiting)
        if line is None:
            line = self._lines[task] = _Line()
        line.waiting.extend(items)

    def turn(self) -> Turn | None:
        """-> the task to work for now, in a tuple as it may be None, or ``MIXED``; None: nothing
        to do."""
        ready = self._ready()
        now = self._clock()
        if self._since is not None:
            mine = self._current in ready
            if mine and (len(ready) == 1 or now - self._since < self._cycle_s):
                return self._current
            self._left[self._current] = next(self._numbers)
            self._since = None
            if mine:
                ready.remove(self._current)
        if not ready:
            return None
        self._current, self._since = self._longest_without(ready), now
        return self._current

    def upcoming(self) -> list[str | None]:
        """The tasks whose turn is next, as far as is known now."""
        ready = [turn for turn in self._ready() if self._since is None or turn != self._current]
        if not ready:
            return []
        turn = self._longest_without(ready)
        return [task for task in self._lines if self._turn_of(task) == turn]

    def take(self, turn: Turn) -> list[Item]:
        """Items that begin to run now, those of a task that waited longest first."""
        lines = {task: line for task, line in self._lines.items() if self._turn_of(task) == turn}
        others = [line for task, line in self._lines.items() if task not in lines]
        room = self._max_running - self._running
        if any(line.running for line in lines.values()):
            room -= sum(1 for line in others if line.waiting and not line.running)
        taken: list[Item] = []
        for _ in range(room):
            ready = [
                task
                for task, line in lines.items()
                if line.waiting and line.running < self._max_batch
            ]
            if not ready:
                break
            task = min(ready, key=lambda each: (lines[each].running, self._left.get((each,), 0)))
            taken.append(lines[task].waiting.popleft())
            lines[task].running += 1
            self._running += 1
            if turn == MIXED:
                self._left[(task,)] = next(self._numbers)
        return taken

    def finish(self, task: str | None, count: int = 1) -> None:
        """So many items that were taken run no more."""
        line = self._lines[task]
        if count > line.running:
            raise ValueError(f"{count} items of {task!r} finish, {line.running} run")
        line.running -= count
        self._running -= count
        self._forget_if_idle(task)

    def withdraw(self, task: str | None, items: Iterable[Item]) -> list[Item]:
        """Take items out that still wait. -> those that did."""
        line = self._lines.get(task)
        found: list[Item] = []
        for item in items:
            if line and item in line.waiting:
                line.waiting.remove(item)
                found.append(item)
        self._forget_if_idle(task)
        return found

    def clear(self, task: str | None) -> list[Item]:
        """Take out all that waits of a task, and -> it."""
        line = self._lines.get(task)
        return self.withdraw(task, list(line.waiting) if line else [])

    def waiting(self) -> dict[str | None, int]:
        """How many items of each task wait."""
        return {task: len(line.waiting) for task, line in self._lines.items() if line.waiting}

    def running(self) -> dict[str | None, int]:
        """How many items of each task run."""
        return {task: line.running for task, line in self._lines.items() if line.running}

    def forget(self, task: str | None) -> None:
        """A task that has no work will have none any more."""
        self._left.pop((task,), None)

    def _turn_of(self, task: str | None) -> Turn:
        return MIXED if self._is_mixed(task) else (task,)

    def _ready(self) -> list[Turn]:
        """Whose turn it could be."""
        found = (self._turn_of(task) for task, line in self._lines.items() if self._is_ready(line))
        return list(dict.fromkeys(found))

    def _is_ready(self, line: _Line[Item]) -> bool:
        return line.running > 0 or (bool(line.waiting) and self._running < self._max_running)

    def _longest_without(self, ready: Sequence[Turn]) -> Turn:
        return min(ready, key=lambda turn: self._left.get(turn, 0))  # ties: who came first

    def _forget_if_idle(self, task: str | None) -> None:
        line = self._lines.get(task)
        if line is not None and not line.waiting and not line.running:
            del self._lines[task]
