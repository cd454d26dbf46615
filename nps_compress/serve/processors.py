"""What stands around a model's weights: the tokenizer, the classes, where an answer ends."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nps_compress.adapters import Kind, Text
from nps_compress.errors import CheckpointError
from nps_compress.models import kind_of, load_config, load_tokenizer

Use = Literal["generate", "embed", "classify"]
Activation = Literal["softmax", "sigmoid", "none"]

_USES: Mapping[Kind, frozenset[Use]] = {
    "causal": frozenset({"generate"}),
    "encoder": frozenset({"embed"}),
    "sequence": frozenset({"classify", "embed"}),
    "regression": frozenset({"classify", "embed"}),
}
_NO_LIMIT = 1 << 20
_UNLIMITED = 1 << 40  # tokenizers that know no limit say 10^30


class ProcessorError(ValueError):
    """A request's text can't be made tokens of; one line."""


@dataclass(frozen=True, eq=False)
class Processor:
    """How text goes into a model and comes out of it.

    ``uses``: what the model is for; ``max_tokens``: positions that it has; ``vocabulary``: tokens
    that it knows; ``ends``: the tokens that end an answer; ``labels``: of its classes;
    ``readers``: how it embeds and classifies, where it does; ``activation``: of its logits.
    """

    kind: Kind
    uses: frozenset[Use]
    tokenizer: Any
    max_tokens: int
    vocabulary: int
    ends: frozenset[int]
    labels: tuple[str, ...]
    activation: Activation
    readers: Mapping[Use, Text]

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation as the chat template words it. Raises ProcessorError."""
        if not self.tokenizer.chat_template:
            raise ProcessorError("this model has no chat template; use /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise whatever it likes
            line = " ".join(str(error).split())[:300]
            raise ProcessorError(f"the chat template refuses these messages ({line})") from error
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(token) for token in found]

    def inputs(self, text: str | Sequence[int]) -> dict[str, list[int]]:
        """One row of what an encoder takes."""
        if isinstance(text, str):
            found = self.tokenizer(text, verbose=False)  # what is too long is refused later
            return {name: list(row) for name, row in found.items()}
        return {"input_ids": list(text), "attention_mask": [1] * len(text)}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(
            self.tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def token_text(self, token: int) -> str:
        """The text of one token, also of a special one."""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def load_processor(
    side_files: Mapping[str, bytes], model: Any, source: Path | str, pooling: Path
) -> Processor:
    """From the files beside a checkpoint's weights.

    model: the one in memory. source: what errors name. pooling: the folder whose ``1_Pooling``
    says how embeddings are pooled, if it has one.

    Raises:
        CheckpointError: a file is missing or damaged, or models of this kind are not served.
    """
    with tempfile.TemporaryDirectory(prefix="nps-compress-") as name:
        folder = Path(name)
        for file, data in side_files.items():
            (folder / file).write_bytes(data)
        try:
            config, kind = load_config(folder), kind_of(folder)
            if kind not in _USES:
                raise CheckpointError(source, f"is a model of kind {kind!r}, which is not served")
            tokenizer = load_tokenizer(folder, kind)
        except CheckpointError as error:
            raise CheckpointError(source, error.reason) from None
    architecture = str(config.architectures[0])
    uses = _USES[kind]
    activation: Activation = "none" if kind == "regression" else "softmax"
    if kind == "encoder" and architecture.endswith("ForSequenceClassification"):
        uses, activation = uses | {"classify"}, "sigmoid"  # of any number of classes at once
    if architecture != type(model).__name__:
        uses &= {"embed"}  # a base whose model in memory has the heads of its tasks
    text_config = config.get_text_config(decoder=True)
    if kind != "causal" and text_config.pad_token_id is not None:
        tokenizer.pad_token_id = text_config.pad_token_id  # by which models tell texts from padding
    kinds: dict[Use, Kind] = {"embed": "encoder", "classify": kind}
    classes = config.num_labels if "classify" in uses else 0
    return Processor(
        kind,
        uses,
        tokenizer,
        _max_tokens(text_config, tokenizer, kind),
        int(text_config.vocab_size),
        _ends(side_files),
        tuple(str(config.id2label.get(i, f"LABEL_{i}")) for i in range(classes)),
        activation,
        {use: Text(pooling, kinds[use], model, tokenizer) for use in kinds if use in uses},
    )


def _max_tokens(config: Any, tokenizer: Any, kind: Kind) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        positions = getattr(config, "n_positions", None) or _NO_LIMIT
    if kind != "causal" and 0 < tokenizer.model_max_length < _UNLIMITED:  # some positions are kept
        positions = min(positions, tokenizer.model_max_length)
    return int(positions)


def _ends(side_files: Mapping[str, bytes]) -> frozenset[int]:
    """As ``generate`` finds them: in the generation config, else in the config."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads(side_files.get(name, b"{}")).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError):
            continue
        listed = found if isinstance(found, list) else [found]
        ends = frozenset(token for token in listed if isinstance(token, int))
        if ends:
            return ends
    return frozenset()
