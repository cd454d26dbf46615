"""Which examples each task is made of: labels, sizes, and what its parts must not share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import causal_lm
import code_lines
import corpus
import digits
import docstrings
from corpus import Item
from training import Row

TOPICS = (
    "matplotlib.backends",
    "networkx.algorithms",
    "networkx.generators",
    "numba.core",
    "numba.cuda",
    "numba.np",
    "numpy.lib",
    "scipy.interpolate",
    "scipy.optimize",
    "scipy.signal",
    "scipy.sparse",
    "scipy.stats",
    "sklearn.ensemble",
    "sklearn.linear_model",
    "sklearn.metrics",
    "sklearn.utils",
    "stdlib.asyncio",
    "stdlib.email",
    "stdlib.importlib",
    "stdlib.multiprocessing",
    "stdlib.xml",
    "sympy.combinatorics",
    "sympy.core",
    "sympy.geometry",
    "sympy.matrices",
    "sympy.physics",
    "sympy.polys",
    "sympy.solvers",
    "sympy.stats",
    "torch.ao",
    "torch.cuda",
    "torch.distributed",
    "torch.distributions",
    "torch.fx",
    "torch.nn",
    "torch.onnx",
    "torch.utils",
    "transformers.generation",
    "transformers.integrations",
    "transformers.models",
)


@dataclass(frozen=True)
class Data:
    """Train, calibration and test rows; ``pretraining`` is for a base that is made here."""

    labels: Sequence[str]
    parts: Sequence[Sequence[Row]]
    pretraining: Sequence[Row] = ()


def packages(folder: Path) -> Data:
    examples = docstrings.collect()
    labels = docstrings.labels(examples)
    parts = docstrings.split(examples, 5000, 256, 1500)
    return Data(
        labels,
        [
            [{"text": e.text, "label": labels.index(e.label)} for e in part]
            for part in (parts.train, parts.calibration, parts.test)
        ],
    )


def kinds(folder: Path) -> Data:
    items = [
        Item(d.source, d.package, {"text": d.text, "label": corpus.KINDS.index(d.kind)})
        for d in corpus.documented()
    ]
    divided = corpus.parts(corpus.cap(items, "label", 1300), seed=1)
    return Data(corpus.KINDS, corpus.draw(divided, (3000, 256, 1200)))


def topics(folder: Path) -> Data:
    items = [
        Item(d.source, topic, {"text": d.text, "label": TOPICS.index(topic)})
        for d in corpus.documented()
        if (topic := corpus.topic(d.source)) in TOPICS
    ]
    divided = corpus.parts(corpus.cap(items, "label", 400), seed=2)
    return Data(TOPICS, corpus.draw(divided, (6000, 256, 1500)))


def tokens(folder: Path) -> Data:
    divided = corpus.parts(code_lines.collect(), seed=3)
    return Data(code_lines.ROLES, corpus.draw(divided, (4000, 256, 1500)))


def digit_images(folder: Path) -> Data:
    return Data([str(digit) for digit in range(10)], digits.collect(folder))


def source(folder: Path) -> Data:
    sources, prose = causal_lm.collect()
    divided = corpus.parts(sources, seed=4)
    held_out = {item.source for part in divided[1:] for item in part}
    readable = [item for item in prose if item.source not in held_out]
    return Data(
        (),
        corpus.draw(divided, (4000, 256, 1000)),
        *corpus.draw([readable], (6000,)),
    )
