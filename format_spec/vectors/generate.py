"""Write the conformance vectors: ``python format_spec/vectors/generate.py [FOLDER]``.

``valid/NAME.nps`` must be accepted and, with ``NAME.base.safetensors``, rebuild to the digests in
``expected.json``. ``reject/RULE-what.nps`` must be refused by that rule. ``wrong_base/NAME.nps`` is
valid, but not for the base beside it. Members of bundles are in folders of their own, each with its
``base.nps``; ``reject/FOLDER/base.nps`` is no vector itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts import DTYPES, Base, File, little
from reject import BASE_NPS, BESIDE, REJECT, WRONG_BASE
from valid import VALID


def safetensors(base: Sequence[Base]) -> bytes:
    header: dict[str, Any] = {}
    offset = 0
    names = {code: name for name, (code, _) in DTYPES.items()}
    for item in base:
        end = offset + len(item.data)
        header[item.name.decode()] = {
            "dtype": names[item.dtype],
            "shape": item.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return little(len(text), 8) + text + b"".join(item.data for item in base)


def expected(file: File) -> dict[str, Any]:
    """What a reader must make of a valid file."""
    names = {code: name for name, (code, _) in DTYPES.items()}
    return {
        "base_root": file.base_root().hex(),
        "content_digest": file.content_digest().hex(),
        "tensors": {
            entry.name.decode(): {
                "dtype": names[entry.dtype],
                "shape": entry.shape,
                "kept": sum(chunk.nnz for chunk in entry.chunks),
                "digest": entry.whole_digest().hex(),
            }
            for entry in file.tensors
        },
        "files": {entry.name.decode(): entry.whole_digest().hex() for entry in file.files},
    }


def generate() -> dict[str, bytes]:
    """All files by their path below vectors/."""
    out: dict[str, bytes] = {}
    outcomes: dict[str, Any] = {"valid": {}, "reject": {}, "wrong_base": []}
    for name, make in VALID.items():
        file = make()
        out[f"valid/{name}.nps"] = file.build()
        if file.base:
            out[f"valid/{name}.base.safetensors"] = safetensors(file.base)
        outcomes["valid"][name] = expected(file)
    for name, build in REJECT.items():
        out[f"reject/{name}.nps"] = build()
        outcomes["reject"][name] = "-".join(name.split("/")[-1].split("-")[:2])
    for name, data in BASE_NPS.items():
        out[f"reject/{name}/base.nps"] = data
    for name, make in BESIDE.items():
        out[f"reject/{name}.base.safetensors"] = safetensors(make().base)
    for name, (start, change) in WRONG_BASE.items():
        out[f"wrong_base/{name}.nps"] = start().build()
        base = start().base
        change(base)
        out[f"wrong_base/{name}.base.safetensors"] = safetensors(base)
        outcomes["wrong_base"].append(name)
    out["expected.json"] = (json.dumps(outcomes, indent=1, sort_keys=True) + "\n").encode()
    return out


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    files = generate()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for path in folder.rglob("*"):
        stale = str(path.relative_to(folder)) not in files
        if stale and path.suffix in (".nps", ".safetensors", ".json"):
            path.unlink()
    print(f"{len(files)} files, {sum(map(len, files.values())):,} bytes, in {folder}")


if __name__ == "__main__":
    main()
