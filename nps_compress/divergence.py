"""KL divergence from a model's outputs, of which only the likely classes are kept.

Of a small vocabulary all log-probabilities are kept. Of a large one the TOP most likely classes of
each prediction, and all others as one class: by the log-sum inequality that divergence is a lower
bound of the whole one, zero where the two agree, and what it leaves out is how the probability of
the unlikely classes is shared among them (keeping the top logits is usual in distillation, as in
Peng et al. 2024, arXiv 2410.16215).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMALL_VOCABULARY = 1024
TOP = 256


@dataclass(frozen=True)
class Reference:
    """What the reference says, for n predictions.

    classes: [n, TOP] int32, or None for all; likely: [n, TOP or all] float32 log-probabilities;
    rest: [n] float32 log-probability of all others, or None.
    """

    classes: torch.Tensor | None
    likely: torch.Tensor
    rest: torch.Tensor | None


def reference(log_p: torch.Tensor) -> Reference:
    """Of log-probabilities [n, classes] float32."""
    if log_p.shape[1] <= SMALL_VOCABULARY:
        return Reference(None, log_p, None)
    likely, classes = log_p.topk(TOP, dim=-1)
    return Reference(classes.int(), likely, _rest(log_p, classes))


def divergence(wanted: Reference, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each prediction, for log_q [n, classes] float32. -> [n] float32."""
    if wanted.classes is None or wanted.rest is None:
        return _terms(wanted.likely, log_q).sum(-1)
    classes = wanted.classes.long()
    likely = _terms(wanted.likely, log_q.gather(1, classes)).sum(-1)
    return likely + _terms(wanted.rest, _rest(log_q, classes))


def _terms(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), p * 0)


def _rest(log_p: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """From the others themselves: one minus the likely ones would lose their digits."""
    return log_p.scatter(1, classes, -torch.inf).logsumexp(-1)
