"""Coverage-guided fuzzing of one target: ``python tests/fuzz TARGET [libFuzzer options]``.

``make fuzz`` runs all of them, see run.py. An index out of bounds in a hot loop is an error here:
the targets of single codecs run those loops as plain Python, so that their branches are seen too;
whole files need compiled code for their size, which then checks its bounds.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
import time
from pathlib import Path

TARGET = sys.argv.pop(1)
WHOLE_FILES = TARGET in ("reader", "members")
os.environ["NUMBA_BOUNDSCHECK" if WHOLE_FILES else "NUMBA_DISABLE_JIT"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "format_spec")]

import atheris  # noqa: E402

MEMORY_LIMIT = 3 << 30  # of address space, of which interpreter, numpy, LLVM and atheris map half

if WHOLE_FILES:  # numba can't compile what atheris has instrumented
    importlib.import_module("nps_compress.grid_codec")  # and all it imports
with atheris.instrument_imports(include=["nps_compress", "minimal_reader", "targets"]):
    import numpy as np

    import targets

# Of this process's own time: the fuzzer's clock runs on where the machine is busy.
MAX_SECONDS = 2.0


def timed(data: bytes) -> None:
    """The target; an input that takes too long is a finding."""
    start = time.process_time()
    targets.TARGETS[TARGET](data)
    used = time.process_time() - start
    if used > MAX_SECONDS:
        raise TimeoutError(f"{used:.1f} s")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    if WHOLE_FILES:  # to compile takes longer than an input may
        for seed in targets.distance_seeds():
            targets.distances(seed)
    np.seterr(over="ignore")  # words wrap around; compiled code does so without a warning
    sys.argv[0] = os.environ.get("FUZZ_SELF", sys.argv[0])  # merging starts it anew by this name
    atheris.Setup(sys.argv, timed)
    atheris.Fuzz()
