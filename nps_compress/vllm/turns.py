"""Whose requests run: a batch holds one task, and tasks take turns.

A turn ends when its task has nothing left to do, or when it has lasted for the cycle and another
task waits, as LoRAX's ``--adapter-cycle-time-s`` does. It lasts at least as long as its own switch
of weights took, so that at most half of the time goes into switching.
"""

from __future__ import annotations

from collections.abc import Sequence


class Turns:
    """The tasks, by any number of theirs, and whose turn it is.

    cycle: seconds that a turn may last while another task waits.
    """

    def __init__(self, cycle: float) -> None:
        self._cycle = cycle
        self._current: int | None = None
        self._chosen = 0.0  # when
        self._began: float | None = None  # when its first step was done
        self._turns: dict[int, int] = {}  # the number of each task's last turn
        self._count = 0

    def next(self, working: Sequence[int], now: float, *, settled: bool) -> tuple[int | None, bool]:
        """Whose requests run in the next step, and whether it may begin new ones.

        working: the tasks that have requests, by the oldest one first; now: seconds; settled: each
        running request has gained something in this turn, so that stopping it now loses no work
        that would have to be done again for ever.
        """
        others = [task for task in working if task != self._current]
        if self._current in working:
            if self._began is None:
                self._began = now
            if not others or now - self._began < max(self._cycle, self._began - self._chosen):
                return self._current, True
            if not settled:
                return self._current, False
        if others:
            self._count += 1
            self._current = min(others, key=lambda task: self._turns.get(task, 0))
            self._turns[self._current] = self._count
            self._chosen, self._began = now, None
        return self._current, True
