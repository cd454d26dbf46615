"""Bundles: what tasks of one base share, and that none of them notices the others."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT, bits, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import minimal_reader
import nps_compress
from nps_compress import bundle, codecs
from nps_compress.dtypes import BY_NAME
from nps_compress.errors import (
    BaseMismatchError,
    FormatError,
    InvalidArgumentError,
    OutputExistsError,
    WriteError,
)
from nps_compress.format import layout
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import BaseTensor
from nps_compress.format.writer import NpsWriter, index_and_footer

VALID = ROOT / "format_spec" / "vectors" / "valid"
State = dict[str, tuple[int, int, bytes]]


@pytest.fixture
def tasks(tiny: tuple[Path, Path], tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A base, and four tasks of it that are kept in different ways."""
    base, tuned = tiny
    kept = {
        "law": {"recipe": nps_compress.Recipe(prune="signs", density=0.2)},
        "med": {"recipe": nps_compress.Recipe(prune="sampled", density=0.1)},
        "tax": {"recipe": nps_compress.Recipe(prune="magnitude", density=0.05)},
        "all": {"lossless": True},
    }
    files = {name: tmp_path / f"{name}.nps" for name in kept}
    for name, options in kept.items():
        nps_compress.pack(base, tuned, files[name], **options)
    return base, files


def state(folder: Path) -> State:
    """What a change of any file in a folder would change."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
        if path.is_file()
    }


def footer_of(path: Path) -> np.void:
    return np.frombuffer(path.read_bytes()[-96:], layout.FOOTER)[0]


class TestRoundTrip:
    def test_extracted_is_what_was_added(self, tasks, tmp_path):
        _, files = tasks
        nps_compress.add_to_bundle(tmp_path / "b", list(files.values()))
        for name, path in files.items():
            out = tmp_path / "out.nps"
            nps_compress.extract_from_bundle(tmp_path / "b", name, out, force=True)
            assert out.read_bytes() == path.read_bytes()

    def test_only_index_and_footer_differ(self, tasks, tmp_path):
        _, files = tasks
        bundle.add(tmp_path / "b", list(files.values()))
        for name, path in files.items():
            member = tmp_path / "b" / f"{name}.nps"
            assert footer_of(member)["index_compression"] == 2
            end = int(footer_of(path)["index_offset"])
            assert member.read_bytes()[:end] == path.read_bytes()[:end]
            with NpsReader(member) as reader, NpsReader(path) as alone:
                assert reader.raw_index == alone.raw_index
                assert reader.content_digest == alone.content_digest
            minimal = minimal_reader.open_nps(member)
            minimal.verify()
            assert minimal.content_digest == alone.content_digest

    @pytest.mark.parametrize("name", ["law", "med", "tax", "all"])
    def test_every_command_takes_a_member(self, tasks, tmp_path, name):
        base, files = tasks
        bundle.add(tmp_path / "b", list(files.values()))
        member, alone = tmp_path / "b" / f"{name}.nps", files[name]
        nps_compress.verify(base, member)
        nps_compress.verify(None, member)
        found = nps_compress.inspect(member)
        wanted = nps_compress.inspect(alone)
        for differs in ("path", "file_bytes", "bits_per_param", "file_sha256"):
            assert found.pop(differs) != wanted.pop(differs)
        assert found == wanted
        assert nps_compress.model_card(member).startswith("---")
        outs = [tmp_path / "rebuilt", tmp_path / "wanted"]
        for task, out in zip((member, alone), outs, strict=True):
            nps_compress.unpack(base, task, out)
        weights = [load_file(out / "model.safetensors") for out in outs]
        assert {n: bits(t) for n, t in weights[0].items()} == {
            n: bits(t) for n, t in weights[1].items()
        }
        if name == "all":
            patches = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
            for task, out in zip((member, alone), patches, strict=True):
                nps_compress.export_sparse(base, task, out)
            assert patches[0].read_bytes() == patches[1].read_bytes()

    def test_bench_takes_members(self, tasks, tmp_path):
        from nps_compress.bench.projection import Plan
        from nps_compress.bench.run import Settings, bench_tasks

        base, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        plan = Plan(2, 2, 1, 0.09, 1, 10.0, 16)
        report = bench_tasks(str(base), [str(tmp_path / "b" / "law.nps")], plan, Settings(None, 1))
        size = (tmp_path / "b" / "law.nps").stat().st_size
        assert f"{size}" in json.dumps(report.to_dict())

    def test_vectors(self, tmp_path):
        """Every valid file, added and taken out: the same index, chunks and versions."""
        count = 0
        for number, path in enumerate(sorted(VALID.glob("*.nps"))):
            folder, out = tmp_path / f"b{number}", tmp_path / "out.nps"
            bundle.add(folder, [path], name="x")
            count += footer_of(folder / "x.nps")["index_compression"] == 2
            bundle.extract(folder, "x", out, force=True)
            with (
                NpsReader(path) as one,
                NpsReader(folder / "x.nps") as member,
                NpsReader(out) as two,
            ):
                assert one.raw_index == member.raw_index == two.raw_index
                start = list(one.stored(one.index_offset))
                assert start == list(member.stored(member.index_offset))
                assert start == list(two.stored(two.index_offset))
                assert one.minor == member.minor == two.minor
            minimal_reader.open_nps(folder / "x.nps")
        assert count > 50


class TestOthersAreNotTouched:
    def check(self, folder: Path, change: Callable[[], object]) -> tuple[set[str], set[str]]:
        """Names that a change adds and removes; all others are as they were."""
        before = state(folder)
        change()
        after = state(folder)
        for name in before.keys() & after.keys():
            assert before[name] == after[name], name
        return after.keys() - before.keys(), before.keys() - after.keys()

    def test_add_and_remove(self, tasks, tmp_path):
        _, files = tasks
        folder = tmp_path / "b"
        sources = state(tmp_path)
        bundle.add(folder, [files["law"]])
        for name in ("med", "tax", "all"):
            found = self.check(folder, lambda name=name: bundle.add(folder, [files[name]]))
            assert found == ({f"{name}.nps"}, set())
        for name in ("law", "all", "med", "tax"):
            found = self.check(folder, lambda name=name: bundle.remove(folder, name))
            assert found == (set(), {f"{name}.nps"})
            for path in folder.glob("*.nps"):
                nps_compress.verify(None, path)
        assert [path.name for path in folder.iterdir()] == ["base.nps"]
        shutil.rmtree(folder)
        assert state(tmp_path) == sources

    def test_replace(self, tasks, tmp_path):
        _, files = tasks
        folder = tmp_path / "b"
        bundle.add(folder, [files["law"], files["med"]])
        before = state(folder)
        bundle.add(folder, [files["tax"]], name="med", force=True)
        after = state(folder)
        assert before.keys() == after.keys()
        assert {name for name in before if before[name] != after[name]} == {"med.nps"}

    def test_extract_and_inspect(self, tasks, tmp_path):
        _, files = tasks
        folder = tmp_path / "b"
        bundle.add(folder, list(files.values()))
        assert self.check(folder, lambda: bundle.inspect(folder)) == (set(), set())
        found = self.check(folder, lambda: bundle.extract(folder, "law", tmp_path / "o.nps"))
        assert found == (set(), set())

    def test_many_at_once(self, tasks, tmp_path):
        _, files = tasks
        failures: list[Exception] = []

        def add(path: Path) -> None:
            try:
                bundle.add(tmp_path / "b", [path])
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=add, args=[path]) for path in files.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert {task.name for task in bundle.inspect(tmp_path / "b").tasks} == set(files)


class TestBase:
    def test_is_the_same_for_all_tasks(self, tasks, tmp_path):
        """So it can be made again, and members move between bundles."""
        _, files = tasks
        for name, path in files.items():
            bundle.add(tmp_path / name, [path])
        one = (tmp_path / "law" / "base.nps").read_bytes()
        assert all((tmp_path / name / "base.nps").read_bytes() == one for name in files)
        shutil.move(tmp_path / "med" / "med.nps", tmp_path / "law" / "moved.nps")
        nps_compress.verify(None, tmp_path / "law" / "moved.nps")
        (tmp_path / "law" / "base.nps").unlink()
        bundle.add(tmp_path / "law", [tmp_path / "tax" / "tax.nps"])  # a member itself
        assert len(bundle.inspect(tmp_path / "law").tasks) == 3

    def test_of_very_many_alike_tensors_is_readable(self, tmp_path):
        """Its index shrinks too far to be stored as a frame, and whole digests are not known."""
        base = [BaseTensor(f"{n:05}", BY_NAME["U8"], (1,), bytes(32)) for n in range(20_000)]
        with (tmp_path / "task.nps").open("wb") as stream:
            NpsWriter(stream).finish(base, {})
        bundle.add(tmp_path / "b", [tmp_path / "task.nps"])
        with (
            NpsReader(tmp_path / "task.nps") as task,
            NpsReader(tmp_path / "b" / "base.nps") as one,
        ):
            assert one.base_root == task.base_root
            assert len(one.base) == len(base)

    def test_is_a_file_like_any_other(self, tasks, tmp_path):
        base, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        report = nps_compress.verify(base, tmp_path / "b" / "base.nps")
        assert report.base_root == nps_compress.inspect(files["law"])["base_root"]
        assert (report.tensors, report.base_tensors) == (
            0,
            len(load_file(base / "model.safetensors")),
        )

    def test_another_base_is_refused(self, tasks, tmp_path):
        _, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        pair = [
            write_checkpoint(tmp_path / part, {"w": torch.full([30, 30], value)})
            for part, value in (("one", 1.0), ("two", 2.0))
        ]
        other = tmp_path / "other.nps"
        nps_compress.pack(*pair, other)
        before = state(tmp_path / "b")
        for sources in ([other], [files["med"], other], [other, files["med"]]):
            with pytest.raises(
                BaseMismatchError, match=r"task .*other\.nps has base root [0-9a-f]"
            ):
                bundle.add(tmp_path / "b", sources)
        assert state(tmp_path / "b") == before
        with pytest.raises(BaseMismatchError, match="is not the base this task was made from"):
            bundle.add(tmp_path / "new", [files["law"], other])
        assert not (tmp_path / "new").exists()
        shutil.copy(other, tmp_path / "b")
        with pytest.raises(BaseMismatchError, match=r"other\.nps"):
            bundle.inspect(tmp_path / "b")


class TestCosts:
    def test_are_those_of_the_files(self, tasks, tmp_path):
        _, files = tasks
        folder = tmp_path / "b"
        added = bundle.add(folder, list(files.values()))
        found = nps_compress.inspect_bundle(folder)
        assert sorted(added, key=lambda task: task.name) == list(found.tasks)
        assert [task.name for task in found.tasks] == sorted(files)
        for task in found.tasks:
            path = folder / f"{task.name}.nps"
            assert task.file_bytes == path.stat().st_size
            assert task.index_bytes == footer_of(path)["index_stored_bytes"]
            assert task.standalone_bytes == files[task.name].stat().st_size > task.file_bytes
            inspected = nps_compress.inspect(path)
            assert task.total_params == inspected["total_params"]
            assert task.bits_per_param == inspected["bits_per_param"]
        assert found.file_bytes == sum(path.stat().st_size for path in folder.iterdir())
        assert found.standalone_bytes == sum(path.stat().st_size for path in files.values())
        assert found.base_bytes == (folder / "base.nps").stat().st_size
        assert found.mean_task_bytes == (found.file_bytes - found.base_bytes) / 4
        assert found.base_root == nps_compress.inspect(files["law"])["base_root"]
        assert found.base_name == "base"

    def test_a_file_put_there_by_hand_saves_nothing(self, tasks, tmp_path):
        _, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        shutil.copy(files["med"], tmp_path / "b")
        _, task = bundle.inspect(tmp_path / "b").tasks
        assert task.name == "med"
        assert task.file_bytes == task.standalone_bytes

    def test_of_nothing(self, tasks, tmp_path):
        _, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        bundle.remove(tmp_path / "b", "law")
        found = bundle.inspect(tmp_path / "b")
        assert found.tasks == ()
        assert found.mean_task_bytes == 0
        assert found.file_bytes == found.base_bytes


class TestBadInput:
    NAMES = ("base", "BASE", "", ".", "..", ".law", "a/b", "../law", "law.nps", "CON", "nul.x")
    NAMES += ("a b", "x" * 129, "l\x1b[31m", "é")

    @pytest.mark.parametrize("name", NAMES)
    def test_names(self, tasks, tmp_path, name):
        _, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        before = state(tmp_path / "b")
        calls: list[Callable[[], object]] = [
            lambda: bundle.add(tmp_path / "b", [files["med"]], name=name, force=True),
            lambda: bundle.remove(tmp_path / "b", name),
            lambda: bundle.extract(tmp_path / "b", name, tmp_path / "out.nps"),
        ]
        for call in calls:
            with pytest.raises(InvalidArgumentError, match="task name must be") as caught:
                call()
            assert caught.value.received == name
        assert state(tmp_path / "b") == before

    def test_a_file_name_that_is_no_name(self, tasks, tmp_path):
        _, files = tasks
        shutil.copy(files["law"], tmp_path / "my law.nps")
        with pytest.raises(InvalidArgumentError, match="my law"):
            bundle.add(tmp_path / "b", [tmp_path / "my law.nps"])
        assert not (tmp_path / "b").exists()

    def test_taken_names(self, tasks, tmp_path):
        _, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        before = state(tmp_path / "b")
        with pytest.raises(OutputExistsError, match=r"law\.nps: exists; pass --force"):
            bundle.add(tmp_path / "b", [files["med"], files["law"]])
        with pytest.raises(InvalidArgumentError, match="given once"):
            bundle.add(tmp_path / "b", [files["med"], files["med"]])
        with pytest.raises(OutputExistsError, match="would replace the input"):
            bundle.add(tmp_path / "b", [tmp_path / "b" / "law.nps"], force=True)
        assert state(tmp_path / "b") == before

    def test_numbers_of_tasks(self, tasks, tmp_path):
        _, files = tasks
        with pytest.raises(InvalidArgumentError, match="received 0"):
            bundle.add(tmp_path / "b", [])
        with pytest.raises(InvalidArgumentError, match="received 2"):
            bundle.add(tmp_path / "b", [files["law"], files["med"]], name="x")

    def test_what_is_not_there(self, tasks, tmp_path):
        _, files = tasks
        with pytest.raises(InvalidArgumentError, match="No such file"):
            bundle.add(tmp_path / "b", [tmp_path / "none.nps"])
        with pytest.raises(WriteError):
            bundle.add(tmp_path / "no" / "folder", [files["law"]])
        for call in (
            lambda: bundle.inspect(tmp_path),
            lambda: bundle.remove(tmp_path, "law"),  # a file that is not in a bundle
            lambda: bundle.extract(tmp_path, "law", tmp_path / "o.nps"),
        ):
            with pytest.raises(InvalidArgumentError, match=r"bundle must be .* base\.nps"):
                call()
        assert files["law"].exists()
        bundle.add(tmp_path / "b", [files["law"]])
        for call in (bundle.remove, lambda *given: bundle.extract(*given, tmp_path / "o.nps")):
            with pytest.raises(InvalidArgumentError, match=r"one of .*b: law, received 'tax'"):
                call(tmp_path / "b", "tax")

    def test_a_damaged_task(self, tasks, tmp_path):
        _, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        before = state(tmp_path / "b")
        data = bytearray(files["med"].read_bytes())
        data[-100] ^= 1
        files["med"].write_bytes(data)
        with pytest.raises(FormatError, match=r"\[I-DIGEST\]"):
            bundle.add(tmp_path / "b", [files["tax"], files["med"]])
        assert state(tmp_path / "b") == before

    def test_a_full_disk(self, tasks, tmp_path, monkeypatch):
        _, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        before = state(tmp_path / "b")

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="no space left"):
            bundle.add(tmp_path / "b", [files["med"]])
        with pytest.raises(WriteError, match="no space left"):
            bundle.extract(tmp_path / "b", "law", tmp_path / "b" / "out.nps")
        assert state(tmp_path / "b") == before

    @pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may do anything")
    def test_a_folder_that_may_not_be_changed(self, tasks, tmp_path):
        _, files = tasks
        bundle.add(tmp_path / "b", [files["law"]])
        (tmp_path / "b").chmod(0o500)
        with pytest.raises(WriteError):
            bundle.remove(tmp_path / "b", "law")


class TestDictionary:
    """What a reader says of a member whose base.nps is not what it needs."""

    @pytest.fixture
    def member(self, tasks, tmp_path) -> Path:
        bundle.add(tmp_path / "b", [tasks[1]["law"]])
        return tmp_path / "b" / "law.nps"

    def refusal(self, path: Path) -> str:
        with pytest.raises(FormatError) as caught:
            NpsReader(path)
        assert caught.value.rule == "T-DICTIONARY"
        with pytest.raises(minimal_reader.Refused, match="T-DICTIONARY"):
            minimal_reader.open_nps(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_missing(self, member):
        base = member.with_name("base.nps")
        with NpsReader(base) as reader:
            size, digest = len(reader.raw_index), layout.digest64(reader.raw_index).hex()
        base.unlink()
        said = self.refusal(member)
        assert said.startswith(f"{member}: needs {base} with an index of {size} bytes")
        assert digest in said
        assert "No such file" in said

    def test_another(self, member, tmp_path):
        pair = [
            write_checkpoint(tmp_path / part, {"w": torch.full([30, 30], value)})
            for part, value in (("one", 1.0), ("two", 2.0))
        ]
        other = tmp_path / "other.nps"
        nps_compress.pack(*pair, other)
        shutil.copy(other, member.with_name("base.nps"))
        assert ", not " in self.refusal(member)

    def test_of_the_same_size(self, member):
        """One character of a name is another."""
        path = member.with_name("base.nps")
        with NpsReader(path) as reader:
            raw = reader.raw_index.replace(b"pooler", b"poolex")
        path.write_bytes(path.read_bytes()[:64] + index_and_footer(raw, 64))
        assert ", not " in self.refusal(member)

    def test_damaged(self, member):
        path = member.with_name("base.nps")
        path.write_bytes(path.read_bytes()[:-1])
        assert "which is refused: " in self.refusal(member)
        path.write_bytes(b"")
        assert "[F-SIZE]" in self.refusal(member)

    def test_in_need_of_one(self, member):
        shutil.copy(member, member.with_name("base.nps"))
        assert "can't need one itself" in self.refusal(member)
        self.refusal(member.with_name("base.nps"))

    @pytest.mark.skipif(sys.platform == "win32", reason="links take a privilege")
    def test_links_are_not_followed_to_it(self, member, tmp_path):
        """The folder is that of the path given, as caches of links to blobs need."""
        linked = tmp_path / "linked"
        linked.mkdir()
        (linked / "law.nps").symlink_to(member)
        self.refusal(linked / "law.nps")
        (linked / "base.nps").symlink_to(member.with_name("base.nps"))
        NpsReader(linked / "law.nps").close()

    def test_a_folder_in_its_place(self, member):
        member.with_name("base.nps").unlink()
        member.with_name("base.nps").mkdir()
        self.refusal(member)


class TestIndex:
    def test_small_ones_need_no_dictionary(self, tmp_path):
        """They stay raw, as they are by themselves."""
        stream = io.BytesIO()
        NpsWriter(stream).finish([], {})
        (tmp_path / "x.nps").write_bytes(stream.getvalue())
        bundle.add(tmp_path / "b", [tmp_path / "x.nps"])
        assert (tmp_path / "b" / "x.nps").read_bytes() == stream.getvalue()

    def test_ratio_counts_the_dictionary(self):
        """The writer takes it where a reader will accept what comes of it."""
        dictionary = np.random.default_rng(0).bytes(1 << 20)
        ends = [
            index_and_footer(dictionary + bytes(more), 64, dictionary)[-96:]
            for more in (0, 1_000_000, 1_100_000)
        ]
        found = [np.frombuffer(end, layout.FOOTER)[0] for end in ends]
        assert [int(footer["index_compression"]) for footer in found] == [2, 2, 1]
        assert [int(footer["dictionary_bytes"]) for footer in found] == [1 << 20, 1 << 20, 0]
        assert all(any(f["dictionary_digest64"].tobytes()) for f in found[:2])

    def test_windows_stay_within_the_format(self):
        """Also where index and dictionary are larger than a window."""
        rng = np.random.default_rng(0)
        dictionary = rng.integers(0, 4, 5 << 20, np.uint8).tobytes()
        data = dictionary + bytes(5 << 20) + dictionary[::2]
        frame = codecs.compress(data, 3, dictionary)
        stated = zstandard.get_frame_parameters(frame)
        assert stated.window_size <= codecs.MAX_ZSTD_WINDOW < len(data)
        assert codecs.decompress(frame, len(data), "I-ZSTD", dictionary) == data

    @settings(deadline=None, max_examples=200)
    @given(
        dictionary=st.binary(min_size=64, max_size=2000),
        parts=st.lists(st.binary(max_size=40), max_size=10),
        level=st.sampled_from([1, 3, 19]),
    )
    def test_frames_round_trip(self, dictionary, parts, level):
        data = b"x" + b"".join(part + dictionary[len(part) :] for part in parts)
        frame = codecs.compress(data, level, dictionary)
        assert codecs.decompress(frame, len(data), "I-ZSTD", dictionary) == data
        assert minimal_reader.inflate(frame, len(data), "I-ZSTD", "", dictionary) == data
