"""README and SPEC say what is true."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from conftest import ROOT

import nps_compress
from nps_compress import codecs, entropy_coding, mask_coding, rank_one, sign_codec, ulp_coding
from nps_compress.cli import main
from nps_compress.codecs import MaskCodec, ValueCodec
from nps_compress.dtypes import DTYPES
from nps_compress.format import layout
from nps_compress.format.writer import NpsWriter
from nps_compress.report import Quality, Trial, errors_to_metadata

README = (ROOT / "README.md").read_text()
SPEC = (ROOT / "format_spec" / "SPEC.md").read_text()


def test_readme_example_runs(tiny, tmp_path, monkeypatch):
    tiny[1].rename(tmp_path / "law")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "law-rebuilt" / "model.safetensors").exists()


def test_readme_names_exist():
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        for name in re.findall(r"nps_compress\.(\w+)", code):
            assert hasattr(nps_compress, name)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_readme_shows_every_command(command):
    assert f"nps-compress {command}" in README


def test_readme_options_exist():
    commands = [*main.commands.values(), *main.commands["bundle"].commands.values()]
    options = {o for c in commands for p in c.params for o in p.opts} | {"--help"}
    readme = re.sub(
        r"`python benchmarks/.*?`|^vllm serve .*$| -- --.*$", "", README, flags=re.M
    )  # not ours
    assert set(re.findall(r"--[a-z][a-z-]+", readme)) <= options


def test_readme_options_of_benchmarks_exist():
    commands = re.findall(r"`python (benchmarks/\w+\.py)(.*?)`", README)
    assert commands
    for script, words in commands:
        for option in re.findall(r"--[a-z][a-z-]+", words):
            assert f'"{option}"' in (ROOT / script).read_text()


def test_readme_is_finished():
    assert not re.findall(r"@[A-Z]+@", README)


def test_readme_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.M)


@pytest.mark.parametrize(
    ("section", "dtype"),
    [
        ("2.1", layout.HEADER),
        ("2.3", layout.FOOTER),
        ("3.1", layout.INDEX_HEAD),
        ("3.2", layout.BASE_RECORD),
        ("3.3", layout.TENSOR_RECORD),
        ("3.5", layout.CHUNK_RECORD),
    ],
)
def test_spec_tables_are_the_code(section, dtype):
    text = SPEC.split(f"### {section} ")[1].split("###")[0].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", text, re.M)
    stated = [(int(offset), int(size), name) for offset, size, name in rows]
    fields = [(dtype.fields[n][1], dtype.fields[n][0].itemsize, n) for n in dtype.names]
    assert stated == fields


def test_spec_codes_are_the_code():
    section = SPEC.split("## 4. ")[1].split("\n## ")[0]
    stated = {
        (int(code), name, int(width))
        for code, name, width in re.findall(r"(\d+) \| ([A-Z0-9_]+) \| (\d)", section)
    }
    assert stated == {(d.code, d.name, d.itemsize) for d in DTYPES}
    for number, codes in (("5", MaskCodec), ("6", ValueCodec)):
        section = SPEC.split(f"## {number}. ")[1].split("\n## ")[0]
        rows = re.findall(r"^\| (\d+) \| (\w+) \|", section, re.M)
        assert [(int(c), n) for c, n in rows] == [(c.value, c.name.lower()) for c in codes]


def test_spec_rules_are_those_raised():
    section = SPEC.split("## 8. ")[1].split("\n## ")[0]
    listed = re.findall(r"^\| ([A-Z]-[A-Z0-9]+) \|", section, re.M)
    assert (
        len(listed) == len(set(listed)) + 4
    )  # a count, a code, or a tail can be wrong in several places
    source = "".join(path.read_text() for path in (ROOT / "nps_compress").rglob("*.py"))
    raised = set(re.findall(r'"([A-Z]-[A-Z0-9]+)"', source))
    assert set(listed) == raised


def test_spec_lists_the_metadata():
    section = SPEC.split("### 3.6 ")[1].split("###")[0]
    cells = re.findall(r"^\| (quality_.*?) \|", section, re.M)
    stated = [key for cell in cells for key in cell.split(", ")]
    full = Quality("kl", *[0.5] * 9, (Trial(0.5, 1.0),), "causal-lm", 0, 1, "ab" * 32)
    assert sorted(stated) == sorted({**full.to_metadata(), **errors_to_metadata(0.5, [0.5])})


def test_spec_limits_are_the_code():
    section = SPEC.split("## 12. ")[1]
    rows = re.findall(
        r"^\| ([a-z][a-z_0-9, ]+) \| ([^|]+) \| ([A-Z-]+(?:, [A-Z-]+)?) \|", section, re.M
    )
    stated = {}
    for name, value, _ in rows:
        numbers = re.findall(r"(\d+)(?:\^(\d+))?", value)
        stated[name] = [int(number) ** int(power or 1) for number, power in numbers]
    none, one = (entropy_coding.stream_bytes_range(numel) for numel in (0, 1))
    assert none == (one[0], one[0])
    least_mask = mask_coding.stream_bytes_range(0)[1]
    tokens = [ulp_coding.most_token_bytes(nnz) for nnz in (0, 1)]
    least = ulp_coding.LEAST_TOKEN_BYTES
    works = [codecs.distances_work(least + more, 2, 0) for more in range(6)]
    assert stated == {
        "records of the base, of the tensors": [layout.MAX_RECORDS],
        "files": [layout.MAX_FILES],
        "bytes of a file": [layout.MAX_FILE_BYTES],
        "bytes of a digest in a base, tensor or file record": [
            layout.DIGEST_BYTES,
            layout.SHORT_DIGEST_BYTES,
        ],
        "bytes of a name": [layout.MAX_NAME_BYTES],
        "rank": [layout.MAX_RANK],
        "elements of a tensor": [layout.MAX_NUMEL],
        "chunk_log2": [layout.MIN_CHUNK_LOG2, layout.MAX_CHUNK_LOG2],
        "bytes of the index": [layout.MAX_INDEX_BYTES],
        "expansion of the index": [layout.MAX_INDEX_RATIO, layout.INDEX_RATIO_SLACK],
        "expansion of a stream": [layout.MAX_ZSTD_RATIO],
        "expansion of all streams": [layout.MAX_EXPANSION, layout.EXPANSION_SLACK],
        "elements that are drawn, as bytes": [1, codecs.DRAWN_PER_BYTE],
        "elements that are coded, as bytes": [1, codecs.CODED_PER_BYTE, codecs.BYTES_PER_CODED],
        "elements of learned masks, as bytes": [1, codecs.CODED_PER_BYTE],
        "coded distances, as bytes": [codecs.distances_work(0, itemsize, 1) for itemsize in (2, 4)],
        "contexts of distances, as bytes": [works[0], works.index(2 * works[0]), least],
        "bytes of metadata": [layout.MAX_METADATA_BYTES],
        "window of a zstd frame": [codecs.MAX_ZSTD_WINDOW],
        "subspaces of signs": [1, sign_codec.SUBSPACES],
        "bytes of coded magnitudes": [none[0], 0, one[1] - one[0]],
        "bytes of a learned mask": [
            least_mask,
            0,
            mask_coding.stream_bytes_range(1)[1] - least_mask,
        ],
        "bytes of tokens": [least, tokens[0], tokens[1] - tokens[0]],
        "bytes of low bits": [0, 16 - ulp_coding.most_low_bytes(2, 8), 8],
        "contexts of distances": [1, ulp_coding.MAX_CONTEXTS],
        "sum of the shares of a context": [1 << 12],
        "exponents of rows and columns": [rank_one.LARGEST, rank_one.LARGEST],
        "exponent of a step": [2 * rank_one.LARGEST, 2 * rank_one.LARGEST],
    }
    rules = set(re.findall(r"^\| ([A-Z]-[A-Z0-9]+) \|", SPEC.split("## 8. ")[1], re.M))
    assert {rule for *_, named in rows for rule in named.split(", ")} <= rules


def test_fuzzing_figures_are_those_recorded():
    text = (ROOT / "format_spec" / "FUZZING.md").read_text()
    with (ROOT / "format_spec" / "fuzzing.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for target in {row["target"] for row in rows}:
        mine = [row for row in rows if row["target"] == target]
        seconds, runs = (sum(int(r[n]) for r in mine) for n in ("cpu_seconds", "executions"))
        assert f"| {target} | {seconds:,} | {runs:,} |" in text
    assert f"{sum(int(row['cpu_seconds']) for row in rows):,} seconds" in text


def test_readme_counts_the_vectors():
    expected = json.loads((ROOT / "format_spec" / "vectors" / "expected.json").read_text())
    assert f"{sum(map(len, expected.values()))} vectors" in README


def test_spec_dump_is_the_smallest_file():
    section = SPEC.split("## 11. ")[1].split("\n## ")[0]
    lines = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)", section, re.M)
    stream = io.BytesIO()
    NpsWriter(stream).finish([], {})
    assert bytes.fromhex("".join(lines)) == stream.getvalue()
