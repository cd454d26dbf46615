"""A bundle's base and a member of it, and zstd frames that repeat what is in a dictionary.

Written from SPEC.md (2.4) and RFC 8878 alone: each match is a block of one sequence, whose three
codes are given by run-length tables, so that no library's choices enter.
"""

from __future__ import annotations

from dataclasses import replace

from parts import (
    ULP,
    File,
    base_tensor,
    copy,
    delta,
    little,
    new,
    random_words,
    side_file,
)

LEAST_MATCH = 16
# Lengths from which a code counts, and the bits that say how many more.
LITERALS = [*((n, 0) for n in range(16)), (16, 1), (18, 1), (20, 1), (22, 1), (24, 2), (28, 2)]
LITERALS += [(32, 3), (40, 3), (48, 4), (64, 6), *((1 << n, n) for n in range(7, 17))]
MATCHES = [*((n, 0) for n in range(3, 35)), (35, 1), (37, 1), (39, 1), (41, 1), (43, 2), (47, 2)]
MATCHES += [(51, 3), (59, 3), (67, 4), (83, 4), (99, 5), *((3 + (1 << n), n) for n in range(7, 17))]


def dictionary_frame(
    data: bytes, dictionary: bytes, *, flags: int = 0xA0, more: bytes = b"", further: int = 0
) -> bytes:
    """One frame of a single segment that states its size in 4 bytes.

    flags: the frame header descriptor's byte; more: what it says follows, before the size.
    further: how much further back than they should matches reach.
    """
    out = b"\x28\xb5\x2f\xfd" + bytes([flags]) + more + little(len(data), 4)
    history, start, at = dictionary + data, len(dictionary), 0
    literals = b""
    while at < len(data):
        here = start + at
        found = history.find(data[at : at + LEAST_MATCH], 0, here + LEAST_MATCH - 1)
        if found < 0 or at + LEAST_MATCH > len(data):
            literals += data[at : at + 1]
            at += 1
            continue
        length = LEAST_MATCH
        while here + length < len(history) and history[found + length] == history[here + length]:
            length += 1
        out += block(sequence(literals, here - found + further, length), kind=2)
        literals, at = b"", at + length
    return out + block(literals, kind=0, last=True)


def block(content: bytes, kind: int, last: bool = False) -> bytes:
    """kind: 0 raw, 2 compressed."""
    return little(int(last) | kind << 1 | len(content) << 3, 3) + content


def sequence(literals: bytes, offset: int, length: int) -> bytes:
    """The content of a compressed block: literals as they are, then one match."""
    codes, bits = [], [1]  # bits are read from the highest one on, which says where they begin
    places = []
    for value, table in ((len(literals), LITERALS), (length, MATCHES)):
        code = max(n for n, (least, _) in enumerate(table) if least <= value)
        codes.append(code)
        places.append((value - table[code][0], table[code][1]))
    code = (offset + 3).bit_length() - 1
    codes.insert(1, code)
    stream = bits[0]
    for value, width in ((offset + 3 - (1 << code), code), places[1], places[0]):
        stream = stream << width | value
    header = little(len(literals) << 4 | 3 << 2, 3)  # raw, with a size of 20 bits
    coded = little(stream, -(-stream.bit_length() // 8))
    return header + literals + b"\1\x54" + bytes(codes) + coded


def bundled_base() -> File:
    """The table of a base of twelve tensors."""
    bases = [
        base_tensor(f"layer.{i:02}.weight", "BF16", [40, 30], random_words(f"b{i}", 1200, 2))
        for i in range(12)
    ]
    return File(base=bases)


def member(dictionary: bytes | None = None) -> File:
    """A fine-tune of that base; by default with the dictionary of its bundle."""
    bases = bundled_base().base
    tensors = [copy(base.name.decode(), bases, i) for i, base in enumerate(bases)]
    for i in (3, 7):
        word = int.from_bytes(bases[i].data[:2], "little")
        tensors[i] = delta(bases[i].name.decode(), bases, i, {0: word ^ 1}, codec=ULP)
    tensors.append(new("score.weight", "BF16", [2, 30], random_words("score", 60, 2)))
    return File(
        base=bases,
        tensors=tensors,
        files=[side_file("config.json", b"{}")],
        metadata=b'{"base_name":"base"}',
        compress_index=True,
        dictionary=base_index() if dictionary is None else dictionary,
        index_frame=lambda raw: dictionary_frame(
            raw, base_index() if dictionary is None else dictionary
        ),
    )


def base_index() -> bytes:
    return bundled_base().raw_index()


def swapped(file: File) -> File:
    """The same with names of base tensors out of order."""
    return replace(file, base=[file.base[1], file.base[0], *file.base[2:]])
