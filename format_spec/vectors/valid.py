"""Files that a reader must accept, by name: ``VALID``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from parts import (
    BITMASK,
    DTYPES,
    EMPTY,
    FLOATS,
    FULL,
    GAP8,
    GAP16,
    NEW,
    NO_BASE,
    REPLACE,
    SQUARES,
    SQUARES_FRAME,
    ULP,
    XOR,
    Chunk,
    Entry,
    File,
    base_file,
    base_tensor,
    chunk_of,
    copy,
    delta,
    frame,
    new,
    random_words,
    side_file,
)

VALID: dict[str, Callable[[], File]] = {}


def valid(function: Callable[[], File]) -> Callable[[], File]:
    VALID[function.__name__.replace("_", "-")] = function
    return function


@valid
def smallest() -> File:
    return File()


@valid
def metadata() -> File:
    text = json.dumps({"base_name": "b\u00e4se", "tool": "x", "": '"\\\n\x1b'}, ensure_ascii=False)
    return File(metadata=text.encode() + b"\n ")


@valid
def minor_version_and_optional_features() -> File:
    return File(set_header={"minor": 9, "optional_features": 2**64 - 1})


@valid
def base_without_fine_tune() -> File:
    return File(base=[base_tensor("w", "BF16", [2, 2], [1, 2, 3, 4])])


@valid
def all_copied_renamed_and_shared() -> File:
    bases = [base_tensor(name, "F16", [3], [1, 2, i]) for i, name in enumerate("abc")]
    tensors = [copy("head", bases, 2), copy("model.a", bases, 0), copy("model.b", bases, 0)]
    return File(base=bases, tensors=tensors)


@valid
def deleted_and_new() -> File:
    bases = [base_tensor("pooler", "F32", [2, 2], [1, 2, 3, 4]), base_tensor("w", "F32", [1], [7])]
    tensors = [new("classifier", "F32", [3, 2], random_words("n", 6, 4)), copy("w", bases, 1)]
    return File(base=bases, tensors=tensors)


@valid
def resized_vocabulary() -> File:
    rows = random_words("v", 40, 2)
    bases = [base_tensor("embed", "BF16", [10, 4], rows)]
    return File(base=bases, tensors=[new("embed", "BF16", [12, 4], rows + [0] * 8)])


@valid
def dtype_changed() -> File:
    bases = [base_tensor("w", "F32", [2], [0x3F800000, 0])]
    return File(base=bases, tensors=[new("w", "BF16", [2], [0x3F80, 0])])


@valid
def empty_tensors() -> File:
    bases = [
        base_tensor("delta", "BF16", [0, 7], []),
        base_tensor("huge", "F64", [2**24, 0, 2**24], []),
    ]
    tensors = [
        delta("delta", bases, 0, {}),
        delta("huge", bases, 1, {}, codec=ULP, chunk_log2=24),
        new("new", "I8", [0], []),
    ]
    return File(base=bases, tensors=tensors, files=[side_file("vocab.txt", b"")])


@valid
def scalars() -> File:
    bases = [base_tensor("changed", "F32", [], [0x40200000]), base_tensor("kept", "I64", [], [5])]
    tensors = [
        delta("changed", bases, 0, {0: 0x40200001}, codec=ULP),
        delta("kept", bases, 1, {}),
        new("new", "BOOL", [], [1]),
    ]
    return File(base=bases, tensors=tensors)


@valid
def rank_8() -> File:
    bases = [base_tensor("w", "U16", [1, 2, 1, 3, 1, 1, 2, 1], list(range(12)))]
    return File(base=bases, tensors=[delta("w", bases, 0, {11: 99})])


@valid
def one_element_kept() -> File:
    """First, middle and last element of a chunk, by each mask codec."""
    bases, tensors = [], []
    for codec, mask in (("bitmask", BITMASK), ("gap16", GAP16), ("gap8", GAP8)):
        for position in (0, 700, 1023):
            name = f"{codec}.{position:04}"
            bases.append(base_tensor(name, "U8", [1024], [0] * 1024))
            tensors.append(delta(name, bases, len(bases) - 1, {position: 1}, masks=mask))
    return File(base=bases, tensors=tensors)


@valid
def none_kept() -> File:
    bases = [base_tensor("w", "BF16", [3000], random_words("k", 3000, 2))]
    return File(base=bases, tensors=[delta("w", bases, 0, {}, codec=XOR)])


@valid
def all_kept() -> File:
    words = random_words("a", 2500, 2)
    bases = [base_tensor(name, "F16", [2500], words) for name in ("replace", "ulp", "xor")]
    changes = {i: word ^ (1 + i % 65535) for i, word in enumerate(words)}
    tensors = [
        delta(name, bases, i, changes, codec=codec)
        for i, (name, codec) in enumerate((("replace", REPLACE), ("ulp", ULP), ("xor", XOR)))
    ]
    return File(base=bases, tensors=tensors)


@valid
def kept_but_unchanged() -> File:
    """Kept elements may have the base's own word, in every value codec (ulp: all ones)."""
    words = random_words("u", 64, 4)
    bases = [base_tensor(name, "F32", [64], words) for name in ("replace", "ulp", "xor")]
    tensors = [
        delta(name, bases, i, {5: 1}, codec=codec, kept=[0, 5, 63])
        for i, (name, codec) in enumerate((("replace", REPLACE), ("ulp", ULP), ("xor", XOR)))
    ]
    return File(base=bases, tensors=tensors)


@valid
def chunk_boundaries() -> File:
    """Changes on both sides of every boundary; sizes of a chunk, one less and one more."""
    bases, tensors = [], []
    for size in (1, 7, 8, 9, 1023, 1024, 1025, 2047, 2048, 2049):
        words = random_words(f"c{size}", size, 2)
        bases.append(base_tensor(f"w{size:04}", "BF16", [size], words))
        edges = {i for i in (0, 1023, 1024, 2047, 2048, size - 1) if i < size}
        changes = {i: words[i] ^ 0x8001 for i in edges}
        tensors.append(
            delta(f"w{size:04}", bases, len(bases) - 1, changes, codec=ULP, masks=BITMASK)
        )
    return File(base=bases, tensors=tensors)


@valid
def mask_codec_of_each_chunk() -> File:
    size = 5 * 1024
    words = random_words("m", size, 2)
    changes = {i: words[i] ^ 1 for i in (*range(1024), *range(1024, 2048, 2))}
    changes |= {i: words[i] ^ 1 for i in (2050, 2400, 3000, 3071, 3072, 3500)}
    bases = [base_tensor("w", "BF16", [5, 1024], words)]
    masks = (FULL, BITMASK, GAP8, GAP16, EMPTY)
    return File(base=bases, tensors=[delta("w", bases, 0, changes, codec=ULP, masks=masks)])


@valid
def gap8_escapes() -> File:
    """Gaps of 254, 255, 256, 509 to 511 and 1020."""
    bases = [base_tensor("w", "U8", [4096], [0] * 4096)]
    positions, position = {}, -1
    for gap in (254, 255, 256, 509, 510, 511, 1020, 0):
        position += gap + 1
        positions[position] = 1
    return File(base=bases, tensors=[delta("w", bases, 0, positions, masks=GAP8, chunk_log2=12)])


@valid
def gap16_escapes() -> File:
    """Gaps of 65,534, 65,535, 65,536 and 131,070, and the last element of the chunk."""
    size = 1 << 19
    bases = [base_tensor("w", "U8", [size], [0] * size)]
    positions, position = {}, -1
    for gap in (65534, 65535, 65536, 131070):
        position += gap + 1
        positions[position] = 9
    positions[size - 1] = 1
    return File(base=bases, tensors=[delta("w", bases, 0, positions, masks=GAP16, chunk_log2=19)])


@valid
def gap8_over_65535() -> File:
    size = 1 << 17
    bases = [base_tensor("w", "U8", [size], [0] * size)]
    changes = {70_000: 1, size - 1: 2}
    return File(base=bases, tensors=[delta("w", bases, 0, changes, masks=GAP8, chunk_log2=17)])


@valid
def chunk_sizes() -> File:
    """Every chunk size that is allowed, 2^10 to 2^24, on a tensor of three chunks of 2^10."""
    bases, tensors = [], []
    for log2 in range(10, 25):
        words = random_words(f"s{log2}", 2500, 2)
        bases.append(base_tensor(f"w{log2}", "BF16", [50, 50], words))
        changes = {i: words[i] ^ 3 for i in (3, 1500, 1501, 2499)}
        tensors.append(
            delta(f"w{log2}", bases, len(bases) - 1, changes, codec=ULP, chunk_log2=log2)
        )
    return File(base=bases, tensors=tensors)


@valid
def new_in_chunks() -> File:
    words = random_words("n", 2100, 2)
    return File(tensors=[new("w", "BF16", [2100], words), new("x", "BF16", [21, 100], words, 20)])


@valid
def special_floats() -> File:
    """To and from NaN payloads, infinities, denormals, both zeros: bits, not numbers, count."""
    bases, tensors = [], []
    for name, bits, exponent in (("BF16", 16, 8), ("F16", 16, 5), ("F32", 32, 8), ("F64", 64, 11)):
        fraction = bits - 1 - exponent
        sign, infinity = 1 << (bits - 1), ((1 << exponent) - 1) << fraction
        half = [0, 1, (1 << fraction) - 1, 1 << fraction, infinity - 1, infinity]
        half += [infinity + 1, infinity | 1 << (fraction - 1), sign - 1]
        words = half + [word | sign for word in half]
        pairs = [(a, b) for a in words for b in words if a != b]
        for codec, number in (("replace", REPLACE), ("ulp", ULP), ("xor", XOR)):
            base = base_tensor(f"{name}.{codec}", name, [len(pairs)], [a for a, _ in pairs])
            bases.append(base)
            changes = {i: b for i, (_, b) in enumerate(pairs)}
            tensors.append(delta(f"{name}.{codec}", bases, len(bases) - 1, changes, codec=number))
    return File(base=bases, tensors=tensors)


@valid
def negative_zero_is_not_added_to() -> File:
    bases = [base_tensor("w", "F32", [4], [1 << 31, 1 << 31, 0, 0])]
    return File(base=bases, tensors=[delta("w", bases, 0, {1: 0, 3: 1 << 31}, codec=ULP)])


@valid
def bool_that_is_neither() -> File:
    bases = [base_tensor("w", "BOOL", [4], [0, 1, 2, 255])]
    return File(base=bases, tensors=[delta("w", bases, 0, {0: 1, 1: 77}, codec=XOR)])


@valid
def zstd_streams() -> File:
    """Masks and planes of zeros, runs and one block that zstd compressed itself."""
    size = 1 << 13
    words = [0x3F80] * size
    bases = [base_tensor("gap16", "BF16", [size], words), base_tensor("w", "BF16", [size], words)]
    tensors = [
        delta(
            "gap16",
            bases,
            0,
            dict.fromkeys(range(0, size, 4), 16257),
            codec=ULP,
            masks=GAP16,
            chunk_log2=13,
            compress=True,
        ),
        delta(
            "w",
            bases,
            1,
            dict.fromkeys(range(1, size, 2), 16258),
            codec=XOR,
            masks=BITMASK,
            chunk_log2=13,
            compress=True,
        ),
        new("x", "U8", [256], list(SQUARES)),
    ]
    assert all(
        chunk.mask_zstd and chunk.planes_zstd == 3 for t in tensors[:2] for chunk in t.chunks
    )
    tensors[2].chunks[0].planes = [SQUARES_FRAME]
    tensors[2].chunks[0].planes_zstd = 1
    return File(base=bases, tensors=tensors)


@valid
def zstd_frame_forms() -> File:
    """Single segment and window descriptor; content sizes of 1, 2, 4 and 8 bytes."""
    tensors = []
    for name, size, flags in (
        *(("a", 200, 0x20), ("b", 300, 0x60), ("c", 300, 0xA0), ("d", 300, 0xE0)),
        *(("e", 300, 0x40), ("f", 300, 0x80), ("g", 300, 0xC0)),
    ):
        tensor = new(name, "U8", [size], [7] * size)
        tensor.chunks[0].planes = [frame(bytes([7]) * size, flags=flags)]
        tensor.chunks[0].planes_zstd = 1
        tensors.append(tensor)
    largest = new("h", "U8", [300], [7] * 300)
    largest.chunks[0].planes = [frame(bytes([7]) * 300, window=b"\x68")]  # 8 MiB
    largest.chunks[0].planes_zstd = 1
    return File(tensors=[*tensors, largest])


def zeros(numel: int) -> Chunk:
    """``numel`` zero bytes, all kept, as one frame of run-length blocks."""
    chunk = chunk_of(None, [0], 1, FULL, REPLACE)
    chunk.nnz, chunk.planes_zstd, chunk.planes = numel, 1, [frame(bytes(numel))]
    return chunk


def expanding(beyond: int) -> File:
    """64 MiB of zeros, and as many more as C-EXPANSION allows, and ``beyond``."""
    parts = [zeros(1 << 24)] * 4
    rest = 256 * sum(len(part.stored()) for part in [*parts, zeros(1 << 19)]) + beyond
    parts.append(zeros(rest))
    assert 256 * sum(len(part.stored()) for part in parts) + beyond == rest
    numel, digest = (4 << 24) + rest, hashlib.sha256()
    for start in range(0, numel, 1 << 20):
        digest.update(bytes(min(1 << 20, numel - start)))
    entry = Entry(b"w", 2, [numel], NEW, REPLACE, 24, NO_BASE, b"", parts, digest.digest())
    return File(tensors=[entry])


@valid
def expansion_at_the_limit() -> File:
    return expanding(0)


@valid
def metadata_of_1_mib() -> File:
    return File(metadata=b'{"a":"' + b"x" * (2**20 - 8) + b'"}')


@valid
def largest_file_of_the_base() -> File:
    """2^26 bytes that the base has: only their digest is here."""
    digest = hashlib.sha256(b"")
    for _ in range(64):
        digest.update(bytes(1 << 20))
    file = base_file("tokenizer.model", b"")
    file.shape, file.sha256 = [2**26], digest.digest()
    return File(files=[file])


@valid
def compressed_index() -> File:
    bases = [base_tensor(f"layer.{i:03}", "BF16", [4], [i, 0, 0, 0]) for i in range(50)]
    tensors = [copy(f"layer.{i:03}", bases, i) for i in range(50)]
    return File(base=bases, tensors=tensors, compress_index=True)


@valid
def side_files() -> File:
    return File(
        files=[
            side_file("config.json", b'{"a": 1}\n'),
            side_file("merges.txt", bytes(range(256)) * 12, chunk_log2=10),
            base_file("vocab.json", b"{}"),
        ]
    )


@valid
def names() -> File:
    """Order is by bytes: upper case before lower, a prefix first, UTF-8 last; 1 to 512 bytes."""
    texts = (
        "A",
        "a",
        "a.",
        "a.b",
        "layer/0",
        " ",
        "\u00e9",
        "\u4e00" * 170 + "xy",
        "..",
        "\U0001f600",
    )
    ordered = sorted(texts, key=str.encode)
    bases = [base_tensor(text, "U8", [1], [i]) for i, text in enumerate(ordered)]
    return File(base=bases, tensors=[copy(text, bases, i) for i, text in enumerate(ordered)])


def every_codec(dtype: str) -> File:
    """One base tensor of two chunks, changed through every pair of mask and value codec."""
    _, width = DTYPES[dtype]
    words = random_words(dtype, 1030, width)
    other = [word or 1 for word in random_words(f"{dtype} changes", 1030, width)]
    kept = {
        ("bitmask", BITMASK): {*range(0, 1030, 3), 1029},
        ("empty", EMPTY): (),
        ("full", FULL): range(1030),
        ("gap16", GAP16): {*range(0, 1030, 199), 1029},
        ("gap8", GAP8): {*range(0, 1030, 19), 1029},
    }
    bases = [base_tensor("w", dtype, [103, 10], words)]
    codecs = {"replace": REPLACE, "xor": XOR} | ({"ulp": ULP} if dtype in FLOATS else {})
    tensors = []
    for (mask, mask_codec), positions in kept.items():
        for codec, value_codec in sorted(codecs.items()):
            changes = {i: words[i] ^ other[i] for i in positions}
            name = f"{mask}.{codec}"
            tensors.append(delta(name, bases, 0, changes, codec=value_codec, masks=mask_codec))
    tensors.append(new("new", dtype, [5], random_words(f"{dtype} new", 5, width)))
    return File(base=bases, tensors=tensors)


for _dtype in DTYPES:
    VALID[f"dtype-{_dtype.lower().replace('_', '-')}"] = lambda name=_dtype: every_codec(name)
