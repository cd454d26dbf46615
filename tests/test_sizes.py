"""No byte is lost unseen: ``make sizes`` writes the table anew."""

from __future__ import annotations

import csv

import sizes


def test_sizes_are_those_recorded():
    with sizes.SIZES.open(newline="") as stream:
        recorded = list(csv.DictReader(stream))
    assert sizes.measured() == recorded


def test_more_effort_is_not_larger():
    """But for what the levels of zstd make of short streams."""
    with sizes.SIZES.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    by_level = {(r["fixture"], r["prune"], r["density"], r["level"]): int(r["bytes"]) for r in rows}
    for (fixture, prune, density, level), size in by_level.items():
        if level == "max":
            others = (by_level[fixture, prune, density, name] for name in ("fast", "default"))
            assert size <= 1.005 * min(others) + 64, (fixture, prune, density)
