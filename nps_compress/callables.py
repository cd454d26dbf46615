"""A fitness function of the user's own, named ``module:function``.

It is called with the model, its weights already in place, and the examples; a third parameter
without a default gets the tokenizer or image processor. It returns one float, or one for each
example, from which intervals can be drawn; higher is better.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nps_compress.calibration import Example
from nps_compress.errors import FitnessError, InvalidArgumentError
from nps_compress.measured import Measured

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

Function = Callable[[Any, Sequence[Example], Any], Any]


def is_callable_name(name: str) -> bool:
    """Whether a fitness is named as ``module:function``."""
    return _NAME.fullmatch(name) is not None


def load_function(name: str) -> Function:
    """The function of that name; its module is also looked for in the working directory.

    Raises:
        InvalidArgumentError: there is none. FitnessError: its module fails when imported.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InvalidArgumentError("fitness", name, f"importable ({error})") from None
    except Exception as error:  # the module is the user's
        raise FitnessError(name, _said(error)) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InvalidArgumentError("fitness", name, f"a function of {module_name}")
    if not _takes_processor(function):
        return lambda model, examples, _: function(model, examples)
    return function


def call(
    name: str, function: Function, model: Any, examples: Sequence[Example], processor: Any
) -> Measured:
    """What a function says of a model: an example each, or all of them as one.

    Raises:
        FitnessError: the function raises, or returns neither a float nor one for each example.
    """
    try:
        found = function(model, list(examples), processor)
        if hasattr(found, "detach"):
            found = found.detach().cpu()
        values = np.asarray(found, np.float64)
    except Exception as error:  # the code is the user's
        raise FitnessError(name, _said(error)) from error
    if values.shape not in ((), (len(examples),)):
        raise FitnessError(
            name, f"returned shape {values.shape}, needs a float or {len(examples)} of them"
        )
    values = np.atleast_1d(values)
    return Measured(values, np.ones(len(values), np.int64))


def _takes_processor(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # builtins have none
        return False
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    return len(positional) > 2 and positional[2].default is inspect.Parameter.empty


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
