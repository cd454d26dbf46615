"""A recipe: everything that turns a base and a fine-tune into one set of kept values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from nps_compress.atomic import write_json
from nps_compress.errors import InvalidArgumentError, RecipeError
from nps_compress.groups import GROUPS, Group
from nps_compress.prune import (
    COEFFICIENTS,
    CUTS,
    MAX_SUBSPACES,
    RULES,
    Cuts,
    Rule,
    Weighting,
    check_density,
    top_shares,
)
from nps_compress.values import VALUES, Values

VERSION = 1
# Best on average over `make quality`, at a third of the bytes of the next best.
DEFAULT_RULE: Rule = "signs"
Importance = Literal["magnitude", "fisher", "activation"]
IMPORTANCES: tuple[Importance, ...] = get_args(Importance)
ROUNDED: tuple[Rule, ...] = ("magnitude", "random")  # whose values may be stored in a few bits
Scope = Literal["global", "tensor"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Recipe:
    """What to keep of a task vector, and at which scale.

    ``density`` is the share of elements kept, in (0, 1]. ``scope`` says whether magnitudes are
    ranked over the whole task vector or within each tensor; ``importance`` by what: the magnitude
    alone, or times an importance measured on calibration data (importance.py). ``values`` says how
    precisely ``magnitude`` and ``random`` store what they keep (values.py). ``top_shares`` cut
    that ranking into subspaces (descending; none: one subspace) and ``coefficients`` scale them,
    the lowest ranks first. ``subspace_densities`` (none: all 1), ``group_coefficients`` and
    ``group_densities`` (by name of a group of tensors, see groups.py; 1 where absent) are the
    other factors of prune.Weighting; ``sampled`` has one step a tensor, and so no densities by
    subspace.
    ``search`` records how the coefficients were found; it changes nothing.
    """

    prune: Rule = DEFAULT_RULE
    density: float = 0.05
    scope: Scope = "global"
    importance: Importance = "magnitude"
    values: Values = "exact"
    top_shares: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = (1.0,)
    subspace_densities: tuple[float, ...] = ()
    group_coefficients: dict[str, float] = field(default_factory=dict)
    group_densities: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    search: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prune not in RULES:
            raise InvalidArgumentError("prune", self.prune, f"one of {', '.join(RULES)}")
        if self.scope not in SCOPES:
            raise InvalidArgumentError("scope", self.scope, f"one of {', '.join(SCOPES)}")
        if self.importance not in IMPORTANCES:
            names = ", ".join(IMPORTANCES)
            raise InvalidArgumentError("importance", self.importance, f"one of {names}")
        if self.values not in VALUES:
            raise InvalidArgumentError("values", self.values, f"one of {', '.join(VALUES)}")
        if self.values != "exact" and self.prune not in ROUNDED:
            what = f"used with {' or '.join(ROUNDED)}, not {self.prune}"
            raise InvalidArgumentError("values", self.values, what)
        check_density(self.density)
        shares, coefficients = self.top_shares, self.coefficients
        if len(shares) >= MAX_SUBSPACES or not all(_is_number(s) and 0 < s < 1 for s in shares):
            raise InvalidArgumentError("top_shares", shares, f"under {MAX_SUBSPACES} within (0, 1)")
        if list(shares) != sorted(set(shares), reverse=True):
            raise InvalidArgumentError("top_shares", shares, "descending")
        if len(coefficients) != len(shares) + 1:
            raise InvalidArgumentError(
                "coefficients", len(coefficients), f"{len(shares) + 1} numbers, one per subspace"
            )
        if self.subspace_densities and len(self.subspace_densities) != len(coefficients):
            raise InvalidArgumentError(
                "subspace_densities", len(self.subspace_densities), "none, or one per coefficient"
            )
        for name in ("group_coefficients", "group_densities"):
            by_group = getattr(self, name)
            if not isinstance(by_group, dict) or not by_group.keys() <= set(GROUPS):
                raise InvalidArgumentError(name, by_group, f"by {', '.join(GROUPS)}")
            _check_factors(name, by_group.values())
        _check_factors("coefficients", coefficients)
        _check_factors("subspace_densities", self.subspace_densities)
        if self.prune == "sampled" and len(set(self.subspace_densities)) > 1:
            what = "equal with sampled"
            raise InvalidArgumentError("subspace_densities", self.subspace_densities, what)
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise InvalidArgumentError("seed", self.seed, "an integer from 0 to 2^32 - 1")
        if not isinstance(self.search, dict):
            raise InvalidArgumentError("search", self.search, "an object")

    def weighting(self, groups: Sequence[Group]) -> Weighting:
        """The factors of these groups of tensors."""
        densities = self.subspace_densities or (1.0,) * len(self.coefficients)
        by_group = [
            [given.get(group, 1.0) for group in groups]
            for given in (self.group_coefficients, self.group_densities)
        ]
        return Weighting(
            np.multiply.outer(by_group[0], self.coefficients),
            np.multiply.outer(by_group[1], densities),
        )

    @classmethod
    def with_subspaces(cls, subspaces: int, cuts: Cuts, **options: Any) -> Recipe:
        """A recipe whose ranking is cut into ``subspaces``, with all coefficients at 1."""
        if cuts not in CUTS:
            raise InvalidArgumentError("cuts", cuts, f"one of {', '.join(CUTS)}")
        plain = cls(**options)
        shares = top_shares(subspaces, plain.density, cuts)
        return replace(plain, top_shares=shares, coefficients=(1.0,) * subspaces)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return {"nps_recipe": VERSION, **asdict(self)}

    def write(self, path: Path, force: bool = False) -> None:
        """Save as JSON. Raises OutputExistsError, WriteError."""
        write_json(path, self.to_dict(), force)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Load what :meth:`write` saved. Raises RecipeError."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(path, f"is not readable JSON ({error})") from error
        known = {item.name for item in fields(cls)}
        if not isinstance(value, dict) or value.pop("nps_recipe", None) != VERSION:
            raise RecipeError(path, f"is not a recipe of version {VERSION}")
        for name, default in _SINCE_0_1_0.items():
            value.setdefault(name, default)
        if set(value) != known:
            odd = sorted(set(value) ^ known)
            raise RecipeError(path, f"has missing or unknown fields: {', '.join(odd)}")
        try:
            for name in ("top_shares", "coefficients", "subspace_densities"):
                value[name] = tuple(value[name])
            return cls(**value)
        except (TypeError, ValueError) as error:
            raise RecipeError(path, str(error)) from error


def default_density(rule: Rule) -> float:
    """Signs are cheap: four times as many fit into a third of the bytes."""
    return 0.2 if rule == "signs" else 0.05


def default_importance(rule: Rule, calibrated: bool) -> Importance:
    """What ranks best on average over `make quality`; the paper's rule ranks by magnitude alone."""
    return "fisher" if calibrated and rule in ("sampled", "signs") else "magnitude"


def default_values(rule: Rule) -> Values:
    """What rounds kept values in about half the bytes and keeps the same quality."""
    return "auto" if rule in ROUNDED else "exact"


# Fields that recipes of 0.1.0 lack, and what those recipes mean.
_SINCE_0_1_0: dict[str, Any] = {
    "importance": "magnitude",
    "values": "exact",
    "subspace_densities": [],
    "group_coefficients": {},
    "group_densities": {},
}


def _check_factors(name: str, factors: Iterable[object]) -> None:
    low, high = COEFFICIENTS
    for factor in factors:
        if not _is_number(factor) or not low <= factor <= high:  # type: ignore[operator]
            raise InvalidArgumentError(name, factor, f"from {low} to {high}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
