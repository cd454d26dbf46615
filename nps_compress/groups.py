"""Groups of tensors that play alike parts in a model, by their names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal, get_args

Group = Literal["embedding", "attention", "mlp", "other", "small"]
GROUPS: tuple[Group, ...] = get_args(Group)

SMALL = 1 << 14  # elements

# The first that is found decides: "attention.output.dense" is attention, "output.dense" the MLP.
_WORDS: tuple[tuple[Group, str], ...] = (
    ("embedding", r"embed|\bw[tp]e\b|\bshared\b|relative_attention_bias"),
    ("attention", r"att(entio)?n|\b[qkvo]_proj|\bquery\b|\bkey\b|\bvalue\b"),
    ("mlp", r"mlp|ffn|feed_?forward|dense|intermediate|\bfc_?[12]?\b|\bw[io](_\d)?\b|expert|_proj"),
)


def group_of(name: str, shape: Sequence[int]) -> Group:
    """The group of a tensor.

    ``small``: biases, norms (of one dimension or none) and whatever has few elements, as a head of
    a few classes has.
    """
    if len(shape) < 2 or math.prod(shape) <= SMALL:
        return "small"
    for group, words in _WORDS:
        if re.search(words, name, re.IGNORECASE):
            return group
    return "other"
