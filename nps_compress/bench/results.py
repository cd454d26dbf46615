"""A report: tables of marked figures, written as JSON, CSV or a page."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nps_compress import __version__
from nps_compress._threads import workers
from nps_compress.atomic import atomic_file, refuse_existing, refuse_input_as_output
from nps_compress.bench.figures import Table, counted
from nps_compress.bench.page import page
from nps_compress.bench.peers import PEERS
from nps_compress.bench.projection import Plan
from nps_compress.errors import InvalidArgumentError

VERSION = 1
_COLUMNS = ("table", "subject", "name", "value", "unit", "kind")


@dataclass(frozen=True)
class Report:
    """All figures, and what stands behind them.

    ``plots``: caption and SVG. ``tasks``, ``tensors``: what was packed, and rebuilt in each of
    ``rounds``, counted or not.
    """

    title: str
    tables: tuple[Table, ...]
    plots: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    plan: Plan
    tasks: int
    tensors: int
    rounds: int

    @property
    def verified(self) -> str:
        """What held, in words; a report exists only where all of it did."""
        return (
            f"verified: in each of {self.rounds} rounds, all tensors unpacked, loaded and switched "
            f"to had the digests that the file promises ({counted(self.tensors, 'tensor')} "
            f"of {counted(self.tasks, 'task')})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, without the plots."""
        return {
            "nps_bench": VERSION,
            "title": self.title,
            "verified": {"tasks": self.tasks, "tensors": self.tensors, "rounds": self.rounds},
            "machine": machine(),
            "plan": asdict(self.plan),
            "figures": [
                {"table": table.title, **asdict(figure)}
                for table in self.tables
                for figure in table.figures
            ],
            "peers": [asdict(peer) for peer in PEERS],
            "notes": [*(note for table in self.tables for note in table.notes), *self.notes],
        }

    def to_csv(self) -> str:
        """One line a figure."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.to_dict()["figures"])
        return stream.getvalue()

    def write(self, csv_path: Path | None, html_path: Path | None, force: bool = False) -> None:
        """Write what is asked for, each file whole or not at all.

        Raises:
            OutputExistsError, WriteError.
        """
        html = page(self.title, self.verified, self.tables, self.plots, self.notes)
        for path, text in ((csv_path, self.to_csv()), (html_path, html)):
            if path is not None:
                with atomic_file(path, force) as stream:
                    stream.write(text.encode())


def refuse_outputs(
    csv_path: Path | None, html_path: Path | None, inputs: Iterable[str], force: bool
) -> None:
    """Refuse, before any work, what :meth:`Report.write` could not or must not write.

    Raises:
        OutputExistsError, WriteError, InvalidArgumentError.
    """
    sources = [Path(source) for source in inputs]
    for path in (csv_path, html_path):
        if path is not None:
            refuse_existing(path, force)
            refuse_input_as_output(path, sources)
    if csv_path is not None and html_path is not None and csv_path.resolve() == html_path.resolve():
        raise InvalidArgumentError("html", str(html_path), "another file than csv")


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "processor": _processor(),
        "cores": workers(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "nps_compress": __version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except (OSError, ValueError):
        pass
    return platform.processor() or platform.machine()
