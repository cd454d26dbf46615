"""Whose turn it is: requests in batches of one task, and no task waits for ever."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


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

    Not thread-safe. clock: seconds, never going back. ``None`` is a task like others: the base.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        cycle_s: float,
        max_waiting: int,
        max_batch: int,
        max_running: int,
    ) -> None:
        self._clock, self._cycle_s = clock, cycle_s
        self._max_waiting, self._max_batch, self._max_running = max_waiting, max_batch, max_running
        self._lines: dict[str | None, _Line[Item]] = {}  # of the tasks with work
        self._left: dict[str | None, float] = {}  # when a task's last turn ended
        self._current: str | None = None
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

    def turn(self) -> tuple[str | None] | None:
        """-> the task to work for now, in a tuple as it may be None; None: nothing to do."""
        ready = [task for task, line in self._lines.items() if self._is_ready(line)]
        now = self._clock()
        if self._since is not None:
            mine = self._current in ready
            if mine and (len(ready) == 1 or now - self._since < self._cycle_s):
                return (self._current,)
            self._left[self._current] = now
            self._since = None
            if mine:
                ready.remove(self._current)
        if not ready:
            return None
        self._current, self._since = self._longest_without(ready), now
        return (self._current,)

    def upcoming(self) -> tuple[str | None] | None:
        """Whose turn is next, as far as is known now."""
        ready = [
            task
            for task, line in self._lines.items()
            if self._is_ready(line) and (self._since is None or task != self._current)
        ]
        return (self._longest_without(ready),) if ready else None

    def take(self, task: str | None) -> list[Item]:
        """Items of a task that begin to run now, those that waited longest first."""
        line = self._lines.get(task)
        if line is None:
            return []
        room = self._max_running - self._running
        if line.running:
            room -= sum(1 for other in self._lines.values() if other.waiting and not other.running)
        room = min(room, self._max_batch - line.running, len(line.waiting))
        taken = [line.waiting.popleft() for _ in range(room)]
        line.running += len(taken)
        self._running += len(taken)
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
        self._left.pop(task, None)

    def _is_ready(self, line: _Line[Item]) -> bool:
        return line.running > 0 or (bool(line.waiting) and self._running < self._max_running)

    def _longest_without(self, ready: Sequence[str | None]) -> str | None:
        return min(ready, key=lambda task: self._left.get(task, -math.inf))  # ties: who came first

    def _forget_if_idle(self, task: str | None) -> None:
        line = self._lines.get(task)
        if line is not None and not line.waiting and not line.running:
            del self._lines[task]
