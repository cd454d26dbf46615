"""The methods by their names, and what each is run with unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nps_compress.errors import InvalidArgumentError
from nps_compress.merging import (
    average,
    consensus,
    dare,
    della,
    emr,
    evolver,
    neuromerging,
    nps,
    task_arithmetic,
    ties,
)
from nps_compress.merging.contract import Measure, Merge, Settings
from nps_compress.prune import RULES, check_density
from nps_compress.recipe import SCOPES


@dataclass(frozen=True)
class Method:
    """A method as the driver runs it.

    ``defaults``: its data-free settings. ``prunes``: whether task vectors may be pruned before by
    any rule. ``options``: the other settings that it reads. ``measure``: its first pass.
    ``genes``: what a search varies. ``per_task``: whether each task has a model of its own.
    """

    merge: Merge
    defaults: Settings
    prunes: bool = False
    options: tuple[str, ...] = ()
    measure: Measure | None = None
    genes: tuple[str, ...] = ()
    per_task: bool = False


METHODS: dict[str, Method] = {
    "average": Method(average.merge, Settings()),
    "task-arithmetic": Method(
        task_arithmetic.merge, Settings(scale=0.4), True, ("scale",), genes=("scale",)
    ),
    "ties": Method(ties.merge, Settings(prune="magnitude"), True, ("scale",), genes=("scale",)),
    "dare": Method(
        dare.merge,
        Settings(scale=0.4, density=0.1, prune="random"),
        True,
        ("scale", "elect"),
        genes=("scale",),
    ),
    "della": Method(
        della.merge, Settings(), options=("scale", "density", "window"), genes=("scale",)
    ),
    "consensus": Method(
        consensus.merge,
        Settings(scale=0.4),
        True,
        ("scale", "elect", "threshold", "agreement"),
        genes=("scale",),
    ),
    "emr": Method(emr.merge, Settings(), options=("scale",), measure=emr.measure, per_task=True),
    "nps": Method(
        nps.merge,
        Settings(density=0.1, prune="magnitude"),
        True,
        ("scale", "elect"),
        genes=("scale", "coefficients"),
    ),
    "neuromerging": Method(
        neuromerging.merge,
        Settings(scale=None, density=0.1, prune="magnitude"),
        True,
        ("scale", "parallel"),
        neuromerging.measure,
        ("scale", "parallel"),
    ),
    "evolver": Method(
        evolver.merge,
        Settings(),
        options=("mutation", "crossover"),
        genes=("exchanges",),
    ),
}

_Check = tuple[Callable[[float], bool], str]
_RANGES: dict[str, _Check] = {
    "scale": (lambda x: -1e6 <= x <= 1e6, "a number from -1e6 to 1e6"),
    "parallel": (lambda x: -1e6 <= x <= 1e6, "a number from -1e6 to 1e6"),
    "threshold": (lambda x: 0 <= x <= 1e6, "a number from 0 to 1e6"),
    "mutation": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "crossover": (lambda x: 0 < x <= 1, "in (0, 1]"),
}


def method_of(name: str) -> Method:
    """A method by its name. Raises InvalidArgumentError for an unknown one."""
    if name not in METHODS:
        raise InvalidArgumentError("method", name, f"one of {', '.join(METHODS)}")
    return METHODS[name]


def check_settings(method: Method, settings: Settings, tasks: int) -> None:
    """Raise InvalidArgumentError where a number that is read is out of its range."""
    check_density(settings.density)
    for name, (is_right, expected) in _RANGES.items():
        value = getattr(settings, name)
        if value is not None and not is_right(value):
            raise InvalidArgumentError(name, value, expected)
    if settings.prune is not None and settings.prune not in RULES:
        raise InvalidArgumentError("prune", settings.prune, f"one of {', '.join(RULES)}")
    if settings.scope not in SCOPES:
        raise InvalidArgumentError("scope", settings.scope, f"one of {', '.join(SCOPES)}")
    if "agreement" in method.options and not 1 <= settings.agreement <= tasks:
        raise InvalidArgumentError("agreement", settings.agreement, f"from 1 to {tasks} tasks")
    if not 0 <= settings.seed < 2**32:
        raise InvalidArgumentError("seed", settings.seed, "an integer from 0 to 2^32 - 1")
    if "window" in method.options:
        della.window_of(settings)
