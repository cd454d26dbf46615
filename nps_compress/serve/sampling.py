"""Which token is next."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens.

    temperature: 0 for the likeliest token; top_p: draw from the likeliest tokens that have so
    much of the probability together; seed: of the draws, None for any; stop: strings; logprobs:
    how many tokens' log-probabilities to tell at each place, None for not even the drawn one's.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


def generator_of(sampling: Sampling) -> torch.Generator | None:
    """Where the draws of a request come from; None where it draws nothing."""
    if sampling.temperature == 0:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(logits: torch.Tensor, sampling: Sampling, draw: float) -> int:
    """The next token. logits: [vocabulary] float32, none of them NaN; draw: uniform in [0, 1).

    By inverting the cumulative distribution, so that equal draws give equal tokens whatever else
    is in the batch. top_p is nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751).
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.double() - logits.max().double()) / max(sampling.temperature, 1e-5)
    probabilities = scaled.softmax(-1)
    if sampling.top_p == 1:
        return _drawn(probabilities, draw)
    probabilities, order = probabilities.sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = max(int((before < sampling.top_p).sum()), 1)
    return int(order[_drawn(probabilities[:kept], draw)])


def _drawn(probabilities: torch.Tensor, draw: float) -> int:
    cumulative = probabilities.cumsum(-1)
    place = int(torch.searchsorted(cumulative, draw * float(cumulative[-1]), right=True))
    return min(place, len(cumulative) - 1)


def log_probabilities(
    logits: torch.Tensor, token: int, most: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """-> the token's log-probability, and those of the ``most`` likeliest, by token.

    Before temperature and top_p. logits: [vocabulary] float32.
    """
    found = logits.log_softmax(-1)
    top = found.topk(min(most, found.numel()))
    likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return float(found[token]), likeliest
