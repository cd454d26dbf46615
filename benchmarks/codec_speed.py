"""Encode and decode speed on one core, in GB of dense weights a second, beside a plain copy.

Decode is timed as a loader meets it: the file in memory, zstd undone, the base's words in hand;
it ends with the fine-tune's words in another buffer. The copy moves the same words in the same
run, alternating with what it is compared to. A row is only printed where every word came back.
Levels are those of ``pack --level``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import rows
from nps_compress import codecs, ulp_coding
from nps_compress.codecs import ValueCodec
from nps_compress.dtypes import BY_NAME, round_float32, to_float32
from nps_compress.encoding import effort_of

BF16 = BY_NAME["BF16"]
CHUNK_LOG2 = 19


def synthetic_pair(
    numel: int, density: float, seed: int = 0
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """N(0, 0.02) weights and the largest N(0, 0.001) changes among them, in bfloat16."""
    rng = np.random.default_rng(seed)
    base = round_float32(rng.normal(0, 0.02, numel).astype(np.float32), BF16)
    change = rng.normal(0, 1e-3, numel).astype(np.float32)
    kept = np.abs(change) >= np.quantile(np.abs(change), 1 - density)
    tuned = round_float32(to_float32(base, BF16) + change, BF16)
    return base.astype(np.uint16), np.where(kept, tuned, base).astype(np.uint16)


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, in turns so that drift of the machine hits all alike.

    Each turn runs a function twice and times the second, so that none pays for what the one
    before it left in the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(numel: int, density: float, level: str, repeats: int) -> dict[str, object]:
    base, tuned = synthetic_pair(numel, density)
    size = 1 << CHUNK_LOG2
    parts = [slice(start, min(start + size, numel)) for start in range(0, numel, size)]
    choices = effort_of(level).codecs
    codec = codecs.best_value_codec(base[parts[0]], tuned[parts[0]], BF16, choices)
    coded = codec is ValueCodec.CODED_ULP

    def encode() -> list[codecs.EncodedChunk]:
        return [codecs.encode_chunk(base[p], tuned[p], BF16, codec) for p in parts]

    chunks = encode()

    def unzstd() -> list[tuple[bytes, npt.NDArray[np.uint8]]]:
        found = []
        for chunk in chunks:
            mask = chunk.mask
            if chunk.mask_compressed:
                mask = codecs.decompress(mask, chunk.mask_raw_bytes)
            planes = np.empty((0, 0), np.uint8)
            if not coded:
                planes = codecs.decode_planes(chunk.planes, chunk.planes_compressed, chunk.nnz)
            found.append((mask, planes))
        return found

    raw = unzstd()
    out = np.empty_like(base)

    def copy() -> None:
        np.copyto(out, base)

    def decode() -> None:
        for part, chunk, (mask, planes) in zip(parts, chunks, raw, strict=True):
            target = out[part]
            positions = codecs.decode_mask(chunk.mask_codec, mask, target.size, chunk.nnz)
            if coded:
                tokens, low = chunk.planes
                np.copyto(target, base[part])
                ulp_coding.apply_distances(tokens, low, positions, target, BF16)
            else:
                codecs.apply_payload(codec, planes, positions, base[part], target, BF16)

    # numpy's way to the same words: a bitmask of the tensor and base ^ new at its set bits, over
    # the whole tensor as a loader would write it, and in chunks that a core's cache holds.
    def bitmask_of(part: slice) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
        changed = base[part] != tuned[part]
        return np.packbits(changed, bitorder="little"), (base[part] ^ tuned[part])[changed]

    whole, chunked = bitmask_of(slice(None)), [bitmask_of(part) for part in parts]

    def numpy_decode(target: npt.NDArray[np.uint16], part: slice, bits: Any, values: Any) -> None:
        np.copyto(target, base[part])
        mask = np.unpackbits(bits, count=target.size, bitorder="little").astype(np.bool_)
        target[mask] ^= values

    def numpy_whole() -> None:
        numpy_decode(out, slice(None), *whole)

    def numpy_chunked() -> None:
        for part, (bits, values) in zip(parts, chunked, strict=True):
            numpy_decode(out[part], part, bits, values)

    for function in (decode, numpy_whole, numpy_chunked):
        out[:] = 0x5A5A
        function()
        if not np.array_equal(out, tuned):
            raise SystemExit(f"{function.__name__} at density {density} is wrong; nothing timed")

    timed: dict[str, Callable[[], object]] = {
        "copy": copy,
        "decode": decode,
        "numpy": numpy_whole,
        "numpy_chunked": numpy_chunked,
        "unzstd": unzstd,
        "encode": encode,
    }
    seconds = interleaved(timed, repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    nbytes = base.nbytes
    masks = sorted({chunk.mask_codec.name.lower() for chunk in chunks})
    return {
        "params": numel,
        "density": density,
        "level": level,
        "codecs": "+".join([*masks, codec.name.lower()]),
        "bits_per_param": round(8 * sum(len(chunk.data) for chunk in chunks) / numel, 4),
        "copy_gb_s": round(nbytes / median["copy"] / 1e9, 2),
        "decode_gb_s": round(nbytes / median["decode"] / 1e9, 2),
        "decode_over_copy": round(ratio("decode", "copy"), 2),
        "numpy_over_decode": round(ratio("numpy", "decode"), 1),
        "numpy_chunked_over_decode": round(ratio("numpy_chunked", "decode"), 1),
        "unzstd_gb_s": round(nbytes / median["unzstd"] / 1e9, 2),
        "encode_gb_s": round(nbytes / median["encode"] / 1e9, 3),
        "exact": True,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--params",
        type=int,
        nargs="+",
        default=[1 << 22, 1 << 24],
        help="weights in a pair: 2^22 fit a cache, 2^24 do not",
    )
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    found = [
        measure(params, density, level, arguments.repeats)
        for params in arguments.params
        for density in (0.002, 0.01, 0.05, 0.1, 0.2, 0.5)
        for level in ("fast", "default")
    ]
    print(rows.table(found))
    print(f"\nsaved in {rows.save('codec_speed_cpu', found)}")


if __name__ == "__main__":
    main()
