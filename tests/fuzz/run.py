"""Fuzz every target for a while: ``python tests/fuzz/run.py --seconds 60``, or ``make fuzz``.

Targets share the cores, one process each. The corpus (corpus/TARGET.zip) grows by what reached new
code and is kept minimal; the vectors are its seeds. A finding is left in fuzz-work/TARGET/findings
and makes the exit status 1. One row a target goes to
format_spec/fuzzing.csv.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import zstandard

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "format_spec")]

from targets import SEEDS  # noqa: E402

WORK = ROOT / "fuzz-work"
RESULTS = ROOT / "format_spec" / "fuzzing.csv"
VECTORS = ROOT / "format_spec" / "vectors"
TARGETS = (
    *("reader", "members", "masks", "zstd", "values"),
    *("magnitudes", "learned", "distances", "quantised"),
)
MAX_LENGTH = 4096
ROUND = 100  # seconds; instrumented code grows by about a kilobyte an input, so start anew
FIELDS = (
    *("date", "commit", "target", "cpu_seconds", "executions", "edges", "corpus"),
    *("slowest_seconds", "peak_rss_mb", "findings", "versions"),
)


def unpack_corpus(target: str) -> Path:
    folder = WORK / target / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = HERE / "corpus" / f"{target}.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as stored:
            for name in stored.namelist():
                (folder / Path(name).name).write_bytes(stored.read(name))
    if target == "zstd":
        for level, size in ((1, 20), (3, 300), (19, 3000)):
            frame = zstandard.ZstdCompressor(level).compress(bytes(range(10)) * (size // 10))
            (folder / f"level-{level}").write_bytes(size.to_bytes(2, "little") + frame)
    for number, seed in enumerate(SEEDS[target]() if target in SEEDS else ()):
        (folder / f"seed-{number}").write_bytes(seed)
    if target == "reader":
        for path in VECTORS.rglob("*.nps"):
            for flags in (0, 15, 31):
                if path.stat().st_size < MAX_LENGTH:
                    name = "-".join(path.relative_to(VECTORS).with_suffix("").parts)
                    (folder / f"{name}-{flags}").write_bytes(bytes([flags]) + path.read_bytes())
    return folder


def pack_corpus(target: str, folder: Path) -> int:
    (HERE / "corpus").mkdir(exist_ok=True)
    paths = sorted(folder.iterdir(), key=lambda path: path.read_bytes())
    archive = HERE / "corpus" / f"{target}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as stored:
        for number, path in enumerate(paths):
            stored.writestr(zipfile.ZipInfo(f"{number:04}"), path.read_bytes())
    return len(paths)


def command(target: str, *options: str) -> list[str]:
    return [sys.executable, str(HERE), target, *options]


def fuzz(target: str, seconds: int) -> dict[str, object]:
    folder = unpack_corpus(target)
    findings = WORK / target / "findings"
    findings.mkdir(exist_ok=True)
    before = set(findings.iterdir())
    limits = (
        *(f"-max_len={MAX_LENGTH}", "-timeout=60", "-rss_limit_mb=1024"),
        f"-artifact_prefix={findings}/",
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(WORK / "numba")}
    state = commit()
    log = WORK / target / "log.txt"
    usage = 0.0
    end = time.monotonic() + seconds
    with log.open("w") as stream:
        while (left := end - time.monotonic()) > 0 and set(findings.iterdir()) == before:
            options = (str(folder), *limits, f"-max_total_time={math.ceil(min(left, ROUND))}")
            child = subprocess.Popen(
                command(target, *options, "-print_final_stats=1"),
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            _, _, used = os.wait4(child.pid, 0)
            child.returncode = 0
            usage += used.ru_utime + used.ru_stime
    text = log.read_text(errors="replace")
    merged = WORK / target / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir()
    itself = WORK / target / "itself"
    itself.write_text(f'#!/bin/sh\nexec {shlex.join(command(target))} "$@"\n')
    itself.chmod(0o755)
    subprocess.run(
        command(target, "-merge=1", *limits, str(merged), str(folder)),
        env=environment | {"FUZZ_SELF": str(itself)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def stated(pattern: str) -> list[int]:
        return list(map(int, re.findall(pattern, text))) or [0]

    names = ("atheris", "numba", "numpy", "zstandard")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": state,
        "target": target,
        "cpu_seconds": round(usage),
        "executions": sum(stated(r"number_of_executed_units: (\d+)")),
        "edges": max(stated(r"cov: (\d+)")),
        "corpus": pack_corpus(target, merged),
        "slowest_seconds": max(stated(r"slowest_unit_time_sec: +(\d+)")),
        "peak_rss_mb": max(stated(r"peak_rss_mb: +(\d+)")),
        "findings": len(set(findings.iterdir()) - before),
        "versions": " ".join(f"{name} {version(name)}" for name in names),
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def commit() -> str:
    """The commit that is fuzzed; what the run itself changes does not make it dirty."""
    dirty = git("status", "--porcelain", "--", ":!tests/fuzz/corpus", ":!format_spec/fuzzing.csv")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    targets = arguments.target or TARGETS
    found = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row in pool.map(lambda target: fuzz(target, arguments.seconds), targets):
            new = not RESULTS.exists()
            with RESULTS.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, FIELDS)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(", ".join(f"{field} {row[field]}" for field in FIELDS[2:-1]))
            found += int(str(row["findings"]))
    if found:
        print(f"findings are in {', '.join(f'fuzz-work/{target}/findings' for target in targets)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
