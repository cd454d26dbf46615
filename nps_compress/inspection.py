"""What a ``.nps`` file says of itself, without its base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nps_compress.format.layout import MAJOR, MINOR
from nps_compress.format.reader import NpsReader
from nps_compress.report import Quality, errors_from_metadata
from nps_compress.unpacking import open_task


def inspect(path: str | Path) -> dict[str, Any]:
    """Tables and totals as JSON values.

    ``tensors``: name, op (copy, delta, new, or deleted: only the base has it), shape, dtype,
    numel, nnz, density, stored_bytes, bits_per_param, codecs, base_tensor, relative_error.
    ``density`` is kept elements over all of the fine-tune's, ``bits_per_param`` file bytes x 8 over
    the same. ``quality`` and ``relative_error`` are what the file says of itself, which nothing
    here can check; None where it says nothing that can be read.
    ``content_digest`` identifies the fine-tune however it is encoded, ``file_sha256`` this file:
    what a detached signature covers (SPEC.md, security).

    Raises:
        FormatError: the file breaks a rule; InvalidArgumentError: it can't be read.
    """
    with open_task(path) as task:
        reader = task.reader
        overall, errors = errors_from_metadata(reader.metadata, len(reader.tensors))
        tensors = [
            _tensor(reader, entry.name, number) | {"relative_error": errors[number]}
            for number, entry in enumerate(reader.tensors)
        ]
        quality = Quality.from_metadata(reader.metadata)
        used = {entry.base_index for entry in reader.tensors}
        present = {entry.name for entry in reader.tensors}
        tensors += [
            {
                "name": tensor.name,
                "op": "deleted",
                "shape": list(tensor.shape),
                "dtype": tensor.dtype.name,
                "numel": 0,
                "nnz": 0,
                "density": 0.0,
                "stored_bytes": 0,
                "bits_per_param": 0.0,
                "codecs": [],
                "base_tensor": tensor.name,
                "relative_error": None,
            }
            for index, tensor in enumerate(reader.base)
            if index not in used and tensor.name not in present
        ]
        total = sum(entry.numel for entry in reader.tensors)
        nnz = sum(tensor["nnz"] for tensor in tensors)
        return {
            "path": str(path),
            "format": f"{MAJOR}.{MINOR}",
            "file_bytes": reader.file_bytes,
            "total_params": total,
            "nnz": nnz,
            "density": nnz / total if total else 0.0,
            "bits_per_param": 8 * reader.file_bytes / total if total else 0.0,
            "base_name": task.base_name,
            "base_root": reader.base_root.hex(),
            "content_digest": reader.content_digest.hex(),
            "file_sha256": reader.file_digest().hex(),
            "base_tensors": len(reader.base),
            "tensors": tensors,
            "files": [
                {
                    "name": entry.name,
                    "from": "base" if entry.op.name == "COPY" else "file",
                    "bytes": entry.numel,
                    "stored_bytes": reader.stored_bytes(entry),
                }
                for entry in reader.files
            ],
            "quality": asdict(quality) if quality else None,
            "relative_error": overall,
            "metadata": dict(reader.metadata),
        }


def _tensor(reader: NpsReader, name: str, number: int) -> dict[str, Any]:
    entry = reader.tensors[number]
    nnz, stored = reader.nnz(entry), reader.stored_bytes(entry)
    masks = [codec.name.lower() for codec in reader.mask_codecs(entry)]
    return {
        "name": name,
        "op": entry.op.name.lower(),
        "shape": list(entry.shape),
        "dtype": entry.dtype.name,
        "numel": entry.numel,
        "nnz": nnz,
        "density": nnz / entry.numel if entry.numel else 0.0,
        "stored_bytes": stored,
        "bits_per_param": 8 * stored / entry.numel if entry.numel else 0.0,
        "codecs": [*masks, entry.value_codec.name.lower()] if masks else [],
        "base_tensor": (None if entry.base_index is None else reader.base[entry.base_index].name),
    }
