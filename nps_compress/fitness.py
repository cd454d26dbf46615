"""What a search maximises: how well a model does on calibration data.

``kl``         minus the mean KL divergence from the fine-tune's own outputs (no labels)
``agreement``  share of classes or next tokens predicted as the fine-tune does (no labels)
``loss``       minus the mean cross-entropy of the labels (classifiers) or next tokens (causal LMs)
``accuracy``   share of labels predicted (classifiers)

Calibration data is JSONL: ``{"text": "...", "label": 3}`` a line; the label, a class index or a
name from the model's config, is only read by ``loss`` and ``accuracy`` of classifiers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from nps_compress.errors import CalibrationError, CheckpointError, InvalidArgumentError

FitnessName = Literal["kl", "agreement", "loss", "accuracy"]
FITNESSES: tuple[FitnessName, ...] = get_args(FitnessName)
MAX_TOKENS = 512
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Row:
    """One line of calibration data."""

    text: str
    label: int | str | None


def read_jsonl(path: Path) -> list[Row]:
    """Calibration data from JSONL. Raises CalibrationError with the number of a bad line."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(path, str(error)) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(path, f"is not JSON ({error})", number) from None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise CalibrationError(path, 'needs an object with a string under "text"', number)
        if any(0xD800 <= ord(char) < 0xE000 for char in value["text"]):
            raise CalibrationError(path, "text holds unpaired surrogates", number)
        label = value.get("label")
        if isinstance(label, bool) or not isinstance(label, int | str | None):
            raise CalibrationError(path, f"label must be an int or a string: {label!r}", number)
        rows.append(Row(value["text"], label))
    if not rows:
        raise CalibrationError(path, "holds no examples")
    return rows


def data_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of calibration data, to tell whether a saved search used the same."""
    text = json.dumps([[row.text, row.label] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def check_fitness(name: str) -> FitnessName:
    """The name of a fitness. Raises InvalidArgumentError for an unknown one."""
    for known in FITNESSES:
        if name == known:
            return known
    raise InvalidArgumentError("fitness", name, f"one of {', '.join(FITNESSES)}")


def device() -> torch.device:
    """The CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Measured:
    """A fitness by example. sums: [n] float64 over what it predicts; counts: [n] int64 of that
    (1 for a classifier, its next tokens for a text)."""

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    @property
    def score(self) -> float:
        """The mean over all that is predicted."""
        return float(self.sums.sum() / self.counts.sum())


@dataclass(frozen=True)
class _Batch:
    """inputs: what the model takes, [batch, tokens] each; labels: [batch] int64 or None."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor | None


class Fitness:
    """A model of the fine-tune's architecture and what it is scored on.

    ``model`` starts as the fine-tune, in float32; its weights may then be overwritten between
    calls of :meth:`score`.

    Raises:
        CheckpointError: the folder can't be loaded as a classifier or causal LM.
        CalibrationError: labels are missing or unknown. InvalidArgumentError: unknown name.
    """

    def __init__(
        self,
        finetuned: Path,
        rows: Sequence[Row],
        name: str = "kl",
        batch_size: int = 32,
        source: Path | str = "calibration data",
    ) -> None:
        if not rows:
            raise CalibrationError(source, "holds no examples")
        self.name = check_fitness(name)
        self.source = source
        self.model, tokenizer, self.is_classifier = load_model(finetuned)
        if name == "accuracy" and not self.is_classifier:
            raise InvalidArgumentError("fitness", name, "kl, agreement or loss for a causal LM")
        self.model.to(device())
        self._batches = self._batch(rows, tokenizer, batch_size)
        self._reference: list[torch.Tensor] = []  # what the fine-tune says, a batch each
        for batch in self._batches if name in ("kl", "agreement") else ():
            said = self._log_probabilities(batch)
            self._reference.append(said if name == "kl" else said.argmax(-1))

    def score(self) -> float:
        """How good the model is with its present weights; higher is better."""
        return self.measure().score

    @torch.inference_mode()
    def measure(self) -> Measured:
        """The score of each example; their order is the same from call to call."""
        sums, counts = [], []
        for index, batch in enumerate(self._batches):
            found = self._log_probabilities(batch)  # [n, classes]
            if self.name == "kl":
                wanted = self._reference[index]
                kl = functional.kl_div(found, wanted, reduction="none", log_target=True)
                values = -kl.sum(-1)
            elif self.name == "loss":
                values = -functional.nll_loss(found, self._targets(batch), reduction="none")
            else:
                wanted = self._reference[index] if self._reference else self._targets(batch)
                values = (found.argmax(-1) == wanted).float()
            if self.is_classifier:
                size = torch.ones(len(values), dtype=torch.int64)
            else:
                size = _next_is_text(batch).sum(1).cpu()
            example = torch.repeat_interleave(torch.arange(len(size)), size)
            total = torch.zeros(len(size), dtype=torch.float64)
            sums.append(total.index_add(0, example, values.double().cpu()).numpy())
            counts.append(size.numpy())
        measured = Measured(np.concatenate(sums), np.concatenate(counts))
        if not measured.counts.sum():
            raise CalibrationError(self.source, "holds no text of two tokens or more")
        return measured

    @torch.inference_mode()
    def _log_probabilities(self, batch: _Batch) -> torch.Tensor:
        """Of classes, [batch, classes], or of each next token, [tokens, vocabulary]."""
        logits = self.model(**batch.inputs).logits.float()
        if not self.is_classifier:
            logits = logits[:, :-1][_next_is_text(batch)]
        return functional.log_softmax(logits, -1)

    def _targets(self, batch: _Batch) -> torch.Tensor:
        if batch.labels is not None:
            return batch.labels
        return batch.inputs["input_ids"][:, 1:][_next_is_text(batch)]

    def _batch(self, rows: Sequence[Row], tokenizer: Any, batch_size: int) -> list[_Batch]:
        limit = token_limit(self.model, tokenizer)
        tokens = tokenizer([row.text for row in rows], truncation=True, max_length=limit)
        for number, ids in enumerate(tokens["input_ids"], 1):
            if not ids:
                raise CalibrationError(self.source, f"example {number} has no tokens")
        labels = None
        if self.is_classifier and self.name in ("loss", "accuracy"):
            labels = [self._label(row, number) for number, row in enumerate(rows, 1)]
        # Alike lengths share a batch, so that little is spent on padding.
        order = sorted(range(len(rows)), key=lambda i: len(tokens["input_ids"][i]))
        batches = []
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            features = {key: [tokens[key][i] for i in picked] for key in tokens}
            inputs = tokenizer.pad(features, return_tensors="pt").to(device())
            chosen = None
            if labels is not None:
                chosen = torch.tensor([labels[i] for i in picked], device=device())
            batches.append(_Batch(dict(inputs), chosen))
        return batches

    def _label(self, row: Row, number: int) -> int:
        names = self.model.config.label2id or {}
        label = names.get(row.label) if isinstance(row.label, str) else row.label
        if label is None or not 0 <= label < self.model.config.num_labels:
            raise CalibrationError(
                self.source,
                f"example {number} has label {row.label!r}, the model knows "
                f"{self.model.config.num_labels} classes",
            )
        return label


def token_limit(model: Any, tokenizer: Any) -> int:
    """Tokens that a text is cut to: what the model takes, MAX_TOKENS at most."""
    positions = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    return min(tokenizer.model_max_length, positions, MAX_TOKENS)


def _next_is_text(batch: _Batch) -> torch.Tensor:
    """Which positions predict a token of the text. -> [batch, tokens - 1] bool."""
    mask = batch.inputs["attention_mask"].bool()
    return mask[:, :-1] & mask[:, 1:]


def load_model(folder: Path) -> tuple[Any, Any, bool]:
    """A model in float32 on the CPU, in eval mode, its tokenizer, and whether it classifies.

    Raises:
        CheckpointError: the folder holds no sequence classifier or causal LM with a tokenizer.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    is_classifier = classifies(folder)
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    try:
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            raise CheckpointError(folder, "holds no tokenizer")  # transformers would invent one
        with quiet_transformers():
            model = auto.from_pretrained(folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever a broken folder leads to
        raise _not_loadable(folder, error) from error
    if tokenizer.pad_token is None:  # any token will do: padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"  # positions then count from the first token of the text
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer, is_classifier


def classifies(folder: Path) -> bool:
    """Whether the model in a folder is a sequence classifier; else it is a causal LM.

    Raises:
        CheckpointError: it is neither.
    """
    from transformers import AutoConfig

    try:
        architecture = (AutoConfig.from_pretrained(folder).architectures or ["unknown"])[0]
    except Exception as error:  # as for load_model
        raise _not_loadable(folder, error) from error
    is_classifier = architecture.endswith("ForSequenceClassification")
    if not is_classifier and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise CheckpointError(
            folder, f"is a {architecture}; a fitness needs a sequence classifier or a causal LM"
        )
    return bool(is_classifier)


def _not_loadable(folder: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(folder, f"can't be loaded by transformers ({reason})")


def natural_metric(folder: Path, rows: Sequence[Row]) -> FitnessName:
    """What people judge such a model by: accuracy with labels, loss for a causal LM."""
    if not classifies(folder):
        return "loss"
    return "agreement" if any(row.label is None for row in rows) else "accuracy"


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
