"""Merged models scored on data: each exam has a live model, whose weights are overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nps_compress.calibration import Example
from nps_compress.dtypes import Words, to_float32
from nps_compress.errors import CheckpointError
from nps_compress.fitness import Fitness
from nps_compress.measured import Measured
from nps_compress.merging.merger import Merger, Plan
from nps_compress.retain import Yardstick


@dataclass(frozen=True)
class Exam:
    """Examples and the metric that a task's model is scored by. ``folder``: the task as it is."""

    task: int
    folder: Path
    examples: Sequence[Example]
    metric: str
    source: Path


class Exams:
    """Holds a model in float32 for each exam. ``yardsticks``: what base and fine-tune score.

    The base has the fine-tune's tensors that are not merged, its head among them.

    Raises:
        As fitness.Fitness; CheckpointError: a merged tensor is no parameter of a model.
    """

    def __init__(self, merger: Merger, exams: Sequence[Exam]) -> None:
        self._merger, self._exams = merger, exams
        self._fitnesses = [Fitness(e.folder, e.examples, e.metric, source=e.source) for e in exams]
        for exam, fitness in zip(exams, self._fitnesses, strict=True):
            for name in merger.names:
                own = merger.found_in[exam.task][name]
                if own not in fitness.weights:
                    what = f"tensor {own!r} has no parameter of that name in the model"
                    raise CheckpointError(exam.folder, what)
        finetuned = [fitness.measure() for fitness in self._fitnesses]
        for name in merger.names:
            self._write(name, [merger.base.read(name)])
        base = [fitness.measure() for fitness in self._fitnesses]
        self.yardsticks = [
            Yardstick(exam.metric, before, after)
            for exam, before, after in zip(exams, base, finetuned, strict=True)
        ]

    def measure(self, plan: Plan) -> list[Measured]:
        """What the merged models score, one an exam."""
        for name, words in self._merger.each_merged(plan):
            self._write(name, words)
        return [fitness.measure() for fitness in self._fitnesses]

    def _write(self, name: str, words: Sequence[Words]) -> None:
        """words: one array for all tasks, or one for each."""
        tensor = self._merger.base.tensors[name]
        values = [torch.from_numpy(to_float32(each, tensor.dtype)) for each in words]
        for exam, fitness in zip(self._exams, self._fitnesses, strict=True):
            target = fitness.weights[self._merger.found_in[exam.task][name]]
            target.copy_(values[exam.task if len(values) > 1 else 0].view(tensor.shape))
