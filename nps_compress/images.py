"""Image files as pixels, for models that come without a preprocessor of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from nps_compress.errors import CalibrationError

_MODES = {1: "L", 3: "RGB"}  # by number of channels
CHANNELS = frozenset(_MODES)


def open_image(path: Path, channels: int) -> Image.Image:
    """An image file in memory, grey (1 channel) or in colour (3).

    Raises:
        CalibrationError: it can't be read as an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert(_MODES[channels])
    except Exception as error:  # decoders raise whatever a broken file leads to
        raise CalibrationError(path, f"can't be read as an image ({error})") from None


def plain_pixels(image: Image.Image, height: int, width: int) -> npt.NDArray[np.float32]:
    """Pixels from -1, black, to 1, white, resized where the size differs. -> [channels, h, w].

    What ViT's and DeiT's own preprocessors do: bilinear, mean and standard deviation 0.5.
    """
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32) / 127.5 - 1
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
