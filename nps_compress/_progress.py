"""Progress bars: on a terminal only, and only where asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def bar(total: int | None, what: str, unit: str, show: bool) -> Iterator[Callable[..., None]]:
    """A bar on standard error, a counter where the total is not known.

    Yields ``advance(note="", steps=1)``.
    """
    disable = None if show else True  # None: tqdm shows it on a terminal only
    with tqdm(total=total, desc=what, unit=unit, disable=disable, leave=False) as progress:

        def advance(note: str = "", steps: float = 1) -> None:
            if note:
                progress.set_postfix_str(note, refresh=False)
            progress.update(steps)

        yield advance
