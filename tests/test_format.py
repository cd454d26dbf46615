"""The container: golden bytes, every refusal by its rule, and no byte that goes unchecked."""

from __future__ import annotations

import dataclasses
import io
import json
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from nps_compress import codecs
from nps_compress.codecs import EncodedChunk, MaskCodec, ValueCodec, encode_chunk
from nps_compress.dtypes import BY_NAME, digest
from nps_compress.errors import FormatError, InvalidArgumentError
from nps_compress.format import layout
from nps_compress.format.layout import Op
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import BaseTensor, TensorEntry, base_root, printable
from nps_compress.format.writer import NpsWriter

BF16, U8 = BY_NAME["BF16"], BY_NAME["U8"]
N = 2500  # three chunks of 2^10


def build(metadata: dict[str, str] | None = None) -> bytes:
    """A small file with a delta, a copy, a new tensor and both kinds of side files."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 1 << 16, N).astype(np.uint16)
    after = before.copy()
    after[[3, 1500, 1501, 2499]] ^= 5
    table = [
        BaseTensor("a", BF16, (50, 50), digest(before)),
        BaseTensor("b", BF16, (50, 50), digest(before)),
    ]
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    codec = ValueCodec.ULP
    parts = [slice(i, i + 1024) for i in range(0, N, 1024)]
    writer.add_chunks(encode_chunk(before[p], after[p], BF16, codec) for p in parts)
    writer.add_tensor(TensorEntry("a", BF16, (50, 50), Op.DELTA, codec, 10, 0, digest(after)))
    writer.add_tensor(
        TensorEntry("b", BF16, (50, 50), Op.COPY, ValueCodec.NONE, 0, 1, table[1].digest)
    )
    new = np.arange(7, dtype=np.uint16)
    writer.add_chunks([encode_chunk(None, new, BF16, ValueCodec.REPLACE)])
    writer.add_tensor(
        TensorEntry("c", BF16, (7,), Op.NEW, ValueCodec.REPLACE, 10, None, digest(new))
    )
    writer.add_file("config.json", b"{}")
    writer.add_base_file("vocab.txt", b"word")
    writer.finish(table, metadata or {"k": "v"})
    return stream.getvalue()


GOOD = build()


def open_bytes(tmp_path: Path, data: bytes) -> NpsReader:
    path = tmp_path / "x.nps"
    path.write_bytes(data)
    return NpsReader(path)


def read_all(reader: NpsReader) -> list[bytes]:
    found = []
    for entry in reader.tensors:
        for number in range(entry.chunk_count):
            chunk = reader.read_chunk(entry, number)
            where = b"" if chunk.positions is None else chunk.positions.tobytes()
            found.append(where + chunk.planes.tobytes())
    found += [reader.read_file(entry) for entry in reader.files if entry.op is Op.NEW]
    return found


def rule_of(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(FormatError) as caught:
        read_all(open_bytes(tmp_path, data))
    assert caught.value.path == tmp_path / "x.nps"
    return caught.value.rule


def test_tables_come_back(tmp_path):
    with open_bytes(tmp_path, GOOD) as reader:
        assert [t.name for t in reader.base] == ["a", "b"]
        assert [(t.name, t.op, t.shape, t.base_index) for t in reader.tensors] == [
            ("a", Op.DELTA, (50, 50), 0),
            ("b", Op.COPY, (50, 50), 1),
            ("c", Op.NEW, (7,), None),
        ]
        assert [(f.name, f.op) for f in reader.files] == [
            ("config.json", Op.NEW),
            ("vocab.txt", Op.COPY),
        ]
        assert reader.read_file(reader.files[0]) == b"{}"
        assert reader.metadata == {"k": "v"}
        assert reader.nnz(reader.tensors[0]) == 4
        whole = digest(np.random.default_rng(0).integers(0, 1 << 16, N).astype(np.uint16))
        assert [t.digest for t in reader.base] == [whole[:8]] * 2
        table = [dataclasses.replace(t, digest=whole) for t in reader.base]
        assert reader.base_root == base_root(reversed(table))


def test_bytes_are_deterministic():
    assert build() == GOOD


def test_smallest_file_byte_for_byte(tmp_path):
    stream = io.BytesIO()
    NpsWriter(stream).finish([], {})
    data = stream.getvalue()
    header = b"\x89NPS\r\n\x1a\n" + b"\x01\x00" + bytes(50)
    counts = bytes(12) + b"\x20" + bytes(3) + bytes(16) + b"\x02" + bytes(7)
    content = blake3(b"nps-content\n" + bytes(8)).digest()
    index = counts + blake3(b"").digest() + content + bytes(24) + b"{}"
    footer = b"".join(
        (
            (64).to_bytes(8, "little"),
            (130).to_bytes(8, "little"),
            (130).to_bytes(8, "little"),
            (290).to_bytes(8, "little"),
            blake3(index).digest(),
            b"\x01\x00\x00\x00",
            bytes(16),
        )
    )
    assert data == b"".join(
        (
            header,
            zlib.crc32(header).to_bytes(4, "little"),
            index,
            footer,
            zlib.crc32(footer).to_bytes(4, "little"),
            b"\n\x1a\n\rSPN\x89",
        )
    )
    with open_bytes(tmp_path, data) as reader:
        assert not reader.tensors


def test_geometry_is_frozen():
    sizes = [
        getattr(layout, name).itemsize
        for name in ("HEADER", "FOOTER", "INDEX_HEAD", "BASE_RECORD", "TENSOR_RECORD")
    ]
    assert (*sizes, layout.CHUNK_RECORD.itemsize) == (64, 96, 128, 104, 128, 56)


def test_every_truncation_is_refused(tmp_path):
    for size in range(len(GOOD)):
        with pytest.raises(FormatError):
            open_bytes(tmp_path, GOOD[:size])


def test_every_flipped_bit_is_refused(tmp_path):
    for position in range(len(GOOD)):
        for bit in range(8):
            damaged = bytearray(GOOD)
            damaged[position] ^= 1 << bit
            assert rule_of(tmp_path, bytes(damaged))


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    with open_bytes(tmp_path, GOOD) as reader:
        (tmp_path / "x.nps").write_bytes(GOOD[:70])
        with pytest.raises(FormatError) as caught:
            read_all(reader)
        assert caught.value.rule == "F-SIZE"


def test_a_file_that_is_replaced_while_it_is_open(tmp_path):
    with open_bytes(tmp_path, GOOD) as reader:
        expected = read_all(reader)
        other = tmp_path / "other"
        other.write_bytes(b"x" * len(GOOD))
        other.replace(tmp_path / "x.nps")
        assert read_all(reader) == expected


def test_appended_bytes_are_refused(tmp_path):
    assert rule_of(tmp_path, GOOD + b"\0") == "T-MAGIC"
    assert rule_of(tmp_path, GOOD + GOOD) == "T-SIZE"


# -- hostile files: a field is set and every checksum behind it repaired ------------------------


def set_header(field: str, value: object) -> bytes:
    header = np.frombuffer(GOOD[:64], layout.HEADER).copy()
    header[0][field] = value
    raw = header.tobytes()[:-4]
    return raw + zlib.crc32(raw).to_bytes(4, "little") + GOOD[64:]


def set_footer(**fields: object) -> bytes:
    footer = np.frombuffer(GOOD[-96:], layout.FOOTER).copy()
    for field, value in fields.items():
        footer[0][field] = value
    raw = footer.tobytes()[:-12]
    return GOOD[:-96] + raw + zlib.crc32(raw).to_bytes(4, "little") + GOOD[-8:]


class Index:
    """The index of GOOD, taken apart; ``join`` puts it back into a file with valid checksums."""

    def __init__(self) -> None:
        footer = np.frombuffer(GOOD[-96:], layout.FOOTER)[0]
        assert footer["index_compression"] == 1
        self.start = int(footer["index_offset"])
        from nps_compress.codecs import decompress

        raw = decompress(GOOD[self.start : -96], int(footer["index_raw_bytes"]))
        self.head = np.frombuffer(raw[:128], layout.INDEX_HEAD).copy()
        position = 128
        self.tables = []
        for dtype, count in (
            (layout.BASE_RECORD, 2),
            (layout.TENSOR_RECORD, 3),
            (layout.TENSOR_RECORD, 2),
            (layout.CHUNK_RECORD, 5),
        ):
            end = position + count * dtype.itemsize
            self.tables.append(np.frombuffer(raw[position:end], dtype).copy())
            position = end
        self.base, self.tensors, self.files, self.chunks = self.tables
        self.heap = raw[position : position + int(self.head[0]["heap_bytes"])]
        self.metadata = raw[position + len(self.heap) :]

    def join(self, data: bytes | None = None, fix_head: bool = True) -> bytes:
        data = GOOD[64 : self.start] if data is None else data
        if fix_head:
            self.head["heap_bytes"] = len(self.heap)
            self.head["metadata_bytes"] = len(self.metadata)
        tables = b"".join(table.tobytes() for table in self.tables)
        index = self.head.tobytes() + tables + self.heap + self.metadata
        footer = np.frombuffer(GOOD[-96:], layout.FOOTER).copy()[0]
        footer["index_offset"] = 64 + len(data)
        footer["index_stored_bytes"] = footer["index_raw_bytes"] = len(index)
        footer["index_compression"] = 0
        footer["file_bytes"] = 64 + len(data) + len(index) + 96
        footer["index_digest"] = np.void(blake3(index).digest())
        raw = footer.tobytes()[:-12]
        crc = zlib.crc32(raw).to_bytes(4, "little")
        return GOOD[:64] + data + index + raw + crc + layout.MAGIC_REVERSED


def test_taken_apart_and_put_back(tmp_path):
    assert read_all(open_bytes(tmp_path, Index().join())) == read_all(open_bytes(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("magic", np.void(b"\x89NPS\n\x1a\n\0"), "H-MAGIC"),
        ("major", 2, "H-MAJOR"),
        ("required_features", 1, "H-FEATURE"),
        ("reserved0", 1, "H-RESERVED"),
        ("reserved1", np.void(b"\1" * 28), "H-RESERVED"),
        ("minor", 7, "T-VERSION"),
    ],
)
def test_header_rules(tmp_path, field, value, rule):
    assert rule_of(tmp_path, set_header(field, value)) == rule


def test_optional_features_are_ignored(tmp_path):
    assert read_all(open_bytes(tmp_path, set_header("optional_features", 5)))


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"major": 2}, "T-VERSION"),
        ({"reserved": np.void(b"\1" * 3)}, "T-RESERVED"),
        ({"dictionary_bytes": 1}, "T-RESERVED"),
        ({"dictionary_digest64": np.void(b"\1" * 8)}, "T-RESERVED"),
        ({"file_bytes": 1}, "T-SIZE"),
        ({"index_offset": 0}, "T-INDEX"),
        ({"index_offset": 2**64 - 1}, "T-INDEX"),
        ({"index_offset": 65}, "T-INDEX"),
        ({"index_stored_bytes": 2**64 - 100}, "T-INDEX"),
        ({"index_raw_bytes": 2**63}, "T-INDEXSIZE"),
        ({"index_raw_bytes": 1}, "T-INDEXSIZE"),
        ({"index_raw_bytes": 2**21}, "T-INDEXSIZE"),
        ({"index_raw_bytes": 100}, "T-INDEXSIZE"),
        ({"index_compression": 0}, "T-INDEXSIZE"),
        ({"index_compression": 9}, "T-COMPRESSION"),
        ({"index_digest": np.void(bytes(32))}, "I-DIGEST"),
        ({"index_raw_bytes": 1000}, "I-ZSTD"),
    ],
)
def test_footer_rules(tmp_path, fields, rule):
    assert rule_of(tmp_path, set_footer(**fields)) == rule


SETTINGS = [
    ("head", "reserved", 0, np.void(bytes(23) + b"\1"), "I-RESERVED"),
    *(("head", "digest_bytes", 0, size, "I-DIGESTS") for size in (0, 7, 9, 31, 33)),
    ("head", "digest_bytes", 0, 32, "I-ROOT"),
    ("base", "digest", 1, [0] * 8 + [1] + [0] * 23, "I-DIGESTS"),
    ("tensors", "digest", 0, [0] * 31 + [1], "I-DIGESTS"),
    ("files", "digest", 1, [0] * 31 + [1], "I-DIGESTS"),
    ("head", "base_records", 0, 2**32 - 1, "I-COUNT"),
    ("head", "chunk_records", 0, 2**60, "I-SIZE"),
    ("head", "chunk_records", 0, 4, "I-SIZE"),
    ("base", "reserved", 1, 1, "I-RESERVED"),
    ("base", "name_bytes", 0, 0, "N-HEAP"),
    ("base", "dtype", 0, 99, "S-DTYPE"),
    ("base", "rank", 0, 9, "S-RANK"),
    ("base", "rank", 0, 1, "S-DIM"),
    ("base", "shape", 0, [2**63, 2**63] + [0] * 6, "S-NUMEL"),
    ("base", "shape", 0, [0, 2**63] + [0] * 6, "S-NUMEL"),
    ("base", "shape", 0, [25, 100] + [0] * 6, "R-SHAPE"),
    ("tensors", "dtype", 0, 13, "R-SHAPE"),
    ("tensors", "op", 0, 0, "R-OP"),
    ("tensors", "op", 0, 4, "R-OP"),
    ("tensors", "op", 0, 3, "R-BASE"),
    ("tensors", "op", 0, 1, "R-COPY"),
    ("tensors", "base_index", 0, 2, "R-BASE"),
    ("tensors", "base_index", 0, 2**32 - 1, "R-BASE"),
    ("tensors", "base_index", 2, 0, "R-BASE"),
    ("tensors", "value_codec", 0, 0, "R-VALUES"),
    ("tensors", "value_codec", 0, 19, "R-VALUES"),
    ("tensors", "value_codec", 1, 1, "R-VALUES"),
    ("tensors", "value_codec", 2, 3, "R-VALUES"),
    ("tensors", "chunk_log2", 0, 9, "R-CHUNKLOG"),
    ("tensors", "chunk_log2", 0, 25, "R-CHUNKLOG"),
    ("tensors", "chunk_log2", 0, 255, "R-CHUNKLOG"),
    ("tensors", "chunk_log2", 1, 10, "R-CHUNKLOG"),
    ("tensors", "chunk_log2", 0, 11, "C-COUNT"),
    ("tensors", "reserved1", 0, 1, "R-RESERVED"),
    ("tensors", "digest", 1, [0] * 7 + [1] + [0] * 24, "R-COPY"),
    ("head", "file_records", 0, 65, "I-COUNT"),
    ("files", "shape", 1, [2**26 + 1] + [0] * 7, "R-FILE"),
    ("files", "dtype", 0, 1, "R-FILE"),
    ("files", "op", 0, 2, "R-FILE"),
    ("files", "base_index", 0, 0, "R-BASE"),
    ("files", "digest", 0, [1] * 8 + [0] * 24, "D-DIGEST"),
    ("chunks", "nnz", 0, 1025, "C-NNZ"),
    ("chunks", "mask_codec", 0, 5, "C-CODEC"),
    ("chunks", "mask_codec", 0, 0, "C-CODEC"),
    ("chunks", "mask_codec", 0, 1, "C-CODEC"),
    ("chunks", "mask_codec", 3, 2, "C-CODEC"),
    ("chunks", "reserved", 0, 1, "C-FLAGS"),
    ("chunks", "mask_compressed", 0, 2, "C-FLAGS"),
    ("chunks", "planes_compressed", 0, 4, "C-FLAGS"),
    ("chunks", "mask_raw_bytes", 0, 2**32 - 1, "C-MASKSIZE"),
    ("chunks", "mask_compressed", 0, 1, "C-STORED"),
    ("chunks", "planes_compressed", 0, 1, "C-STORED"),
    ("chunks", "plane_stored_bytes", 0, [1, 1, 1, 0, 0, 0, 0, 0], "C-STORED"),
    ("chunks", "plane_stored_bytes", 0, [2, 1, 0, 0, 0, 0, 0, 0], "C-STORED"),
    ("chunks", "digest64", 0, [0] * 8, "P-DIGEST"),
]


@pytest.mark.parametrize(("table", "field", "row", "value", "rule"), SETTINGS)
def test_index_rules(tmp_path, table, field, row, value, rule):
    index = Index()
    getattr(index, table)[row][field] = value
    assert rule_of(tmp_path, index.join(fix_head=table != "head")) == rule


@pytest.mark.parametrize(
    ("heap", "rule"),
    [
        (b"abab", "N-HEAP"),
        (b"aaabcconfig.jsonvocab.txt", "N-ORDER"),
        (b"baabcconfig.jsonvocab.txt", "N-ORDER"),
        (b"ab\x1bbcconfig.jsonvocab.txt", "N-CONTROL"),
        (b"ab\xffbcconfig.jsonvocab.txt", "N-UTF8"),
        (b"ababc../fig.jsonvocab.txt", "N-FILE"),
    ],
)
def test_name_rules(tmp_path, heap, rule):
    index = Index()
    index.heap = heap
    assert rule_of(tmp_path, index.join()) == rule


def test_reserved_name_rule(tmp_path):
    index = Index()
    index.heap = b"ab__metadata__bcconfig.jsonvocab.txt"
    index.tensors[0]["name_bytes"] = len("__metadata__")
    assert rule_of(tmp_path, index.join()) == "N-RESERVED"


def test_name_length_rule(tmp_path):
    index = Index()
    index.base[0]["name_bytes"], index.base[1]["name_bytes"] = 0, 2
    assert rule_of(tmp_path, index.join()) == "N-LENGTH"


@pytest.mark.parametrize(
    ("metadata", "rule"),
    [
        (b"", "M-JSON"),
        (b"[]", "M-JSON"),
        (b'[["a","b"]]', "M-JSON"),
        (b'{"a":1}', "M-JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "M-JSON"),
        (b'{"a":NaN}', "M-JSON"),
        (b'{"a":{"b":"c"}}', "M-JSON"),
        (b'{"a":' * 100_000, "M-JSON"),
        (b'{"a":"\xff"}', "M-JSON"),
        (b'{"a":"\\ud800"}', "M-JSON"),
        (b'{"a":"b"}x', "M-JSON"),
        (b'{"a":"b","a":"b"}', "M-KEYS"),
        (b'{"a":"' + b"x" * 2**20 + b'"}', "M-SIZE"),
    ],
)
def test_metadata_rules(tmp_path, metadata, rule):
    index = Index()
    index.metadata = metadata
    assert rule_of(tmp_path, index.join()) == rule


def test_data_that_chunks_do_not_cover(tmp_path):
    data = GOOD[64 : Index().start]
    assert rule_of(tmp_path, Index().join(data + bytes(8))) == "C-LAYOUT"


def test_padding_must_be_zero(tmp_path):
    data = bytearray(GOOD[64 : Index().start])
    index = Index()
    used = int(layout.stored_chunk_bytes(index.chunks)[0])
    assert used % 8
    data[used] = 1
    assert rule_of(tmp_path, index.join(bytes(data))) == "C-PADDING"


def test_mask_must_agree_with_its_record(tmp_path):
    data, index = bytearray(GOOD[64 : Index().start]), Index()
    size = int(layout.stored_chunk_bytes(index.chunks)[1])
    start = layout.aligned(int(layout.stored_chunk_bytes(index.chunks)[0]))
    mask = int(index.chunks[1]["mask_stored_bytes"])
    data[start : start + mask] = b"\xff" * mask  # the second chunk's gaps all become escapes
    chunk = bytes(data[start : start + size])
    index.chunks[1]["digest64"] = np.frombuffer(layout.digest64(chunk), np.uint8)
    assert rule_of(tmp_path, index.join(bytes(data))) == "P-ESCAPE"


def test_writer_refuses_what_the_reader_would(tmp_path):
    writer = NpsWriter(io.BytesIO())
    for name in ("", "x" * 513, "a\nb", "a\x9bb", "__metadata__"):
        with pytest.raises(InvalidArgumentError):
            writer.add_tensor(
                TensorEntry(name, BF16, (), Op.COPY, ValueCodec.NONE, 0, 0, bytes(32))
            )
    with pytest.raises(InvalidArgumentError):
        writer.add_file("../evil", b"")
    with pytest.raises(InvalidArgumentError):
        writer.finish([], {"k": "x" * 2**20})
    for names in (["a\n"], ["b", "a"], ["a", "a"], ["__metadata__"]):
        with pytest.raises(InvalidArgumentError):
            writer.finish([BaseTensor(name, BF16, (), bytes(32)) for name in names], {})


def copied(name: str) -> TensorEntry:
    return TensorEntry(name, BF16, (), Op.COPY, ValueCodec.NONE, 0, 0, bytes(32))


def test_writer_keeps_names_in_order():
    writer = NpsWriter(io.BytesIO())
    writer.add_tensor(copied("b"))
    for name in ("a", "b"):
        with pytest.raises(InvalidArgumentError, match="greater than 'b'"):
            writer.add_tensor(copied(name))
    writer.add_base_file("b", b"")
    with pytest.raises(InvalidArgumentError, match="greater than 'b'"):
        writer.add_file("a", b"")


def test_writer_keeps_the_limits(monkeypatch):
    writer = NpsWriter(io.BytesIO())
    for number in range(layout.MAX_FILES):
        writer.add_base_file(f"f{number:02}", b"")
    with pytest.raises(InvalidArgumentError, match="64 at most"):
        writer.add_base_file("g", b"")
    monkeypatch.setattr(layout, "MAX_FILE_BYTES", 3)
    for add in (NpsWriter(io.BytesIO()).add_file, NpsWriter(io.BytesIO()).add_base_file):
        add("a", b"abc")
        with pytest.raises(InvalidArgumentError, match="at most 64 MiB"):
            add("b", b"abcd")
    table = [BaseTensor(name, BF16, (), bytes(32)) for name in "ab"]
    monkeypatch.setattr(layout, "MAX_RECORDS", 1)
    with pytest.raises(InvalidArgumentError, match="1 at most"):
        NpsWriter(io.BytesIO()).finish(table, {})
    monkeypatch.undo()
    monkeypatch.setattr(layout, "MAX_INDEX_BYTES", 200)
    with pytest.raises(InvalidArgumentError, match="at most 1 GiB"):
        NpsWriter(io.BytesIO()).finish(table, {})


def test_order_of_metadata_does_not_matter():
    assert build({"a": "1", "b": "2"}) == build({"b": "2", "a": "1"})


def test_a_chunk_stored_raw_is_the_same_chunk(rng):
    before = rng.integers(0, 1 << 16, 8192).astype(np.uint16)
    after = before.copy()
    after[::2] ^= rng.integers(1, 256, 4096).astype(np.uint16)  # low bytes random, high ones 0
    chunk = encode_chunk(before, after, BF16, ValueCodec.XOR)
    assert chunk.mask_compressed
    assert chunk.planes_compressed == 2
    raw = chunk.stored_raw()
    assert (raw.mask_compressed, raw.planes_compressed) == (False, 0)
    assert raw.raw_bytes == len(raw.data) == chunk.raw_bytes
    assert raw.mask == codecs.decompress(chunk.mask, chunk.mask_raw_bytes)
    planes = codecs.decode_planes(chunk.planes, chunk.planes_compressed, chunk.nnz)
    assert b"".join(raw.planes) == planes.tobytes()


def test_writer_bounds_the_expansion_of_masks(tmp_path):
    bits = np.zeros(1 << 21, np.uint8)
    bits[0] = 1
    mask = codecs.compress(bits.tobytes(), 19)
    chunk = EncodedChunk(1, MaskCodec.BITMASK, 1 << 21, True, mask, 0, (b"\1",))
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    writer.add_chunks([chunk] * 40)
    shape = (40 << 24,)
    writer.add_tensor(TensorEntry("w", U8, shape, Op.DELTA, ValueCodec.XOR, 24, 0, bytes(32)))
    writer.finish([BaseTensor("w", U8, shape, bytes(32))], {})
    assert len(stream.getvalue()) < 3 << 20  # one of 80 MiB is enough
    with open_bytes(tmp_path, stream.getvalue()) as reader:
        reader.verify(reader.tensors[0])
        place = np.frombuffer(stream.getvalue()[-96:], layout.FOOTER)[0]["index_offset"]
        assert reader.stored_bytes(reader.tensors[0]) == place - 64


def test_printable_escapes_terminal_sequences():
    assert printable("a\x1b[31mb\u202e") == "a\\x1b[31mb\\u202e"
    assert json.loads(json.dumps({"k": "é"}))["k"] == printable("é")


def test_zstd_cannot_have_made_a_stream_that_small(tmp_path):
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    zeros = np.zeros(1 << 20, np.uint16)
    chunk = encode_chunk(None, zeros, BF16, ValueCodec.REPLACE)
    assert all(32 <= len(plane) < 4096 for plane in chunk.planes)
    writer.add_chunks([dataclasses.replace(chunk, planes=tuple(p[:31] for p in chunk.planes))])
    writer.add_tensor(
        TensorEntry("z", BF16, (1 << 20,), Op.NEW, ValueCodec.REPLACE, 20, None, digest(zeros))
    )
    writer.finish([], {})
    assert rule_of(tmp_path, stream.getvalue()) == "C-STORED"


def test_opening_many_records_is_quick(tmp_path):
    table = [BaseTensor(f"{i:06}", BF16, (1,), bytes(32)) for i in range(60_000)]
    stream = io.BytesIO()
    NpsWriter(stream).finish(table, {})
    start = time.perf_counter()
    with open_bytes(tmp_path, stream.getvalue()) as reader:
        assert len(reader.base) == 60_000
    assert time.perf_counter() - start < 5  # 0.3 s on a quiet core
