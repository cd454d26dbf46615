"""The memory benchmark: what it reports is the peak of what it runs, and of nothing else."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MODULE = "import sys\ndata = bytearray(int(sys.argv[1]) << 20)\ndata[::4096] = data[::4096]\n"


@pytest.fixture(scope="module")
def memory(benchmark):
    return benchmark("memory")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A program that holds as many MiB as it is told to."""
    (tmp_path / "holds.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "holds"


def test_the_peak_is_that_of_the_program_alone(memory, module):
    ours = np.ones(600 << 20, np.uint8)  # this process's own peak goes beyond what is measured
    assert ours[-1] == 1
    _, little = memory.peak(1, module=module)
    _, more = memory.peak(200, module=module)
    assert little < 0.1
    assert 195 / 1024 < more - little < 210 / 1024


def test_a_step_that_fails_is_no_figure(memory, module):
    with pytest.raises(SystemExit, match="holds many failed"):
        memory.peak("many", module=module)


def test_the_command_line_runs(memory, capfd):
    seconds, gib = memory.peak("--version")
    assert seconds > 0
    assert 0 < gib < 2
    assert "nps-compress" in capfd.readouterr().out
