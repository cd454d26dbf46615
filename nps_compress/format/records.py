"""The tables of an index as Python values."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blake3 import blake3

from nps_compress.codecs import ValueCodec
from nps_compress.dtypes import DType, Words, octets
from nps_compress.format.layout import Op

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base: what identifies it.

    ``digest`` is BLAKE3 of its little-endian bytes, or as many bytes of that as an index holds.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True)
class TensorEntry:
    """One tensor (or side file) of the fine-tune.

    ``base_index`` points into the base table where ``op`` is COPY or DELTA. ``digest`` is of the
    rebuilt bytes, as for :class:`BaseTensor`; for a copied tensor it is the base tensor's.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    op: Op
    value_codec: ValueCodec
    chunk_log2: int
    base_index: int | None
    digest: bytes
    first_chunk: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def has_parameters(self) -> bool:
        """Whether the first chunk record is not of elements but of the tensor's parameters."""
        return self.value_codec in (ValueCodec.SIGNS, ValueCodec.LEVELS, ValueCodec.GRID)

    @property
    def has_payload(self) -> bool:
        """Whether what changes an element is a word of its own, which needs no base to decode."""
        return self.value_codec in (ValueCodec.REPLACE, ValueCodec.XOR, ValueCodec.ULP)

    @property
    def chunks(self) -> int:
        """Number of chunks of elements; the last one may be short, a copy has none."""
        return 0 if self.op is Op.COPY else -(-self.numel >> self.chunk_log2)

    @property
    def chunk_count(self) -> int:
        """Number of chunk records."""
        return self.chunks + self.has_parameters


def has_digest(data: bytes | Words, promised: bytes) -> bool:
    """Whether bytes, or words as bytes, have the digest that an index holds, whole or its start."""
    raw = data if isinstance(data, bytes) else octets(data)
    return bool(blake3(raw).digest(len(promised)) == promised)


def base_root(base: Iterable[BaseTensor]) -> bytes:
    """One digest over names, dtypes, shapes and digests of all base tensors, by name."""
    digest = blake3()
    for tensor in sorted(base, key=lambda tensor: tensor.name.encode()):
        digest.update(_identity(tensor))
    return digest.digest()


def content_digest(tensors: Sequence[TensorEntry], files: Sequence[TensorEntry]) -> bytes:
    """One digest that identifies a fine-tune however it is encoded (SPEC.md, content digest).

    tensors, files: in order of their UTF-8 names.
    """
    digest = blake3(b"nps-content\n")
    digest.update(struct.pack("<I", len(tensors)))
    for tensor in tensors:
        digest.update(_identity(tensor))
    digest.update(struct.pack("<I", len(files)))
    for file in files:
        name = file.name.encode()
        digest.update(struct.pack("<H", len(name)) + name)
        digest.update(struct.pack("<Q", file.numel) + file.digest)
    return digest.digest()


def _identity(tensor: BaseTensor | TensorEntry) -> bytes:
    name, rank = tensor.name.encode(), len(tensor.shape)
    typed = struct.pack(f"<BB{rank}Q", tensor.dtype.code, rank, *tensor.shape)
    return struct.pack("<H", len(name)) + name + typed + tensor.digest


def has_control_characters(text: str) -> bool:
    """True for C0 and C1 control characters, which could drive a terminal."""
    return _CONTROL.search(text) is not None


def printable(text: str) -> str:
    """Text from a file with everything that is not printable written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
