"""nps-compress, through its Python API. Settings: lossless, or a recipe's fields."""

from __future__ import annotations

from pathlib import Path

import nps_compress
import worker

SETTINGS = worker.settings()


def encode(base: Path, tuned: Path, out: Path) -> None:
    recipe = nps_compress.Recipe(**SETTINGS["recipe"]) if "recipe" in SETTINGS else None
    lossless = SETTINGS.get("lossless", False)
    nps_compress.pack(base, tuned, out / "task.nps", recipe=recipe, lossless=lossless)


def decode(base: Path, packed: Path, out: Path) -> None:
    nps_compress.unpack(base, packed / "task.nps", out)


worker.serve(encode, decode, ["nps-compress"], whole=True)
