"""Base and fine-tunes of random weights, in the shapes of a public model, as far as fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nps_compress.atomic import refuse_too_large
from nps_compress.bench.shapes import Model, Shapes, parameters
from nps_compress.checkpoint import WEIGHTS, encode_header
from nps_compress.dtypes import BY_NAME, Words, round_float32, to_float32
from nps_compress.task_vector import Float32

BF16 = BY_NAME["BF16"]
WEIGHT_SCALE = 0.02
# Of a change: a normal number times its own size and this. Heavy tails, as fine-tuning has.
CHANGE_SCALE = 2e-4


def sample(model: Model, nbytes: int) -> tuple[dict[str, tuple[int, ...]], str]:
    """Tensors that take about ``nbytes`` in bf16, and what they are of the model, in words.

    The whole model where it fits, else as many whole layers as do, else one layer whose matrices
    all keep the same share of their rows.
    """
    limit = nbytes // BF16.itemsize
    whole = model.tensors()
    if parameters(whole) <= limit:
        return whole, "the whole model"
    layer = model.layer(0)
    count = limit // parameters(layer)
    if count:
        several = [model.layer(number) for number in range(count)]
        tensors = {name: shape for one in several for name, shape in one.items()}
        return tensors, "1 layer" if count == 1 else f"{count} layers"
    share = limit / parameters(layer)
    cut = {
        name: (max(1, int(shape[0] * share)), *shape[1:]) if len(shape) > 1 else shape
        for name, shape in layer.items()
    }
    return cut, f"1 layer with {share:.2%} of its rows"


def write_pairs(folder: Path, tensors: Shapes, tasks: int) -> tuple[Path, list[Path]]:
    """Write a base and ``tasks`` fine-tunes of it; the same numbers for the same shapes.

    Raises:
        OutputTooLargeError: there is not enough room. WriteError, OSError.
    """
    nbytes = BF16.itemsize * parameters(tensors)
    # What is written here, and the unpacked folder and the copy that are measured later.
    refuse_too_large(folder / "base", (1 + tasks + 2) * nbytes, None)
    paths = [folder / "base", *(folder / f"task-{number}" for number in range(1, tasks + 1))]
    for number, path in enumerate(paths):
        path.mkdir()
        with (path / WEIGHTS).open("wb") as stream:
            header = [(name, BF16, shape) for name, shape in tensors.items()]
            stream.write(encode_header(header, {"format": "pt"}))
            for words in _weights(tensors, number):
                stream.write(words.data)
    return paths[0], paths[1:]


def _weights(tensors: Shapes, task: int) -> Iterator[Words]:
    """Tensor by tensor, [numel] bf16 words. Task 0 is the base itself."""
    for index, shape in enumerate(tensors.values()):
        count = math.prod(shape)
        words = round_float32(_normal(count, index, 0) * np.float32(WEIGHT_SCALE), BF16)
        if task:
            change = _normal(count, index, task)
            change *= np.abs(change)
            change *= np.float32(CHANGE_SCALE)
            words = round_float32(to_float32(words, BF16) + change, BF16)
        yield words


def _normal(count: int, *seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal(count, np.float32)
