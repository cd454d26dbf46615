"""The table of benchmarks/quality.py, on rows counted by hand."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def quality(benchmark):
    return benchmark("quality")


def row(task, method, seed, retained, bits):
    found = {"task": task, "method": method, "setting": "density 0.1", "seed": seed}
    return found | {"retained": retained, "bits_per_param": bits}


def test_tasks_weigh_alike_however_many_seeds_they_have(quality):
    found = [
        row("a", "ours", "0", "0.90", "1.0"),
        row("a", "ours", "1", "1.00", "2.0"),
        row("b", "ours", "0", "0.55", "0.5"),
        row("a", "theirs", "0", "0.20", "0.1"),
    ]
    partial, complete = sorted(quality.summary(found), key=lambda line: str(line["mean"]))
    assert (complete["a"], complete["b"]) == ("95.0 (10.0)", "55.0")
    assert (complete["mean"], complete["bits"], complete["seeds"]) == ("75.0", "1.000", 1)
    assert (partial["a"], partial["b"], partial["mean"], partial["bits"]) == ("20.0", "-", "-", "-")
