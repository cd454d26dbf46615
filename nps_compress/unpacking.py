"""Unpack a ``.nps`` file into a checkpoint, or verify it against a base, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nps_compress._progress import bar
from nps_compress._threads import MEMORY_SLACK, bounded_map
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
from nps_compress.dtypes import Words, digest
from nps_compress.errors import BaseMismatchError, FormatError, InvalidArgumentError
from nps_compress.format.layout import Op
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.reconstruct import Task

DEFAULT_SHARD_BYTES = 5_000_000_000
_CHUNK_BYTES = 64 << 20  # a chunk of two-byte words in work, with its positions
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


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
    content_sha256: str
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
    refuse_unrelated_content(out, force, _is_ours)
    base_ = open_checkpoint(base)
    refuse_input_as_output(out, [base_.path, Path(task)])
    with open_task(task) as task_:
        check_layout(task_, base_, task_.reader.tensors)
        nbytes = sum(_nbytes(entry) for entry in task_.reader.tensors)
        refuse_too_large(out, nbytes, max_bytes)
        side_files = dict(_side_files(task_, base_))
        shards = _shards(task_.reader.tensors, max_shard_bytes)
        with (
            atomic_directory(out, force, _is_ours) as folder,
            bar(len(task_.entries), "unpacking", "tensor", progress) as advance,
        ):
            for file, entries in shards.items():
                with (folder / file).open("wb") as stream:
                    header = [(entry.name, entry.dtype, entry.shape) for entry in entries]
                    stream.write(encode_header(header, {"format": "pt"}))
                    for _, words in rebuilt(task_, base_, entries):
                        stream.write(words.data)
                        advance()
            if len(shards) > 1:
                index = json.dumps(_shard_index(shards), indent=2)
                (folder / WEIGHTS_INDEX).write_text(index, encoding="utf-8")
            for name, data in side_files.items():
                (folder / name).write_bytes(data)
    return UnpackReport(out, len(task_.entries), nbytes, tuple(side_files))


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
        difference = _first_difference(task_, base_, progress)
        if difference:
            raise difference
        with bar(len(reader.tensors), "verifying", "tensor", progress) as advance:
            for entry, _ in rebuilt(task_, base_, reader.tensors):
                on_tensor(entry)
                advance()
        files = sum(1 for _ in _side_files(task_, base_))
        return _report(reader, len(reader.base), files, with_base=True)


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
    entries = list(entries)

    def run(entry: TensorEntry) -> tuple[TensorEntry, Words, bool]:
        base_name = task.base_tensor_name(entry.name)
        before = base.read(base_name) if base_name else None
        try:
            words = task.rebuild_words(entry.name, before)
        except FormatError as error:  # distances don't decode with another base
            raise _first_difference(task, base) or error from None
        return entry, words, task.matches(entry.name, words)

    largest = max(map(_nbytes, entries), default=0)
    for entry, words, matches in bounded_map(run, entries, _nbytes, 2 * largest + MEMORY_SLACK):
        if not matches:
            raise _first_difference(task, base) or task.damaged(entry.name)
        yield entry, words


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


def _first_difference(
    task: Task, base: Checkpoint, progress: bool = False
) -> BaseMismatchError | None:
    """The first base tensor, by name, that is missing or has other values."""

    def differs(record: BaseTensor) -> bool:
        return digest(base.read(record.name)) != record.sha256

    records = task.reader.base
    for record in records:
        if record.name not in base.tensors:
            return _mismatch(task, base, f"tensor {record.name!r}", "is missing")
    sizes = {record.name: base.tensors[record.name].nbytes for record in records}
    budget = 2 * max(sizes.values(), default=0) + MEMORY_SLACK
    results = bounded_map(differs, records, lambda record: sizes[record.name], budget)
    with bar(len(records), "hashing base", "tensor", progress) as advance:
        for record, different in zip(records, results, strict=True):
            if different:
                return _mismatch(task, base, f"tensor {record.name!r}", "has other values")
            advance()
    return None


def _mismatch(task: Task, base: Checkpoint, what: str, difference: str) -> BaseMismatchError:
    return BaseMismatchError(base.path, what, difference, task.base_name)


def _side_files(task: Task, base: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Side files of the fine-tune. Only names that this program knows are ever written."""
    for entry in task.reader.files:
        if entry.op is Op.NEW:
            data = task.reader.read_file(entry)
        elif entry.name not in SIDE_FILES:
            continue
        else:
            if entry.name not in base.side_files:
                raise _mismatch(task, base, f"file {entry.name!r}", "is missing")
            data = base.read_side_file(entry.name)
            if (len(data), hashlib.sha256(data).digest()) != (entry.numel, entry.sha256):
                raise _mismatch(task, base, f"file {entry.name!r}", "has another content")
        if entry.name in SIDE_FILES:
            yield entry.name, data


def _is_ours(name: str) -> bool:
    return name in SIDE_FILES or name == WEIGHTS_INDEX or _OURS.fullmatch(name) is not None


def _nbytes(entry: TensorEntry) -> int:
    return entry.numel * entry.dtype.itemsize


def _shards(entries: Iterable[TensorEntry], max_shard_bytes: int) -> dict[str, list[TensorEntry]]:
    """File name -> its tensors; within a file wide elements come first, so that all are aligned."""
    groups: list[list[TensorEntry]] = [[]]
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


def _shard_index(shards: dict[str, list[TensorEntry]]) -> dict[str, object]:
    total = sum(_nbytes(entry) for entries in shards.values() for entry in entries)
    return {
        "metadata": {"total_size": total},
        "weight_map": {entry.name: file for file, entries in shards.items() for entry in entries},
    }
