"""What all workers share: one provider in a process and an environment of its own.

A worker answers each line of JSON on stdin with one on stdout. What its libraries print goes to
stderr. Of a provider's own functions everything from files to files is timed, imports are not.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODEL = "model.safetensors"
REST = "rest/model.safetensors"  # in a folder of its own: some read all that is beside a file

Step = Callable[[Path, Path, Path], None]


def settings() -> dict[str, Any]:
    """What the provider is told beside the files."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve(encode: Step, decode: Step, packages: Sequence[str], whole: bool = False) -> None:
    """Answer requests until stdin ends.

    encode: (base, fine-tune, folder to fill), decode: (base, filled folder, folder to write
    ``model.safetensors`` in); base and fine-tune are files with the same tensors. What only the
    fine-tune has is copied beside, but for a provider that takes the ``whole`` fine-tune.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    answer(versions={name: importlib.metadata.version(name) for name in packages})
    for line in sys.stdin:
        request = json.loads(line)
        base, source, out = (Path(request[name]) for name in ("base", "source", "out"))
        started = time.perf_counter()
        try:
            if request["step"] == "encode":
                encode(base / MODEL, source / MODEL, out)
            else:
                decode(base / MODEL, source, out)
            if not whole and (source / REST).exists():
                (out / REST).parent.mkdir()
                shutil.copyfile(source / REST, out / REST)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            answer(error=f"{type(error).__name__}: {text[0]}")
            continue
        seconds = time.perf_counter() - started
        answer(seconds=seconds, peak_mib=peak())


def peak() -> float:
    """The peak resident set of this program, MiB.

    What getrusage says on Linux includes that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (s for s in status.read_text().splitlines() if s.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
