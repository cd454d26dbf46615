"""Read every vector with every reader: ``python format_spec/conformance.py``, ``make conformance``.

Writes CONFORMANCE.md, a table of vectors by readers; the exit status is 1 where a reader differs
from vectors/expected.json. The package and the minimal reader must rebuild the same bytes, or
refuse by the same rule. The parser that Kaitai Struct generates from nps.ksy knows structure only:
it must find names, shapes and counts in what is valid, and refuse what breaks a rule that nps.ksy
states (``kaitai_reader.RULES``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "kaitai")]

import kaitai_reader  # noqa: E402
import minimal_reader  # noqa: E402
import nps_compress  # noqa: E402
from nps_compress.checkpoint import open_checkpoint  # noqa: E402
from nps_compress.dtypes import DTYPES  # noqa: E402
from nps_compress.format.layout import Op  # noqa: E402

VECTORS = HERE / "vectors"
TABLE = HERE / "CONFORMANCE.md"
READERS = ("package", "minimal reader", "Kaitai parser")
REBUILT, STRUCTURE, REFUSED, WRONG_BASE = "rebuilt", "structure", "refused", "wrong base"
NOT_STRUCTURE = "(not structure)"


@dataclass(frozen=True)
class Row:
    """One vector: what each reader made of it, and whether that is right."""

    vector: str
    expected: str
    outcomes: tuple[str, ...]
    agrees: bool


def by_package(path: Path, base: Path | None) -> str | dict[str, Any]:
    """What the package makes of a file: digests, or how it refuses."""
    try:
        nps_compress.verify(None, path)
        if base:
            nps_compress.verify(base, path)
        source = open_checkpoint(base) if base else None
        with nps_compress.open(path) as task:
            tensors = {}
            for name in task.names:
                base_name = task.base_tensor_name(name)
                before = source.read(base_name) if source and base_name else None
                tensors[name] = task.rebuild_words(name, before).tobytes()
            stored = [entry for entry in task.reader.files if entry.op is Op.NEW]
            files = [(entry.name, task.reader.read_file(entry)) for entry in stored]
            roots = (task.reader.base_root, task.reader.content_digest)
            return summary(*roots, tensors.items(), files)
    except nps_compress.FormatError as error:
        return error.rule
    except nps_compress.BaseMismatchError:
        return WRONG_BASE


def by_minimal_reader(path: Path, base: Path | None) -> str | dict[str, Any]:
    """What minimal_reader.py makes of the same file."""
    try:
        nps = minimal_reader.open_nps(path)
        nps.verify()
        tensors = nps.rebuild(minimal_reader.read_safetensors(base) if base else {})
        stored = [file.name for file in nps.files if file.op == minimal_reader.NEW]
        files = [(name, nps.read_file(name)) for name in stored]
        return summary(nps.base_root, nps.content_digest, tensors.items(), files)
    except minimal_reader.Refused as refusal:
        return refusal.rule
    except minimal_reader.WrongBase:
        return WRONG_BASE


def by_kaitai(path: Path) -> str | dict[str, Any]:
    """What the generated parser finds: dtype, shape and kept elements of each tensor."""
    try:
        found = kaitai_reader.structure(path)
    except kaitai_reader.StructureError:
        return REFUSED
    names = {dtype.code: dtype.name for dtype in DTYPES}
    tensors, first = {}, 0
    for tensor in found["tensors"]:
        chunks = found["chunks"][first : first + tensor["chunks"]]
        first += tensor["chunks"]
        kept = sum(chunk["nnz"] for chunk in chunks)
        typed = {"dtype": names[tensor["dtype"]], "shape": tensor["shape"]}
        tensors[tensor["name"]] = typed | {"kept": kept}
    return {"tensors": tensors, "files": [file["name"] for file in found["files"]]}


def summary(
    base_root: bytes,
    content: bytes,
    tensors: Iterable[tuple[str, bytes]],
    files: Iterable[tuple[str, bytes]],
) -> dict[str, Any]:
    """What two readers that rebuild have in common, in the terms of expected.json."""
    return {
        "base_root": base_root.hex(),
        "content_digest": content.hex(),
        "tensors": {name: blake3(data).hexdigest() for name, data in tensors},
        "files": {name: blake3(data).hexdigest() for name, data in files},
    }


def read_all() -> list[Row]:
    """Every vector that expected.json names, read by every reader."""
    outcomes = json.loads((VECTORS / "expected.json").read_text(encoding="utf-8"))
    rows = [_valid(name, wanted) for name, wanted in outcomes["valid"].items()]
    rows += [_refused("reject", name, rule) for name, rule in outcomes["reject"].items()]
    rows += [_refused("wrong_base", name, WRONG_BASE) for name in outcomes["wrong_base"]]
    return rows


def _valid(name: str, wanted: dict[str, Any]) -> Row:
    path, base = _paths("valid", name)
    whole = dict(wanted)
    whole["tensors"] = {tensor: typed["digest"] for tensor, typed in wanted["tensors"].items()}
    structure = {
        "tensors": {
            tensor: {field: typed[field] for field in ("dtype", "shape", "kept")}
            for tensor, typed in wanted["tensors"].items()
        },
        "files": list(wanted["files"]),
    }
    found = [by_package(path, base), by_minimal_reader(path, base)]
    for outcome in found:
        if isinstance(outcome, dict):  # files of the base are not in the file
            outcome["files"] = {**whole["files"], **outcome["files"]}
    said = [REBUILT if outcome == whole else str(outcome)[:60] for outcome in found]
    seen = by_kaitai(path)
    said.append(STRUCTURE if seen == structure else str(seen)[:60])
    right = said == [REBUILT, REBUILT, STRUCTURE]
    return Row(f"valid/{name}", "accepted", tuple(said), right)


def _refused(folder: str, name: str, rule: str) -> Row:
    path, base = _paths(folder, name)
    found = [by_package(path, base), by_minimal_reader(path, base)]
    seen = by_kaitai(path)
    refused = seen == REFUSED
    said = [outcome if isinstance(outcome, str) else REBUILT for outcome in found]
    said.append(REFUSED if refused else NOT_STRUCTURE)
    right = said[:2] == [rule, rule] and (refused or rule not in kaitai_reader.RULES)
    return Row(f"{folder}/{name}", rule, tuple(said), right)


def _paths(folder: str, name: str) -> tuple[Path, Path | None]:
    base = VECTORS / folder / f"{name}.base.safetensors"
    return VECTORS / folder / f"{name}.nps", base if base.exists() else None


def table(rows: list[Row]) -> str:
    """CONFORMANCE.md."""
    counts = {kind: sum(row.vector.startswith(kind) for row in rows) for kind in KINDS}
    agree = sum(row.agrees for row in rows)
    lines = [
        "# Conformance",
        "",
        f"Written by `make conformance`: {counts['valid']} vectors to accept, {counts['reject']} "
        f"to refuse, {counts['wrong_base']} beside the wrong base; {agree} of {len(rows)} agree.",
        "",
        f"*{REBUILT}*: all tensors and files have the expected bytes, the file the expected base",
        f"root and content digest. *{STRUCTURE}*: names, dtypes, shapes, counts are as expected. A",
        f"rule id: refused by that rule. *{NOT_STRUCTURE}*: accepted by the Kaitai parser, which",
        "computes no digests and decodes no streams.",
        "",
        f"| vector | expected | {' | '.join(READERS)} | |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (KINDS.index(row.vector.split("/")[0]), row.vector)):
        mark = "agree" if row.agrees else "**DIFFER**"
        lines.append(f"| {row.vector} | {row.expected} | {' | '.join(row.outcomes)} | {mark} |")
    return "\n".join(lines) + "\n"


KINDS = ("valid", "reject", "wrong_base")


def main() -> int:
    """Write the table; 1 where readers differ."""
    rows = read_all()
    TABLE.write_text(table(rows), encoding="utf-8")
    for row in rows:
        if not row.agrees:
            print(f"{row.vector}: expected {row.expected}, found {', '.join(row.outcomes)}")
    print(f"{sum(row.agrees for row in rows)} of {len(rows)} vectors agree; {TABLE.name} written")
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
