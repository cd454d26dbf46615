"""A real text task that needs no download: which package was this docstring written for?

Each example is the opening paragraph of one docstring of an installed package, its label the
package. Parts are split by module, and a text that occurs in two modules is kept once, so no
source is shared between train, calibration and test.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STDLIB = "stdlib"
PACKAGES = (
    STDLIB,
    "matplotlib",
    "networkx",
    "numba",
    "numpy",
    "scipy",
    "sklearn",
    "sympy",
    "torch",
    "transformers",
)
_SKIPPED_FOLDERS = {"tests", "test", "testing", "site-packages", "idlelib", "__pycache__"}
_MIN_WORDS, _MAX_WORDS = 6, 60


@dataclass(frozen=True)
class Example:
    text: str
    label: str
    source: str  # module path, relative to the package


@dataclass(frozen=True)
class Split:
    train: list[Example]
    calibration: list[Example]
    test: list[Example]


def collect(
    packages: Sequence[str] = PACKAGES, modules_per_package: int = 250, seed: int = 0
) -> list[Example]:
    """Docstring openings of at most ``modules_per_package`` modules of each installed package."""
    examples: list[Example] = []
    seen: set[str] = set()
    for package in packages:
        root = package_root(package)
        if root is None:
            continue
        modules = sorted(module_paths(root))
        random.Random(f"{seed}/{package}").shuffle(modules)
        for module in modules[:modules_per_package]:
            source = f"{package}/{module.relative_to(root).as_posix()}"
            for docstring in _docstrings(module):
                text = opening(docstring, package)
                if text is not None and text.lower() not in seen:
                    seen.add(text.lower())
                    examples.append(Example(text, package, source))
    return examples


def split(
    examples: Sequence[Example], train: int, calibration: int, test: int, seed: int = 0
) -> Split:
    """Divide the modules 60 : 15 : 25, then draw the asked number of examples from each part.

    Raises:
        ValueError: a part holds fewer examples than asked for.
    """
    sources = sorted({example.source for example in examples})
    rng = random.Random(seed)
    rng.shuffle(sources)
    first, second = int(len(sources) * 0.6), int(len(sources) * 0.75)
    drawn = []
    for wanted, part in (
        (train, sources[:first]),
        (calibration, sources[first:second]),
        (test, sources[second:]),
    ):
        inside = set(part)
        pool = [example for example in examples if example.source in inside]
        if len(pool) < wanted:
            raise ValueError(f"only {len(pool)} docstrings for a part of {wanted}")
        rng.shuffle(pool)
        drawn.append(pool[:wanted])
    return Split(*drawn)


def labels(examples: Sequence[Example]) -> list[str]:
    return sorted({example.label for example in examples})


def write_jsonl(path: Path, examples: Sequence[Example], names: Sequence[str]) -> None:
    """One ``{"text": str, "label": int}`` a line, as the fitness functions read it."""
    with path.open("w", encoding="utf-8") as stream:
        for example in examples:
            row = {"text": example.text, "label": names.index(example.label)}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def package_root(package: str) -> Path | None:
    if package == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def module_paths(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
            yield path


def _docstrings(module: Path) -> Iterator[str]:
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def opening(docstring: str, package: str) -> str | None:
    """The first paragraph on one line, the package's own name taken out; None where unfit."""
    paragraph = docstring.strip().split("\n\n")[0]
    words = re.sub(rf"(?i){re.escape(package)}\w*", "it", paragraph).split()
    if not _MIN_WORDS <= len(words) <= _MAX_WORDS:
        return None
    return " ".join(words)
