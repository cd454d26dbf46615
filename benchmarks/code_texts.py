"""Two more text tasks on the same base, so that there are six to merge.

``errors``: which exception a message was raised with. ``verbs``: what the name of a function that
a docstring describes begins with.
"""

from __future__ import annotations

import ast
from pathlib import Path

import corpus
import docstrings
from corpus import Item
from task_data import Data

ERRORS = ("AssertionError", "NotImplementedError", "RuntimeError", "TypeError", "ValueError")
VERBS = (
    *("add", "check", "create", "find", "generate", "get", "is", "make", "parse", "read", "set"),
    "update",
)
_MIN_WORDS = 4


def errors(folder: Path) -> Data:
    """Literal parts of the messages of ``raise``."""
    items: list[Item] = []
    seen: set[str] = set()
    for module in corpus.modules():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            name = getattr(node.exc.func, "id", None)
            if name not in ERRORS or not node.exc.args:
                continue
            text = " ".join(_strings(node.exc.args[0]).split())
            if len(text.split()) >= _MIN_WORDS and text.lower() not in seen:
                seen.add(text.lower())
                row = {"text": text, "label": ERRORS.index(name)}
                items.append(Item(module.source, module.package, row))
    divided = corpus.parts(corpus.cap(items, "label", 900), seed=5)
    return Data(ERRORS, corpus.draw(divided, (1900, 256, 750)))


def verbs(folder: Path) -> Data:
    """First paragraphs of the docstrings of functions."""
    items: list[Item] = []
    seen: set[str] = set()
    for module in corpus.modules():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            verb = node.name.strip("_").split("_")[0].lower()
            docstring = ast.get_docstring(node)
            text = docstrings.opening(docstring, module.package) if docstring else None
            if verb in VERBS and text is not None and text.lower() not in seen:
                seen.add(text.lower())
                row = {"text": text, "label": VERBS.index(verb)}
                items.append(Item(module.source, module.package, row))
    divided = corpus.parts(corpus.cap(items, "label", 450), seed=6)
    return Data(VERBS, corpus.draw(divided, (2000, 256, 800)))


def _strings(node: ast.expr) -> str:
    """The string constants of an expression, in the order they stand."""
    found = [
        child
        for child in ast.walk(node)
        if isinstance(child, ast.Constant) and isinstance(child.value, str)
    ]
    found.sort(key=lambda child: (child.lineno, child.col_offset))
    return " ".join(str(child.value) for child in found)
