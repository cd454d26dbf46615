"""What a search maximises: how well a model does on calibration data.

Against the fine-tune's own outputs, without labels:

``kl``           minus the mean KL divergence from its classes or next tokens
``agreement``    share of its classes or next tokens that are predicted
``hidden``       minus the mean squared error of the last hidden states, relative to their square
``embedding``    minus the mean squared distance of embeddings of unit length: 2 cos - 2

Against the data:

``loss``         minus the mean cross-entropy of labels or next tokens (squared error of scores)
``perplexity``   minus the exponential of the mean cross-entropy of next tokens
``accuracy``     share of labels that are predicted
``exact_match``  share of greedy answers that equal the target, but for white space around them
``spearman``     rank correlation with scores: of the cosine of two texts' embeddings, or of what a
                 regression model says

And ``module:function``, a function of the user's own (see callables). Higher is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch.nn import functional

from nps_compress import callables
from nps_compress.adapters import Clip, Generator, Kind, device, each
from nps_compress.batches import Batch, in_batches
from nps_compress.calibration import Example
from nps_compress.divergence import Reference, divergence, reference
from nps_compress.errors import CalibrationError, InvalidArgumentError
from nps_compress.measured import Measured, join
from nps_compress.models import kind_of, load_model, running, weights_of

FitnessName = Literal[
    "kl",
    "agreement",
    "loss",
    "perplexity",
    "accuracy",
    "exact_match",
    "spearman",
    "hidden",
    "embedding",
]
FITNESSES: tuple[FitnessName, ...] = get_args(FitnessName)
_STATES: tuple[FitnessName, ...] = ("hidden", "embedding")
_CLASSES: tuple[FitnessName, ...] = ("kl", "agreement", "loss", "accuracy", *_STATES)
_ANSWERS: tuple[FitnessName, ...] = (
    *("kl", "agreement", "loss", "perplexity", "exact_match"),
    *_STATES,
)
SUITS: dict[Kind, tuple[FitnessName, ...]] = {
    "sequence": _CLASSES,
    "regression": ("loss", "spearman", *_STATES),
    "token": _CLASSES,
    "causal": _ANSWERS,
    "seq2seq": _ANSWERS,
    "image": _CLASSES,
    "clip": _CLASSES,
    "encoder": ("spearman", *_STATES),
}
LABEL_FREE: tuple[FitnessName, ...] = ("kl", "agreement", *_STATES)
_ANSWER_SLACK = 8  # tokens that an answer may go on beyond the longest target


def check_fitness(name: str) -> str:
    """The name of a fitness, whose function is imported where it is the user's own.

    Raises:
        InvalidArgumentError: an unknown one, or nothing to import. FitnessError: importing fails.
    """
    if name in FITNESSES:
        return name
    if not callables.is_callable_name(name):
        raise InvalidArgumentError(
            "fitness", name, f"one of {', '.join(FITNESSES)}, or your own module:function"
        )
    callables.load_function(name)
    return name


def natural_metric(folder: Path, examples: Sequence[Example]) -> FitnessName:
    """What people judge such a model by, as far as the data goes.

    Accuracy where there are labels, loss of language models, Spearman's correlation where there
    are scores; else agreement with the fine-tune, or of embeddings where nothing is predicted.
    """
    kind = kind_of(folder)
    if kind == "causal" or (kind == "seq2seq" and all(e.target is not None for e in examples)):
        return "loss"
    if kind in ("encoder", "regression"):
        pairs = kind == "regression" or all(e.pair is not None for e in examples)
        scored = all(isinstance(e.label, int | float) for e in examples)
        return "spearman" if pairs and scored else "embedding"
    if kind == "token":
        labelled = all(e.labels is not None for e in examples)
    else:
        labelled = all(e.label is not None for e in examples)
    if kind == "seq2seq" or not labelled:
        return "agreement" if _has_classes(kind, examples) else "embedding"
    return "accuracy"


def label_free_fitness(folder: Path, examples: Sequence[Example]) -> FitnessName:
    """What a search maximises by default: ``kl``, or ``embedding`` where nothing is predicted."""
    kind = kind_of(folder)
    return "kl" if "kl" in SUITS[kind] and _has_classes(kind, examples) else "embedding"


def _has_classes(kind: Kind, examples: Sequence[Example]) -> bool:
    """CLIP's are the labels."""
    return kind != "clip" or len({e.label for e in examples if e.label is not None}) > 1


class Fitness:
    """A model of the fine-tune's architecture and what it is scored on.

    ``model`` starts as the fine-tune, in float32; its weights may then be overwritten between
    calls, by their names in the file through ``weights``. It is on ``where``, by default a GPU if
    there is one. What the fine-tune says is kept in memory: for ``kl`` at most 1,024 numbers a
    prediction, for ``hidden`` the states of all tokens (tokens x width x 4 bytes). So are the
    pixels of all images.

    Raises:
        CheckpointError: the folder can't be loaded as a model of a known kind, or not be run.
        CalibrationError: what the fitness needs is missing from the data.
        InvalidArgumentError: an unknown name, or one that doesn't suit the model.
        FitnessError: the user's own function fails.
    """

    def __init__(
        self,
        finetuned: Path,
        examples: Sequence[Example],
        name: str = "kl",
        batch_size: int = 32,
        source: Path | str = "calibration data",
        where: torch.device | None = None,
    ) -> None:
        if not examples:
            raise CalibrationError(source, "holds no examples")
        self.name, self.source = check_fitness(name), source
        self._loaded = load_model(finetuned)
        self.model = self._loaded.model
        self._examples = list(examples)
        self._function = None if name in FITNESSES else callables.load_function(name)
        if not self._function and name not in SUITS[self._loaded.kind]:
            suiting = ", ".join(SUITS[self._loaded.kind])
            raise InvalidArgumentError(
                "fitness", name, f"{suiting} or module:function for {_KINDS[self._loaded.kind]}"
            )
        self.model.to(where or device())
        self.weights = weights_of(self.model)
        self._batches: list[Batch] = []
        self._answers: list[tuple[list[list[int]], list[str]]] = []  # a batch's prompts, targets
        self._said: list[torch.Tensor | Reference] = []  # by the fine-tune, a batch each
        self._square = 1.0  # the mean of its hidden states' elements
        with running(finetuned):
            if self.name == "exact_match":
                self._answers = self._prompts(batch_size)
            elif not self._function:
                encoded = self._loaded.encode(examples, source, name not in LABEL_FREE)
                self._batches = self._loaded.batches(encoded, batch_size)
                self._check()
                self._remember()

    def score(self) -> float:
        """How good the model is with its present weights; higher is better."""
        return self.measure().score

    def measure(self) -> Measured:
        """The score of each example; their order is the same from call to call."""
        return join(self.parts(range(self.part_count)))

    @property
    def part_count(self) -> int:
        """Batches; a function of the user's own is one part."""
        return max(1, len(self._batches), len(self._answers))

    def parts(self, numbers: Iterable[int]) -> Iterator[Measured]:
        """Batch by batch, in an order that never changes and is not one of length.

        The first parts therefore stand for all: who judges by them can stop early.
        """
        for number in numbers:
            yield self._part(number)

    @torch.inference_mode()
    def _part(self, index: int) -> Measured:
        loaded = self._loaded
        if self._function:
            return callables.call(
                self.name, self._function, self.model, self._examples, loaded.processor
            )
        with running(loaded.folder):
            if self._answers:
                return self._match(*self._answers[index])
            batch = self._batches[index]
            if self.name == "spearman":
                return self._scores(batch)
            values, owner = self._values(batch, self._said[index] if self._said else None)
            sums = torch.zeros(batch.size, dtype=torch.float64)
            sums.index_add_(0, owner.cpu(), values.double().cpu())
            counts = torch.bincount(owner.cpu(), minlength=batch.size)
            is_perplexity = self.name == "perplexity"
            return Measured(sums.numpy(), counts.numpy(), "perplexity" if is_perplexity else "mean")

    def _values(
        self, batch: Batch, said: torch.Tensor | Reference | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each prediction, position or embedding, and the example that it belongs to."""
        if self.name == "hidden":
            assert isinstance(said, torch.Tensor)
            found, owner = self._loaded.hidden(batch)
            return -(found - said).square().mean(-1) / self._square, owner
        if self.name == "embedding":
            assert isinstance(said, torch.Tensor)
            found = self._loaded.embeddings(batch)
            return -(found - said).square().sum(-1), batch.row_owner
        logits = self._loaded.logits(batch)
        if isinstance(said, Reference):
            return -divergence(said, functional.log_softmax(logits, -1)), batch.owner
        wanted = batch.targets if said is None else said
        assert wanted is not None
        if self._loaded.kind == "regression":
            return -(logits[:, 0] - wanted).square(), batch.owner
        if self.name in ("loss", "perplexity"):
            return -functional.cross_entropy(logits, wanted, reduction="none"), batch.owner
        top = logits.max(-1)
        right = (top.indices == wanted) & ~top.values.isnan()  # a broken model predicts nothing
        return right.float(), batch.owner

    def _scores(self, batch: Batch) -> Measured:
        assert batch.targets is not None
        if self._loaded.kind == "regression":
            found = self._loaded.logits(batch)[:, 0]
        else:
            left, right = self._loaded.embeddings(batch).view(batch.size, 2, -1).unbind(1)
            found = (left * right).sum(-1)
        return Measured(
            found.double().cpu().numpy(),
            np.ones(batch.size, np.int64),
            "spearman",
            batch.targets.double().cpu().numpy(),
        )

    def _match(self, prompts: list[list[int]], targets: list[str]) -> Measured:
        loaded = self._loaded
        assert isinstance(loaded, Generator)
        answers = loaded.answers(prompts, self._room)
        right = [
            loaded.text_of(answer).strip() == target
            for answer, target in zip(answers, targets, strict=True)
        ]
        return Measured(np.array(right, np.float64), np.ones(len(right), np.int64))

    def _prompts(self, batch_size: int) -> list[tuple[list[list[int]], list[str]]]:
        """Batches of prompts, tokens each, and of the texts that should follow."""
        loaded = self._loaded
        assert isinstance(loaded, Generator)
        wanted = each(self._examples, self.source, loaded.target)
        # The same for all, so that an answer does not depend on its batch.
        self._room = max(map(len, wanted)) + _ANSWER_SLACK
        prompts = each(self._examples, self.source, lambda e: loaded.prompt(e, self._room))
        targets = [(example.target or "").strip() for example in self._examples]
        return [
            ([prompts[i] for i in picked], [targets[i] for i in picked])
            for picked in in_batches([len(p) for p in prompts], batch_size, 1 << 40)
        ]

    def _check(self) -> None:
        """Raise CalibrationError where nothing is predicted."""
        if self.name in ("hidden", "embedding", "spearman"):
            return
        if isinstance(self._loaded, Clip) and len(self._loaded.classes) < 2:
            raise CalibrationError(self.source, "needs two labels or more: they are CLIP's classes")
        if not sum(len(batch.owner) for batch in self._batches):
            what = {"causal": "text of two tokens or more", "token": "word with a label"}
            raise CalibrationError(
                self.source, f"holds no {what.get(self._loaded.kind, 'prediction')}"
            )

    @torch.inference_mode()
    def _remember(self) -> None:
        """Keep what the fine-tune says, where the fitness compares with it."""
        loaded = self._loaded
        for batch in self._batches if self.name in LABEL_FREE else ():
            if self.name == "kl":
                self._said.append(reference(functional.log_softmax(loaded.logits(batch), -1)))
            elif self.name == "agreement":
                self._said.append(loaded.logits(batch).argmax(-1))
            elif self.name == "embedding":
                self._said.append(loaded.embeddings(batch))
            else:
                self._said.append(loaded.hidden(batch)[0])
        if self.name == "hidden":
            states = [said for said in self._said if isinstance(said, torch.Tensor)]
            total = sum(float(state.double().square().sum()) for state in states)
            self._square = total / sum(state.numel() for state in states) or 1.0


_KINDS: dict[Kind, str] = {
    "sequence": "a sequence classifier",
    "regression": "a regression model",
    "token": "a token classifier",
    "causal": "a causal LM",
    "seq2seq": "an encoder-decoder",
    "image": "an image classifier",
    "clip": "CLIP",
    "encoder": "an encoder",
}
