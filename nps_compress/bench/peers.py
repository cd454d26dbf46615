"""How much smaller others make a fine-tune, as published or as measured elsewhere; not by us here.

Each at its own quality and on its own model: ratios, not a ranking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_TOY = "a synthetic bf16 pair of 56.6 M parameters, 96 % of them changed"


@dataclass(frozen=True)
class Peer:
    """``ratio``: bytes of dense weights over bytes of one packed fine-tune.

    ``by``: reported by its authors, or measured elsewhere by others. ``unrebuilt``: its kernel
    computes with base and packed weights, so that none are rebuilt in memory.
    """

    name: str
    ratio: float
    lossless: bool
    unrebuilt: bool
    by: Literal["reported", "measured elsewhere"]
    of: str
    source: str


PEERS = (
    Peer(
        *("BitDelta", 10.87, False, True, "reported"),
        "Llama-2-7B, 13.48 GB to 1.24 GB",
        "https://fasterdecoding.github.io/BitDelta/",
    ),
    Peer(
        *("DeltaZip", 9.86, False, True, "reported"),
        "Vicuna-7B, 2 bits and 2:4, 12,853 MB to 1,303.8 MB",
        "https://github.com/eth-easl/deltazip",
    ),
    Peer(
        *("Delta-CoMe", 16.0, False, False, "reported"),
        "7B and 13B, a budget of bits; its code writes no small file",
        "https://github.com/thunlp/Delta-CoMe",
    ),
    Peer(
        *("UltraDelta", 50.0, False, False, "reported"),
        "Llama-2 7B and 13B, the most reported; no code for language models",
        "https://arxiv.org/abs/2505.13563v3",
    ),
    Peer(
        *("deltatensors 0.2.0, int4", 3.36, False, False, "measured elsewhere"),
        _TOY,
        "https://pypi.org/project/deltatensors/",
    ),
    Peer(
        *("ZipNN 0.5.4, XOR", 2.0, True, False, "measured elsewhere"),
        _TOY,
        "https://github.com/zipnn/zipnn",
    ),
    Peer(
        *("fireworks-delta-compression 0.1.0", 1.74, True, False, "measured elsewhere"),
        _TOY,
        "https://pypi.org/project/fireworks-delta-compression/",
    ),
)
