"""What the installed packages' own sources hold: docstrings by kind and place, and functions.

Every task divides modules, not examples, between train, calibration and test, and keeps a text
that occurs twice once, so that no part has seen another's sources.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import platform
import random
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import docstrings
from training import Row

KINDS = ("class", "function", "method", "module", "property")
_PROPERTIES = {"property", "cached_property"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Item:
    """A row and where it is from. ``stratum``: the parts hold every stratum alike."""

    source: str
    stratum: str
    row: Row


@dataclass(frozen=True)
class Docstring:
    text: str  # its opening paragraph, without the package's name
    kind: str
    package: str
    source: str  # package/path of the module


@dataclass(frozen=True)
class Module:
    package: str
    source: str
    text: str
    tree: ast.Module


def versions() -> dict[str, str]:
    """Of everything that is read: with the same versions, the same data are found."""
    distributions = importlib.metadata.packages_distributions()
    found = {
        package: importlib.metadata.version(distributions[package][0])
        for package in docstrings.PACKAGES
        if package in distributions
    }
    return found | {docstrings.STDLIB: platform.python_version()}


def modules(limit: int | None = None, seed: int = 0) -> Iterator[Module]:
    """At most ``limit`` modules of each package, in an order that only the seed changes."""
    for package in docstrings.PACKAGES:
        root = docstrings.package_root(package)
        if root is None:
            continue
        paths = sorted(docstrings.module_paths(root))
        random.Random(f"{seed}/{package}").shuffle(paths)
        for path in paths[:limit]:
            try:
                text = path.read_text(encoding="utf-8")
                tree = ast.parse(text)
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            yield Module(package, f"{package}/{path.relative_to(root).as_posix()}", text, tree)


@functools.cache
def documented() -> tuple[Docstring, ...]:
    """The opening of every docstring of every module."""
    found = []
    seen: set[str] = set()
    for module in modules():
        for kind, node in [("module", module.tree), *_definitions(module.tree, in_class=False)]:
            docstring = ast.get_docstring(node)
            text = docstrings.opening(docstring, module.package) if docstring else None
            if text is not None and text.lower() not in seen:
                seen.add(text.lower())
                found.append(Docstring(text, kind, module.package, module.source))
    return tuple(found)


def topic(source: str) -> str | None:
    """The subpackage that a module belongs to; None for a module right inside its package."""
    package, *folders, _ = Path(source).parts
    return f"{package}.{folders[0]}" if folders else None


def functions(module: Module, lines: tuple[int, int] = (4, 40)) -> Iterator[str]:
    """Source text of the functions and methods of so many lines, without their indentation."""
    text = module.text.split("\n")
    for node in ast.walk(module.tree):
        if isinstance(node, _Function):
            picked = text[node.lineno - 1 : node.end_lineno]
            if lines[0] <= len(picked) <= lines[1]:
                yield textwrap.dedent("\n".join(picked))


def prose(module: Module, min_words: int = 12) -> Iterator[str]:
    """Whole docstrings."""
    for _, node in [("module", module.tree), *_definitions(module.tree, in_class=False)]:
        docstring = ast.get_docstring(node)
        if docstring and len(docstring.split()) >= min_words:
            yield docstring


def cap(items: Sequence[Item], key: str, most: int, seed: int = 0) -> list[Item]:
    """At most so many items of each value of ``row[key]``."""
    groups: dict[object, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.row[key]].append(item)
    rng = random.Random(seed)
    return [item for group in groups.values() for item in rng.sample(group, min(most, len(group)))]


def parts(items: Sequence[Item], seed: int = 0) -> list[list[Item]]:
    """Train, calibration and test: 60 : 15 : 25 of the sources of each stratum."""
    strata: dict[str, set[str]] = defaultdict(set)
    for item in items:
        strata[item.stratum].add(item.source)
    part_of: dict[str, int] = {}
    for stratum in sorted(strata):
        sources = sorted(strata[stratum] - part_of.keys())
        random.Random(f"{seed}/{stratum}").shuffle(sources)
        first, second = round(len(sources) * 0.6), round(len(sources) * 0.75)
        for index, source in enumerate(sources):
            part_of[source] = (index >= first) + (index >= second)
    return [[item for item in items if part_of[item.source] == part] for part in range(3)]


def draw(divided: Sequence[Sequence[Item]], sizes: Sequence[int], seed: int = 0) -> list[list[Row]]:
    """So many rows of each part, drawn at random.

    Raises:
        ValueError: a part holds fewer rows than asked for.
    """
    rng = random.Random(seed)
    drawn = []
    for items, size in zip(divided, sizes, strict=True):
        if len(items) < size:
            raise ValueError(f"only {len(items)} examples for a part of {size}")
        drawn.append([item.row for item in rng.sample(items, size)])
    return drawn


def _definitions(
    node: ast.AST, in_class: bool
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Kind and node of all classes and functions below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield "class", child
            yield from _definitions(child, True)
        elif isinstance(child, _Function):
            names = {getattr(d, "id", getattr(d, "attr", None)) for d in child.decorator_list}
            if names & _PROPERTIES:
                yield "property", child
            else:
                yield "method" if in_class else "function", child
            yield from _definitions(child, False)
        else:
            yield from _definitions(child, in_class)
