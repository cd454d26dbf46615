"""Benchmark rows that explain themselves, kept as CSV under benchmarks/results/."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import nps_compress

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Machine, versions and commit that a figure belongs to."""
    import numba
    import numpy
    import zstandard

    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--", ":/", ":!/benchmarks/results"):
        commit += "-dirty"
    versions = (
        f"nps-compress {nps_compress.__version__}, numpy {numpy.__version__}, "
        f"numba {numba.__version__}, zstandard {zstandard.__version__}"
    )
    return {"machine": _processor(), "versions": versions, "commit": commit}


def save(name: str, rows: list[dict[str, object]]) -> Path:
    """Write rows of equal keys, each with its environment."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    shared = environment()
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *shared], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, **shared})
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows that a file has so far."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append(path: Path, fields: Sequence[str], row: Mapping[str, object]) -> None:
    """Add a row to a file, which is made if there is none."""
    new = not path.exists()
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def write(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Replace what a file has; it has the old rows or the new, whenever this ends."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".partial")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def table(rows: list[dict[str, object]]) -> str:
    """The rows as aligned text."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
