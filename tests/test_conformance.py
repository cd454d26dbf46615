"""The standard's own corpus: vectors, and three readers that must agree on each of them."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from functools import cache

import pytest
from blake3 import blake3
from click.testing import CliRunner
from conftest import ROOT

import conformance
import kaitai_reader
import minimal_reader
from nps_compress.cli import main

SPEC = ROOT / "format_spec"
VECTORS = SPEC / "vectors"
EXPECTED = json.loads((VECTORS / "expected.json").read_text())
NAMES = [f"{kind}/{name}" for kind in conformance.KINDS for name in EXPECTED[kind]]


@cache
def rows() -> dict[str, conformance.Row]:
    return {row.vector: row for row in conformance.read_all()}


@pytest.mark.parametrize("vector", NAMES)
def test_readers_agree(vector):
    row = rows()[vector]
    assert row.agrees, row


def test_table_is_the_last_word():
    assert conformance.TABLE.read_text() == conformance.table(list(rows().values()))


@pytest.mark.parametrize("reader", ["by_package", "by_minimal_reader", "by_kaitai"])
class TestReadersThatDiffer:
    """Each of the three, alone, is noticed."""

    def test_refuses_what_is_valid(self, reader, monkeypatch):
        monkeypatch.setattr(conformance, reader, lambda *_: conformance.REFUSED)
        row = conformance._valid("smallest", EXPECTED["valid"]["smallest"])
        assert not row.agrees
        assert "**DIFFER**" in conformance.table([row])

    def test_accepts_what_is_not(self, reader, monkeypatch):
        monkeypatch.setattr(conformance, reader, lambda *_: {})
        assert not conformance._refused("reject", "H-MAJOR-2", "H-MAJOR").agrees

    def test_finds_something_else(self, reader, monkeypatch):
        name = "side-files" if reader != "by_kaitai" else "chunk-boundaries"
        found = getattr(conformance, reader)

        def changed(*paths):
            result = found(*paths)
            if reader == "by_kaitai":
                next(reversed(result["tensors"].values()))["kept"] += 1
                return result
            return {**result, "files": dict.fromkeys(result["files"], "0" * 64)}

        monkeypatch.setattr(conformance, reader, changed)
        assert not conformance._valid(name, EXPECTED["valid"][name]).agrees

    def test_fails_the_command(self, reader, monkeypatch, tmp_path):
        monkeypatch.setattr(conformance, reader, lambda *_: conformance.REFUSED)
        row = conformance._valid("smallest", EXPECTED["valid"]["smallest"])
        monkeypatch.setattr(conformance, "read_all", lambda: [row])
        monkeypatch.setattr(conformance, "TABLE", tmp_path / "table.md")
        assert conformance.main() == 1


@pytest.mark.parametrize("reader", ["by_package", "by_minimal_reader"])
def test_another_rule_is_noticed(reader, monkeypatch):
    monkeypatch.setattr(conformance, reader, lambda *_: "H-CRC")
    assert not conformance._refused("reject", "H-MAJOR-2", "H-MAJOR").agrees


def test_minimal_reader_checks_files_as_it_rebuilds():
    nps = minimal_reader.Nps((VECTORS / "reject" / "D-DIGEST-file.nps").read_bytes())
    base = VECTORS / "reject" / "D-DIGEST-delta.base.safetensors"
    with pytest.raises(minimal_reader.Refused, match="D-DIGEST"):
        nps.rebuild(minimal_reader.read_safetensors(base))


def test_vectors_come_out_of_their_generator_byte_for_byte(tmp_path):
    generator = VECTORS / "generate.py"
    subprocess.run([sys.executable, str(generator), str(tmp_path)], check=True, capture_output=True)
    made = {str(p.relative_to(tmp_path)): p for p in tmp_path.rglob("*") if p.is_file()}
    kept = {
        str(p.relative_to(VECTORS)): p
        for p in VECTORS.rglob("*")
        if p.suffix in (".nps", ".safetensors", ".json")
    }
    assert set(made) == set(kept)
    for name, path in made.items():
        assert path.read_bytes() == kept[name].read_bytes(), name


def test_every_rule_has_a_vector():
    text = (SPEC / "SPEC.md").read_text().split("## 8. ")[1].split("\n## ")[0]
    rules = set(re.findall(r"^\| ([A-Z]-[A-Z0-9]+) \|", text, re.M))
    names = {name.split("/")[-1] for name in EXPECTED["reject"]}
    assert {"-".join(name.split("-")[:2]) for name in names} == rules
    assert set(EXPECTED["reject"].values()) == rules
    assert len(EXPECTED["reject"]) >= 80
    assert len(EXPECTED["valid"]) >= 25


def test_readers_are_independent():
    allowed = set(sys.stdlib_module_names) | {"numpy", "zstandard", "blake3", "kaitaistruct"}
    files = [SPEC / "minimal_reader.py", *VECTORS.glob("*.py"), *(SPEC / "kaitai").glob("*.py")]
    own = {"parts", "signs", "grids", "learned", "distances", "bundles", "valid", "reject"}
    own |= {"nps", "nps_zstd"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in imported} <= allowed | own, path
    assert len((SPEC / "minimal_reader.py").read_text().splitlines()) <= 760


def test_kaitai_parser_is_compiled_from_the_description():
    digest = hashlib.sha256((SPEC / "nps.ksy").read_bytes()).hexdigest()
    first, *_ = (SPEC / "kaitai" / "nps.py").read_text().splitlines()
    assert first == f"# From nps.ksy, SHA-256 {digest}"


def test_kaitai_states_most_rules():
    refused = {row.expected for row in rows().values() if row.outcomes[2] == conformance.REFUSED}
    assert refused >= kaitai_reader.RULES
    assert len(kaitai_reader.RULES) >= 40


def minimal(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SPEC / "minimal_reader.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


class TestMinimalReader:
    """Its command line; what it decodes is tested by the vectors."""

    task = VECTORS / "valid" / "dtype-bf16.nps"
    base = VECTORS / "valid" / "dtype-bf16.base.safetensors"

    def test_lists(self):
        done = minimal("list", self.task)
        assert "delta 3 BF16 [103, 10] 'gap16.ulp'" in done.stdout
        assert EXPECTED["valid"]["dtype-bf16"]["content_digest"] in done.stdout

    def test_verifies(self):
        assert minimal("verify", self.task).returncode == 0
        assert minimal("verify", self.task, self.base).returncode == 0
        wrong = minimal("verify", self.task, VECTORS / "valid" / "dtype-f16.base.safetensors")
        assert wrong.returncode == 1
        assert wrong.stderr.startswith("WrongBase: ")
        refused = minimal("verify", VECTORS / "reject" / "N-CONTROL-escape.nps")
        assert refused.returncode == 1
        assert refused.stderr == "N-CONTROL: c\\x1b[31m\n"

    def test_rebuilds(self, tmp_path):
        out = tmp_path / "out.safetensors"
        assert minimal("rebuild", self.task, self.base, out).returncode == 0
        wanted = EXPECTED["valid"]["dtype-bf16"]["tensors"]
        found = minimal_reader.read_safetensors(out)
        for name, (dtype, shape, data) in found.items():
            assert (dtype, list(shape)) == (wanted[name]["dtype"], wanted[name]["shape"])
            assert blake3(data).hexdigest() == wanted[name]["digest"]
        assert set(found) == set(wanted)
        assert minimal("rebuild", self.task, self.base, out).returncode == 1  # never overwritten


def test_vectors_folder_holds_nothing_else():
    kinds = {path.suffix for path in VECTORS.rglob("*") if path.is_file()}
    assert kinds - {".pyc"} == {".py", ".json", ".nps", ".safetensors"}
    found = {path.relative_to(VECTORS).with_suffix("") for path in VECTORS.rglob("*.nps")}
    others = {str(path) for path in found} - set(NAMES)
    # What members of bundles need, or do not get.
    assert {name.split("/")[-1] for name in others} == {"base"}
    assert all((VECTORS / name).parent.parent.name == "reject" for name in others)


@pytest.mark.parametrize("arguments", [("inspect",), ("inspect", "--json"), ("verify",)])
def test_no_vector_reaches_the_terminal_unescaped(arguments):
    for path in VECTORS.rglob("*.nps"):
        done = CliRunner().invoke(main, [arguments[0], str(path), *arguments[1:]])
        said = done.stdout + done.stderr
        assert done.exit_code in (0, 1), (path, said)
        assert isinstance(done.exception, SystemExit | None), (path, done.exception)
        assert not [c for c in said if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"], path
        if done.exit_code:
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1, said
