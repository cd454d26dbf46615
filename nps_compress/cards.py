"""A model card for people, from what a ``.nps`` file says of itself.

All names in it are the file's, whoever wrote it: they are shown as code, without the characters
that end code or a table's cell, and reach a command only where a shell takes them as they are.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nps_compress.atomic import atomic_file, refuse_existing, refuse_input_as_output
from nps_compress.dtypes import BY_NAME
from nps_compress.format.records import printable
from nps_compress.inspection import inspect
from nps_compress.reconstruct import FINETUNED_NAME_KEY
from nps_compress.report import ERROR_MEANING, Quality, recipe_words

_LARGEST = 5
_MAX_NAME = 200
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def write_card(task: str | Path, out: str | Path, *, force: bool = False) -> None:
    """Write :func:`model_card` of ``task`` at ``out``.

    Raises:
        OutputExistsError, WriteError, and as :func:`nps_compress.inspect`.
    """
    out = Path(out)
    refuse_existing(out, force)
    refuse_input_as_output(out, [Path(task)])
    text = model_card(task)
    with atomic_file(out, force) as stream:
        stream.write(text.encode())


def model_card(task: str | Path) -> str:
    """A model card in Markdown with the front matter that the Hugging Face Hub reads.

    Raises:
        FormatError: the file breaks a rule; InvalidArgumentError, OSError: it can't be read.
    """
    found = inspect(task)
    metadata = found["metadata"]
    finetuned = metadata.get(FINETUNED_NAME_KEY, "")
    base = found["base_name"]
    parts = [
        *_front_matter(base),
        f"# {_code(finetuned or 'unnamed fine-tune')}",
        "",
        f"A fine-tune of {_code(base)}, stored as what changed: base and this file give the "
        "weights back, each tensor checked against its digest.",
        "",
        "```",
        _unpack_command(base, Path(task).name, finetuned),
        "```",
        "",
        "## Size",
        "",
        *_size(found),
        "",
        "## Recipe",
        "",
        _sentence(recipe_words(metadata) or "none is recorded in the file"),
        "",
        *_quality(Quality.from_metadata(metadata)),
        "## Tensors",
        "",
        *_tensors(found),
        "",
        "## Digests",
        "",
        *_table(
            ("digests", ""),
            [
                ("the fine-tune (content, BLAKE3)", f"`{found['content_digest']}`"),
                ("the file (SHA-256)", f"`{found['file_sha256']}`"),
                (
                    f"the base (root over {found['base_tensors']} tensors)",
                    f"`{found['base_root']}`",
                ),
            ],
        ),
    ]
    return "\n".join(parts) + "\n"


def _front_matter(base: str) -> list[str]:
    lines = ["---", "library_name: nps-compress", "tags:", "- nps-compress", "- task-vector"]
    if _HUB_ID.fullmatch(base):
        lines.append(f"base_model: {json.dumps(base)}")
    return [*lines, "---", ""]


def _unpack_command(base: str, file: str, finetuned: str) -> str:
    # Whoever reads a card copies this: no text of the file that a shell could take for more.
    plain = _HUB_ID.fullmatch(base) or _PLAIN.fullmatch(base)
    last = finetuned.rpartition("/")[2]
    out = last if _PLAIN.fullmatch(last) else "finetuned"
    name = shlex.quote(printable(file))
    name = f"./{name}" if name.startswith("-") else name
    return f"nps-compress unpack {base if plain else 'BASE'} {name} -o {out}-rebuilt"


def _size(found: dict[str, Any]) -> list[str]:
    tensors = found["tensors"]
    weights = sum(tensor["numel"] * BY_NAME[tensor["dtype"]].itemsize for tensor in tensors)
    return _table(
        ("bytes", "weights in full", "ratio", "parameters", "bits per parameter", "density"),
        [
            (
                f"{found['file_bytes']:,}",
                f"{weights:,}",
                f"{weights / found['file_bytes']:.1f}x",
                f"{found['total_params']:,}",
                f"{found['bits_per_param']:.4g}",
                f"{found['density']:.4g}",
            )
        ],
    )


def _quality(quality: Quality | None) -> list[str]:
    if quality is None:
        return []
    return [
        "## Quality",
        "",
        "As measured by who packed the file, on the data that its recipe was chosen on; nothing in "
        "the file can prove it.",
        "",
        *_table(("", ""), [(label, _code(value)) for label, value in quality.rows()]),
        "",
    ]


def _tensors(found: dict[str, Any]) -> list[str]:
    tensors = [tensor for tensor in found["tensors"] if tensor["op"] != "deleted"]
    known = [tensor for tensor in tensors if tensor["relative_error"] is not None]
    whole = [tensor["name"] for tensor in tensors if tensor["op"] == "new"]
    lines = [f"- {len(tensors)} tensors; stored whole, without the base: {_some(whole)}"]
    if known:
        exact = [t["name"] for t in known if t["op"] == "delta" and t["relative_error"] == 0]
        same = [t for t in known if t["op"] == "copy" and t["relative_error"] == 0]
        lines.append(f"- every change kept exactly: {_some(exact)}")
        lines.append(f"- the same as the base's: {len(same)}")
    if found["relative_error"] is not None:
        overall = f"{found['relative_error']:.3g}"
        lines.append(f"- relative error over the pruned tensors: {overall} ({ERROR_MEANING})")
    worst = sorted(known, key=lambda tensor: -tensor["relative_error"])[:_LARGEST]
    rows = [
        (_code(tensor["name"]), f"{tensor['relative_error']:.3g}", f"{tensor['density']:.4g}")
        for tensor in worst
        if tensor["relative_error"] > 0
    ]
    if rows:
        header = ("largest relative error", "error", "density")
        lines += ["", *_table(header, rows)]
    return lines


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _LARGEST} more" if len(names) > _LARGEST else ""
    return ", ".join(_code(name) for name in names[:_LARGEST]) + more


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _code(text: str) -> str:
    """Text of the file as code, in which nothing is markup: neither Markdown nor HTML."""
    shown = printable(text).replace("`", "'").replace("|", "\N{BROKEN BAR}").strip()
    if len(shown) > _MAX_NAME:
        shown = shown[: _MAX_NAME - 3] + "..."
    return f"`{shown or '?'}`"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
