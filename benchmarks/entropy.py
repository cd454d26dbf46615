"""How near files come to the entropy of what they hold: fine-tunes of tasks.py at five densities.

    python benchmarks/entropy.py                   # minutes a task
    python benchmarks/entropy.py --task packages

``floor_bytes`` is what three parts would take:

- masks: n H(kept / n) for each tensor, which is the least where places are independent,
- values: the entropy of a tensor's own frequencies, of signed distances between floats for exact
  ones, of integers for multiples of a step, and one bit for each sign; bytes as they are for
  tensors that only the fine-tune has,
- the index and all else that is no chunk, as the file has it.

``over`` is what the file takes beyond that, in per cent; it can be less than nothing, since places
are told by rows and columns. Frequencies cost nothing here, though a reader would have to learn
them: with few values of many sizes the floor is lower than any code can be. Gate: the file rebuilds
to the digests that it promises.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

import nps_compress
import rows
import tasks
from nps_compress.checkpoint import Checkpoint, open_checkpoint
from nps_compress.codecs import ValueCodec
from nps_compress.format.layout import Op
from nps_compress.format.records import TensorEntry
from nps_compress.recipe import Recipe
from nps_compress.reconstruct import Task
from nps_compress.ulp_coding import distances_of

RESULT = rows.RESULTS / "entropy.csv"
FIELDS = (
    *("task", "kept", "density", "file_bytes", "mask_floor", "value_floor", "index", "chunk_bytes"),
    *("floor_bytes", "over", "index_share", "bits_per_param", "machine", "versions", "commit"),
)
DENSITIES = (0.002, 0.01, 0.05, 0.2, 0.5)
KEPT = {
    "magnitude, exact": {"prune": "magnitude", "values": "exact"},
    "magnitude, int8": {"prune": "magnitude", "values": "int8"},
    "magnitude, int4": {"prune": "magnitude", "values": "int4"},
    "magnitude, sign": {"prune": "magnitude", "values": "sign"},
    "sampled": {"prune": "sampled"},
    "signs": {"prune": "signs"},
}


def measure(task: tasks.Task, kept: str, density: float, folder: Path) -> dict[str, object]:
    """A row: the file and its floor."""
    recipe = Recipe(density=density, **KEPT[kept])  # type: ignore[arg-type]
    path = folder / "t.nps"
    report = nps_compress.pack(task.base, task.finetuned, path, recipe=recipe, force=True)
    nps_compress.verify(task.base, path)
    base = open_checkpoint(task.base)
    masks = values = 0.0
    chunk_bytes = 0
    with Task(path) as file:
        for entry in file.reader.tensors:
            mask, value = floor(file, entry, base)
            masks, values = masks + mask, values + value
            chunk_bytes += file.reader.stored_bytes(entry)
        size = file.reader.file_bytes
    index = size - chunk_bytes
    least = (masks + values) / 8 + index
    return {
        "file_bytes": size,
        "mask_floor": round(masks / 8),
        "value_floor": round(values / 8),
        "index": index,
        "chunk_bytes": chunk_bytes,
        "floor_bytes": round(least),
        "over": f"{100 * (size / least - 1):.2f}",
        "index_share": f"{100 * index / size:.2f}",
        "bits_per_param": f"{report.bits_per_param:.4f}",
    }


def floor(file: Task, entry: TensorEntry, base: Checkpoint) -> tuple[float, float]:
    """Bits of a tensor's mask and values."""
    if entry.op is Op.COPY:
        return 0.0, 0.0
    if entry.op is Op.NEW:
        return 0.0, 8.0 * file.reader.stored_bytes(entry)
    kept = [file.reader.read_chunk(entry, number) for number in range(entry.chunks)]
    nnz = file.reader.nnz(entry)
    mask = entry.numel * binary_entropy(nnz / entry.numel)
    if entry.value_codec is ValueCodec.SIGNS:
        return mask, float(nnz)
    if entry.value_codec is ValueCodec.GRID:
        return mask, frequencies_entropy(
            np.concatenate([chunk.planes.reshape(-1).view(np.int16) for chunk in kept])
        )
    if entry.has_parameters:
        return mask, frequencies_entropy(np.concatenate([chunk.planes[0] for chunk in kept]))
    name = file.base_tensor_name(entry.name)
    assert name is not None
    before = base.read(name)
    after = file.rebuild_words(entry.name, before, in_place=False)
    positions = np.flatnonzero(before != after).astype(np.uint32)
    if not positions.size:
        return mask, 0.0
    return mask, frequencies_entropy(distances_of(before, after, positions, entry.dtype)[0])


def binary_entropy(share: float) -> float:
    """Bits an element, of which a share is kept."""
    return sum(-p * float(np.log2(p)) for p in (share, 1 - share) if p > 0)


def frequencies_entropy(symbols: npt.NDArray[np.integer]) -> float:
    """Bits of all symbols, each coded by how often it occurs among them. symbols: [n]."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float((counts * np.log2(symbols.size / counts)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", action="append", choices=tasks.names(), help="only this one")
    arguments = parser.parse_args()
    names = arguments.task or tasks.names()
    others = [row for row in rows.read(RESULT) if row["task"] not in names]
    found: list[dict[str, object]] = []
    environment = rows.environment()
    for name in names:
        task = tasks.build(name)
        with tempfile.TemporaryDirectory() as folder:
            for kept in KEPT:
                for density in DENSITIES:
                    row = measure(task, kept, density, Path(folder))
                    found.append({"task": name, "kept": kept, "density": density, **row})
                    print(rows.table([found[-1]]).splitlines()[1], flush=True)
    rows.write(RESULT, FIELDS, [*others, *({**row, **environment} for row in found)])
    print(rows.table(found))
    print(f"rows in {RESULT}")


if __name__ == "__main__":
    main()
