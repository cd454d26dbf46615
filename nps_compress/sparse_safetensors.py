"""Exchange with tools that read sparse safetensors: ``NAME.indices`` and ``NAME.values``.

The layout of TRL's delta weight sync (huggingface/trl #5417, #5937) and of verl, and what vLLM's
checkpoint weight patches take (vllm-project/vllm #50723): of each changed tensor the flat positions
as int32 and the fine-tune's own values there, in the tensor's dtype; a tensor that the base lacks
lies whole under its name; what is unchanged is absent; the file's metadata says ``sparse: True``.

What the layout has no place for (renamed and deleted tensors, side files) travels as one JSON text
in the file's metadata under the key ``nps``, which other readers ignore.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nps_compress._progress import bar
from nps_compress.atomic import atomic_file, refuse_existing, refuse_input_as_output
from nps_compress.checkpoint import (
    SIDE_FILES,
    Checkpoint,
    Pair,
    StoredTensor,
    encode_header,
    open_checkpoint,
    read_header,
)
from nps_compress.dtypes import BY_NAME, DType, Words
from nps_compress.errors import CheckpointError, InvalidArgumentError
from nps_compress.format.layout import DIGEST_BYTES, SHORT_DIGEST_BYTES, Op
from nps_compress.format.records import TensorEntry, has_digest
from nps_compress.packing import PackReport, write
from nps_compress.reconstruct import FINETUNED_NAME_KEY, Task
from nps_compress.unpacking import check_layout, open_task, rebuilt

_INDICES, _VALUES = ".indices", ".values"
_INT32, _INT64 = BY_NAME["I32"], BY_NAME["I64"]
_KEY = "nps"
_DIGESTS = (DIGEST_BYTES, SHORT_DIGEST_BYTES)
_MAX_HEADER_BYTES = 100_000_000  # what safetensors' own reader takes


@dataclass(frozen=True)
class ExportReport:
    """What was written: tensors with changes, tensors stored whole, changed elements."""

    path: Path
    file_bytes: int
    changed_tensors: int
    new_tensors: int
    nnz: int


def export_sparse(
    base: str | Path,
    task: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: bool = False,
) -> ExportReport:
    """Write the changes of a ``.nps`` file as sparse safetensors; every digest is checked.

    Raises:
        OutputExistsError, CheckpointError, FormatError, BaseMismatchError, WriteError,
        InvalidArgumentError: a tensor is too large for int32 positions, or its names collide.
    """
    out = Path(out)
    refuse_existing(out, force)
    base_ = open_checkpoint(base)
    refuse_input_as_output(out, [base_.path, Path(task)])
    with open_task(task) as task_:
        check_layout(task_, base_, task_.reader.tensors)
        changed = [
            entry for entry in task_.reader.tensors if entry.op is Op.NEW or task_.reader.nnz(entry)
        ]
        blocks = _blocks(task_, changed)
        header = encode_header(
            [(name, *blocks[name]) for name in blocks],
            {"format": "pt", "sparse": "True", _KEY: _Beyond.of(task_).to_json()},
        )
        if len(header) > _MAX_HEADER_BYTES:
            raise InvalidArgumentError(
                "header", f"{len(header):,} bytes", "at most 100 MB: too many or large side files"
            )
        offsets, end = {}, len(header)
        for name, (dtype, shape) in blocks.items():
            offsets[name] = end
            end += math.prod(shape) * dtype.itemsize
        with (
            atomic_file(out, force) as stream,
            bar(len(changed), "exporting", "tensor", progress) as advance,
        ):
            stream.write(header)
            for entry, words in rebuilt(task_, base_, changed):
                if entry.op is Op.DELTA:
                    kept = task_.kept_positions(entry.name)
                    stream.seek(offsets[entry.name + _INDICES])
                    stream.write(kept.astype("<i4").data)
                    stream.seek(offsets[entry.name + _VALUES])
                    stream.write(words[kept].data)
                else:
                    stream.seek(offsets[entry.name])
                    stream.write(words.data)
                advance()
        deltas = [entry for entry in changed if entry.op is Op.DELTA]
        nnz = sum(map(task_.reader.nnz, deltas))
    return ExportReport(out, end, len(deltas), len(changed) - len(deltas), nnz)


def import_sparse(
    base: str | Path,
    patch: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: bool = False,
) -> PackReport:
    """Pack what a sparse safetensors file makes of its base, bit for bit, as a ``.nps`` file.

    Raises:
        OutputExistsError, WriteError.
        CheckpointError: no such file, not this layout, or it changes what the base lacks.
        BaseMismatchError: the file was exported against another base.
    """
    out = Path(out)
    refuse_existing(out, force)
    base_ = open_checkpoint(base)
    refuse_input_as_output(out, [base_.path, Path(patch)])
    pair_, beyond = _apply(base_, Path(patch))
    return write(pair_, None, out, beyond.metadata, force, progress, beyond.base_root)


# -- export -----------------------------------------------------------------------------------


def _blocks(task: Task, changed: list[TensorEntry]) -> dict[str, tuple[DType, tuple[int, ...]]]:
    """Dtype and shape of all tensors of the file by name, wide dtypes first."""
    deltas = [entry for entry in changed if entry.op is Op.DELTA]
    taken = {entry.name + _VALUES for entry in deltas}
    blocks: dict[str, tuple[DType, tuple[int, ...]]] = {}
    for entry in changed:
        if entry.op is Op.NEW:
            if entry.name in taken or entry.name.endswith(_INDICES):
                raise InvalidArgumentError(
                    "tensor name", entry.name, f"none that reads as {_INDICES} or {_VALUES}"
                )
            blocks[entry.name] = (entry.dtype, entry.shape)
            continue
        if entry.numel > 2**31 - 1:
            raise InvalidArgumentError(
                f"size of {entry.name!r}", entry.numel, "at most 2147483647, to fit int32 indices"
            )
        nnz = task.reader.nnz(entry)
        blocks[entry.name + _INDICES] = (_INT32, (nnz,))
        blocks[entry.name + _VALUES] = (entry.dtype, (nnz,))
    return dict(sorted(blocks.items(), key=lambda block: -block[1][0].itemsize))


@dataclass(frozen=True)
class _Beyond:
    """What the layout has no place for; kept as JSON in the file's metadata.

    renamed: tensors that come from a base tensor of another name, with that name. deleted: base
    tensors that the fine-tune does not have under their own name. base_files: side files that are
    the base's, with their digest (BLAKE3, or its start).
    """

    base_root: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    deleted: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    base_files: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task) -> _Beyond:
        """What a task says that its changes do not. Raises FormatError."""
        reader = task.reader
        base_of = {name: task.base_tensor_name(name) for name in task.names}
        return cls(
            reader.base_root.hex(),
            {name: other for name, other in base_of.items() if other not in (None, name)},
            [t.name for t in reader.base if base_of.get(t.name, "") not in (None, t.name)],
            {file.name: reader.read_file(file) for file in reader.files if file.op is Op.NEW},
            {file.name: file.digest.hex() for file in reader.files if file.op is Op.COPY},
            reader.metadata,
        )

    def to_json(self) -> str:
        files = {name: base64.b64encode(data).decode() for name, data in self.files.items()}
        return json.dumps({**asdict(self), "files": files})

    @classmethod
    def parse(cls, path: Path, text: str | None) -> _Beyond:
        """Undo :meth:`to_json`; nothing is known of a file that another tool wrote."""
        if text is None:
            return cls()
        try:
            read = json.loads(text)
            names = ("renamed", "files", "base_files", "metadata")
            texts = {name: _texts(read[name].items()) for name in names}
            ((_, root),) = _texts([("", read["base_root"])]).items()
            files = {
                name: base64.b64decode(data, validate=True)
                for name, data in texts["files"].items()
                if name in SIDE_FILES
            }
            deleted = list(_texts((name, "") for name in read["deleted"]))
            base_files = texts["base_files"]
            if not all(len(bytes.fromhex(text)) in _DIGESTS for text in base_files.values()):
                raise ValueError("digests of another size")
            return cls(root, texts["renamed"], deleted, files, base_files, texts["metadata"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"metadata {_KEY!r} is not what export writes ({error!r})"
            raise CheckpointError(path, reason) from None


def _texts(items: Iterable[tuple[Any, Any]]) -> dict[str, str]:
    found = dict(items)
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise TypeError("not text")
    return found


# -- import -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patched(Checkpoint):
    """The fine-tune that a patch makes of its base, read like a checkpoint on disk."""

    base: Checkpoint
    base_of: Mapping[str, str]
    patches: Mapping[str, tuple[StoredTensor, StoredTensor]]  # indices and values
    files: Mapping[str, bytes]

    def read_into(self, name: str, words: Words) -> None:
        """Fill ``words`` with the tensor, changed as the patch says. Raises CheckpointError."""
        if name not in self.base_of:
            super().read_into(name, words)
            return
        self.base.read_into(self.base_of[name], words)
        if name in self.patches:
            indices, values = self.patches[name]
            words[self._positions(indices, words.size)] = values.read()

    def _positions(self, indices: StoredTensor, numel: int) -> npt.NDArray[np.signedinteger]:
        positions = indices.read().view(f"<i{indices.dtype.itemsize}")
        if positions.size and not 0 <= positions.min() <= positions.max() < numel:
            raise CheckpointError(
                self.path, f"{indices.name!r} has one outside of {numel} elements"
            )
        if len(np.unique(positions)) != len(positions):
            raise CheckpointError(self.path, f"{indices.name!r} has one twice")
        return positions

    def read_side_file(self, name: str) -> bytes:
        """The bytes of a side file."""
        return self.files[name]


def _apply(base: Checkpoint, path: Path) -> tuple[Pair, _Beyond]:
    """The base and what the patch makes of it, as far as headers tell."""
    if not path.is_file():
        raise CheckpointError(path, "no such file")
    stored, metadata = read_header(path)
    patches = dict(_patches(path, stored))
    if not patches and metadata.get("sparse") != "True":
        raise CheckpointError(path, f"holds no NAME{_INDICES} and NAME{_VALUES}")
    beyond = _Beyond.parse(path, metadata.get(_KEY))
    parts = {part.name for patch in patches.values() for part in patch}
    whole = {name: tensor for name, tensor in stored.items() if name not in parts}
    same = set(base.tensors) - set(beyond.deleted) - set(whole)
    base_of = {name: name for name in same} | dict(beyond.renamed)
    for name in (*patches, *base_of):
        if base_of.get(name) not in base.tensors:
            raise CheckpointError(path, f"changes {name!r}, which {base.path} does not have")
    tensors = whole | {name: base.tensors[other] for name, other in base_of.items()}
    for name, (indices, values) in patches.items():
        expected = (tensors[name].dtype, indices.shape)
        if (values.dtype, values.shape) != expected:
            raise CheckpointError(
                path,
                f"{values.name!r} is {values.dtype.name} {list(values.shape)}, expected "
                f"{expected[0].name} {list(expected[1])}",
            )
    files = {**beyond.files, **_base_files(base, beyond.base_files)}
    finetuned = _Patched(
        path,
        beyond.metadata.get(FINETUNED_NAME_KEY, path.name),
        dict(sorted(tensors.items(), key=lambda item: item[0].encode())),
        dict.fromkeys(files, path),
        base,
        base_of,
        patches,
        files,
    )
    return Pair(base, finetuned, base_of), beyond


def _base_files(base: Checkpoint, wanted: Mapping[str, str]) -> dict[str, bytes]:
    found = {}
    for name in sorted(set(wanted) & set(SIDE_FILES)):
        found[name] = base.read_side_file(name) if name in base.side_files else b""
        if not has_digest(found[name], bytes.fromhex(wanted[name])):
            raise CheckpointError(base.path, f"file {name!r} is not the one that was exported")
    return found


def _patches(
    path: Path, stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, tuple[StoredTensor, StoredTensor]]]:
    for name, indices in stored.items():
        changed = name.removesuffix(_INDICES)
        if changed == name:
            continue
        values = stored.get(changed + _VALUES)
        if values is None:
            raise CheckpointError(path, f"has {name!r} but no {changed + _VALUES!r}")
        if indices.dtype not in (_INT32, _INT64) or len(indices.shape) != 1:
            found = f"{indices.dtype.name} {list(indices.shape)}"
            raise CheckpointError(path, f"{name!r} is {found}, expected one row of I32")
        yield changed, (indices, values)
