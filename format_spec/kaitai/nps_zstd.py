"""The `process: nps_zstd` of nps.ksy: undoes one zstd frame (format_spec/SPEC.md, section 7)."""

from __future__ import annotations

import zstandard
from blake3 import blake3

MAGIC = b"\x28\xb5\x2f\xfd"
MAX_WINDOW = 8 << 20


class NpsZstdError(ValueError):
    """The bytes are not the frame of section 7."""


# What process routines are given does not say where the file is, so dictionaries that are at hand
# are put here, before a file is parsed.
DICTIONARIES: list[bytes] = []


class NpsZstd:
    """Decompresses exactly one frame whose content size is stated and is the expected one.

    dictionary_bytes, digest: of its dictionary, 0 where it has none.
    """

    def __init__(self, raw_bytes: int, dictionary_bytes: int = 0, digest: bytes = b"") -> None:
        self.raw_bytes, self.dictionary = raw_bytes, None
        if dictionary_bytes:
            for known in DICTIONARIES:
                if (len(known), blake3(known).digest(8)) == (dictionary_bytes, digest):
                    kind = zstandard.DICT_TYPE_RAWCONTENT
                    self.dictionary = zstandard.ZstdCompressionDict(known, dict_type=kind)
            if self.dictionary is None:
                raise NpsZstdError("needs a dictionary that is not at hand")

    def decode(self, stored: bytes) -> bytes:
        # The stated size is compared before anything is decompressed: nothing larger is allocated.
        if stored[:4] != MAGIC:  # a skippable frame, or none
            raise NpsZstdError("not a zstd frame")
        try:
            frame = zstandard.get_frame_parameters(stored)
            if frame.content_size != self.raw_bytes:  # where it states none, that is 2^64 - 1
                raise NpsZstdError(f"states {frame.content_size} bytes, not {self.raw_bytes}")
            if frame.dict_id or frame.has_checksum or frame.window_size > MAX_WINDOW:
                raise NpsZstdError("has a dictionary id, a checksum or a window of over 8 MiB")
            decompressor = zstandard.ZstdDecompressor(self.dictionary, max_window_size=MAX_WINDOW)
            raw = decompressor.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise NpsZstdError(str(error)) from error
        if len(raw) != self.raw_bytes:
            raise NpsZstdError(f"holds {len(raw)} bytes, not {self.raw_bytes}")
        return raw
