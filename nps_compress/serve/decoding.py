"""Sequences that are decoded together, and what the model remembers of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional


class Sequences:
    """Rows of unequal length, padded on the left, with their keys and values.

    As ``generate`` of transformers does it: padding is masked, and positions count from a row's
    first token. ``rows``: how many there are. It belongs to the weights that it was made with.
    """

    def __init__(self, cache: Any, mask: torch.Tensor) -> None:
        self._cache = cache
        self._mask = mask  # [rows, positions] int64, 0 for padding

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return len(self._mask)

    @classmethod
    def start(cls, model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Sequences, torch.Tensor]:
        """Read prompts, none of them empty. -> also [prompts, vocabulary] float32 logits."""
        from transformers import DynamicCache

        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = next(model.parameters()).device
        found = cls(DynamicCache(config=model.config), mask.to(device))
        return found, found._forward(model, tokens.to(device))

    def advance(self, model: Any, tokens: Sequence[int]) -> torch.Tensor:
        """Add a token to each row. -> [rows, vocabulary] float32 logits."""
        new = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(new)], dim=1)
        return self._forward(model, new)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        if list(rows) == list(range(self.rows)):
            return
        at = torch.tensor(rows, dtype=torch.int64, device=self._mask.device)
        self._cache.batch_select_indices(at)
        self._mask = self._mask[at]
        if self._is_plain() and len(rows):
            unused = int(self._mask.argmax(1).min())  # columns that are padding in all rows
            self._mask = self._mask[:, unused:]
            for layer in self._cache.layers:
                layer.keys = layer.keys[:, :, unused:].contiguous()
                layer.values = layer.values[:, :, unused:].contiguous()

    def part(self, rows: Sequence[int]) -> Sequences:
        """A copy of these rows, that goes on by itself."""
        found = copy.deepcopy(self)
        found.keep(rows)
        return found

    def join(self, other: Sequences) -> bool:
        """Take another's rows in, after the own; it is of no use then.

        -> False, and nothing is done, where the model keeps more than keys and values of all
        positions (sliding windows, recurrent states).
        """
        if not (self._is_plain() and other._is_plain()):
            return False
        length = max(self._mask.shape[1], other._mask.shape[1])
        mine, theirs = (length - each._mask.shape[1] for each in (self, other))
        self._mask = torch.cat(
            [functional.pad(self._mask, (mine, 0)), functional.pad(other._mask, (theirs, 0))]
        )
        for layer, more in zip(self._cache.layers, other._cache.layers, strict=True):
            for name in ("keys", "values"):
                both = (
                    functional.pad(getattr(layer, name), (0, 0, mine, 0)),
                    functional.pad(getattr(more, name), (0, 0, theirs, 0)),
                )
                setattr(layer, name, torch.cat(both))
        return True

    def _is_plain(self) -> bool:
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def _forward(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [rows, new positions] int64. -> the logits of the last position."""
        arguments: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": self._mask,
            "past_key_values": self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
            "position_ids": (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
        }
        known = inspect.signature(model.forward).parameters
        with torch.inference_mode():
            found = model(**{name: value for name, value in arguments.items() if name in known})
            return found.logits[:, -1].float()
