"""Many fine-tunes behind one model in memory: a task is switched to in place, bit for bit."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from nps_compress.checkpoint import open_checkpoint
from nps_compress.errors import (
    CheckpointError,
    FormatError,
    InvalidArgumentError,
    NotMixableError,
    NpsError,
    TaskBankError,
)
from nps_compress.lazy import LazyTensors, base_tensors, base_under_names_of
from nps_compress.mixed_model import MixedModel, MixedTask, mixed_task
from nps_compress.pretrained import config_difference, load, parsed_config
from nps_compress.reconstruct import Task
from nps_compress.resident_model import ResidentModel, ResidentTask, TaskForms
from nps_compress.unpacking import open_task, side_files_of

REBUILT, DEVICE, HOST, DISK = "rebuilt", "device", "host", "disk"
_SUFFIX = ".nps"
_SWITCHES_KEPT = 256

T = TypeVar("T", TaskForms, ResidentTask)


@dataclass(frozen=True)
class TaskInfo:
    """One task of a bank.

    ``tier``: the fastest that holds it, ``rebuilt``, ``device``, ``host`` or ``disk``; ``nbytes``:
    what its changes take when they are loaded; ``file_bytes``: what its file takes. ``config``: the
    fine-tune's config.json (``id2label`` and the like), None where it has none.
    """

    name: str
    path: Path
    active: bool
    pinned: bool
    tier: str
    nbytes: int
    file_bytes: int
    content_digest: str
    config: Mapping[str, Any] | None


@dataclass(frozen=True)
class BankMetrics:
    """What a bank has done, and holds.

    ``switches``: to another task or the base; ``hits``, ``misses``: times that a task which was
    asked for was, or was not, in the fastest tier; ``loads``: from disk; ``evictions``: from any
    tier. ``nbytes``: by tier, ``disk`` being all files; ``undo_bytes``: buffers of a switch.
    ``switch_seconds``: of the last 256 switches, the latest last.
    """

    switches: int
    hits: int
    misses: int
    loads: int
    evictions: int
    failures: int
    nbytes: Mapping[str, int]
    undo_bytes: int
    switch_seconds: tuple[float, ...]


@dataclass
class _Entry:
    name: str
    path: Path
    pinned: bool
    file_bytes: int = 0
    file_digest: bytes = b""
    content_digest: str = ""
    nbytes: int = 0
    config: Mapping[str, Any] | None = None
    mixes: bool | None = None  # None: nobody tried
    loading: threading.Lock = field(default_factory=threading.Lock)


class _Tier(Generic[T]):
    """Tasks in one kind of memory, the least recently used first."""

    def __init__(self, name: str, budget: int | None) -> None:
        self.name, self.budget = name, budget
        self.held: OrderedDict[str, T] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.held.values())

    def get(self, name: str) -> T | None:
        if name in self.held:
            self.held.move_to_end(name)
        return self.held.get(name)

    def make_room(self, nbytes: int, kept: set[str]) -> int:
        """Evict until so much fits, and -> how many. Raises TaskBankError: it can't."""
        if self.budget is None:
            return 0
        fixed = sum(each.nbytes for name, each in self.held.items() if name in kept)
        if fixed + nbytes > self.budget:
            raise TaskBankError(
                f"a task of {nbytes:,} bytes does not fit into the {self.budget:,} bytes for "
                f"tasks in {self.name} memory, {fixed:,} of them pinned or active"
            )
        evicted = 0
        for name in [name for name in self.held if name not in kept]:
            if self.nbytes + nbytes <= self.budget:
                break
            del self.held[name]
            evicted += 1
        return evicted


class TaskBank:
    """One model in memory, and any number of ``.nps`` tasks that it can become.

    >>> bank = TaskBank.from_pretrained("base/", {"law": "law.nps"})  # doctest: +SKIP
    >>> with bank.use("law"):  # doctest: +SKIP
    ...     bank.model.generate(...)

    A switch changes the weights in place, those of both tasks only, and going back restores the
    base bit for bit. It needs no file: a task is read, decoded and verified before. Where anything
    fails, the task that was active still is, and its weights are right.

    A tensor that has the model's shape is changed where it is; pointers stay. One of another shape
    or dtype (a head of another number of classes) takes the parameter's place while its task is
    active, cast to the parameter's dtype as transformers does. What a task has no tensor for, and
    the base neither (a head of other tasks), stays as it was when the bank was made. Tied weights
    are changed once. ``model.config`` stays as it is; a task's own is in :class:`TaskInfo`.

    Tasks lie in the fastest memory that has room, and the least recently used leave first; the
    active and pinned ones stay. With the model on the CPU there are two tiers: ``host`` and
    ``disk``; with a GPU, ``device`` before them. Before all of these, ``rebuilt_bytes`` are for
    tasks whose whole weights are kept, beside the base's, as they were when first active: a switch
    to one of them exchanges tensors of the model, not words in them. Those that come first stay. A
    task that is loaded again is refused unless its file is byte for byte what was added.

    Thread-safe. :meth:`use` keeps the weights as they are for as long as it lasts: other threads
    that want to switch wait, those that load, add or look do not. Whoever runs the model without
    :meth:`use` must be the only one who switches.

    model: loaded from ``base``, a folder, ``.safetensors`` file or cached Hub id, in the dtypes of
    its files, and neither moved, cast nor trained afterwards. device_bytes, host_bytes: budgets of
    the tiers, None for no limit. rebuilt_bytes: likewise, and 0 as long as memory is dear.

    Raises:
        CheckpointError: the base can't be read, or a weight of the model is not the base's.
    """

    def __init__(
        self,
        model: nn.Module,
        base: str | Path,
        *,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        rebuilt_bytes: int | None = 0,
    ) -> None:
        budgets = {
            "device_bytes": device_bytes,
            "host_bytes": host_bytes,
            "rebuilt_bytes": rebuilt_bytes,
        }
        for label, budget in budgets.items():
            if budget is not None and budget < 0:
                raise InvalidArgumentError(label, budget, "at least 0 bytes")
        self.model = model
        self._resident = ResidentModel(model, open_checkpoint(base))
        on_host = self._resident.on_host
        if on_host and device_bytes is not None:
            raise InvalidArgumentError(
                "device_bytes", device_bytes, "left out: the model is on the CPU; see host_bytes"
            )
        self._near: _Tier[ResidentTask] = (
            _Tier(HOST, host_bytes) if on_host else _Tier(DEVICE, device_bytes)
        )
        self._rebuilt: _Tier[ResidentTask] = _Tier(REBUILT, rebuilt_bytes)
        self._host: _Tier[TaskForms] | None = None if on_host else _Tier(HOST, host_bytes)
        self._entries: dict[str, _Entry] = {}
        self._active: tuple[_Entry, ResidentTask] | None = None
        self._in_use: list[str | None] = []  # by use() blocks, of the one thread that may
        self._mixed: MixedModel | None = None  # of the mix() block, likewise
        self._mixed_tasks: weakref.WeakKeyDictionary[ResidentTask, MixedTask] = (
            weakref.WeakKeyDictionary()
        )
        self._weights_lock = threading.RLock()  # of the weights; held for long
        self._lock = threading.RLock()  # of all else here; held for short
        self._counts = dict.fromkeys(
            ("switches", "hits", "misses", "loads", "evictions", "failures"), 0
        )
        self._switch_seconds: deque[float] = deque(maxlen=_SWITCHES_KEPT)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        tasks: Mapping[str, str | Path] | Sequence[str | Path] = (),
        *,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        rebuilt_bytes: int | None = 0,
        device: Any = None,
        model_class: Any = None,
        **hf_kwargs: Any,
    ) -> TaskBank:
        """A bank with its model, loaded by transformers from the base's weights.

        The model has the architecture and config of the first task, so that a base without a head
        serves tasks with heads; a tensor that only fine-tunes have is the first task's until
        another one is active. Without tasks it is the base's own. device: where the whole model is
        moved to, as torch names it; ``device_map`` among hf_kwargs splits it, and needs accelerate.
        model_class, hf_kwargs: as for :func:`nps_compress.from_pretrained`.

        Raises:
            What :func:`nps_compress.from_pretrained`, the constructor and :meth:`add` raise.
        """
        named = dict(tasks) if isinstance(tasks, Mapping) else {_stem(t): t for t in tasks}
        if len(named) != len(tasks):
            raise InvalidArgumentError("tasks", [str(t) for t in tasks], "of different names")
        checkpoint = open_checkpoint(base)
        if named:
            first = next(iter(named.values()))
            with LazyTensors(checkpoint, first) as tensors:
                own = base_under_names_of(tensors)
                model = load(own, tensors.side_files, base, model_class, **hf_kwargs)
        else:
            side_files = {name: checkpoint.read_side_file(name) for name in checkpoint.side_files}
            model = load(base_tensors(checkpoint), side_files, base, model_class, **hf_kwargs)
        if device is not None:
            try:
                model.to(device)
            except (
                RuntimeError,
                AssertionError,
            ) as error:  # as torch says it, also where it is full
                why = str(error).splitlines()[0]
                raise InvalidArgumentError(
                    "device", str(device), f"one with room ({why})"
                ) from None
        bank = cls(
            model,
            base,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            rebuilt_bytes=rebuilt_bytes,
        )
        for name, path in named.items():
            bank.add(path, name)
        return bank

    def add(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        pin: bool = False,
        verify: bool = True,
    ) -> TaskInfo:
        """Add a task: read it, check it against the base and the model, load it if there is room.

        name: by default the file's without ``.nps``. pin: never evict it once it is loaded.
        verify: rebuild every tensor and check the digest that it promises; without, only those of
        what is stored, and that the base is the one the task was made from.

        Raises:
            InvalidArgumentError: no such file, or a name that is taken. FormatError: it is
            damaged. BaseMismatchError: it is of another base. CheckpointError: it is of another
            architecture, or has a tensor for which the model has no place. TaskBankError: ``pin``,
            and there is no room.
        """
        entry = _Entry(name if name is not None else _stem(path), Path(path), pin)
        if not entry.name or not entry.name.isprintable():
            raise InvalidArgumentError("task name", entry.name, "printable and not empty")
        self._refuse_taken(entry.name)
        with entry.loading:
            forms = self._read(entry, verify=verify)
            entry.nbytes = forms.nbytes
            with self._lock:
                self._refuse_taken(entry.name)
                if pin:
                    self._put(entry, forms)
                else:
                    with contextlib.suppress(TaskBankError):
                        self._put(entry, forms)
                self._entries[entry.name] = entry
                return self._info(entry)

    def remove(self, name: str) -> None:
        """Forget a task; where it is active, the base is restored first. Its file stays.

        Raises:
            InvalidArgumentError: no such task. TaskBankError: it is in use by this thread.
        """
        self._entry(name)
        with self._weights_lock:
            if name in self._in_use or name in self._in_mix():
                raise TaskBankError(f"task {name!r} is in use")
            if self.active == name:
                self._activate(None)
            with self._lock:
                self._entries.pop(name, None)
                for tier in self._tiers():
                    tier.held.pop(name, None)

    def activate(self, name: str | None) -> None:
        """Make the model a task, or the base where name is None. Nothing if it is already.

        Raises:
            InvalidArgumentError: no such task. FormatError, BaseMismatchError, CheckpointError,
            TaskBankError: its file is gone, damaged or another one, or there is no room for it;
            the task that was active still is.
        """
        self._prepare(name)
        with self._weights_lock:
            self._refuse_in_mix()
            self._activate(name)

    def deactivate(self) -> None:
        """Make the model the base again, bit for bit."""
        self.activate(None)

    @contextlib.contextmanager
    def use(self, name: str | None, *, keep: bool = False) -> Iterator[nn.Module]:
        """The model as a task (None: the base) for the length of the block, then as before.

        keep: leave the task active instead, which spares a server two switches. Blocks may be
        nested; another thread's waits until this one ends.

        Raises:
            As :meth:`activate`, also at the end of the block.
        """
        self._prepare(name)
        with self._weights_lock:
            self._refuse_in_mix()
            before = self.active
            self._activate(name)
            self._in_use.append(name)
            try:
                yield self.model
            finally:
                self._in_use.pop()
                if not keep:
                    self._activate(before if before in self._entries else None)

    @contextlib.contextmanager
    def mix(self, names: Sequence[str] = (), *, keep: bool = False) -> Iterator[MixedModel]:
        """The model for batches with rows of several of these tasks and of the base.

        The base is active for the length of the block, then what was before; keep: the base still.
        Answers agree with the task's own up to rounding. More tasks may join in the block. All of
        them stay in memory, with a copy, which the tiers don't count, of the words that they change
        in embeddings. When a task joins for the first time, a few tokens' answers are compared with
        those of the task itself, which is switched to and back.

        Raises:
            NotMixableError: a task can't be, for good: :meth:`use` it. As :meth:`activate`.
        """
        with self._weights_lock:
            self._refuse_in_mix()
            before = self.active
            self._activate(None)
            try:
                mixed = MixedModel(self._resident, self._joining)
                with contextlib.closing(mixed) as self._mixed:
                    for name in names:
                        self._mixed.join(name)
                    yield self._mixed
            finally:
                self._mixed = None
                if not keep:
                    self._activate(before if before in self._entries else None)

    def prefetch(self, name: str) -> None:
        """Load a task into the fastest memory, while another may be in use.

        Raises:
            As :meth:`activate`.
        """
        self._fetch(self._entry(name))

    def pin(self, name: str) -> None:
        """Load a task and keep it from being evicted. Raises: as :meth:`activate`."""
        entry = self._entry(name)
        with self._lock:
            was, entry.pinned = entry.pinned, True
        try:
            self._fetch(entry)
        except BaseException:
            entry.pinned = was
            raise

    def unpin(self, name: str) -> None:
        """Let a task be evicted again. Raises InvalidArgumentError: no such task."""
        self._entry(name).pinned = False

    @property
    def active(self) -> str | None:
        """The task that the model is now; None: the base."""
        active = self._active
        return active[0].name if active else None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def tasks(self) -> dict[str, TaskInfo]:
        """All tasks by name, in the order they were added."""
        with self._lock:
            return {name: self._info(entry) for name, entry in self._entries.items()}

    def metrics(self) -> BankMetrics:
        """What was done so far, and what is held."""
        with self._lock:
            nbytes = {tier.name: tier.nbytes for tier in self._tiers()}
            nbytes[DISK] = sum(entry.file_bytes for entry in self._entries.values())
            return BankMetrics(
                **self._counts,
                nbytes=nbytes,
                undo_bytes=self._resident.undo_bytes,
                switch_seconds=tuple(self._switch_seconds),
            )

    def _tiers(self) -> list[_Tier[Any]]:
        return [self._rebuilt, self._near, *([self._host] if self._host else [])]

    def _entry(self, name: str) -> _Entry:
        with self._lock:
            if name not in self._entries:
                known = ", ".join(map(repr, self._entries)) or "no tasks yet"
                raise InvalidArgumentError("task name", name, f"one of the bank's ({known})")
            return self._entries[name]

    def _refuse_taken(self, name: str) -> None:
        if name in self._entries:
            raise InvalidArgumentError("task name", name, "one that is not taken")

    def _info(self, entry: _Entry) -> TaskInfo:
        tier = next((tier.name for tier in self._tiers() if entry.name in tier.held), DISK)
        return TaskInfo(
            name=entry.name,
            path=entry.path,
            active=self.active == entry.name,
            pinned=entry.pinned,
            tier=tier,
            nbytes=entry.nbytes,
            file_bytes=entry.file_bytes,
            content_digest=entry.content_digest,
            config=entry.config,
        )

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, number in counts.items():
                self._counts[name] += number

    def _kept(self) -> set[str]:
        """What must not be evicted."""
        pinned = {name for name, entry in self._entries.items() if entry.pinned}
        return pinned | {name for name in (self.active, *self._in_mix()) if name}

    def _in_mix(self) -> list[str]:
        return self._mixed.names if self._mixed else []

    def _refuse_in_mix(self) -> None:
        if self._mixed:
            raise TaskBankError("tasks are mixed in this block, whose weights are the base's")

    def _read(self, entry: _Entry, *, verify: bool) -> TaskForms:
        """Decode a task from its file, which must be the one that was added."""
        try:
            with open_task(entry.path) as task:
                found = task.reader.file_digest()
                if entry.file_digest and found != entry.file_digest:
                    raise FormatError(
                        "D-CONTENT", f"is not the file that was added as {entry.name!r}", entry.path
                    )
                if not entry.file_digest:
                    entry.config = self._config(task)
                forms = self._resident.load(task, verify=verify)
                entry.file_digest = found
                entry.file_bytes = task.reader.file_bytes
                entry.content_digest = task.reader.content_digest.hex()
        except OSError as error:
            raise InvalidArgumentError(
                "task", str(entry.path), f"a readable file ({error.strerror})"
            ) from None
        except MemoryError:
            raise TaskBankError(f"{entry.path}: there is no memory to load it") from None
        self._count(loads=1)
        return forms

    def _config(self, task: Task) -> Mapping[str, Any] | None:
        """The fine-tune's config. Raises CheckpointError: it is not one of the bank's model."""
        files = dict(side_files_of(task, self._resident.checkpoint))
        config = parsed_config(files, task.reader.path)
        if config is None:
            return None
        difference = config_difference(self.model, config)
        if difference:
            raise CheckpointError(task.reader.path, f"is of another model: {difference}")
        return config

    def _prepare(self, name: str | None) -> None:
        """Load a task that is asked for, before it is its turn."""
        if name is None:
            return
        entry = self._entry(name)
        with self._lock:
            is_there = self.active == name or self._nearest(name) is not None
            self._count(hits=is_there, misses=not is_there)
        if not is_there:
            with contextlib.suppress(TaskBankError):  # there may be room once it is its turn
                self._fetch(entry)

    def _nearest(self, name: str) -> ResidentTask | None:
        """A task as it can be switched to, where it is held so."""
        return self._rebuilt.get(name) or self._near.get(name)

    def _fetch(self, entry: _Entry, *, rebuilt: bool = True) -> ResidentTask:
        """A task in the fastest memory, whence it may be evicted at any time.

        rebuilt: its whole weights will do, where they are kept.
        """
        with entry.loading:
            with self._lock:
                name = entry.name
                found = self._nearest(name) if rebuilt else self._near.get(name)
                if found:
                    return found
                # Before anything is read, as far as is known.
                self._make_room(self._near, entry, entry.nbytes)
                forms = self._host.get(entry.name) if self._host else None
            if forms is None:
                forms = self._read(entry, verify=False)
            with self._lock:
                if self._entries.get(entry.name) is not entry:
                    raise TaskBankError(f"task {entry.name!r} was removed")
                return self._put(entry, forms)

    def _put(self, entry: _Entry, forms: TaskForms) -> ResidentTask:
        """Into every tier, the fastest of which must have room."""
        if self._host is not None and entry.name not in self._host.held:
            with contextlib.suppress(TaskBankError):
                self._make_room(self._host, entry, forms.nbytes)
                self._host.held[entry.name] = forms
        self._make_room(self._near, entry, forms.nbytes)
        try:
            placed = self._resident.place(forms)
        except (MemoryError, RuntimeError) as error:  # what torch raises where memory is full
            raise TaskBankError(
                f"there is no {self._near.name} memory for task {entry.name!r} ({error})"
            ) from None
        self._near.held[entry.name] = placed
        return placed

    def _make_room(self, tier: _Tier[Any], entry: _Entry, nbytes: int) -> None:
        self._count(evictions=tier.make_room(nbytes, self._kept() - {entry.name}))

    def _activate(self, name: str | None) -> None:
        """With the lock of the weights held."""
        if self._resident.broken:
            self._recover()
        if self.active == name:
            return
        former = self._active
        target = None
        if name is not None:
            entry = self._entry(name)
            target = (entry, self._fetch(entry))
        start = time.perf_counter()
        try:
            self._resident.switch(former[1] if former else None, target[1] if target else None)
        except BaseException as error:
            self._count(failures=1)
            self._drop(former, target)
            if self._resident.broken:
                self._recover()
            if isinstance(error, MemoryError | RuntimeError):
                raise TaskBankError(f"can't switch to {name!r} ({error})") from error
            raise
        with self._lock:
            self._active = target
            if (
                target
                and target[0].name in self._entries
                and self._rebuilt.get(target[0].name) is not target[1]
            ):
                self._near.held[target[0].name] = target[1]  # it may have been evicted meanwhile
                if not self._mixed:  # where it is only tried
                    self._keep_rebuilt(*target)
            self._switch_seconds.append(time.perf_counter() - start)
            self._counts["switches"] += 1

    def _keep_rebuilt(self, entry: _Entry, active: ResidentTask) -> None:
        """Keep the weights of the active task, where there is room beside those that are kept."""
        budget, held = self._rebuilt.budget, self._rebuilt.nbytes
        if budget is None or held + self._resident.rebuilt_bytes(active) <= budget:
            with contextlib.suppress(MemoryError, RuntimeError):  # no memory: as it was
                self._rebuilt.held[entry.name] = self._resident.rebuilt(active)

    def _joining(self, name: str) -> MixedTask:
        """A task for the mix, with the base active."""
        entry = self._entry(name)
        if entry.mixes is False:
            raise NotMixableError(f"task {name!r} can't be mixed, as was found before")
        self._prepare(name)
        placed = self._fetch(entry, rebuilt=False)
        try:
            if placed not in self._mixed_tasks:
                self._mixed_tasks[placed] = mixed_task(self._resident, placed)
            found = self._mixed_tasks[placed]
            if entry.mixes is None and self._mixed:
                self._mixed.check(found, lambda: self._trying(name))
                entry.mixes = True
        except NotMixableError as error:
            entry.mixes = False
            raise NotMixableError(f"task {name!r} can't be mixed: {error}") from None
        except (MemoryError, RuntimeError) as error:  # what torch raises where memory is full
            raise TaskBankError(f"there is no memory to mix task {name!r} ({error})") from None
        return found

    @contextlib.contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        self._activate(name)
        try:
            yield
        finally:
            self._activate(None)

    def _drop(self, *tasks: tuple[_Entry, ResidentTask] | None) -> None:
        """Forget what a switch that failed may have left half-swapped."""
        with self._lock:
            for name in (task[0].name for task in tasks if task):
                for tier in self._tiers():
                    tier.held.pop(name, None)

    def _recover(self) -> None:
        """After a switch that failed half-way: the base from its files, then what was active."""
        former, self._active = self._active, None
        try:
            self._resident.restore_base()
            if former:
                forms = self._read(former[0], verify=False)
                with self._lock:
                    placed = self._put(former[0], forms)
                self._resident.switch(None, placed)
                self._active = (former[0], placed)
        except NpsError as error:
            what = former[0].name if former else "the base"
            raise TaskBankError(
                f"a switch failed, and {what} can't be restored: {error}"
            ) from error


def _stem(path: str | Path) -> str:
    return Path(path).name.removesuffix(_SUFFIX)
