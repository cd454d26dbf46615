"""What the engine is asked to do, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nps_compress.serve.failures import RequestError
from nps_compress.serve.processors import Processor
from nps_compress.serve.sampling import Sampling


@dataclass(frozen=True)
class TokenScore:
    """A token that was chosen: its log-probability, and those of the likeliest by token."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """Text that is certain now. ``reason``: None, or why the answer ends with this piece.

    ``tokens``: how many were generated so far; ``scores``: of those that are new, if asked for.
    """

    text: str
    tokens: int
    scores: tuple[TokenScore, ...] = ()
    reason: Literal["stop", "length"] | None = None


@dataclass(eq=False)
class Generation:
    """Go on from a prompt. ``emit`` gets pieces, or an error as the last; from another thread."""

    task: str | None
    label: str
    processor: Processor
    prompt: Sequence[int]
    sampling: Sampling
    emit: Callable[[Piece | RequestError], None]
    cancelled: bool = field(default=False)


@dataclass(eq=False)
class Reading:
    """One row to embed or classify. ``emit`` gets its vector or probabilities, or an error."""

    task: str | None
    label: str
    processor: Processor
    use: Literal["embed", "classify"]
    row: Mapping[str, Sequence[int]]
    emit: Callable[[list[float] | RequestError], None]
    cancelled: bool = field(default=False)


Job = Generation | Reading
