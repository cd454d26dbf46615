"""The smallest recipe that keeps a share of the fine-tune's quality.

For each rule in turn, and each precision of values where ``auto`` leaves that open, densities are
tried from the largest that makes sense down, a factor of sqrt(2) apart, until two in a row keep too
little, or no longer make a difference to the cost; then the step below the smallest that kept
enough is halved twice. What costs more than the best so far is not tried.
Going down step by step costs more trials than bisection and does not trust one lucky draw far down.
The rule that holds at the least cost wins: which one that is depends on the fine-tune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nps_compress.errors import InvalidArgumentError, RetainError
from nps_compress.measured import Measured
from nps_compress.prune import Rule
from nps_compress.recipe import ROUNDED, Recipe
from nps_compress.report import RATIOS, Quality, Trial
from nps_compress.values import Values

# Sampled changes are nearly exact at 0.9.
LARGEST_DENSITY: dict[Rule, float] = {"signs": 1.0, "sampled": 0.9, "magnitude": 0.5, "random": 0.5}
VALUES_TRIED: tuple[Values, ...] = ("sign", "int2", "int4", "int8")
STEP, REFINEMENTS = math.sqrt(2), 2
SMALLEST_DENSITY = 1e-5
_FAILURES = 2
_NO_GAIN = 0.999
_RESAMPLES, _CONFIDENCE = 2000, 0.95


def check_retain(share: float) -> None:
    """Raise InvalidArgumentError unless 0 < share <= 1."""
    if isinstance(share, bool | str) or not 0 < share <= 1:
        raise InvalidArgumentError("retain", share, "in (0, 1]")


@dataclass(frozen=True)
class Yardstick:
    """The scores that a share is measured against, of the same examples."""

    metric: str
    base: Measured
    finetuned: Measured

    def share(self, found: Measured) -> float:
        """What a model keeps; minus infinity where that makes no sense."""
        return _retained(self.metric, self.base, self.finetuned, found)

    def report(self, found: Measured, **known: Any) -> Quality:
        """What a packed model keeps of its fine-tune. known: further fields of the report.

        No share is stated where the fine-tune is no better than its base, or a score is not
        finite.
        """
        scores = [measured.score for measured in (self.base, self.finetuned, found)]
        floor = 0.0 if self.metric in RATIOS else scores[0]
        if all(map(math.isfinite, scores)) and scores[1] > floor:
            low, high = _interval(self.metric, self.base, self.finetuned, found)
            share = {"retained": self.share(found), "low": low, "high": high}
            known |= {name: value for name, value in share.items() if math.isfinite(value)}
        return Quality(
            self.metric,
            len(found.counts),
            base=scores[0],
            finetuned=scores[1],
            packed=scores[2],
            **known,
        )


def find_recipe(
    measure: Callable[[Recipe], Measured],
    yardstick: Yardstick,
    recipe: Recipe,
    rules: Sequence[Rule],
    share: float,
    on_trial: Callable[[Trial], None] = lambda _: None,
    cost: Callable[[Recipe], float] = lambda recipe: recipe.density,
) -> tuple[Recipe, Quality]:
    """The recipe of least cost that keeps ``share``, by whichever rule, and a report on it.

    measure: scores the words that a recipe would store.

    Raises:
        InvalidArgumentError: see :func:`check_retain`.
        RetainError: the fine-tune is no better than its base, or no density keeps the share.
    """
    check_retain(share)
    base, finetuned = yardstick.base.score, yardstick.finetuned.score
    if not math.isfinite(finetuned) or finetuned <= base:
        raise RetainError(
            f"the fine-tune is no better than its base on the calibration data: {yardstick.metric} "
            f"{finetuned:.5g}, base {base:.5g}"
        )
    trials: list[Trial] = []
    best: tuple[Recipe, Measured] | None = None
    for ruled in _variants(recipe, rules):
        asked = _densities(LARGEST_DENSITY[ruled.prune])
        density = next(asked)
        while True:
            candidate = replace(ruled, density=density)
            enough = best is not None and cost(candidate) >= cost(best[0])
            if not enough:
                found = measure(candidate)
                trials.append(Trial(density, yardstick.share(found), ruled.prune, ruled.values))
                on_trial(trials[-1])
                enough = trials[-1].retained >= share
                if enough:
                    best = candidate, found
            try:
                density = asked.send(enough)
            except StopIteration:
                break
            if density < candidate.density and cost(replace(ruled, density=density)) > (
                _NO_GAIN * cost(candidate)
            ):
                break
    if best is None:
        closest = max(trials, key=lambda trial: trial.retained)
        raise RetainError(
            f"density {closest.density:.3g} keeps {closest.retained:.2%} of the fine-tune's "
            f"{yardstick.metric}, not {share:.2%}; pack with --lossless"
        )
    recipe, found = best
    quality = yardstick.report(
        found,
        target=share,
        density=recipe.density,
        trials=tuple(trials),
        seed=recipe.seed,
        evaluations=len(trials),
    )
    return recipe, quality


def _variants(recipe: Recipe, rules: Sequence[Rule]) -> Iterator[Recipe]:
    for rule in rules:
        wanted = recipe.values if rule in ROUNDED else "exact"
        for values in VALUES_TRIED if wanted == "auto" else (wanted,):
            yield replace(recipe, prune=rule, values=values)


def _densities(largest: float) -> Generator[float, bool]:
    """Densities to try, given after each whether it kept enough."""
    density, least = largest, None
    failed: list[float] = []  # in a row, the larger first
    while len(failed) < _FAILURES and density > SMALLEST_DENSITY:
        if (yield density):
            least, failed = density, []
        else:
            failed.append(density)
        density /= STEP
    if least is None:
        return
    for _ in range(REFINEMENTS if failed else 0):
        middle = math.sqrt(least * failed[0])
        if (yield middle):
            least = middle
        else:
            failed = [middle]


def _retained(metric: str, base: Measured, finetuned: Measured, found: Measured) -> float:
    floor = 0.0 if metric in RATIOS else base.score
    gain = finetuned.score - floor
    share = (found.score - floor) / gain if gain > 0 else math.nan
    return share if math.isfinite(share) else -math.inf


def _interval(
    metric: str, base: Measured, finetuned: Measured, found: Measured
) -> tuple[float, float]:
    """Percentile bootstrap over examples, the same ones for all three models (Efron 1979).

    Samples on which the fine-tune has nothing to keep are left out.
    """
    rng = np.random.default_rng(0)
    size = len(found.counts)
    if size == 1:
        return (_retained(metric, base, finetuned, found),) * 2
    shares = []
    for _ in range(_RESAMPLES):
        picked = rng.integers(0, size, size)
        drawn = [measured.take(picked) for measured in (base, finetuned, found)]
        floor = 0.0 if metric in RATIOS else drawn[0].score
        if drawn[1].score > floor:
            shares.append(_retained(metric, *drawn))
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(shares, [tail, 100 - tail]) if shares else (-math.inf, math.inf)
    return float(low), float(high)
