"""Recipes scored on calibration data: each is made in a live model, and the model is measured."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nps_compress.adapters import device
from nps_compress.calibration import Example
from nps_compress.candidates import Pruner
from nps_compress.fitness import Fitness
from nps_compress.live import LiveModel
from nps_compress.measured import Measured, join
from nps_compress.racing import Outcome, race, rounds
from nps_compress.recipe import Recipe
from nps_compress.retain import Yardstick
from nps_compress.search import Memory


class Evaluator:
    """Holds a model for each worker; ``workers`` None: one a GPU, or one on the CPU.

    Raises:
        See fitness.Fitness.
    """

    def __init__(
        self,
        pruner: Pruner,
        examples: Sequence[Example],
        name: str,
        source: Path | str = "calibration data",
        workers: int | None = None,
    ) -> None:
        on_gpu = device().type == "cuda"
        count = workers or (torch.cuda.device_count() if on_gpu else 1)
        self._idle: queue.SimpleQueue[tuple[Fitness, LiveModel]] = queue.SimpleQueue()
        self._workers = count
        for number in range(count):
            where = f"cuda:{number % torch.cuda.device_count()}" if on_gpu else "cpu"
            folder = pruner.pair.finetuned.path
            fitness = Fitness(folder, examples, name, source=source, where=torch.device(where))
            if not number:
                finetuned = fitness.measure()  # while the model is the fine-tune
            live = LiveModel(pruner, fitness.weights)
            self._idle.put((fitness, live))
        live.apply_base()
        self.yardstick = Yardstick(name, fitness.measure(), finetuned)
        self._rounds = rounds(fitness.part_count, finetuned.how == "mean")

    def measure(self, recipe: Recipe) -> Measured:
        """The score of what a recipe would store, by example."""
        return self._measure(recipe, range(self._rounds[0].start, self._rounds[-1].stop))

    def race(
        self,
        recipes: Sequence[Recipe],
        memory: Memory,
        on_share: Callable[[float], None] = lambda _: None,
    ) -> list[Outcome]:
        """Scores of a generation; what is measured is kept in ``memory``.

        on_share: is told the share of an evaluation whenever so much has been done.
        """
        total = self._rounds[-1].stop

        def measure(numbers: Sequence[int], span: range) -> list[Measured]:
            keys = {number: f"{number}:{span.start}" for number in numbers}
            missing = [number for number in numbers if memory.get(keys[number]) is None]
            jobs = [lambda n=number: self._measure(recipes[n], span) for number in missing]
            for number, measured in zip(missing, self._run(jobs), strict=True):
                memory.put(keys[number], _to_json(measured))
                on_share(len(span) / total)
            return [_from_json(memory.get(keys[number])) for number in numbers]

        return race(len(recipes), self._rounds, measure)

    def _measure(self, recipe: Recipe, span: range) -> Measured:
        fitness, live = station = self._idle.get()
        try:
            live.apply(recipe)
            return join(fitness.parts(span))
        finally:
            self._idle.put(station)

    def _run(self, jobs: Sequence[Callable[[], Measured]]) -> Iterator[Measured]:
        """Results in their order, as they come."""
        if self._workers == 1:
            yield from (job() for job in jobs)
            return
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, before // self._workers))  # shared by the workers
        try:
            with ThreadPoolExecutor(self._workers) as pool:
                yield from pool.map(lambda job: job(), jobs)
        finally:
            torch.set_num_threads(before)


def _to_json(measured: Measured) -> Any:
    targets = None if measured.targets is None else measured.targets.tolist()
    return [measured.sums.tolist(), measured.counts.tolist(), measured.how, targets]


def _from_json(value: Any) -> Measured:
    sums, counts, how, targets = value
    return Measured(
        np.array(sums, np.float64),
        np.array(counts, np.int64),
        how,
        None if targets is None else np.array(targets, np.float64),
    )
