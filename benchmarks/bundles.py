"""What tasks of one base cost in a bundle, beside files of their own.

    python benchmarks/bundles.py

Bytes of four fine-tunes of MiniLM. ``shared_chunks`` is the most that dictionaries for chunk data
could save too: every stream that a task's file can hold as a zstd frame, once more with the same
tensor's streams of the three other tasks before it. Gate: each member rebuilds to the digests that
it promises, and comes out of the bundle as the file that was put in.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nps_compress
import rows
import tasks
from nps_compress import bundle, codecs
from nps_compress.format.reader import NpsReader
from nps_compress.recipe import Recipe

TASKS = ("packages", "kinds", "tokens", "topics")
KEPT = {
    "signs 1 %": Recipe(prune="signs", density=0.01),
    "signs 5 %": Recipe(prune="signs", density=0.05),
    "sampled 5 %": Recipe(prune="sampled", density=0.05),
    "every bit": None,
}
LEVEL = 19
Streams = dict[tuple[str, int, int], tuple[bytes, int]]


def measure(kept: str, recipe: Recipe | None, folder: Path) -> list[dict[str, object]]:
    """A row for each task; all are in one bundle."""
    files = {}
    for name in TASKS:
        task, files[name] = tasks.build(name), folder / f"{name}.nps"
        nps_compress.pack(
            task.base, task.finetuned, files[name], recipe=recipe, lossless=recipe is None
        )
    bundle.add(folder / "bundle", list(files.values()))
    streams = {name: _streams(path) for name, path in files.items()}
    found: list[dict[str, object]] = []
    for member in bundle.inspect(folder / "bundle").tasks:
        again = folder / "again.nps"
        bundle.extract(folder / "bundle", member.name, again, force=True)
        assert again.read_bytes() == files[member.name].read_bytes()
        nps_compress.verify(tasks.build(member.name).base, folder / "bundle" / f"{member.name}.nps")
        saved = member.standalone_bytes - member.file_bytes
        others = [streams[name] for name in TASKS if name != member.name]
        shared = _shared(streams[member.name], others)
        found.append(
            {
                "kept": kept,
                "task": member.name,
                "by_itself": member.standalone_bytes,
                "in_bundle": member.file_bytes,
                "saved": f"{saved / member.standalone_bytes:.2%}",
                "index_by_itself": member.index_bytes + saved,
                "index_in_bundle": member.index_bytes,
                "base_nps": (folder / "bundle" / "base.nps").stat().st_size,
                "shared_chunks": f"{shared / member.standalone_bytes:.2%}",
            }
        )
    return found


def _streams(path: Path) -> Streams:
    """Raw bytes and stored size of each mask and plane that zstd may have compressed."""
    found: Streams = {}
    with NpsReader(path) as reader:
        for entry in (*reader.tensors, *reader.files):
            for number in range(entry.chunk_count):
                record, data = reader._chunk_data(entry, number)
                mask = int(record["mask_stored_bytes"])
                found[entry.name, number, -1] = (reader._mask(record, data), mask)
                start = mask
                for plane, size in enumerate(map(int, record["plane_stored_bytes"])):
                    stored = data[start : start + size]
                    if record["planes_compressed"] >> plane & 1:
                        stored = codecs.decompress(stored, int(record["nnz"]))
                    found[entry.name, number, plane] = (stored, size)
                    start += size
    return found


def _shared(mine: Streams, others: list[Streams]) -> int:
    """Bytes that fewer are stored with the others' streams as dictionary."""
    saved = 0
    for key, (raw, stored) in mine.items():
        known = b"".join(other[key][0] for other in others if key in other)
        if raw and len(known) >= 8:
            saved += max(stored - len(codecs.compress(raw, LEVEL, known)), 0)
    return saved


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    found: list[dict[str, object]] = []
    for kept, recipe in KEPT.items():
        with tempfile.TemporaryDirectory() as folder:
            found += measure(kept, recipe, Path(folder))
    path = rows.save("bundles", found)
    print(rows.table(found))
    print(f"rows in {path}")


if __name__ == "__main__":
    main()
