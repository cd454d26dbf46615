"""The least density that keeps a share of the fine-tune's quality.

Densities are tried from the largest down, a factor of sqrt(2) apart, until two in a row keep too
little; then the step below the smallest that kept enough is halved twice. Going down step by step
costs more trials than bisection and does not trust one lucky draw far down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nps_compress.candidates import LiveModel, Pruner
from nps_compress.errors import InvalidArgumentError, RetainError
from nps_compress.fitness import Fitness, check_fitness
from nps_compress.measured import Measured

LARGEST_DENSITY, STEP, REFINEMENTS = 0.5, math.sqrt(2), 2
SMALLEST_DENSITY = 1e-5
_FAILURES = 2
_RESAMPLES, _CONFIDENCE = 2000, 0.95
# Zero where nothing is left, so the share of the fine-tune's own; of all others, of its gain.
RATIOS = ("agreement", "accuracy", "exact_match", "spearman")


@dataclass(frozen=True)
class Trial:
    """One density that was tried, and the share that it kept."""

    density: float
    retained: float


@dataclass(frozen=True)
class Quality:
    """What was kept, on calibration data.

    ``retained`` is the share of the fine-tune's score that the packed model reaches; for metrics
    without a zero (all but RATIOS), of its gain over the base. ``low`` and ``high``: its 95 %
    bootstrap interval over examples, which is what to expect on other data of the same kind; where
    a user's own fitness gives one figure for all examples, ``retained`` itself. ``base`` has the
    fine-tune's own new tensors (its head), and nothing of its task vector.
    """

    metric: str
    examples: int
    target: float
    density: float
    base: float
    finetuned: float
    packed: float
    retained: float
    low: float
    high: float
    trials: tuple[Trial, ...]

    @property
    def examples_needed(self) -> int:
        """Examples with which the interval would reach no further than (1 - target) below.

        Its width falls with the square root of their number.
        """
        room = max(1 - self.target, 1e-3)
        return math.ceil(self.examples * max(1.0, ((self.retained - self.low) / room) ** 2))

    def to_metadata(self) -> dict[str, str]:
        """Flat strings for the metadata of a file."""
        texts = {
            name: f"{getattr(self, name):.6g}"
            for name in ("examples", "target", "density", "base", "finetuned", "packed", "retained")
        }
        return {
            "quality_metric": self.metric,
            **{f"quality_{name}": text for name, text in texts.items()},
            "quality_interval": f"{self.low:.6g} to {self.high:.6g}",
            "quality_trials": json.dumps([[t.density, round(t.retained, 6)] for t in self.trials]),
        }


def check_retain(share: float, metric: str | None) -> None:
    """Raise InvalidArgumentError unless 0 < share <= 1 and there is a fitness of that name.

    FitnessError: it is the user's own, and can't be imported.
    """
    if isinstance(share, bool | str) or not 0 < share <= 1:
        raise InvalidArgumentError("retain", share, "in (0, 1]")
    if metric is not None:
        check_fitness(metric)


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
    low, high = _interval(fitness.name, base, finetuned, found)
    return Quality(
        fitness.name,
        len(found.counts),
        share,
        density,
        base.score,
        finetuned.score,
        found.score,
        _retained(fitness.name, base, finetuned, found),
        low,
        high,
        tuple(trials),
    )


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
