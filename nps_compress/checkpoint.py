"""Base and fine-tuned checkpoints on disk, read one tensor at a time and paired by name."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from nps_compress.dtypes import BY_NAME, DType, Words, digest, octets
from nps_compress.errors import CheckpointError, PickleRefusedError
from nps_compress.format.layout import MAX_RANK, RESERVED_NAME

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

# What from_pretrained needs beside the weights. Only these names are ever stored or written.
SIDE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. ``offset`` is in bytes from the start of ``file``."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.nbytes // self.dtype.itemsize

    def read(self) -> Words:
        """The tensor as a new writable array. -> [numel] words. Raises CheckpointError."""
        words = np.empty(self.numel, self.dtype.word)
        self.read_into(words)
        return words

    def read_into(self, words: Words, start: int = 0) -> None:
        """Fill ``words``, [n], with those from ``start`` on. Raises CheckpointError."""
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.offset + start * self.dtype.itemsize)
                left = octets(words)
                while left and (size := stream.readinto(left)):
                    left = left[size:]
        except OSError as error:
            raise CheckpointError(self.file, error.strerror or str(error)) from error
        if left:
            raise CheckpointError(self.file, f"ends inside tensor {self.name!r}")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers only; weights are read on demand."""

    path: Path
    name: str  # folder, file or Hub id, without the path to it
    tensors: Mapping[str, StoredTensor]  # in order of the UTF-8 names
    side_files: Mapping[str, Path]

    def read(self, name: str) -> Words:
        """The tensor as a new writable array. -> [numel] words. Raises CheckpointError."""
        tensor = self.tensors[name]
        words = np.empty(tensor.numel, tensor.dtype.word)
        self.read_into(name, words)
        return words

    def read_into(self, name: str, words: Words) -> None:
        """Fill ``words``, [numel], with the tensor. Raises CheckpointError."""
        self.tensors[name].read_into(words)

    def read_side_file(self, name: str) -> bytes:
        """The bytes of a side file. Raises CheckpointError."""
        try:
            return self.side_files[name].read_bytes()
        except OSError as error:
            raise CheckpointError(self.side_files[name], error.strerror or str(error)) from error

    @property
    def total_params(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())


@dataclass(frozen=True)
class Pair:
    """A base and a fine-tune. ``base_of`` maps fine-tuned names to base names of equal shape."""

    base: Checkpoint
    finetuned: Checkpoint
    base_of: Mapping[str, str]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a folder, a ``.safetensors`` file, or a Hub id that is in the local cache.

    Raises:
        CheckpointError: nothing usable there; PickleRefusedError: only pickled weights.
    """
    try:
        return _open(str(source))
    except OSError as error:
        raise CheckpointError(source, error.strerror or str(error)) from error


def _open(source: str) -> Checkpoint:
    path = Path(source)
    name = path.resolve().name
    if not path.exists():
        path, name = _cached_snapshot(source), source
    name = name.encode(errors="replace").decode()  # a folder's name need not be UTF-8
    if path.is_file():
        if path.suffix != ".safetensors":
            if any(path.match(pattern) for pattern in _PICKLES):
                raise PickleRefusedError(path, path.name)
            raise CheckpointError(path, "is neither a folder nor a .safetensors file")
        return Checkpoint(path, name, _sorted(read_header(path)[0]), {})
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(path):
        for tensor_name, tensor in read_header(file)[0].items():
            if tensor_name in tensors:
                raise CheckpointError(path, f"tensor {tensor_name!r} is in two shards")
            tensors[tensor_name] = tensor
    side_files = {name: path / name for name in SIDE_FILES if (path / name).is_file()}
    return Checkpoint(path, name, _sorted(tensors), side_files)


def pair(base: Checkpoint, finetuned: Checkpoint) -> Pair:
    """Match tensors by name, or by name less or plus the prefix that matches the most ("bert.").

    What a prefix leaves unmatched is matched by its own name. A tensor whose shape differs from
    its namesake's is not matched.

    Raises:
        CheckpointError: the two share no tensor.
    """
    spellings: list[Callable[[str], str]] = [lambda name: name]
    for prefix in _prefixes(base, finetuned):
        spellings.append(lambda name, p=prefix: name.removeprefix(p))  # type: ignore[misc]
    for prefix in _prefixes(finetuned, base):
        spellings.append(lambda name, p=prefix: p + name)  # type: ignore[misc]

    def matched_elements(spelling: Callable[[str], str]) -> int:
        return sum(finetuned.tensors[name].numel for name in _same_shape(base, finetuned, spelling))

    names = _same_shape(base, finetuned, max(spellings, key=matched_elements))
    used = set(names.values())
    for name, base_name in _same_shape(base, finetuned, spellings[0]).items():
        if name not in names and base_name not in used:
            names[name] = base_name
    if not names:
        raise CheckpointError(
            finetuned.path, f"shares no tensor of the same name and shape with {base.path}"
        )
    return Pair(base, finetuned, names)


def encode_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Length and JSON header of a safetensors file whose data follow in this order.

    The library can only write what is in memory. Put wide dtypes first, so that all are aligned.
    """
    header: dict[str, object] = {RESERVED_NAME: dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype.name, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def content_digest(checkpoint: Checkpoint) -> str:
    """BLAKE3 over all tensors and side files, by name; reads the whole checkpoint."""
    found = blake3()
    for name, tensor in checkpoint.tensors.items():
        found.update(f"{name}\0{tensor.dtype.name}\0{tensor.shape}\0".encode())
        found.update(digest(checkpoint.read(name)))
    for name in sorted(checkpoint.side_files):
        found.update(name.encode() + blake3(checkpoint.read_side_file(name)).digest())
    return found.hexdigest()


def _same_shape(
    base: Checkpoint, finetuned: Checkpoint, to_base: Callable[[str], str]
) -> dict[str, str]:
    matched = {}
    for name, tensor in finetuned.tensors.items():
        other = base.tensors.get(to_base(name))
        if other is not None and other.shape == tensor.shape:
            matched[name] = other.name
    return matched


def _prefixes(short: Checkpoint, long: Checkpoint) -> list[str]:
    """Prefixes that turn names of ``short`` into names of ``long``, the most frequent first."""
    counts: Counter[str] = Counter()
    for name in long.tensors:
        for cut in (index + 1 for index, char in enumerate(name) if char == "."):
            if name[cut:] in short.tensors:
                counts[name[:cut]] += 1
    return [prefix for prefix, _ in counts.most_common()]


def _sorted(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return dict(sorted(tensors.items(), key=lambda item: item[0].encode()))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise CheckpointError(index, f"is not a shard index ({error})") from error
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(index, f"names a shard outside its folder: {shard!r}")
        return [folder / shard for shard in sorted(shards)]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            folder, f"holds {len(found)} .safetensors files and no {WEIGHTS_INDEX}"
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise PickleRefusedError(folder, pickles[0])
    raise CheckpointError(folder, "holds no .safetensors weights")


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one safetensors file, in its order, and its metadata.

    Raises:
        CheckpointError: not a readable safetensors file, or an unsupported dtype or rank.
    """
    try:
        with safe_open(file, framework="numpy"):  # checks the header: sizes, offsets, overlaps
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not a readable safetensors file ({error})") from error
    tensors = {}
    for name, fields in header.items():
        if name == RESERVED_NAME:
            continue
        dtype = BY_NAME.get(fields["dtype"])
        if dtype is None:
            raise CheckpointError(file, f"tensor {name!r} has unsupported dtype {fields['dtype']}")
        if len(fields["shape"]) > MAX_RANK:
            raise CheckpointError(file, f"tensor {name!r} has rank {len(fields['shape'])}")
        begin, end = fields["data_offsets"]
        tensors[name] = StoredTensor(
            name, dtype, tuple(fields["shape"]), file, 8 + size + begin, end - begin
        )
    return tensors, header.get(RESERVED_NAME, {})


def _cached_snapshot(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise CheckpointError(
            repo_id, "no such file or folder, nor a Hub model in the local cache"
        ) from None
