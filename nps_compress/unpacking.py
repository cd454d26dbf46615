"""Unpack a ``.nps`` file into a checkpoint, or verify it against a base, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from blake3 import blake3

from nps_compress._progress import bar
from nps_compress._threads import MEMORY_SLACK, bounded_map, workers
from nps_compress.atomic import (
    atomic_directory,
    refuse_input_as_output,
    refuse_too_large,
    refuse_unrelated_content,
)
from nps_compress.checkpoint import (
    SIDE_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
    Checkpoint,
    encode_header,
    open_checkpoint,
)
from nps_compress.dtypes import DType, Words, digest, octets
from nps_compress.errors import BaseMismatchError, FormatError, InvalidArgumentError
from nps_compress.format.layout import Op
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import (
    BaseTensor,
    TensorEntry,
    base_root,
    content_digest,
    has_digest,
)
from nps_compress.reconstruct import Task

DEFAULT_SHARD_BYTES = 5_000_000_000
_HEADER = {"format": "pt"}
Place = tuple[Path, int]  # a file that is there, and an offset in it

_CHUNK_BYTES = 64 << 20  # a chunk of two-byte words in work, with its positions
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class Shaped(Protocol):
    """A tensor to write: of a file or of a checkpoint."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> DType: ...  # noqa: D102
    @property
    def numel(self) -> int: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


S = TypeVar("S", bound=Shaped)


@dataclass(frozen=True)
class UnpackReport:
    """What was written. ``nbytes`` counts weights only."""

    path: Path
    tensors: int
    nbytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class VerifyReport:
    """What was verified: every one of these held.

    Without a base (``with_base`` False): the file's own rules, every chunk, and the digests of
    what is new; ``base_tensors`` is 0.
    """

    tensors: int
    base_tensors: int
    files: int
    base_root: str
    content_digest: str
    with_base: bool


def unpack(
    base: str | Path,
    task: str | Path,
    out: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_bytes: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> UnpackReport:
    """Rebuild the fine-tune as a folder that ``from_pretrained`` loads.

    Every tensor's digest is checked before the folder appears. A result of more than
    ``max_bytes`` of weights, or than the disk has room for, is refused before anything is written.

    Raises:
        OutputExistsError, CheckpointError, FormatError, BaseMismatchError, WriteError,
        OutputTooLargeError.
    """
    out = Path(out)
    if max_shard_bytes < 1:
        raise InvalidArgumentError("max shard size", max_shard_bytes, "at least 1 byte")
    refuse_unrelated_content(out, force, is_ours)
    base_ = open_checkpoint(base)
    refuse_input_as_output(out, [base_.path, Path(task)])
    with open_task(task) as task_:
        check_layout(task_, base_, task_.reader.tensors)
        nbytes = sum(_nbytes(entry) for entry in task_.reader.tensors)
        refuse_too_large(out, nbytes, max_bytes)
        side_files = dict(side_files_of(task_, base_))
        shards = shards_of(task_.reader.tensors, max_shard_bytes)
        with (
            atomic_directory(out, force, is_ours) as folder,
            bar(len(task_.entries), "unpacking", "tensor", progress) as advance,
        ):
            places = write_headers(folder, shards)
            digests = {}
            for entry, found in rebuild_each(task_, base_, task_.reader.tensors, places):
                digests[entry.name] = found
                advance()
            check_content(task_, base_, digests, side_files)
            written = {name: data for name, data in side_files.items() if name in SIDE_FILES}
            for name, data in written.items():
                (folder / name).write_bytes(data)
    return UnpackReport(out, len(task_.entries), nbytes, tuple(written))


def unpack_side_files(
    base: str | Path, task: str | Path, out: str | Path, *, force: bool = False
) -> tuple[str, ...]:
    """Write what :func:`unpack` writes beside the weights: configuration and tokenizer.

    -> their names. For engines that rebuild the weights themselves.

    Raises:
        OutputExistsError, CheckpointError, FormatError, BaseMismatchError, WriteError.
    """
    out = Path(out)
    refuse_unrelated_content(out, force, is_ours)
    base_ = open_checkpoint(base)
    refuse_input_as_output(out, [base_.path, Path(task)])
    with open_task(task) as task_, atomic_directory(out, force, is_ours) as folder:
        files = {name: data for name, data in side_files_of(task_, base_) if name in SIDE_FILES}
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return tuple(files)


def verify(
    base: str | Path | None,
    task: str | Path,
    *,
    progress: bool = False,
    on_tensor: Callable[[TensorEntry], None] = lambda _: None,
) -> VerifyReport:
    """Check everything the file promises: its own bytes, the whole base, every rebuilt tensor.

    With base None: all that can be checked from the file alone.

    Raises:
        FormatError: the file is damaged. BaseMismatchError: the base is another one; names the
        first difference. CheckpointError: the base can't be read.
    """
    if base is None:
        return _verify_alone(task, progress, on_tensor)
    base_ = open_checkpoint(base)
    with open_task(task) as task_:
        reader = task_.reader
        check_layout(task_, base_, reader.tensors)
        extra = sorted(set(base_.tensors) - {tensor.name for tensor in reader.base})
        if extra:
            raise _mismatch(
                task_, base_, f"tensor {extra[0]!r}", "is not in the base the task was made from"
            )
        difference = first_difference(task_, base_, progress)
        if difference:
            raise difference
        with bar(len(reader.tensors), "verifying", "tensor", progress) as advance:
            digests = {}
            for entry, found in rebuild_each(task_, base_, reader.tensors):
                digests[entry.name] = found
                on_tensor(entry)
                advance()
        files = dict(side_files_of(task_, base_))
        check_content(task_, base_, digests, files)
        known = sum(1 for name in files if name in SIDE_FILES)
        return _report(reader, len(reader.base), known, with_base=True)


def _verify_alone(
    task: str | Path, progress: bool, on_tensor: Callable[[TensorEntry], None]
) -> VerifyReport:
    with open_task(task) as task_:
        reader = task_.reader
        entries = (*reader.tensors, *reader.files)
        done = bounded_map(reader.verify, entries, lambda entry: _CHUNK_BYTES, 4 * _CHUNK_BYTES)
        with bar(len(entries), "verifying", "tensor", progress) as advance:
            for entry, _ in zip(entries, done, strict=True):
                if entry.op is not Op.COPY:
                    on_tensor(entry)
                advance()
        files = sum(1 for entry in reader.files if entry.op is Op.NEW)
        return _report(reader, 0, files, with_base=False)


def _report(reader: NpsReader, base_tensors: int, files: int, with_base: bool) -> VerifyReport:
    root, content = reader.base_root.hex(), reader.content_digest.hex()
    return VerifyReport(len(reader.tensors), base_tensors, files, root, content, with_base)


def open_task(path: str | Path) -> Task:
    """Open a ``.nps`` file. Raises FormatError, InvalidArgumentError (no such file)."""
    try:
        return Task(path)
    except OSError as error:
        raise InvalidArgumentError(
            "task", str(path), f"a readable file ({error.strerror})"
        ) from None


def rebuilt(
    task: Task, base: Checkpoint, entries: Iterable[TensorEntry]
) -> Iterator[tuple[TensorEntry, Words]]:
    """Rebuilt tensors in order, each with the digest that was promised."""

    def run(entry: TensorEntry) -> tuple[Words, bool]:
        base_name = task.base_tensor_name(entry.name)
        before = base.read(base_name) if base_name else None
        with right_base(task, base):
            words = task.rebuild_words(entry.name, before)
        return words, task.matches(entry.name, words)

    entries = list(entries)
    largest = max(map(_nbytes, entries), default=0)
    done = bounded_map(run, entries, _nbytes, 2 * largest + MEMORY_SLACK)
    for entry, (words, matches) in zip(entries, done, strict=True):
        if not matches:
            raise first_difference(task, base) or task.damaged(entry.name)
        yield entry, words


def rebuild_each(
    task: Task,
    base: Checkpoint,
    entries: Iterable[TensorEntry],
    places: Mapping[str, Place] | None = None,
) -> Iterator[tuple[TensorEntry, bytes]]:
    """Rebuild tensors piece by piece, each with the digest that was promised.

    -> they and their whole digests, the largest first. places: by name, where to write them.

    Raises:
        FormatError, BaseMismatchError, CheckpointError; OSError: a place can't be written.
    """

    def run(entry: TensorEntry, places: Mapping[str, Place] | None = places) -> bytes:
        base_name = task.base_tensor_name(entry.name)
        before = base.tensors[base_name].read_into if base_name else None
        found = blake3()
        with right_base(task, base), _opened(places, entry.name) as stream:
            for words in task.pieces(entry.name, before):
                found.update(octets(words))
                if stream:
                    stream.write(words.data)
        if not found.digest().startswith(entry.digest):
            raise first_difference(task, base) or task.damaged(entry.name)
        return found.digest()

    entries = list(entries)
    # The largest first, so that no core has one left when the others are done.
    ordered = sorted(entries, key=_nbytes, reverse=True)
    try:
        done = bounded_map(run, ordered, lambda entry: 1, 4 * workers())
        yield from zip(ordered, done, strict=True)
    except FormatError:
        for entry in entries:  # which of several faults is told does not depend on sizes
            run(entry, None)
        raise


@contextlib.contextmanager
def right_base(task: Task, base: Checkpoint) -> Iterator[None]:
    """Say that the base is another one where that is why a tensor does not decode."""
    try:
        yield
    except FormatError as error:  # distances don't decode with another base
        raise first_difference(task, base) or error from None


@contextlib.contextmanager
def _opened(places: Mapping[str, Place] | None, name: str) -> Iterator[BinaryIO | None]:
    if places is None:
        yield None
        return
    path, offset = places[name]
    with path.open("r+b") as stream:
        stream.seek(offset)
        yield stream


def check_content(
    task: Task, base: Checkpoint, digests: Mapping[str, bytes], files: Mapping[str, bytes]
) -> None:
    """The digest over everything: of each tensor's an index may hold only the start.

    digests: whole, by name of the tensor; files: what could be read, by name.

    Raises:
        FormatError: D-CONTENT. BaseMismatchError: that is why.
    """
    reader = task.reader
    if len(files) < len(reader.files):  # one is the base's under a name that nobody reads
        return
    tensors = [replace(entry, digest=digests[entry.name]) for entry in reader.tensors]
    side_files = [replace(file, digest=blake3(files[file.name]).digest()) for file in reader.files]
    if content_digest(tensors, side_files) != reader.content_digest:
        detail = "all together, the tensors and files don't have the digest that was promised"
        raise first_difference(task, base) or FormatError("D-CONTENT", detail, reader.path)


def check_layout(task: Task, base: Checkpoint, entries: Iterable[TensorEntry]) -> None:
    """Names, dtypes and shapes of the base tensors; costs no read of weights."""
    used = {entry.base_index for entry in entries}
    for index, record in enumerate(task.reader.base):
        found = base.tensors.get(record.name)
        if found is None:
            if index in used:
                raise _mismatch(task, base, f"tensor {record.name!r}", "is missing")
        elif (found.dtype, found.shape) != (record.dtype, record.shape):
            raise _mismatch(
                task,
                base,
                f"tensor {record.name!r}",
                f"is {found.dtype.name} {list(found.shape)}, "
                f"not {record.dtype.name} {list(record.shape)}",
            )


def first_difference(
    task: Task, base: Checkpoint, progress: bool = False
) -> BaseMismatchError | None:
    """The first base tensor, by name, that is missing or has other values."""

    def digest_of(record: BaseTensor) -> bytes:
        return digest(base.read(record.name))

    records = task.reader.base
    for record in records:
        if record.name not in base.tensors:
            return _mismatch(task, base, f"tensor {record.name!r}", "is missing")
    sizes = {record.name: base.tensors[record.name].nbytes for record in records}
    budget = 2 * max(sizes.values(), default=0) + MEMORY_SLACK
    results = bounded_map(digest_of, records, lambda record: sizes[record.name], budget)
    found = []
    with bar(len(records), "hashing base", "tensor", progress) as advance:
        for record, whole in zip(records, results, strict=True):
            if not whole.startswith(record.digest):
                return _mismatch(task, base, f"tensor {record.name!r}", "has other values")
            found.append(replace(record, digest=whole))
            advance()
    if base_root(found) != task.reader.base_root:  # an index may hold only the start of digests
        return _mismatch(task, base, "one of the tensors", "has other values")
    return None


def _mismatch(task: Task, base: Checkpoint, what: str, difference: str) -> BaseMismatchError:
    return BaseMismatchError(base.path, what, difference, task.base_name)


def side_files_of(task: Task, base: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Side files of the fine-tune that could be read, perhaps under names never to be written."""
    for entry in task.reader.files:
        if entry.op is Op.NEW:
            data = task.reader.read_file(entry)
        elif entry.name not in SIDE_FILES:
            continue
        else:
            if entry.name not in base.side_files:
                raise _mismatch(task, base, f"file {entry.name!r}", "is missing")
            data = base.read_side_file(entry.name)
            if len(data) != entry.numel or not has_digest(data, entry.digest):
                raise _mismatch(task, base, f"file {entry.name!r}", "has another content")
        yield entry.name, data


def is_ours(name: str) -> bool:
    """Whether a folder of ours may hold a file of this name."""
    return name in SIDE_FILES or name == WEIGHTS_INDEX or _OURS.fullmatch(name) is not None


def _nbytes(entry: Shaped) -> int:
    return entry.numel * entry.dtype.itemsize


def shards_of(entries: Iterable[S], max_shard_bytes: int) -> dict[str, list[S]]:
    """File name -> its tensors; within a file wide elements come first, so that all are aligned."""
    groups: list[list[S]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + _nbytes(entry) > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += _nbytes(entry)
    for group in groups:
        group.sort(key=lambda entry: -entry.dtype.itemsize)
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    total = len(groups)
    return {
        f"model-{number:05}-of-{total:05}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def write_headers(folder: Path, shards: Mapping[str, Sequence[Shaped]]) -> dict[str, Place]:
    """Make weight files of the right size, and their index. -> where each tensor's bytes go."""
    places = {}
    for file, entries in shards.items():
        header = encode_header([(e.name, e.dtype, e.shape) for e in entries], _HEADER)
        (folder / file).write_bytes(header)
        end = len(header)
        for entry in entries:
            places[entry.name] = (folder / file, end)
            end += _nbytes(entry)
        os.truncate(folder / file, end)
    if len(shards) > 1:
        index = json.dumps(_shard_index(shards), indent=2)
        (folder / WEIGHTS_INDEX).write_text(index, encoding="utf-8")
    return places


def _shard_index(shards: Mapping[str, Sequence[Shaped]]) -> dict[str, object]:
    total = sum(_nbytes(entry) for entries in shards.values() for entry in entries)
    return {
        "metadata": {"total_size": total},
        "weight_map": {entry.name: file for file, entries in shards.items() for entry in entries},
    }
