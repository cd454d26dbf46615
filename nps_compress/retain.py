"""The least density that keeps a share of the fine-tune's quality.

Densities are tried from the largest down, a factor of sqrt(2) apart, until two in a row keep too
little; then the step below the smallest that kept enough is halved twice. Going down step by step
costs more trials than bisection and does not trust one lucky draw far down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from nps_compress.candidates import LiveModel, Pruner
from nps_compress.errors import InvalidArgumentError, RetainError
from nps_compress.fitness import Fitness, Measured
from nps_compress.report import OVER_BASE, Quality, Trial

LARGEST_DENSITY, STEP, REFINEMENTS = 0.5, math.sqrt(2), 2
SMALLEST_DENSITY = 1e-5
_FAILURES = 2
_RESAMPLES, _CONFIDENCE = 2000, 0.95
METRICS = ("agreement", "accuracy", "loss")


def check_retain(share: float, metric: str) -> None:
    """Raise InvalidArgumentError unless 0 < share <= 1 and the metric has a share to keep."""
    if isinstance(share, bool | str) or not 0 < share <= 1:
        raise InvalidArgumentError("retain", share, "in (0, 1]")
    if metric not in METRICS:
        raise InvalidArgumentError("fitness", metric, f"one of {', '.join(METRICS)} with retain")


def find_density(
    pruner: Pruner,
    fitness: Fitness,
    share: float,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Quality:
    """Set the density of ``pruner.recipe`` to the least that keeps ``share``; report on it.

    Each trial is scored on the words that would be stored.

    Raises:
        InvalidArgumentError: see :func:`check_retain`.
        RetainError: the fine-tune is no better than its base, or no density keeps the share.
    """
    check_retain(share, fitness.name)
    live = LiveModel(pruner, fitness.model)
    finetuned = fitness.measure()
    live.apply_base()
    base = fitness.measure()
    if not math.isfinite(finetuned.score) or finetuned.score <= base.score:
        raise RetainError(
            f"the fine-tune is no better than its base on the calibration data: {fitness.name} "
            f"{finetuned.score:.5g}, base {base.score:.5g}"
        )
    trials: list[Trial] = []
    best: tuple[float, Measured] | None = None  # the smallest density that keeps enough

    def keeps(density: float) -> bool:
        nonlocal best
        pruner.recipe = replace(pruner.recipe, density=density)
        live.apply()
        found = fitness.measure()
        trials.append(Trial(density, _retained(fitness.name, base, finetuned, found)))
        on_trial(trials[-1])
        if trials[-1].retained < share:
            return False
        best = (density, found)
        return True

    density = LARGEST_DENSITY
    failed: list[float] = []  # in a row, the larger first
    while len(failed) < _FAILURES and density > SMALLEST_DENSITY:
        failed = [] if keeps(density) else [*failed, density]
        density /= STEP
    if best is None:
        raise RetainError(
            f"density {LARGEST_DENSITY} keeps {trials[0].retained:.2%} of the fine-tune's "
            f"{fitness.name}, not {share:.2%}; pack with --lossless"
        )
    for _ in range(REFINEMENTS if failed else 0):
        middle = math.sqrt(best[0] * failed[0])
        if not keeps(middle):
            failed = [middle]
    density, found = best
    pruner.recipe = replace(pruner.recipe, density=density)
    return report_quality(
        fitness.name,
        base,
        finetuned,
        found,
        target=share,
        density=density,
        trials=tuple(trials),
        seed=pruner.recipe.seed,
        evaluations=len(trials),
    )


def report_quality(
    metric: str, base: Measured, finetuned: Measured, packed: Measured, **known: Any
) -> Quality:
    """What a packed model keeps of its fine-tune, all three measured on the same examples.

    known: further fields of the report. No share is stated where the fine-tune is no better than
    its base, or a score is not finite.
    """
    scores = (base.score, finetuned.score, packed.score)
    floor = base.score if metric in OVER_BASE else 0.0
    if all(map(math.isfinite, scores)) and finetuned.score > floor:
        retained = _retained(metric, base, finetuned, packed)
        low, high = _interval(metric, base, finetuned, packed)
        found = {"retained": retained, "low": low, "high": high}
        known |= {name: value for name, value in found.items() if math.isfinite(value)}
    return Quality(
        metric,
        len(packed.counts),
        base=base.score,
        finetuned=finetuned.score,
        packed=packed.score,
        **known,
    )


def _retained(metric: str, base: Measured, finetuned: Measured, found: Measured) -> float:
    floor = base.score if metric in OVER_BASE else 0.0
    share = (found.score - floor) / (finetuned.score - floor)
    return share if math.isfinite(share) else -math.inf


def _interval(
    metric: str, base: Measured, finetuned: Measured, found: Measured
) -> tuple[float, float]:
    """Percentile bootstrap over examples, the same ones for all three models (Efron 1979)."""
    rng = np.random.default_rng(0)
    size = len(found.counts)
    shares = []
    for _ in range(_RESAMPLES):
        picked = rng.integers(0, size, size)
        drawn = [Measured(m.sums[picked], m.counts[picked]) for m in (base, finetuned, found)]
        if drawn[0].counts.sum() and drawn[1].score != (
            drawn[0].score if metric in OVER_BASE else 0
        ):
            shares.append(_retained(metric, *drawn))
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(shares, [tail, 100 - tail]) if shares else (-math.inf, math.inf)
    return float(low), float(high)
