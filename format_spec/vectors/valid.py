"""Files that a reader must accept, by name: ``VALID``."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from blake3 import blake3

from bundles import bundled_base, dictionary_frame, member
from distances import Context, Distances, coded_ulp, distances_of, exponent_of, moved
from grids import GridParameters, grid, grid_parameters
from learned import columns_of, contexts_of, decisions_of, kept_of, with_learned_masks
from parts import (
    BITMASK,
    CODED,
    DTYPES,
    EMPTY,
    FLOATS,
    FULL,
    GAP8,
    GAP16,
    LEARNED,
    NEW,
    NO_BASE,
    REPLACE,
    SQUARES,
    SQUARES_FRAME,
    ULP,
    XOR,
    Base,
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
    words_of,
)
from signs import (
    NEVER,
    Parameters,
    Subspace,
    levels,
    parameters,
    seed_of,
    signs,
    weights,
    word_of,
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
    size = 6 * 1024
    words = random_words("m", size, 2)
    changes = {i: words[i] ^ 1 for i in (*range(1024), *range(1024, 2048, 2))}
    changes |= {i: words[i] ^ 1 for i in (2050, 2400, 3000, 3071, 3072, 3500)}
    changes |= {i: words[i] ^ 1 for i in range(5200, 6100, 3)}
    bases = [base_tensor("w", "BF16", [6, 1024], words)]
    masks = (FULL, BITMASK, GAP8, GAP16, EMPTY, GAP8)
    entry = delta("w", bases, 0, changes, codec=ULP, masks=masks)
    return File(base=bases, tensors=[with_learned_masks(entry, bases[0], {5})])


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
    numel, digest = (4 << 24) + rest, blake3()
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
    digest = blake3(b"")
    for _ in range(64):
        digest.update(bytes(1 << 20))
    file = base_file("tokenizer.model", b"")
    file.shape, file.digest = [2**26], digest.digest()
    return File(files=[file])


@valid
def compressed_index() -> File:
    bases = [base_tensor(f"layer.{i:03}", "BF16", [4], [i, 0, 0, 0]) for i in range(50)]
    tensors = [copy(f"layer.{i:03}", bases, i) for i in range(50)]
    return File(base=bases, tensors=tensors, compress_index=True)


def digests(digest_bytes: int) -> File:
    """Every op, of tensors and files, in an index with whole digests or with short ones."""
    words = random_words("digests", 30, 2)
    bases = [base_tensor(name, "BF16", [30], [*words[1:], i]) for i, name in enumerate("abc")]
    tensors = [
        delta("a", bases, 0, {3: 1}, codec=ULP),
        copy("b", bases, 1),
        copy("d", bases, 1),
        new("e", "F32", [2], [1, 2]),
    ]
    files = [side_file("config.json", b"{}")]
    return File(base=bases, tensors=tensors, files=files, digest_bytes=digest_bytes)


@valid
def digests_whole() -> File:
    return digests(32)


@valid
def digests_short() -> File:
    return digests(8)


@valid
def digests_short_of_nothing() -> File:
    return File(digest_bytes=8)


@valid
def digests_short_with_files_of_the_base() -> File:
    """Whose whole digests nobody can tell who does not have them."""
    return File(files=[side_file("a.txt", b"a"), base_file("vocab.json", b"{}")], digest_bytes=8)


@valid
def digests_short_and_index_compressed() -> File:
    bases = [base_tensor(f"layer.{i:03}", "BF16", [4], [i, 0, 0, 0]) for i in range(50)]
    tensors = [copy(f"layer.{i:03}", bases, i) for i in range(50)]
    return File(base=bases, tensors=tensors, compress_index=True, digest_bytes=8)


@valid
def bundle_law() -> File:
    file = member()
    sizes = [len(dictionary_frame(file.raw_index(), d)) for d in (file.dictionary, b"")]
    assert sizes[0] < sizes[1] - 400, sizes
    return file


VALID["bundle/law"] = VALID.pop("bundle-law")
VALID["bundle/base"] = bundled_base
VALID["bundle/nothing-of-the-dictionary"] = lambda: replace(
    member(), index_frame=lambda raw: dictionary_frame(raw, b"")
)
VALID["bundle/all-of-the-dictionary"] = lambda: replace(
    bundled_base(),
    dictionary=bundled_base().raw_index(),
    compress_index=True,
    index_frame=lambda raw: dictionary_frame(raw, raw),
)
VALID["bundle/by-itself"] = lambda: replace(member(), dictionary=b"", compress_index=False)
VALID["bundle-compressed/base"] = lambda: replace(bundled_base(), compress_index=True)
VALID["bundle-compressed/law"] = member


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
        ("learned", LEARNED): {i for i in range(1030) if i % 10 in (2, 5) or i // 10 % 7 == 3},
    }
    bases = [base_tensor("w", dtype, [103, 10], words)]
    codecs = {"replace": REPLACE, "xor": XOR} | ({"ulp": ULP} if dtype in FLOATS else {})
    tensors = []
    for (mask, mask_codec), positions in kept.items():
        for codec, value_codec in sorted(codecs.items()):
            changes = {i: words[i] ^ other[i] for i in positions}
            name = f"{mask}.{codec}"
            given = GAP8 if mask_codec == LEARNED else mask_codec
            entry = delta(name, bases, 0, changes, codec=value_codec, masks=given)
            if mask_codec == LEARNED:
                with_learned_masks(entry, bases[0])
            tensors.append(entry)
    tensors.append(new("new", dtype, [5], random_words(f"{dtype} new", 5, width)))
    return File(base=bases, tensors=tensors)


# -- learned masks ---------------------------------------------------------------------------------


def learned(
    tensors: dict[str, list[int]],
    kept: Callable[[str, int], bool],
    chunk_log2: int = 10,
    compress: bool = False,
) -> File:
    """Tensors of bytes. tensors: shapes by name; kept: of a name and a position."""
    bases = [base_tensor(n, "U8", shape, [0] * math.prod(shape)) for n, shape in tensors.items()]
    entries = []
    for index, (name, shape) in enumerate(tensors.items()):
        changes = {p: 1 + (p >> 12) for p in range(math.prod(shape)) if kept(name, p)}
        entry = delta(name, bases, index, changes, chunk_log2=chunk_log2, compress=compress)
        entries.append(with_learned_masks(entry, bases[index]))
    return File(base=bases, tensors=entries)


def learned_parts(file: File, tensor: int, number: int) -> tuple[list[int], int, int, int]:
    """Of a chunk what ``decisions_of`` takes."""
    entry, base = file.tensors[tensor], file.base[tensor]
    start = number << entry.chunk_log2
    numel = min(1 << entry.chunk_log2, math.prod(entry.shape) - start)
    return kept_of(entry, base, number), numel, start, columns_of(entry)


@valid
def learned_masks_of_each_shape() -> File:
    """Rows longer than chunks, ends of rows within chunks and at their ends, columns of one."""
    shapes = {
        "column": [1500, 1],
        "cube": [5, 7, 40],
        "even": [48, 64],
        "long": [3, 1500],
        "narrow": [500, 3],
        "row": [1, 1500],
        "vector": [1500],
        "wide": [4, 700],
    }

    def kept(name: str, p: int) -> bool:
        columns = math.prod(shapes[name][1:]) if len(shapes[name]) > 1 else shapes[name][0]
        row, column = divmod(p, columns)
        return (7 * row + p * p) % 11 < 3 or column % 13 == 5 or row % 9 == 4

    return learned(shapes, kept)


@valid
def learned_masks_of_one_and_of_all_but_one() -> File:
    """The first, a middle and the last element of a chunk, kept alone or alone not kept."""
    names = {f"{how}.{p:04}": [32, 33] for how in ("all-but", "one") for p in (0, 500, 1023)}
    return learned(names, lambda name, p: (p % 1024 == int(name[-4:])) == name.startswith("one"))


@valid
def learned_masks_in_contexts_at_their_ends() -> File:
    """The last row and column kept alone, or alone not kept: contexts 63 and 0."""
    side = 320

    def kept(name: str, p: int) -> bool:
        return (name == "kept") == (side - 1 in divmod(p, side))

    file = learned({"kept": [side, side], "not": [side, side]}, kept, 17, compress=True)
    for tensor, context in ((0, 63), (1, 0)):
        assert context in contexts_of(*learned_parts(file, tensor, 0))
    return file


@valid
def learned_masks_that_learn_all_there_is() -> File:
    """More than 511 elements of a row and of a column, shares of 1 and 65535, and surprises."""
    surprises = {0: (4000, 20_000), 1: (9000, 30_000)}

    def kept(name: str, p: int) -> bool:
        half = p >> 14
        return (half == 1) != (p in surprises[half])

    file = learned({"row": [1 << 15], "tall": [1 << 13, 4]}, kept, 15, compress=True)
    shares = [share for _, share in decisions_of(*learned_parts(file, 0, 0))]
    assert (min(shares), max(shares)) == (1, 65535)
    return file


@valid
def learned_masks_of_distances() -> File:
    """Beside coded distances, in each dtype; one chunk of nothing and one of all."""

    def make(name: str, bases: list[Base], index: int) -> Entry:
        words = words_of(bases[index])
        kept = [*range(1024), *(p for p in range(2048, 4000) if p % 40 in (1, 2, 9))]
        entry = coded_ulp(name, bases, index, {p: words[p] ^ 1 for p in kept})
        return with_learned_masks(entry, bases[index])

    file = stored_on(make, {name.lower(): (name, [100, 40]) for name in ("BF16", "F16", "F32")})
    assert [chunk.codec for chunk in file.tensors[0].chunks] == [FULL, EMPTY, LEARNED, LEARNED]
    return file


# -- signs and levels ----------------------------------------------------------------------------

QUANTISED = ("BF16", "F16", "F32")


def drawn(file: File) -> list[list[int]]:
    """Drawn elements of each chunk of each tensor: what a vector asserts that it holds."""
    return [[chunk.nnz for chunk in tensor.chunks[1:]] for tensor in file.tensors]


def stored_on(
    make: Callable[[str, list[Base], int], Entry], tensors: dict[str, tuple[str, list[int]]]
) -> File:
    """A file of what ``make`` makes of small weights. tensors: dtype and shape by name."""
    bases = []
    for name, (dtype, shape) in tensors.items():
        words = weights(name, math.prod(shape), dtype)
        bases.append(base_tensor(name, dtype, shape, words))
    return File(base=bases, tensors=[make(name, bases, i) for i, name in enumerate(tensors)])


def some_signs(shape: list[int], seed: int = 1) -> Parameters:
    """Small changes of about a third of all elements, in two subspaces."""
    return parameters(
        shape,
        2.0**-10,
        seed=seed,
        subspaces=[Subspace(1.0, 350.0), Subspace(0.75, 250.0, 1)],
        size_rows=(0, 1, -3, 2),
        size_columns=(1, 0, -2, 3, -1),
        rows=(0, -1, 1),
        columns=(2, 0, 0, -3),
    )


@valid
def signs_of_each_dtype() -> File:
    """Three chunks; rows of 33 elements, so that four that share random bits cross rows."""
    shape = [70, 33]
    file = stored_on(
        lambda name, bases, i: signs(name, bases, i, some_signs(shape, (2**64 - 1, 0, 5)[i])),
        {dtype.lower(): (dtype, shape) for dtype in QUANTISED},
    )
    assert all(200 < nnz < 700 for tensor in drawn(file) for nnz in tensor[:2])
    return file


@valid
def signs_of_each_rank() -> File:
    """A tensor of rank 3 or more is its first dimension by all others, a vector one row."""
    shapes = {f"rank{len(shape)}": shape for shape in ([], [37], [5, 7], [3, 5, 7], [2, 1, 3, 6])}
    shapes["rank8"] = [2, 1, 3, 1, 5, 1, 1, 2]
    shapes["row"], shapes["column"] = [1, 41], [41, 1]
    file = stored_on(
        lambda name, bases, i: signs(name, bases, i, some_signs(shapes[name], seed_of([0] * 4))),
        {name: ("BF16", shape) for name, shape in sorted(shapes.items())},
    )
    assert all(sum(tensor) for tensor in drawn(file))
    return file


@valid
def signs_chunks_without_draws() -> File:
    """Nothing is drawn in the second chunk, nor in the last one, nor in a whole tensor."""
    shape = [9, 512]
    given = some_signs(shape)
    for row in (2, 3, 8):
        given.size_rows[row] = NEVER
    file = stored_on(
        lambda name, bases, i: signs(
            name, bases, i, given if name == "some" else parameters(shape, rate=2.0**-18)
        ),
        dict.fromkeys(("none", "some"), ("F16", shape)),
    )
    none, some = drawn(file)
    assert none == [0] * 5
    assert [bool(nnz) for nnz in some] == [True, False, True, True, False]
    return file


@valid
def signs_factors_of_0() -> File:
    """Rows and columns whose size is 0, whatever the other exponents say."""
    shape = [8, 33]
    given = parameters(
        shape,
        size_rows=(0, NEVER, 0, 60),
        size_columns=(0, -60, NEVER, 0, 60),
        rows=(60, 60, -60, 0),
        columns=(60, 60, 60, -60, 0),
    )
    nothing = parameters(shape, size_columns=(NEVER,), rows=(60,))
    file = stored_on(
        lambda name, bases, i: signs(name, bases, i, given if name == "some" else nothing),
        dict.fromkeys(("none", "some"), ("F32", shape)),
    )
    assert drawn(file)[0] == [0]
    assert 33 < drawn(file)[1][0] < 6 * 27
    return file


@valid
def signs_subspaces() -> File:
    """Of 1, 3 and 64 subspaces; some begin beyond any exponent, or at the one of an element."""
    shape = [24, 21]
    rows, columns = (*range(-12, 12),), (*range(-10, 11),)
    few = [Subspace(1.5, 0.25), Subspace(0.5, 2.0, -5), Subspace(1.25, 0.5, 6)]
    many = [Subspace(1 + i / 64, 2.0 ** ((33 - i) // 2), i - 33) for i in range(1, 60)]
    many = [Subspace(), Subspace(9.0, 9.0, -32767), Subspace(2.0, 2.0, -240), *many]
    many += [Subspace(7.0, 7.0, 241), Subspace(5.0, 5.0, 32767)]
    assert len(many) == 64
    file = stored_on(
        lambda name, bases, i: signs(
            name,
            bases,
            i,
            parameters(
                shape,
                2.0**-2,
                seed=i,
                subspaces=[[Subspace()], few, many][i],
                size_rows=(-3, 2, 1),
                size_columns=(0, 1),
                rows=rows,
                columns=columns,
            ),
        ),
        dict.fromkeys(("subspaces01", "subspaces03", "subspaces64"), ("BF16", shape)),
    )
    assert all(50 < sum(tensor) < 24 * 21 for tensor in drawn(file))
    return file


@valid
def signs_gain_0() -> File:
    """Nothing is drawn where the score is 0: by the gain, or because float32 has no less."""
    shape = [4, 9]
    gains = {"gain": (0.0, 0), "less": (2.0**-149, -3), "least": (2.0**-149, -1)}
    file = stored_on(
        lambda name, bases, i: signs(
            name,
            bases,
            i,
            parameters(shape, gains[name][0], 1e300, size_rows=(gains[name][1],)),
        ),
        dict.fromkeys(sorted(gains), ("F32", shape)),
    )
    assert drawn(file) == [[0], [36], [0]]
    return file


@valid
def signs_all_drawn() -> File:
    """Rates that reach 65536, exactly, beyond, and infinitely; 65535 leaves the largest draw."""
    shape = [4]
    rates = {"exactly": 1.0, "infinite": 1.7e308, "over": 1e6, "short": 65535 / 65536}
    file = stored_on(
        lambda name, bases, i: signs(
            name, bases, i, parameters(shape, 2.0, rates[name] / 2, seed=seed_of([65535] * 4))
        ),
        dict.fromkeys(rates, ("BF16", shape)),
    )
    infinite = parameters(shape, 3e38, 1.7e308, size_columns=(-60,), columns=(60,))
    file.tensors[1] = signs("infinite", file.base, 1, infinite)
    assert drawn(file) == [[4], [4], [4], [0]]
    return file


@valid
def signs_levels_round_to_even() -> File:
    """Expected draws that are halves, and draws on both sides of what they round to."""
    halves = {"0.5": [0], "0.500001": [1], "1.5": [2], "2.5": [2], "2.500001": [3], "3.5": [4]}
    halves |= {"0.25": [0], "65534.5": [65534], "65535.5": [65536], "65535.49": [65535]}

    def stored(name: str, bases: list[Base], i: int) -> Entry:
        level = halves[name][0]
        draws = [0, max(level - 1, 0), min(level, 65535), 65535]
        rate = float(name) / 65536
        return signs(name, bases, i, parameters([4], 1.0, rate, 2.0**-17, seed_of(draws)))

    file = stored_on(stored, {name: ("F32", [4]) for name in sorted(halves)})
    found = dict(zip(sorted(halves), drawn(file), strict=True))
    assert found["0.25"] == found["0.5"] == [0]
    assert found["0.500001"] == found["1.5"] == found["2.5"] == found["65534.5"] == [2]
    assert found["65535.5"] == [4]
    return file


@valid
def signs_gain_that_is_rounded() -> File:
    """Products of a gain with all bits and half octaves, in float32 and no wider."""
    shape = [24, 11]
    given = parameters(
        shape,
        float.fromhex("0x1.b7e15p-9"),
        float.fromhex("0x1.5555555555555p+7"),
        float.fromhex("0x1.921fb6p+0"),
        0x0123456789ABCDEF,
        size_rows=(*range(-7, 5),),
        size_columns=(0, 1, -1),
        rows=(1, -1, 0, 3, -4),
        columns=(5, 1),
    )
    return stored_on(
        lambda name, bases, i: signs(name, bases, i, given),
        {dtype.lower(): (dtype, shape) for dtype in QUANTISED},
    )


def specials(dtype: str) -> list[int]:
    """Words of both signs: zero, least, subnormal, 1 and its neighbours, largest, inf, NaN."""
    bits, fraction = {"BF16": (16, 7), "F16": (16, 10), "F32": (32, 23)}[dtype]
    sign, infinity = 1 << (bits - 1), (1 << (bits - 1)) - (1 << fraction)
    one = word_of(1.0, DTYPES[dtype][0])
    half = [0, 1, 2, (1 << fraction) - 1, 1 << fraction, one - 1, one, one + 1]
    half += [infinity - 2, infinity - 1, infinity, infinity + 1, sign - 1]
    return [*half, *(word | sign for word in half)]


# Sizes in half octaves, times 1, 2^104 and 2^-120. Of 1, of the largest and of the least floats of
# each dtype: halves and quarters of a unit in the last place, a bit more, and several units.
SIZES = (-60, -59, -58, -57, -56, -55, -54, -52, -51, -50, -49, -48, -47, -46, -44, -28, -26, -25)
SIZES += (-24, -23, -22, -21, -20, -18, -16, -15, -14, -13, -12, -4, -2, 0, 1, 2, 7, 8, 9, 10, 11)
SIZES += (12, 13, 24, 30, 31, 32, 33, 34, 35, 46, 47, 48, 49, 59, 60)
GAINS = {"f16": (0,), "bf16": (0, 104, -120), "f32": (0, 104, -120)}


@valid
def signs_words_that_stay() -> File:
    """Sums that are the base's number, or no finite one; results that are subnormal or zero."""
    bases, tensors = [], []
    for index, dtype in enumerate(QUANTISED):
        words = specials(dtype)
        width, shape = len(words), [2 * len(SIZES), len(words)]
        bases.append(base_tensor(dtype.lower(), dtype, shape, words * shape[0]))
        for gain in GAINS[dtype.lower()]:
            given = parameters(
                shape,
                2.0**gain,
                2.0**200,
                size_rows=[size for size in SIZES for _ in range(2)],
            )
            name = f"{dtype.lower()}.{gain:04}"
            minus = lambda p, width=width: bool(p // width % 2)  # noqa: E731
            tensors.append(signs(name, bases, index, given, minus=minus))
    tensors.sort(key=lambda tensor: tensor.name)
    for tensor in tensors:
        before, after = bases[tensor.base_index].data, tensor.data
        assert before != after
    return File(base=bases, tensors=tensors)


@valid
def signs_changes_that_are_not_finite() -> File:
    """Sizes and factors that are infinite in float32, and 0 times infinity: the words stay."""
    shape, largest = [2, 9], float.fromhex("0x1.fffffep+127")
    given = {
        "factor": parameters(shape, 1.0, 0.5, largest),
        "nan": parameters(
            shape, 2.0**-100, 2.0**99, largest, size_rows=(-60,), size_columns=(-60,), rows=(60,)
        ),
        "size": parameters(shape, largest, 1.0, size_rows=(1,)),
        "subnormal": parameters(shape, 2.0**126, 0.9, 2.0**-149),
    }
    given["nan"].columns = [60] * 9
    file = stored_on(
        lambda name, bases, i: signs(name, bases, i, given[name]),
        dict.fromkeys(sorted(given), ("F32", shape)),
    )
    assert all(nnz for tensor in drawn(file) for nnz in tensor)
    same = [tensor.data == file.base[i].data for i, tensor in enumerate(file.tensors)]
    assert same == [True, True, True, False]
    return file


@valid
def signs_parameters_compressed() -> File:
    """Raw they lie in signs-of-each-dtype."""
    shape = [60, 20]
    file = stored_on(
        lambda name, bases, i: signs(
            name, bases, i, parameters(shape, 2.0**-8, 50.0), compress=name == "zstd"
        ),
        dict.fromkeys(("raw", "zstd"), ("BF16", shape)),
    )
    assert [tensor.chunks[0].mask_zstd for tensor in file.tensors] == [0, 1]
    return file


@valid
def signs_and_levels_of_nothing() -> File:
    """Empty tensors have their parameters, and nothing else."""
    shapes = {"a": [0], "b": [0, 7], "c": [7, 0], "d": [2, 0, 3]}

    def stored(name: str, bases: list[Base], i: int) -> Entry:
        if name.endswith("levels"):
            return levels(name, bases, i, -120, [])
        return signs(name, bases, i, some_signs(shapes[name[0]]), chunk_log2=24)

    file = stored_on(
        stored,
        {
            f"{name}.{codec}": (dtype, shape)
            for (name, shape), dtype in zip(shapes.items(), (*QUANTISED, "F32"), strict=True)
            for codec in ("levels", "signs")
        },
    )
    assert all(len(tensor.chunks) == 1 for tensor in file.tensors)
    return file


@valid
def signs_and_levels_beside_others() -> File:
    """Several tensors of one base tensor, in every codec and several chunk sizes."""
    shape, words = [30, 70], weights("beside", 2100, "BF16")
    bases = [base_tensor("w", "BF16", shape, words)]
    given = some_signs(shape)
    tensors = [
        copy("copy", bases, 0),
        levels("levels.10", bases, 0, -21, [i % 7 - 3 for i in range(2100)]),
        levels("levels.24", bases, 0, -21, [0] * 2100, chunk_log2=24, compress=True),
        new("new", "BF16", [3], [1, 2, 3]),
        signs("signs.10", bases, 0, given),
        signs("signs.11", bases, 0, given, chunk_log2=11),
        signs("signs.24", bases, 0, given, chunk_log2=24),
        delta("ulp", bases, 0, {7: words[7] ^ 1, 2099: 0}, codec=ULP),
    ]
    assert len({sum(chunk.nnz for chunk in tensor.chunks) for tensor in tensors[4:7]}) == 1
    return File(base=bases, tensors=tensors, files=[side_file("config.json", b"{}")])


@valid
def levels_of_each_dtype() -> File:
    """Two chunks, all steps from -128 to 127, exponents that are odd and even."""
    return stored_on(
        lambda name, bases, i: levels(
            name, bases, i, (-25, -26, -31)[i], [(k * 37) % 256 - 128 for k in range(1029 + i)]
        ),
        {dtype.lower(): (dtype, [1029 + i]) for i, dtype in enumerate(QUANTISED)},
    )


@valid
def levels_of_each_rank() -> File:
    shapes = {f"rank{len(shape)}": shape for shape in ([], [5], [3, 5], [2, 2, 3])}
    shapes["rank8"] = [2, 1, 3, 1, 5, 1, 1, 2]
    return stored_on(
        lambda name, bases, i: levels(
            name, bases, i, -16, [(11 * k + 4) % 19 - 9 for k in range(math.prod(shapes[name]))]
        ),
        {name: ("F16", shape) for name, shape in shapes.items()},
    )


@valid
def levels_chunks_compressed_and_raw() -> File:
    """A chunk of one level, one of many, one of zeros: two of the planes are zstd frames."""
    steps = [3] * 1024 + [(k * 37) % 256 - 128 for k in range(1024)] + [0] * 512
    file = stored_on(
        lambda name, bases, i: levels(name, bases, i, -20, steps, compress=True),
        {dtype.lower(): (dtype, [5, 512]) for dtype in ("BF16", "F32")},
    )
    for tensor in file.tensors:
        assert [chunk.planes_zstd for chunk in tensor.chunks] == [0, 1, 0, 1]
    return file


@valid
def levels_words_that_stay() -> File:
    """Steps that do nothing, or too much, to special words; the least and largest exponents."""
    multiples = (0, 1, -1, 2, -3, 64, 127, -127, -128)
    exponents = (-120, -119, -61, -49, -48, -23, -17, -16, -1, 0, 1, 8, 11, 31, 119, 120)
    bases, tensors = [], []
    for index, dtype in enumerate(QUANTISED):
        words = specials(dtype)
        shape = [len(multiples), len(words)]
        bases.append(base_tensor(dtype.lower(), dtype, shape, words * len(multiples)))
        steps = [k for k in multiples for _ in words]
        for exponent in exponents:
            name = f"{dtype.lower()}.{exponent:+04}"
            tensors.append(levels(name, bases, index, exponent, steps, compress=True))
    tensors.sort(key=lambda tensor: tensor.name)
    return File(base=bases, tensors=tensors)


# -- grids ---------------------------------------------------------------------------------------


def integers(seed: str, sizes: Sequence[int] = (0, 0, 0, 1, 1, 2, 3)) -> Callable[[int], int]:
    """Integers by position, of either sign; how many bits they have is drawn from ``sizes``."""

    def integer(position: int) -> int:
        source = random.Random(f"{seed} {position}")
        size = sizes[source.getrandbits(16) % len(sizes)]
        magnitude = (1 << size - 1) + source.getrandbits(size - 1) if size else 0
        return -magnitude if source.getrandbits(1) else magnitude

    return integer


def some_grid(shape: list[int], step: float = 2.0**-13) -> GridParameters:
    """Small changes in a dozen contexts, those of three rows and a column without code."""
    return grid_parameters(
        shape,
        step,
        -5,
        size_rows=(0, 1, -3, 2, NEVER),
        size_columns=(1, 0, -2, 3, -1, 0, NEVER),
        rows=(0, -1, 1),
        columns=(2, 0, 0, -3),
    )


@valid
def grid_of_each_dtype() -> File:
    """Three chunks, a dozen contexts, a step that is no power of 2."""
    shape = [70, 33]
    file = stored_on(
        lambda name, bases, i: grid(
            name, bases, i, some_grid(shape, (1e-4, 1 / 3000, 0.01)[i]), integers(name)
        ),
        {dtype.lower(): (dtype, shape) for dtype in QUANTISED},
    )
    assert all(nnz > 60 for tensor in drawn(file) for nnz in tensor)
    return file


@valid
def grid_of_each_rank() -> File:
    shapes = {f"rank{len(shape)}": shape for shape in ([], [37], [5, 7], [3, 5, 7], [2, 1, 3, 6])}
    shapes["rank8"] = [2, 1, 3, 1, 5, 1, 1, 2]
    shapes["row"], shapes["column"] = [1, 41], [41, 1]
    file = stored_on(
        lambda name, bases, i: grid(
            name,
            bases,
            i,
            grid_parameters(shapes[name], 2.0**-9, rows=(0, 3), columns=(1, 0, 2)),
            integers(name, (1, 0, 2)) if shapes[name] else lambda _: -1,
        ),
        {name: ("BF16", shape) for name, shape in sorted(shapes.items())},
    )
    assert all(sum(tensor) for tensor in drawn(file))
    return file


@valid
def grid_every_magnitude() -> File:
    """0 to 32767, in an order that is learned badly, with both signs."""
    size = 1 << 15
    file = stored_on(
        lambda name, bases, i: grid(
            name,
            bases,
            i,
            grid_parameters([size], 2.0**-16),
            lambda p: (p * 12345 + 6789) % size * (1 if p % 3 else -1),
            chunk_log2=15,
        ),
        {"w": ("F16", [size])},
    )
    assert drawn(file) == [[size - 1]]
    return file


@valid
def grid_edges_of_lengths() -> File:
    """The least and largest magnitudes of every length, alone in their chunk or together."""
    magnitudes = sorted({(1 << n) + more for n in range(1, 15) for more in (-1, 0, 1)} | {1, 32767})
    together = [k for magnitude in magnitudes for k in (magnitude, -magnitude)]

    def alone(position: int) -> int:
        number, place = divmod(position, 1024)
        return together[number] if place == (37 * number) % 1024 else 0

    shapes = {"alone": [len(together), 1024], "together": [len(together)]}
    file = stored_on(
        lambda name, bases, i: grid(
            name,
            bases,
            i,
            grid_parameters(shapes[name], 2.0**-16),
            alone if name == "alone" else lambda p: together[p],
        ),
        {name: ("BF16", shape) for name, shape in shapes.items()},
    )
    assert drawn(file) == [[1] * len(together), [len(together)]]
    return file


@valid
def grid_contexts() -> File:
    """First contexts at, below and above all there are, and far beyond; importance counts too."""
    shape, rows, columns = [30, 26], (*range(-58, 61, 4),), (*range(-60, 44, 4),)
    firsts = {"all": -32, "beyond": 32767, "far": -32768, "high": 40, "low": -100}
    file = stored_on(
        lambda name, bases, i: grid(
            name,
            bases,
            i,
            grid_parameters(
                shape,
                2.0**-30,
                firsts[name],
                size_rows=(0, 5),
                size_columns=(0, 0, -3),
                rows=[row // 2 for row in rows],
                columns=[column // 2 for column in columns],
            ),
            integers("contexts", (0, 1, 1, 2, 4)),
        ),
        dict.fromkeys(firsts, ("F32", shape)),
    )
    sizes = [len(tensor.chunks[1].mask) for tensor in file.tensors]
    assert len({tensor.data for tensor in file.tensors}) == 5  # bases differ
    assert len(set(sizes)) > 2
    return file


@valid
def grid_contexts_all_differ() -> File:
    """64 contexts of different distributions, and elements beyond the first and the last one."""
    shape = [70, 40]
    file = stored_on(
        lambda name, bases, i: grid(
            name,
            bases,
            i,
            grid_parameters(shape, 2.0**-20, -32, size_rows=[*range(-35, 35)], rows=(1, -1)),
            lambda p: integers("differ", [*range(p // 40 // 8 + 1)])(p),
            chunk_log2=12,
        ),
        {"w": ("F32", shape)},
    )
    assert len(file.tensors[0].chunks) == 2
    return file


@valid
def grid_factors_of_0() -> File:
    """Rows and columns whose size is 0: their elements have no code, whatever else is said."""
    shape = [8, 33]
    given = grid_parameters(
        shape,
        2.0**-9,
        -60,
        size_rows=(0, NEVER, 0, 60),
        size_columns=(0, -60, NEVER, 0, 60),
        rows=(60, 60, -60, 0),
        columns=(60, 60, 60, -60, 0),
    )
    nothing = grid_parameters(shape, size_columns=(NEVER,), rows=(60,))
    file = stored_on(
        lambda name, bases, i: grid(
            name, bases, i, given if name == "some" else nothing, lambda p: 1 - p % 3
        ),
        dict.fromkeys(("none", "some"), ("F32", shape)),
    )
    assert drawn(file)[0] == [0]
    assert 50 < drawn(file)[1][0] < 6 * 27
    return file


@valid
def grid_factors_that_are_extreme() -> File:
    """All exponents the least or the largest: what is least has a code, unlike what is 0."""
    shape = [4, 8]
    file = stored_on(
        lambda name, bases, i: grid(
            name,
            bases,
            i,
            grid_parameters(
                shape,
                2.0**-70 if name == "least" else 2.0**50,
                -240 if name == "least" else 200,
                size_rows=(-60, -60, 60, NEVER) if name == "least" else (60, 60, -60),
                size_columns=(-60,) if name == "least" else (60,),
                rows=(-60,) if name == "least" else (60,),
                columns=(-60, -60, -59) if name == "least" else (60, 60, 59),
            ),
            lambda p: 2 - p % 3,
        ),
        dict.fromkeys(("largest", "least"), ("F32", shape)),
    )
    assert [sum(tensor) for tensor in drawn(file)] == [22, 16]
    assert all(
        tensor.data != base.data for tensor, base in zip(file.tensors, file.base, strict=True)
    )
    return file


@valid
def grid_chunks_of_nothing_and_of_all() -> File:
    """Chunks of which nothing, one element, all but one and all elements are kept."""
    shape = [9, 512]
    kept = (lambda p: 0, lambda p: p == 1500, lambda p: 1, lambda p: p != 4000, lambda p: 0)
    file = stored_on(
        lambda name, bases, i: grid(
            name,
            bases,
            i,
            grid_parameters(shape, 2.0**-8),
            lambda p: 0 if name == "none" else int(kept[p // 1024](p)) * (1 + p % 2),
        ),
        dict.fromkeys(("none", "some"), ("F16", shape)),
    )
    assert drawn(file) == [[0] * 5, [0, 1, 1024, 1023, 0]]
    assert all(chunk.codec == CODED for chunk in file.tensors[1].chunks[2:5])
    return file


@valid
def grid_learning() -> File:
    """Runs so long that chances reach their ends, surprises after them, and all 512 rates."""
    size = 1 << 14

    def integer(position: int) -> int:
        if position < 6000:
            return 0
        if position < 12000:
            return -1
        return (0, 1, 2, 3, 32767)[position % 5] if position < 16000 else 0

    file = stored_on(
        lambda name, bases, i: grid(
            name, bases, i, grid_parameters([size], 2.0**-10), integer, chunk_log2=14
        ),
        {"w": ("BF16", [size])},
    )
    assert len(file.tensors[0].chunks[1].mask) < 6500
    return file


@valid
def grid_steps_that_are_rounded() -> File:
    """Steps with all bits of a float64, half octaves, and products with large integers."""
    shape = [24, 11]
    given = grid_parameters(
        shape,
        float.fromhex("0x1.b7e151628aed3p-12"),
        -9,
        rows=(1, -1, 0, 3, -4, -7),
        columns=(5, 1, 0, -2),
    )
    return stored_on(
        lambda name, bases, i: grid(name, bases, i, given, integers(name, (1, 2, 5, 9, 15))),
        {dtype.lower(): (dtype, shape) for dtype in QUANTISED},
    )


@valid
def grid_steps_out_of_range() -> File:
    """Steps that are infinite, subnormal or 0 in float32; changes that are too large or small."""
    shape = [6, 9]
    steps = {"factor": 2.0**100, "huge": 1.7e308, "least": 5e-324, "little": 2.0**-140}
    steps |= {"over": 2.0**128 - 2.0**103, "under": 2.0**-150}
    rows = {"factor": (-60, 60), "little": (0, 3, -3), "under": (0, -1, -2)}
    file = stored_on(
        lambda name, bases, i: grid(
            name,
            bases,
            i,
            grid_parameters(shape, steps[name], rows=rows.get(name, (0,))),
            lambda p: (1, -1, 2, -3, 300, -32767)[p % 6],
        ),
        dict.fromkeys(sorted(steps), ("F32", shape)),
    )
    small = file.base[3]
    small.data = bytes(len(small.data))  # beside which subnormal changes count
    file.tensors[3] = grid(
        "little",
        file.base,
        3,
        grid_parameters(shape, steps["little"], rows=rows["little"]),
        lambda p: (1, -1, 2, -3, 300, -32767)[p % 6],
    )
    same = [tensor.data == file.base[i].data for i, tensor in enumerate(file.tensors)]
    assert same == [False, True, True, False, True, True]
    return file


@valid
def grid_words_that_stay() -> File:
    """Sums that are the base's number, or no finite one; results that are subnormal or zero."""
    integer = (1, -1, 2, -3, 255, -256, 2049, 32767, -32767)
    exponents = (-120, -61, -49, -48, -24, -23, -16, -14, 0, 1, 11, 16, 31, 120)
    bases, tensors = [], []
    for index, dtype in enumerate(QUANTISED):
        words = specials(dtype)
        width, shape = len(words), [len(integer), len(words)]
        bases.append(base_tensor(dtype.lower(), dtype, shape, words * len(integer)))
        for exponent in exponents:
            given = grid_parameters(shape, 2.0**exponent, rows=(0, 1))
            name = f"{dtype.lower()}.{exponent:+04}"
            every = lambda p, width=width: integer[p // width]  # noqa: E731
            tensors.append(grid(name, bases, index, given, every))
    tensors.sort(key=lambda tensor: tensor.name)
    return File(base=bases, tensors=tensors)


@valid
def grid_parameters_compressed() -> File:
    shape = [60, 20]
    file = stored_on(
        lambda name, bases, i: grid(
            name,
            bases,
            i,
            grid_parameters(shape, 2.0**-8),
            integers(name),
            compress=name == "zstd",
        ),
        dict.fromkeys(("raw", "zstd"), ("BF16", shape)),
    )
    assert [tensor.chunks[0].mask_zstd for tensor in file.tensors] == [0, 1]
    return file


@valid
def grid_of_nothing() -> File:
    """Empty tensors have their parameters, and nothing else."""
    shapes = {"a": [0], "b": [0, 7], "c": [7, 0], "d": [2, 0, 3]}
    file = stored_on(
        lambda name, bases, i: grid(
            name, bases, i, some_grid(shapes[name]), lambda p: 1, chunk_log2=24
        ),
        {
            name: (dtype, shape)
            for (name, shape), dtype in zip(shapes.items(), (*QUANTISED, "F32"), strict=True)
        },
    )
    assert all(len(tensor.chunks) == 1 for tensor in file.tensors)
    return file


@valid
def grid_beside_others() -> File:
    """Several tensors of one base tensor, in all lossy codecs and several chunk sizes."""
    shape, words = [30, 70], weights("beside", 2100, "BF16")
    bases = [base_tensor("w", "BF16", shape, words)]
    given, integer = some_grid(shape), integers("beside")
    tensors = [
        copy("copy", bases, 0),
        *(grid(f"grid.{n}", bases, 0, given, integer, chunk_log2=n) for n in (10, 11, 24)),
        levels("levels", bases, 0, -21, [i % 7 - 3 for i in range(2100)]),
        new("new", "BF16", [3], [1, 2, 3]),
        signs("signs", bases, 0, some_signs(shape)),
        delta("ulp", bases, 0, {7: words[7] ^ 1, 2099: 0}, codec=ULP),
    ]
    assert len({tensor.data for tensor in tensors[1:4]}) == 1
    return File(base=bases, tensors=tensors, files=[side_file("config.json", b"{}")])


# -- coded distances -----------------------------------------------------------------------------


def on_weights(
    tensors: dict[str, tuple[str, list[int]]],
    distance: Callable[[str, int], int],
    **options: object,
) -> File:
    """A file of small weights, each so far from what it was; 0 where it is not kept."""

    def make(name: str, bases: list[Base], index: int) -> Entry:
        bits = 8 * DTYPES[tensors[name][0]][1]
        words = enumerate(words_of(bases[index]))
        changes = {p: moved(w, distance(name, p), bits) for p, w in words if distance(name, p)}
        return coded_ulp(name, bases, index, changes, **options)  # type: ignore[arg-type]

    return stored_on(make, tensors)


def some_distance(name: str, position: int) -> int:
    """Small ones often, of a third of all elements."""
    source = random.Random(f"{name}{position}")
    return 1 + int(source.expovariate(0.05)) if source.random() < 0.33 else 0


@valid
def distances_of_each_dtype() -> File:
    """In several contexts, of which some have no element."""
    shape = [3, 700]
    return on_weights(
        {dtype.lower(): (dtype, shape) for dtype in QUANTISED},
        some_distance,
        firsts=(0, 3, 8, 10, 112, 117, 121, 255),
    )


@valid
def distances_of_each_rank() -> File:
    shapes = {f"rank{len(shape)}": shape for shape in ([], [5], [3, 5], [2, 2, 3])}
    shapes["rank8"] = [2, 1, 3, 1, 5, 1, 1, 2]
    return on_weights(
        {name: ("F16", shape) for name, shape in shapes.items()}, lambda _, p: 1 + p % 9
    )


@valid
def distances_of_every_length() -> File:
    """Every token that a dtype has, with low bits 0 and 1; the largest is half of all floats."""
    file = on_weights(
        {dtype.lower(): (dtype, [5 * 8 * DTYPES[dtype][1]]) for dtype in QUANTISED},
        lambda name, p: every_length(8 * DTYPES[name.upper()][1])[p],
    )
    assert {z for _, z in distances_at(file, 2, 0).coded} == {0, *range(2, 64)}
    assert {z for _, z in distances_at(file, 1, 0).coded} == {0, *range(2, 32)}
    return file


def every_length(bits: int) -> list[int]:
    found = []
    for length in range(1, bits + 1):
        low, high = 1 << (length - 1), (1 << length) - 1
        found += [low, high, (2 * low + high) // 3, high - (length > 2), low + (length > 3)]
    return found


def distances_at(file: File, tensor: int, number: int) -> Distances:
    """What a chunk of one context says."""
    entry, base = file.tensors[tensor], file.base[tensor]
    part = slice(number << entry.chunk_log2, (number + 1) << entry.chunk_log2)
    after = words_of(replace(base, data=entry.data))
    return distances_of(words_of(base)[part], after[part], base.dtype)


@valid
def distances_from_specials() -> File:
    """From and to zeros of both signs, subnormals, infinities and NaNs."""
    bases, tensors = [], []
    for index, dtype in enumerate(QUANTISED):
        words = specials(dtype)
        name, size = dtype.lower(), len(words)
        before = [word for word in words for _ in words]
        bases.append(base_tensor(name, dtype, [size, size], before))
        changes = dict(enumerate(words * size))
        tensors.append(coded_ulp(name, bases, index, changes, firsts=(0, 1, 15, 31)))
    return File(base=bases, tensors=tensors)


@valid
def distances_of_nothing_and_of_all() -> File:
    """Chunks that keep nothing, one element, all but one and all; 1 to 5 elements for 4 states."""
    kept = (lambda p: 0, lambda p: p == 1500, lambda p: 1, lambda p: p != 4000, lambda p: 0)
    kept += tuple(lambda p, n=n: p % 1024 in (0, 5, 511, 512, 1023)[:n] for n in range(2, 6))
    file = on_weights(
        {"none": ("BF16", [9 * 1024]), "some": ("BF16", [9 * 1024])},
        lambda name, p: 0 if name == "none" else int(kept[p // 1024](p)) * (1 + p % 7),
        masks=BITMASK,
    )
    assert [chunk.nnz for chunk in file.tensors[1].chunks] == [0, 1, 1024, 1023, 0, 2, 3, 4, 5]
    return file


@valid
def distances_by_each_mask() -> File:
    """Masks may be frames, planes never are."""
    codecs = {"bitmask": BITMASK, "gap16": GAP16, "gap8": GAP8}
    shape = [4096]

    def make(name: str, bases: list[Base], index: int) -> Entry:
        mask, compress = name.split(".")
        words = words_of(bases[index])
        changes = {p: words[p] ^ 1 for p in range(64, 3000, 8)}
        return coded_ulp(
            name,
            bases,
            index,
            changes,
            masks=codecs[mask],
            compress=compress == "zstd",
            chunk_log2=12,
        )

    file = stored_on(
        make, {f"{mask}.{how}": ("F16", shape) for mask in codecs for how in ("raw", "zstd")}
    )
    assert [entry.chunks[0].mask_zstd for entry in file.tensors] == [0, 1] * 3
    return file


@valid
def distances_of_64_contexts() -> File:
    """As many as there may be, next to each other and up to the last exponent."""
    words = [(4 * (i % 64) + 3) << 7 | i % 128 for i in range(2000)]
    bases = [
        base_tensor("close", "BF16", [2000], words),
        base_tensor("wide", "BF16", [2000], words),
    ]
    changes = {i: moved(word, 1 + i % (i % 64 + 1), 16) for i, word in enumerate(words)}
    return File(
        base=bases,
        tensors=[
            coded_ulp("close", bases, 0, changes, firsts=(0, *range(193, 256)), chunk_log2=11),
            coded_ulp("wide", bases, 1, changes, firsts=range(0, 256, 4), chunk_log2=11),
        ],
    )


@valid
def distances_in_contexts_at_their_edges() -> File:
    """Every exponent, of both signs; a context that begins at each, and one exponent later."""
    words = [sign << 15 | e << 7 | 5 for e in range(256) for sign in (0, 1)]
    changes = {i: moved(word, 1 + word % 5, 16) for i, word in enumerate(words)}
    bases = [base_tensor(f"w{first:03}", "BF16", [512], words) for first in (1, 2, 127, 254, 255)]
    tensors = [
        coded_ulp(base.name.decode(), bases, i, changes, firsts=(0, int(base.name[1:])))
        for i, base in enumerate(bases)
    ]
    assert {exponent_of(word, 14) for word in words} == set(range(256))
    return File(base=bases, tensors=tensors)


@valid
def distances_all_the_same() -> File:
    """A share of 4096: states don't move, and there are no words behind them."""
    each = {"one": 1, "two": 2, "three": 3, "four": 4, "largest": 65535}
    file = on_weights(
        dict.fromkeys(sorted(each), ("BF16", [1500])), lambda name, _: each[name], chunk_log2=11
    )
    assert all(len(entry.chunks[0].planes[0]) == 22 for entry in file.tensors)
    sizes = {entry.name.decode(): len(entry.chunks[0].planes[1]) for entry in file.tensors}
    assert sizes == {"four": 188, "largest": 2625, "one": 0, "three": 0, "two": 0}
    return file


@valid
def distances_that_are_rare() -> File:
    """Shares of 1 and of 4095, where states are least and words most; two tokens in turn."""
    rare = {"even": 2, "often": 4, "once": 4096}

    def change(_: int, given: Distances) -> Distances:
        tokens = [token for _, token in given.coded]
        first, last = min(tokens), max(tokens)
        shares = [1, *[0] * (last - first - 1), 4095]
        if tokens.count(first) < len(tokens) // 2:
            shares.reverse()  # what is rare gets nearly all
        return replace(given, contexts=[Context(0, first, shares)])

    return on_weights(
        dict.fromkeys(rare, ("F32", [5000])),
        lambda name, p: 1 if p % rare[name] == 7 % rare[name] else 9 + p % 3,
        chunk_log2=13,
        change=change,
    )


@valid
def distances_with_tokens_that_do_not_occur() -> File:
    """All tokens of the dtype have a share, in each of 64 contexts; the largest table."""

    def change(number: int, given: Distances) -> Distances:
        shares = [1, 0, *[1] * 61, 4096 - 62]
        return replace(given, contexts=[Context(4 * i, 0, shares) for i in range(64)])

    file = on_weights({"w": ("F32", [300])}, lambda _, p: 1 + p * p, change=change)
    assert len(file.tensors[0].chunks[0].planes[0]) > 1 + 64 * 131 + 16
    return file


@valid
def distances_whose_low_bits_fill_bytes() -> File:
    """0 to 17 low bits in all: the last byte is full, or holds one bit."""
    sizes = {f"bits{n:02}": [1 << (n % 9 + 1), 1 << (n - n % 9 + 1), 3] for n in range(18)}
    file = on_weights({name: ("F32", [3]) for name in sizes}, lambda name, p: sizes[name][p])
    assert [len(entry.chunks[0].planes[1]) for entry in file.tensors] == [
        -(-n // 8) for n in range(18)
    ]
    return file


@valid
def distances_beside_others() -> File:
    """Several tensors of one base tensor, in several codecs and chunk sizes; an empty one."""
    shape, words = [30, 70], weights("beside", 2100, "BF16")
    bases = [base_tensor("empty", "F32", [0, 4], []), base_tensor("w", "BF16", shape, words)]
    changes = {i: word + 1 + i % 3 for i, word in enumerate(words) if i % 5 < 2}
    tensors = [
        *(
            coded_ulp(f"coded.{n}", bases, 1, changes, firsts=(0, 118), chunk_log2=n)
            for n in (10, 11, 24)
        ),
        copy("copy", bases, 1),
        coded_ulp("empty", bases, 0, {}),
        grid("grid", bases, 1, some_grid(shape), integers("beside")),
        new("new", "BF16", [3], [1, 2, 3]),
        delta("ulp", bases, 1, changes, codec=ULP),
    ]
    assert len({tensor.data for tensor in (*tensors[:3], tensors[-1])}) == 1
    return File(base=bases, tensors=tensors, files=[side_file("config.json", b"{}")])


for _dtype in DTYPES:
    VALID[f"dtype-{_dtype.lower().replace('_', '-')}"] = lambda name=_dtype: every_codec(name)
