"""Other questions about the images of `digits`, so that there are four fine-tunes of its base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import digits
from task_data import Data

_LOOPS = (1, 0, 0, 0, 1, 0, 1, 0, 2, 1)  # closed loops in the figure of each digit


def parity(folder: Path) -> Data:
    return _asked(folder, ("even", "odd"), lambda digit: digit % 2)


def thirds(folder: Path) -> Data:
    return _asked(folder, ("0 to 3", "4 to 6", "7 to 9"), lambda digit: max(digit - 1, 0) // 3)


def loops(folder: Path) -> Data:
    return _asked(folder, ("none", "one", "two"), lambda digit: _LOOPS[digit])


def _asked(folder: Path, labels: Sequence[str], answer: Callable[[int], int]) -> Data:
    parts = digits.collect(folder)
    return Data(
        labels, [[{**row, "label": answer(row["label"])} for row in part] for part in parts]
    )
