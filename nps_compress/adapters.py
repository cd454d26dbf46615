"""How models of each kind take examples, and what they say of them.

``sequence``    a class of a text or of two, from ``...ForSequenceClassification``
``regression``  the same with one output: a score
``token``       a class of each word; the first piece of a word speaks for it
``causal``      the next token; where an example has a target, only the target's tokens count
``seq2seq``     the tokens of the target, said by a decoder
``image``       a class of an image
``clip``        zero-shot classes of an image: see :class:`Clip`
``encoder``     hidden states and embeddings only: any other model of texts or images
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch.nn import functional

from nps_compress.batches import Batch, Encoded, collate, in_batches, pad
from nps_compress.calibration import IGNORED, Example, Label
from nps_compress.errors import CalibrationError, CheckpointError
from nps_compress.images import open_image, plain_pixels

Kind = Literal["sequence", "regression", "token", "causal", "seq2seq", "image", "clip", "encoder"]

T = TypeVar("T")

MAX_TOKENS = 512
LOGITS_OF_A_BATCH = 1 << 27  # 512 MiB in float32
OWN_ANSWER_TOKENS = 64
CLIP_PROMPT = "a photo of a {}."  # Radford et al. 2021, arXiv 2103.00020, section 3.1.4


class LoadedModel:
    """A model in memory: float32, eval mode, and how examples go into it and come out.

    ``processor`` is a tokenizer, an image processor of transformers, or None for images that need
    none. Outputs carry gradients where the caller lets them.
    """

    def __init__(self, folder: Path, kind: Kind, model: Any, processor: Any) -> None:
        self.folder, self.kind, self.model, self.processor = folder, kind, model, processor

    def encode(
        self, examples: Sequence[Example], source: Path | str, labelled: bool
    ) -> list[Encoded]:
        """Every example by itself. ``labelled``: with what it should say.

        Raises:
            CalibrationError: an example lacks what the model needs.
        """
        return each(examples, source, lambda example: self._encode(example, labelled))

    def collate(self, examples: Sequence[Encoded]) -> Batch:
        """A batch on the model's device."""
        return collate(examples, self._padding(), device_of(self.model))

    def batches(self, examples: Sequence[Encoded], size: int) -> list[Batch]:
        """All examples, ``size`` at most a batch; fewer where logits would take too much memory."""
        most = LOGITS_OF_A_BATCH // self._logits_of_a_position()
        return [
            self.collate([examples[i] for i in picked])
            for picked in in_batches([example.length for example in examples], size, most)
        ]

    def logits(self, batch: Batch) -> torch.Tensor:
        """-> [predictions, classes] float32."""
        found = self.model(**batch.inputs).logits.float()
        return found if batch.predicted is None else found[batch.predicted]

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The last hidden state of every position that isn't padding, and whose example it is.

        -> [positions, width] float32, [positions] int64.
        """
        states, mask = self._states(batch)
        owner = batch.row_owner[:, None].expand(mask.shape)
        return states[mask], owner[mask]

    def embeddings(self, batch: Batch) -> torch.Tensor:
        """Of unit length, one a row. -> [rows, width] float32."""
        states, mask = self._states(batch)
        return functional.normalize(_mean(states, mask), dim=-1)

    def _states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """-> [rows, positions, width] float32 and [rows, positions] bool, False for padding."""
        states = self.model.base_model(**batch.inputs).last_hidden_state.float()
        if states.ndim == 4:  # of a convolutional network: [rows, width, height, width]
            states = states.flatten(2).transpose(1, 2)
        mask = batch.inputs.get("attention_mask")
        if mask is None or mask.shape != states.shape[:2]:
            mask = torch.ones(states.shape[:2], device=states.device)
        return states, mask.bool()

    def _encode(self, example: Example, labelled: bool) -> Encoded:
        """Raises ValueError that goes on after "example 3"."""
        raise NotImplementedError

    def _padding(self) -> dict[str, int]:
        return {}

    def _logits_of_a_position(self) -> int:
        return 1

    def _class(self, label: Label | None) -> int:
        config = self.model.config
        known = (config.label2id or {}).get(label) if isinstance(label, str) else label
        if not isinstance(known, int) or not 0 <= known < config.num_labels:
            raise ValueError(f"has label {label!r}, the model knows {config.num_labels} classes")
        return known


class Text(LoadedModel):
    """Sequence classifiers, regression models and encoders of text."""

    def __init__(self, folder: Path, kind: Kind, model: Any, processor: Any) -> None:
        super().__init__(folder, kind, model, processor)
        self._pooling = _pooling_of(folder) if kind == "encoder" else "mean"

    def embeddings(self, batch: Batch) -> torch.Tensor:
        """Pooled as ``1_Pooling`` of sentence-transformers says, else the mean of all tokens."""
        states, mask = self._states(batch)
        rows = torch.arange(len(mask), device=mask.device)
        if self._pooling == "cls":
            found = states[:, 0]
        elif self._pooling == "lasttoken":
            found = states[rows, mask.sum(1) - 1]
        else:
            found = _mean(states, mask)
        return functional.normalize(found, dim=-1)

    def _encode(self, example: Example, labelled: bool) -> Encoded:
        if self.kind != "encoder":
            rows: tuple[dict[str, list[int]], ...] = (self._tokens(example.text, example.pair),)
        else:
            texts = (example.text,) if example.pair is None else (example.text, example.pair)
            rows = tuple(self._tokens(text) for text in texts)
        if not labelled:
            return Encoded(rows)
        if self.kind == "sequence":
            return Encoded(rows, targets=(self._class(example.label),))
        if self.kind == "encoder" and len(rows) != 2:
            raise ValueError("has no second text to compare with")
        if not isinstance(example.label, int | float):
            raise ValueError(f"has label {example.label!r}, needs a score")
        return Encoded(rows, targets=(float(example.label),))

    def _tokens(self, text: str | None, pair: str | None = None) -> dict[str, list[int]]:
        if text is None:
            raise ValueError("has no text")
        limit = token_limit(self.model.config, self.processor)
        tokens = dict(self.processor(text, pair, truncation=True, max_length=limit))
        if not tokens["input_ids"]:
            raise ValueError("has no tokens")
        return tokens

    def _padding(self) -> dict[str, int]:
        types = self.processor.pad_token_type_id
        return {"input_ids": self.processor.pad_token_id, "token_type_ids": types}


class Token(Text):
    """Token classifiers. A text without words is split at white space."""

    def _encode(self, example: Example, labelled: bool) -> Encoded:
        if example.words is None and example.text is None:
            raise ValueError("has no words")
        words = example.words or tuple((example.text or "").split())
        if labelled and example.labels is None:
            raise ValueError("has no labels")
        limit = token_limit(self.model.config, self.processor)
        tokens = self.processor(
            list(words), is_split_into_words=True, truncation=True, max_length=limit
        )
        first: dict[int, int] = {}  # word -> its first piece
        for position, word in enumerate(tokens.word_ids()):
            if word is not None:
                first.setdefault(word, position)
        labels = (example.labels or ()) if labelled else ()
        if not tokens["input_ids"]:
            raise ValueError("has no tokens")
        if labelled:
            first = {word: at for word, at in first.items() if labels[word] != IGNORED}
        targets = tuple(self._class(labels[word]) for word in first) if labelled else ()
        return Encoded((dict(tokens),), predicted=tuple(first.values()), targets=targets)


class Generator(Text):
    """What causal and encoder-decoder models share: they can answer."""

    def prompt(self, example: Example, room: int) -> list[int]:
        """Tokens that an answer of ``room`` tokens follows. Raises ValueError for none."""
        raise NotImplementedError

    def target(self, example: Example) -> list[int]:
        """Tokens of the answer that is wanted. Raises ValueError for none."""
        raise NotImplementedError

    def answers(self, prompts: Sequence[list[int]], room: int) -> list[list[int]]:
        """Greedy answers of ``room`` tokens at most, with the tokens that end them."""
        left = self.kind == "causal"  # the answer follows the prompt
        ids = pad(prompts, self.processor.pad_token_id, left)
        mask = pad([[1] * len(prompt) for prompt in prompts], 0, left)
        at = device_of(self.model)
        with quiet_transformers():
            found = self.model.generate(
                input_ids=ids.to(at), attention_mask=mask.to(at), max_new_tokens=room
            )
        return found[:, ids.shape[1] if left else 0 :].tolist()

    def text_of(self, tokens: Sequence[int]) -> str:
        """Of an answer, without the tokens that end it."""
        return str(self.processor.decode(tokens, skip_special_tokens=True))

    def _logits_of_a_position(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])


class Causal(Generator):
    """Causal LMs: every next token, or those of the target after its prompt."""

    def prompt(self, example: Example, room: int) -> list[int]:
        """The prompt's last tokens, as many as leave room."""
        limit = token_limit(self.model.config, self.processor) - room
        if limit < 1:
            raise ValueError(f"needs {room} tokens for its answer, more than the model can take")
        if example.text is None:
            raise ValueError("has no text")
        ids = self.processor(example.text)["input_ids"]
        if not ids:
            raise ValueError("has no tokens")
        return list(ids[-limit:])

    def target(self, example: Example) -> list[int]:
        """As the tokenizer splits it on its own."""
        if example.target is None:
            raise ValueError("has no target")
        ids = list(self.processor(example.target, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError("has a target without tokens")
        return ids

    def _encode(self, example: Example, labelled: bool) -> Encoded:
        if example.target is None:
            tokens = self._tokens(example.text)
            start = 1  # nothing predicts the first token
        else:
            wanted = self.target(example)
            ids = self.prompt(example, len(wanted))
            tokens = {"input_ids": ids + wanted, "attention_mask": [1] * (len(ids) + len(wanted))}
            start = len(ids)
        size = len(tokens["input_ids"])
        return Encoded(
            ({key: tokens[key] for key in ("input_ids", "attention_mask")},),
            predicted=tuple(range(start - 1, size - 1)),
            targets=tuple(tokens["input_ids"][start:]),
        )


class Seq2seq(Generator):
    """Encoder-decoders. Without a target, what the model itself answers stands for it."""

    def prompt(self, example: Example, room: int) -> list[int]:
        """The encoder's tokens; the answer takes no room there."""
        return self._tokens(example.text)["input_ids"]

    def target(self, example: Example) -> list[int]:
        """With the token that ends it."""
        if example.target is None:
            raise ValueError("has no target")
        limit = token_limit(self.model.config, self.processor)
        ids = self.processor(text_target=example.target, truncation=True, max_length=limit)
        if not ids["input_ids"]:
            raise ValueError("has a target without tokens")
        return list(ids["input_ids"])

    def logits(self, batch: Batch) -> torch.Tensor:
        """-> [predictions, vocabulary] float32."""
        found = self.model(**batch.inputs, decoder_input_ids=self._said_before(batch))
        return found.logits[batch.predicted].float()

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the decoder, where it predicts."""
        found = self.model.get_decoder()(
            input_ids=self._said_before(batch),
            encoder_hidden_states=self._encoder_states(batch),
            encoder_attention_mask=batch.inputs["attention_mask"],
        )
        return found.last_hidden_state[batch.predicted].float(), batch.owner

    def _states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._encoder_states(batch).float(), batch.inputs["attention_mask"].bool()

    def _encoder_states(self, batch: Batch) -> torch.Tensor:
        found = self.model.get_encoder()(**batch.inputs)
        return found.last_hidden_state

    def _said_before(self, batch: Batch) -> torch.Tensor:
        return self.model.prepare_decoder_input_ids_from_labels(batch.answers)

    def _encode(self, example: Example, labelled: bool) -> Encoded:
        tokens = self._tokens(example.text)
        if example.target is None and not labelled:
            ids = tokens["input_ids"]
            answer = self.answers([ids], OWN_ANSWER_TOKENS)[0][1:]  # the decoder's first is given
        else:
            answer = self.target(example)
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        return Encoded((inputs,), tuple(answer), tuple(range(len(answer))), tuple(answer))


class Image(LoadedModel):
    """Image classifiers and encoders of images."""

    def _encode(self, example: Example, labelled: bool) -> Encoded:
        if example.image is None:
            raise ValueError("has no image")
        if labelled and self.kind == "encoder":
            raise ValueError("is an image; only texts are compared")
        config = getattr(self.model.config, "vision_config", self.model.config)
        image = open_image(example.image, config.num_channels)
        if self.processor is None:
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            pixels = plain_pixels(image, height, width)
        else:
            pixels = np.asarray(self.processor(images=[image], return_tensors="np").pixel_values[0])
        targets = (self._class(example.label),) if labelled else ()
        return Encoded(({"pixel_values": pixels.astype(np.float32)},), targets=targets)


class Clip(Image):
    """CLIP as a zero-shot classifier, the classes being the labels of the examples.

    An image's logits are its products with the text embeddings of "a photo of a <label>.". These
    are taken once, from the weights at that time: the fine-tune's. Where weights change later the
    text head stays as it was, as in the experiments of Task Arithmetic (arXiv 2212.04089) and NPS.
    """

    def __init__(
        self, folder: Path, kind: Kind, model: Any, processor: Any, tokenizer: Any
    ) -> None:
        super().__init__(folder, kind, model, processor)
        self.tokenizer = tokenizer
        self.classes: list[str] = []
        self._head = torch.empty(0)  # [classes, width]

    def encode(
        self, examples: Sequence[Example], source: Path | str, labelled: bool
    ) -> list[Encoded]:
        """As for other models; the examples' labels become the classes."""
        labels = [example.label for example in examples if example.label is not None]
        if any(not isinstance(label, str) for label in labels):
            raise CalibrationError(source, "has labels that are numbers; CLIP needs names")
        self.classes = sorted({str(label) for label in labels})
        if self.classes:
            self._head = self._text_embeddings([CLIP_PROMPT.format(c) for c in self.classes])
        return super().encode(examples, source, labelled)

    def logits(self, batch: Batch) -> torch.Tensor:
        """-> [images, classes] float32."""
        return self._scale() * self.embeddings(batch) @ self._head.T

    def embeddings(self, batch: Batch) -> torch.Tensor:
        """Those that are compared with texts. -> [images, width] float32."""
        pooled = self.model.vision_model(**batch.inputs).pooler_output
        return functional.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def _states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.model.vision_model(**batch.inputs).last_hidden_state.float()
        return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)

    def _scale(self) -> torch.Tensor:
        return self.model.logit_scale.exp()

    def _class(self, label: Label | None) -> int:
        if label is None:
            raise ValueError("has no label")
        return self.classes.index(str(label))

    @torch.no_grad()
    def _text_embeddings(self, texts: Sequence[str]) -> torch.Tensor:
        limit = token_limit(self.model.config.text_config, self.tokenizer)
        tokens = [self.tokenizer(t, truncation=True, max_length=limit) for t in texts]
        ids = pad([t["input_ids"] for t in tokens], self.tokenizer.pad_token_id)
        mask = pad([t["attention_mask"] for t in tokens], 0)
        at = device_of(self.model)
        pooled = self.model.text_model(input_ids=ids.to(at), attention_mask=mask.to(at))
        found = self.model.text_projection(pooled.pooler_output).float()
        return functional.normalize(found, dim=-1)


def each(
    examples: Sequence[Example], source: Path | str, function: Callable[[Example], T]
) -> list[T]:
    """What a function makes of each example; its ValueError goes on after "example 3"."""
    found = []
    for number, example in enumerate(examples, 1):
        try:
            found.append(function(example))
        except ValueError as error:
            raise CalibrationError(source, f"example {number} {error}") from None
    return found


def device() -> torch.device:
    """The CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(model: Any) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device


def token_limit(config: Any, tokenizer: Any) -> int:
    """Tokens that a text is cut to: what the model takes, MAX_TOKENS at most."""
    positions = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
    return int(min(tokenizer.model_max_length, positions, MAX_TOKENS))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep load reports and progress bars of transformers off the terminal for a while."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _pooling_of(folder: Path) -> str:
    """How sentence-transformers would pool: ``mean``, ``cls`` or ``lasttoken``."""
    try:
        value = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
        legacy = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
        found = [name for key, name in legacy.items() if value.get(f"pooling_mode_{key}")]
        mode = value.get("pooling_mode") or "".join(found)
    except FileNotFoundError:
        return "mean"
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(folder, f"1_Pooling/config.json can't be read ({error})") from error
    if mode not in ("mean", "cls", "lasttoken"):
        raise CheckpointError(folder, f"1_Pooling asks for {mode!r}, which is not supported")
    return str(mode)


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Over the positions of the mask. -> [rows, width]."""
    weight = mask[:, :, None].float()
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
