"""The images of `digits`, on their side or upside down, each at an angle of its own.

A fine-tune of the model that reads upright ones: it learns to read these, and forgets those.
"""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

import digits
from task_data import Data


def turned(folder: Path) -> Data:
    parts = digits.collect(folder)
    angles = random.Random(0)
    for row in (row for part in parts for row in part):
        path = folder / row["image"]
        image = Image.open(path).rotate(angles.uniform(60, 300), Image.Resampling.BILINEAR)
        image.save(path)
    return Data([str(digit) for digit in range(10)], parts)
