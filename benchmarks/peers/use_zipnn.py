"""ZipNN over the file's bytes as bfloat16, alone or with the base by XOR."""

from __future__ import annotations

from pathlib import Path

from zipnn import ZipNN

import worker

DELTA = worker.settings()["delta"]
FILE = "model.znn"


def codec() -> ZipNN:
    options = {"delta_compressed_type": "byte"} if DELTA else {}
    return ZipNN(bytearray_dtype="bfloat16", threads=worker.cores(), **options)


def encode(base: Path, tuned: Path, out: Path) -> None:
    second = {"delta_second_data": base.read_bytes()} if DELTA else {}
    (out / FILE).write_bytes(codec().compress(tuned.read_bytes(), **second))


def decode(base: Path, packed: Path, out: Path) -> None:
    second = {"delta_second_data": base.read_bytes()} if DELTA else {}
    (out / worker.MODEL).write_bytes(codec().decompress((packed / FILE).read_bytes(), **second))


worker.serve(encode, decode, ["zipnn", "torch", "numpy"])
