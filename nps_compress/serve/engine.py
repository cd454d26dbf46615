"""The thread that owns the model: batches of one task or mixed, in the turns of the scheduler."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from nps_compress.bank import TaskBank
from nps_compress.batches import Encoded
from nps_compress.errors import InvalidArgumentError, NotMixableError, NpsError, TaskBankError
from nps_compress.mixed_model import MixedModel
from nps_compress.serve.decoding import Sequences
from nps_compress.serve.failures import RequestError
from nps_compress.serve.jobs import Generation, Job, Piece, Reading, TokenScore
from nps_compress.serve.metrics import Metrics
from nps_compress.serve.sampling import choose, generator_of, log_probabilities
from nps_compress.serve.scheduler import MIXED, CycleScheduler, QueueFullError, Turn
from nps_compress.serve.texts import TextStream

log = logging.getLogger(__name__)
T = TypeVar("T")

_NO_NUMBERS = RequestError(500, "the model gave no numbers (NaN)")


@dataclass(frozen=True)
class EngineLimits:
    """``cycle_s``: seconds of a turn while others wait; ``max_waiting``: items of a task in its
    queue; ``max_batch``: rows of a task at once; ``max_running``: rows that are begun, of all;
    ``max_pass_tokens``: positions of one pass over prompts, padding included; ``mixed``: whether
    a batch may have rows of several tasks."""

    cycle_s: float = 0.5
    max_waiting: int = 256
    max_batch: int = 16
    max_running: int = 64
    max_pass_tokens: int = 8192
    mixed: bool = False


@dataclass(eq=False)
class _Row:
    """A generation under way."""

    job: Generation
    stream: TextStream
    generator: torch.Generator | None
    tokens: int = 0
    last: int = 0


@dataclass(eq=False)
class _Group:
    """Rows that advance together."""

    sequences: Sequences
    rows: list[_Row]


class Engine:
    """Does jobs, in batches of one task or mixed.

    bank: nobody else switches it from now on.

    While a task has its turn, its new jobs join those that run. When the turn is over, running
    ones keep their keys and values, and go on at the next. Where tasks are mixed, they and the base
    share a turn; one that can't be, or for which there is no room beside them, has its own.
    """

    def __init__(
        self,
        bank: TaskBank,
        metrics: Metrics,
        limits: EngineLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bank, self.limits, self._metrics = bank, limits, metrics
        self._scheduler: CycleScheduler[Job] = CycleScheduler(
            clock,
            cycle_s=limits.cycle_s,
            max_waiting=limits.max_waiting,
            max_batch=limits.max_batch,
            max_running=limits.max_running,
            is_mixed=self._is_mixed,
        )
        self._changed = threading.Condition()  # guards the scheduler and what follows
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._stopping = False
        self._groups: dict[Turn, list[_Group]] = {}
        self._mixing = limits.mixed
        self._unmixable: set[str | None] = set()
        self._without_room: set[str | None] = set()  # to be mixed, until their own turn's work ends
        self._put_off: dict[str | None, list[Job]] = {}  # taken for the mix, for their own turn
        self._begun: set[Job] = set()  # taken from the scheduler, and not finished
        self._prefetching = ThreadPoolExecutor(1, thread_name_prefix="nps-prefetch")
        self._thread = threading.Thread(target=self._run, name="nps-engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs of one task, all or none.

        Raises:
            RequestError: too many wait (429), or the server shuts down (503).
        """
        with self._changed:
            if self._stopping:
                raise RequestError(503, "the server is shutting down", retry_after=1)
            try:
                self._scheduler.add(jobs[0].task, jobs)
            except QueueFullError as error:
                raise RequestError(
                    429,
                    f"model {jobs[0].label!r} has {error.limit} inputs waiting at most; try later",
                    code="queue_full",
                    retry_after=1,
                ) from None
            self._count()
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody wants the answers any more. Those that are done already stay so."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            if jobs:
                self._scheduler.withdraw(jobs[0].task, jobs)
            self._count()

    def work_of(self, task: str | None) -> int:
        """How many jobs of a task wait or run."""
        with self._changed:
            return self._scheduler.waiting().get(task, 0) + self._scheduler.running().get(task, 0)

    def work(self) -> tuple[dict[str | None, int], dict[str | None, int]]:
        """-> how many jobs wait, and how many run, by task."""
        with self._changed:
            return self._scheduler.waiting(), self._scheduler.running()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run something between two steps, when the model is nobody's."""
        found: Future[T] = Future()
        with self._changed:
            if self._stopping:
                found.set_exception(RequestError(503, "the server is shutting down"))
            else:
                self._calls.append((function, found))
                self._changed.notify()
        return found

    def forget(self, task: str | None) -> None:
        """A task was removed, and has no work."""
        with self._changed:
            self._scheduler.forget(task)
            self._unmixable.discard(task)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Fail what is left, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        self._prefetching.shutdown(cancel_futures=True)

    def _run(self) -> None:
        while True:
            with self._changed:
                turn: Turn | None = None
                while not (self._calls or self._stopping or (turn := self._scheduler.turn())):
                    self._changed.wait()
                calls, self._calls = self._calls, []
                if self._stopping:
                    break
            for function, answer in calls:
                _answer(function, answer)
            if turn:
                self._take_turn(turn)
        error = RequestError(503, "the server is shutting down", retry_after=1)
        for _, answer in calls:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)
        with self._changed:
            tasks = {*self._scheduler.waiting(), *self._scheduler.running()}
        for task in tasks:
            self._fail_all(task, error)

    def _take_turn(self, turn: Turn) -> None:
        self._prefetch_next()
        try:
            if turn == MIXED:
                with self.bank.mix(keep=True) as mixed:
                    self._work(turn, mixed.model, mixed)
            else:
                with self.bank.use(turn[0], keep=True) as model:
                    self._work(turn, model)
        except NotMixableError as error:  # of some input of the model's: too late for their rows
            log.error("tasks are mixed no more: %s", error)
            self._fail_turn(turn, RequestError(503, "the server failed; try again", retry_after=1))
            self._mixing = False
        except NpsError as error:
            if isinstance(error, TaskBankError) and self._leave_task():
                return  # there may be room without the task that was active: the turn goes on
            log.error("turn %r can't be taken: %s", turn, error)
            self._fail_turn(turn, _unusable(error))
        except Exception:  # the thread must outlive whatever it is
            log.exception("turn %r can't be taken", turn)
            self._fail_turn(turn, RequestError(500, "the server failed; see its log"))

    def _work(self, turn: Turn, model: Any, mixed: MixedModel | None = None) -> None:
        """Steps, until the turn is over."""
        while True:
            self._step(turn, model, mixed)
            with self._changed:
                if self._calls or self._stopping or self._scheduler.turn() != turn:
                    return

    def _is_mixed(self, task: str | None) -> bool:
        return self._mixing and task not in self._unmixable and task not in self._without_room

    def _leave_task(self) -> bool:
        """Go back to the base. -> whether another task was active until now."""
        if self.bank.active is None:
            return False
        try:
            self.bank.deactivate()
        except NpsError as error:
            log.error("the base can't be restored: %s", error)
            return False
        return True

    def _prefetch_next(self) -> None:
        """Load whose turn is next from disk, while this one's lasts."""
        with self._changed:
            upcoming = self._scheduler.upcoming()
        for task in upcoming:
            if task is not None:
                self._prefetching.submit(_try_prefetch, self.bank, task)

    def _step(self, turn: Turn, model: Any, mixed: MixedModel | None) -> None:
        """One pass of what runs, and of what begins to."""
        with self._changed:
            taken = self._scheduler.take(turn)
            self._begun.update(taken)
            self._count()
        groups = self._groups.setdefault(turn, [])
        for group in groups:
            self._drop(group, [row for row in group.rows if row.job.cancelled])
        if mixed:
            running = [row.job for group in groups for row in group.rows]
            taken = self._let_in(mixed, running, taken)
        else:
            taken += self._put_off.pop(turn[0], [])
        for group in groups:
            jobs = [row.job for row in group.rows]
            self._guarded(jobs, partial(self._advance, model, group), mixed)
        groups[:] = [group for group in groups if any(r.job in self._begun for r in group.rows)]
        prompts = [job for job in taken if isinstance(job, Generation)]
        for batch in _passes(prompts, lambda job: len(job.prompt), self.limits.max_pass_tokens):
            batch.sort(key=_place)
            self._guarded(batch, partial(self._begin, model, groups, batch), mixed)
        limit = self.limits.max_pass_tokens
        if model.config.get_text_config().pad_token_id is None:
            limit = 0  # a model that looks for the last token of a text would not find it
        for readings in _alike([job for job in taken if isinstance(job, Reading)]):
            for rows in _passes(readings, lambda job: len(job.row["input_ids"]), limit):
                rows.sort(key=_place)
                self._guarded(rows, partial(self._read, rows), mixed)
        if mixed:
            left = {row.job.task for group in groups for row in group.rows}
            for name in mixed.names:
                if name not in left:
                    mixed.leave(name)
        if not groups:
            del self._groups[turn]
            if turn != MIXED:
                self._without_room.discard(turn[0])

    def _let_in(self, mixed: MixedModel, running: Sequence[Job], taken: Sequence[Job]) -> list[Job]:
        """Let the tasks in that have something to do. -> what may begin of what was taken."""
        for task in dict.fromkeys(job.task for job in (*running, *taken)):
            try:
                if task is not None:
                    mixed.join(task)
            except TaskBankError as error:
                log.warning("task %r has turns of its own: %s", task, error)
                is_for_good = isinstance(error, NotMixableError)
                (self._unmixable if is_for_good else self._without_room).add(task)
                self._put_off[task] = [job for job in taken if job.task == task]
                self._move_out(task)
            except NpsError as error:
                log.error("task %r can't be used: %s", task, error)
                self._fail_all(task, _unusable(error))
        names = {None, *mixed.names}
        return [job for job in taken if job.task in names]

    def _move_out(self, task: str | None) -> None:
        """Let the rows of a task that run mixed go on at its own turns."""
        for group in self._groups[MIXED]:
            mine = [i for i, row in enumerate(group.rows) if row.job.task == task]
            if mine:
                rows = [group.rows[i] for i in mine]
                own = _Group(group.sequences.part(mine), rows)
                self._groups.setdefault((task,), []).append(own)
                self._keep(group, [i for i in range(len(group.rows)) if i not in mine])

    def _guarded(
        self, jobs: Sequence[Job], function: Callable[[], None], mixed: MixedModel | None
    ) -> None:
        """Whatever the model raises fails the jobs of this pass, and no others.

        Raises:
            NotMixableError: it got rows that can't be mixed.
        """
        if not jobs:
            return
        tasks = [job.task for job in jobs]
        self._metrics.batch_rows.observe(len(jobs))
        self._metrics.batch_tasks.observe(len(set(tasks)))
        try:
            with mixed.rows(tasks) if mixed else contextlib.nullcontext():
                function()
        except NotMixableError:
            raise
        except Exception as error:  # out of memory, and whatever else a model may raise
            log.exception("a pass of task %r failed", jobs[0].task)
            self._fail(jobs, RequestError(500, f"the model failed ({type(error).__name__})"))

    def _begin(self, model: Any, groups: list[_Group], jobs: Sequence[Generation]) -> None:
        """Read prompts and write their first tokens."""
        sequences, logits = Sequences.start(model, [job.prompt for job in jobs])
        new = _Group(sequences, [_row(job) for job in jobs])
        self._write(new, logits)
        if not new.rows:
            return
        for group in groups:
            if group.sequences.join(sequences):
                group.rows += new.rows
                self._keep(
                    group, sorted(range(len(group.rows)), key=lambda i: _place(group.rows[i].job))
                )
                return
        groups.append(new)

    def _advance(self, model: Any, group: _Group) -> None:
        """Write one more token of each row."""
        self._write(group, group.sequences.advance(model, [row.last for row in group.rows]))

    def _write(self, group: _Group, logits: torch.Tensor) -> None:
        """Choose a token for each row, tell its text, and drop the rows that are finished."""
        logits = logits.cpu()
        broken = logits.isnan().any(dim=1).tolist()
        ended = []
        for row, scores, is_broken in zip(group.rows, logits, broken, strict=True):
            if is_broken:
                self._fail([row.job], _NO_NUMBERS)
            if is_broken or row.job.cancelled or self._write_one(row, scores):
                ended.append(row)
        self._drop(group, ended)

    def _write_one(self, row: _Row, logits: torch.Tensor) -> bool:
        """-> whether the answer has ended."""
        job, sampling = row.job, row.job.sampling
        draw = 0.0
        if row.generator is not None:
            draw = float(torch.rand((), generator=row.generator, dtype=torch.float64))
        token = row.last = choose(logits, sampling, draw)
        row.tokens += 1
        self._metrics.generated_tokens.labels(job.label).inc()
        scores: tuple[TokenScore, ...] = ()
        if sampling.logprobs is not None:
            scores = (TokenScore(token, *log_probabilities(logits, token, sampling.logprobs)),)
        text = ""
        reason: Literal["stop", "length"] | None = None
        if token in job.processor.ends:
            reason = "stop"
        else:
            text = row.stream.push(token)
            if row.tokens >= sampling.max_tokens:
                reason = "length"
        if reason:
            text += row.stream.finish()
        if row.stream.stopped:
            reason = "stop"
        job.emit(Piece(text, row.tokens, scores, reason))
        return reason is not None

    def _drop(self, group: _Group, rows: Sequence[_Row]) -> None:
        """Go on without some rows."""
        if rows:
            self._keep(group, [i for i, row in enumerate(group.rows) if row not in rows])
            self._finish([row.job for row in rows])

    def _keep(self, group: _Group, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        group.sequences.keep(rows)
        group.rows = [group.rows[i] for i in rows]

    def _read(self, jobs: Sequence[Reading]) -> None:
        """Embed or classify rows."""
        processor, use = jobs[0].processor, jobs[0].use
        reader = processor.readers[use]
        batch = reader.collate([Encoded((job.row,)) for job in jobs])
        with torch.inference_mode():
            found = reader.embeddings(batch) if use == "embed" else reader.logits(batch)
            if use == "classify" and processor.activation == "softmax":
                found = found.softmax(-1)
            elif use == "classify" and processor.activation == "sigmoid":
                found = found.sigmoid()
        broken = found.isnan().any(dim=1).tolist()
        for job, values, is_broken in zip(jobs, found.tolist(), broken, strict=True):
            job.emit(_NO_NUMBERS if is_broken else values)
        self._finish(jobs)

    def _fail(self, jobs: Iterable[Job], error: RequestError) -> None:
        """Tell those that have begun and not ended."""
        for job in jobs:
            if job in self._begun:
                job.emit(error)
                self._finish([job])

    def _finish(self, jobs: Iterable[Job]) -> None:
        """Each job once, however it ended."""
        with self._changed:
            for job in jobs:
                if job in self._begun:
                    self._begun.remove(job)
                    self._scheduler.finish(job.task)
            self._count()

    def _fail_all(self, task: str | None, error: RequestError) -> None:
        """Everything that a task has to do."""
        self._end([job for job in self._begun if job.task == task], error)
        self._put_off.pop(task, None)
        with self._changed:
            waiting = self._scheduler.clear(task)
            self._count()
        for job in waiting:
            job.emit(error)

    def _fail_turn(self, turn: Turn, error: RequestError) -> None:
        """Everything that the tasks of a turn have to do."""
        self._groups.pop(turn, None)
        waiting, running = self.work()
        for task in {*waiting, *running} if turn == MIXED else {turn[0]}:
            if turn != MIXED or self._is_mixed(task):
                self._fail_all(task, error)

    def _end(self, jobs: Sequence[Job], error: RequestError) -> None:
        """Fail jobs that have begun, and take their rows out of what runs."""
        self._fail(jobs, error)
        for groups in self._groups.values():
            groups[:] = [group for group in groups if any(r.job not in jobs for r in group.rows)]
            for group in groups:
                self._drop(group, [row for row in group.rows if row.job in jobs])

    def _count(self) -> None:
        """With the lock held."""
        self._metrics.waiting.set(sum(self._scheduler.waiting().values()))
        self._metrics.running.set(sum(self._scheduler.running().values()))


def _unusable(error: NpsError) -> RequestError:
    if isinstance(error, InvalidArgumentError):
        return RequestError(503, "this model was unloaded, or its file is gone", code="unavailable")
    if isinstance(error, TaskBankError):
        what = "there is no memory for this model now"
        return RequestError(503, what, code="unavailable", retry_after=1)
    return RequestError(503, "this model's file is damaged, or another one", code="unavailable")


def _row(job: Generation) -> _Row:
    stream = TextStream(job.processor.decode, job.sampling.stop)
    return _Row(job, stream, generator_of(job.sampling))


def _place(job: Job) -> tuple[bool, str]:
    """Where a job's row is in a batch: the base's first, a task's together."""
    return job.task is not None, job.task or ""


def _alike(jobs: Iterable[Reading]) -> list[list[Reading]]:
    """Rows that one pass can read."""
    found: dict[object, list[Reading]] = {}
    for job in jobs:
        processor = job.processor
        key = (job.use, processor.activation, processor.tokenizer.pad_token_id, frozenset(job.row))
        found.setdefault(key, []).append(job)
    return list(found.values())


def _passes(items: Iterable[T], length: Callable[[T], int], most: int) -> list[list[T]]:
    """Items in batches of at most so many positions, padding included; one item always fits."""
    found: list[list[T]] = []
    longest = 0
    for item in sorted(items, key=length):
        longest = length(item)
        if not found or longest * (len(found[-1]) + 1) > most:
            found.append([])
        found[-1].append(item)
    return found


def _answer(function: Callable[[], T], answer: Future[T]) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        answer.set_result(function())
    except Exception as error:  # whoever waits for the answer gets it
        answer.set_exception(error)


def _try_prefetch(bank: TaskBank, task: str) -> None:
    try:
        bank.prefetch(task)
    except NpsError as error:  # told to those who ask for the task, when it is their turn
        log.info("task %r can't be loaded ahead: %s", task, error)
