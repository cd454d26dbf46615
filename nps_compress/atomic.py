"""Outputs that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nps_compress.errors import OutputExistsError, OutputTooLargeError, WriteError


@contextlib.contextmanager
def atomic_file(path: Path, force: bool = False) -> Iterator[BinaryIO]:
    """Write a temporary file beside ``path``; put it in place when the block ends without error.

    Raises:
        OutputExistsError: ``path`` exists and ``force`` is False.
        WriteError: the operating system refused; the temporary file is gone.
    """
    path = _resolved(path)
    refuse_existing(path, force)
    temporary = _sibling(path)
    try:
        with os_errors_as_write_errors(path):
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            with os.fdopen(descriptor, "w+b") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            refuse_existing(path, force)
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(
    path: Path, force: bool = False, may_replace: Callable[[str], bool] = lambda _: True
) -> Iterator[Path]:
    """Fill a temporary folder beside ``path``; rename it into place when the block ends.

    An existing folder is only replaced where it is empty, or ``force`` is True and
    ``may_replace(name)`` holds for all it contains, so that nothing unrelated is lost.

    Raises:
        OutputExistsError, WriteError: as for :func:`atomic_file`.
    """
    path = _resolved(path)
    refuse_unrelated_content(path, force, may_replace)
    temporary = _sibling(path)
    try:
        with os_errors_as_write_errors(path):
            temporary.mkdir()
            yield temporary
            refuse_unrelated_content(path, force, may_replace)
            if path.exists():
                old = _sibling(path)
                path.rename(old)
                temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any, force: bool = False) -> None:
    """Write ``value`` as indented JSON, atomically. Raises as :func:`atomic_file`."""
    with atomic_file(path, force) as stream:
        stream.write((json.dumps(value, indent=2) + "\n").encode())


def refuse_input_as_output(out: Path, inputs: Iterable[Path]) -> None:
    """Raise OutputExistsError where writing ``out`` would replace what is read, force or not."""
    target = out.resolve()
    for path in inputs:
        source = path.resolve()
        if target == source or target in source.parents:
            raise OutputExistsError(out, f"would replace the input {path}")


def refuse_too_large(out: Path, nbytes: int, limit: int | None) -> None:
    """Raise OutputTooLargeError where ``nbytes`` exceed the limit or the free space for ``out``."""
    if limit is not None and nbytes > limit:
        raise OutputTooLargeError(out, nbytes, f"at most {limit:,} were allowed")
    with os_errors_as_write_errors(out):
        free = shutil.disk_usage(out.absolute().parent).free
    if nbytes > free:
        raise OutputTooLargeError(out, nbytes, f"the disk has {free:,} free")


def refuse_existing(path: Path, force: bool) -> None:
    """Raise OutputExistsError where ``path`` exists and may not be overwritten.

    Also raises WriteError where its folder does not exist: callers ask before long work.
    """
    with os_errors_as_write_errors(path):
        _refuse_missing_parent(path)
        if path.is_dir():
            raise OutputExistsError(path, "is a directory")
        if path.exists() and not force:
            raise OutputExistsError(path)


def refuse_unrelated_content(
    path: Path, force: bool, may_replace: Callable[[str], bool] = lambda _: True
) -> None:
    """As :func:`refuse_existing`, for a folder that may hold what must not be replaced."""
    with os_errors_as_write_errors(path):
        _refuse_missing_parent(path)
        if path.exists() and not path.is_dir():
            raise OutputExistsError(path, "exists and is not a directory")
        content = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if content and not force:
        raise OutputExistsError(path, "exists and is not empty; pass --force to overwrite")
    foreign = [name for name in content if not may_replace(name)]
    if foreign:
        raise OutputExistsError(path, f"holds {foreign[0]!r}, which overwriting would lose")


@contextlib.contextmanager
def os_errors_as_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a WriteError for ``path``."""
    try:
        yield
    except OSError as error:
        reason = "no space left on device" if error.errno == errno.ENOSPC else error.strerror
        raise WriteError(path, reason or str(error)) from error


def _refuse_missing_parent(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise WriteError(path, f"folder {path.parent} does not exist")


def _resolved(path: Path) -> Path:
    """Where a link leads: it is what is there that is replaced, not the link."""
    with os_errors_as_write_errors(path):
        return path.resolve()


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows can't open a folder, and needs no sync to keep a rename
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
