"""The quality report that a file carries: flat strings in its metadata.

Written by who packs, shown by ``inspect`` and the model card. It is a statement, not a check: what
is read back may come from anyone, so every string is parsed by a narrow rule or left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nps_compress.checkpoint import Checkpoint
from nps_compress.errors import CheckpointError
from nps_compress.prune import RULES
from nps_compress.values import VALUES

_PREFIX = "quality_"
_ERROR, _TENSOR_ERRORS = "quality_error", "quality_tensor_errors"
# Of the megabyte that metadata may have; a model of that many tensors keeps the overall figure.
_MAX_TENSOR_ERRORS_BYTES = 1 << 18
_MAX_TRIALS = 1000
_NUMBER = re.compile(r"-?\d{1,32}(\.\d{1,32})?(e[+-]?\d{1,3})?", re.ASCII)
_INTEGER = re.compile(r"\d{1,18}", re.ASCII)
_WORDS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._:/+-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FLOATS = ("target", "density", "base", "finetuned", "packed", "retained")
_INTEGERS = ("examples", "seed", "evaluations")

# Zero where nothing is left, so the share of the fine-tune's own; of all others, of its gain.
RATIOS = ("agreement", "accuracy", "exact_match", "spearman")

ERROR_MEANING = (
    "norm of packed - fine-tune over norm of fine-tune - base: 0 is exact, 1 as if nothing were "
    "kept, and an unbiased sample goes beyond 1"
)


@dataclass(frozen=True)
class Trial:
    """One density that was tried, the share that it kept, by which rule, with which values."""

    density: float
    retained: float
    prune: str | None = None
    values: str = "exact"

    def to_list(self) -> list[object]:
        """As in metadata."""
        found: list[object] = [self.density, round(self.retained, 6), self.prune]
        return found if self.values == "exact" else [*found, self.values]

    @property
    def how(self) -> str:
        """Rule, and values where they are rounded."""
        return f"{self.prune} {self.values}" if self.values != "exact" else str(self.prune)


@dataclass(frozen=True)
class Quality:
    """What was kept, on calibration data; None where that is not known.

    ``retained`` is the share of the fine-tune's score that the packed model reaches; for the
    metrics without a zero (all but RATIOS), of its gain over the base. ``low`` and ``high``:
    its 95 % bootstrap interval over examples, which is what to expect on other data of the same
    kind. ``base`` has the fine-tune's own new tensors (its head), and nothing of its task vector.
    ``target`` and ``trials``: the share that was asked for, and the densities tried for it.
    ``evaluations`` counts the candidates that were scored, ``data_sha256`` identifies the
    calibration data, ``task`` is the kind of model ("sequence-classification").
    """

    metric: str
    examples: int | None = None
    target: float | None = None
    density: float | None = None
    base: float | None = None
    finetuned: float | None = None
    packed: float | None = None
    retained: float | None = None
    low: float | None = None
    high: float | None = None
    trials: tuple[Trial, ...] = ()
    task: str | None = None
    seed: int | None = None
    evaluations: int | None = None
    data_sha256: str | None = None

    @property
    def examples_needed(self) -> int:
        """Examples with which the interval would reach no further than (1 - target) below.

        Its width falls with the square root of their number. 0 where no share was asked for.
        """
        if self.target is None or self.retained is None or self.low is None:
            return 0
        room = max(1 - self.target, 1e-3)
        return math.ceil((self.examples or 0) * max(1.0, ((self.retained - self.low) / room) ** 2))

    def to_metadata(self) -> dict[str, str]:
        """Flat strings for the metadata of a file; without what is not known or not finite."""
        texts = {"metric": self.metric, "task": self.task, "data_sha256": self.data_sha256}
        for name in _FLOATS:
            value = getattr(self, name)
            texts[name] = f"{value:.6g}" if _is_finite(value) else None
        for name in _INTEGERS:
            value = getattr(self, name)
            texts[name] = None if value is None else str(value)
        if _is_finite(self.low) and _is_finite(self.high):
            texts["interval"] = f"{self.low:.6g} to {self.high:.6g}"
        if self.trials:
            tried = [trial.to_list() for trial in self.trials if _is_finite(trial.retained)]
            texts["trials"] = json.dumps(tried)
        return {_PREFIX + name: text for name, text in texts.items() if text is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Quality | None:
        """Undo :meth:`to_metadata`; what is malformed is left out.

        Returns None where no metric is named. Raises nothing.
        """
        said = {name: metadata.get(_PREFIX + name, "") for name in _KEYS}
        if not _WORDS.fullmatch(said["metric"]):
            return None
        low, _, high = said["interval"].partition(" to ")
        numbers: dict[str, Any] = {name: _number(said[name]) for name in _FLOATS}
        for name in _INTEGERS:
            numbers[name] = int(said[name]) if _INTEGER.fullmatch(said[name]) else None
        return cls(
            said["metric"],
            **numbers,
            low=_number(low),
            high=_number(high),
            trials=_trials(said["trials"]),
            task=said["task"] if _WORDS.fullmatch(said["task"]) else None,
            data_sha256=said["data_sha256"] if _SHA256.fullmatch(said["data_sha256"]) else None,
        )

    def rows(self) -> list[tuple[str, str]]:
        """The report for people: what, and how much. Holds no character that needs escaping."""
        kept = None
        if self.retained is not None:
            kept = f"{self.retained:.2%}"
            if self.low is not None and self.high is not None:
                kept += f" (95 % interval {self.low:.2%} to {self.high:.2%})"
        gain = "" if self.metric in RATIOS else " of the gain over the base"
        wanted = None if self.target is None else f"{self.target:.2%}"
        return [
            (label, str(value))
            for label, value in (
                ("task", self.task),
                ("metric", self.metric),
                ("base", _short(self.base)),
                ("fine-tune", _short(self.finetuned)),
                ("packed", _short(self.packed)),
                (f"retained{gain}", kept),
                ("asked for", wanted),
                ("calibration examples", self.examples),
                ("calibration data sha256", self.data_sha256),
                ("density", _short(self.density)),
                ("seed", self.seed),
                ("evaluations", self.evaluations),
            )
            if value is not None
        ]


_KEYS = (*(item.name for item in fields(Quality)), "interval")


def errors_to_metadata(overall: float, each: Sequence[float]) -> dict[str, str]:
    """Relative errors as flat strings, three digits each.

    overall: over all pruned tensors. each: of every tensor of the file, in its order; 0 for those
    that are exact.
    """
    texts = {_ERROR: f"{overall:.3g}", _TENSOR_ERRORS: " ".join(f"{error:.3g}" for error in each)}
    if len(texts[_TENSOR_ERRORS]) > _MAX_TENSOR_ERRORS_BYTES:
        del texts[_TENSOR_ERRORS]
    return texts


def errors_from_metadata(
    metadata: Mapping[str, str], tensors: int
) -> tuple[float | None, list[float | None]]:
    """Undo :func:`errors_to_metadata`, for a file of so many tensors.

    Returns the overall error and one for each tensor; None for each that is absent or malformed.
    """
    each = [_error(text) for text in metadata.get(_TENSOR_ERRORS, "").split(" ")]
    if len(each) != tensors:
        each = [None] * tensors
    return _error(metadata.get(_ERROR, "")), each


def task_of(finetuned: Checkpoint) -> str | None:
    """The kind of model by the architecture in ``config.json``: "sequence-classification".

    None where there is no config, or it names no kind. Raises nothing.
    """
    try:
        config = json.loads(finetuned.read_side_file("config.json"))
        architecture = config["architectures"][0]
        if architecture.endswith("LMHeadModel"):
            return "causal-lm"
        found = re.search(r"For([A-Z][A-Za-z0-9]{0,40})$", architecture)
    except (CheckpointError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", found[1]).lower() if found else None


def recipe_words(metadata: Mapping[str, str]) -> str | None:
    """The recipe in a sentence; None where there is none or it does not make sense."""
    try:
        recipe = json.loads(metadata.get("recipe", ""))
    except (ValueError, RecursionError):
        return None
    if not isinstance(recipe, dict) or recipe.get("prune") not in RULES:
        return None
    density = _finite(recipe.get("density"))
    if density is None or not 0 < density <= 1:
        return None
    what = {
        "magnitude": f"the largest {density:.4g} of the changes",
        "sampled": f"an unbiased sample of {density:.4g} of the changes",
        "signs": f"signs of {density:.4g} of the changes, sampled by row and column",
        "random": f"{density:.4g} of the changes at random, rescaled",
    }[recipe["prune"]]
    where = "within each tensor" if recipe.get("scope") == "tensor" else "over the whole model"
    ranked = {"fisher": "size times Fisher importance", "activation": "size times input norm"}.get(
        str(recipe.get("importance")), "size"
    )
    parts = [f"{what}, ranked by {ranked} {where}"]
    values = recipe.get("values")
    if values in VALUES and values != "exact":
        parts.append(f"values rounded ({values})")
    coefficients = recipe.get("coefficients")
    if isinstance(coefficients, list) and len(coefficients) > 1:
        parts.append(f"{len(coefficients)} subspaces with a coefficient each")
    if recipe.get("subspace_densities"):
        parts.append("a density for each subspace")
    if recipe.get("group_coefficients"):
        parts.append("a coefficient for each group of tensors")
    if recipe.get("group_densities"):
        parts.append("a density for each group of tensors")
    search = recipe.get("search")
    evaluations = search.get("evaluations") if isinstance(search, dict) else None
    if type(evaluations) is int and 0 < evaluations < 10**9:
        parts.append(f"searched in {evaluations} evaluations")
    seed = recipe.get("seed")
    if type(seed) is int and 0 <= seed < 2**32:
        parts.append(f"seed {seed}")
    return "; ".join(parts)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.5g}"


def _number(text: str) -> float | None:
    return _finite(float(text)) if _NUMBER.fullmatch(text) else None


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _error(text: str) -> float | None:
    found = _number(text)
    return None if found is None or found < 0 else found


def _trials(text: str) -> tuple[Trial, ...]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    pairs = read if isinstance(read, list) else []
    found = []
    for pair in pairs[:_MAX_TRIALS]:
        if isinstance(pair, list) and 2 <= len(pair) <= 4:
            density, retained = map(_finite, pair[:2])
            rule = pair[2] if len(pair) > 2 and pair[2] in RULES else None
            values = pair[3] if len(pair) > 3 and pair[3] in VALUES else "exact"
            if density is not None and retained is not None:
                found.append(Trial(density, retained, rule, values))
    return tuple(found)
