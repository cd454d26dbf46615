"""fireworks-delta-compression, file to file. It unpickles: only ever given its own files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fireworks_delta_compression as fireworks
from safetensors.torch import load_file, save_file

import worker

FORMAT = worker.settings()["format"]
FILE = "delta.safetensors"


def encode(base: Path, tuned: Path, out: Path) -> None:
    with ThreadPoolExecutor(worker.cores()) as pool:
        fireworks.delta_compress_files_to_file(
            src=str(base),
            dst=str(tuned),
            diff_file=str(out / FILE),
            compression_format=FORMAT,
            executor=pool,
        )


def decode(base: Path, packed: Path, out: Path) -> None:
    with ThreadPoolExecutor(worker.cores()) as pool:
        weights = fireworks.delta_decompress_dict_from_file(
            src=load_file(base),
            diff_file=str(packed / FILE),
            compression_format=FORMAT,
            executor=pool,
        )
    save_file(weights, out / worker.MODEL, {"format": "pt"})


worker.serve(encode, decode, ["fireworks-delta-compression", "torch", "numpy", "zstd"])
