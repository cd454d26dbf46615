"""Threads for work that runs without the GIL, with bounded memory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

# What small tensors in work may take together, beside the largest ones.
MEMORY_SLACK = 256 << 20
_AHEAD = 64  # small tensors that others may do while one does a large one

T = TypeVar("T")
R = TypeVar("R")


def workers() -> int:
    """One per core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bounded_map(
    function: Callable[[T], R], items: Iterable[T], cost: Callable[[T], int], budget: int
) -> Iterator[R]:
    """Results in the order of ``items``, while the costs of unfinished ones stay within budget.

    At most ``_AHEAD`` items a worker are in work or waiting to be taken.

    An item that alone exceeds the budget runs alone. What an item costs counts until its result
    has been taken and the next one asked for.
    """
    pending: deque[tuple[Future[R], int]] = deque()
    in_work = 0
    with ThreadPoolExecutor(workers()) as pool:
        try:
            for item in items:
                price = cost(item)
                while pending and (in_work + price > budget or len(pending) >= _AHEAD * workers()):
                    future, paid = pending.popleft()
                    yield future.result()
                    in_work -= paid
                pending.append((pool.submit(function, item), price))
                in_work += price
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()


class Buffers:
    """Memory that is used again: fresh pages cost as much as reading a file into them.

    There are never more than were held at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[npt.NDArray[np.uint8]] = []

    @contextlib.contextmanager
    def held(self, nbytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Memory of so many bytes, with anything in it. [nbytes] uint8."""
        with self._lock:
            self._free.sort(key=len)
            fits = next((i for i, one in enumerate(self._free) if len(one) >= nbytes), -1)
            buffer = self._free.pop(fits) if self._free else np.empty(0, np.uint8)
        if len(buffer) < nbytes:
            del buffer  # before there is another one
            buffer = np.empty(nbytes, np.uint8)
        try:
            yield buffer[:nbytes]
        finally:
            with self._lock:
                self._free.append(buffer)
