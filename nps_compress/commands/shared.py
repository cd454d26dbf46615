"""Options and output that commands have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def output(what: str) -> Callable[[F], F]:
    """The ``-o`` option, described by ``what``."""
    return click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=what)


force_option = click.option("--force", is_flag=True, help="Overwrite the output.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def given(ctx: click.Context, names: set[str]) -> list[str]:
    """Those of the named options that were given on the command line."""
    return [
        param.opts[-1]
        for param in ctx.command.params
        if param.name in names
        and ctx.get_parameter_source(param.name) is click.core.ParameterSource.COMMANDLINE
    ]


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(value, indent=2))


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
