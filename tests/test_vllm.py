"""What of the vLLM plugin needs no vLLM: streams of tensors, turns, and options."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import bits, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import nps_compress
from nps_compress.cli import main
from nps_compress.unpacking import unpack_side_files
from nps_compress.vllm import arguments
from nps_compress.vllm.launch import prepare
from nps_compress.vllm.stream import rebuilt_stream, refuse_other_shape
from nps_compress.vllm.turns import Turns


@pytest.fixture
def packed(tiny, tmp_path):
    """Base and unpacked weights by name, and the task."""
    base, tuned = tiny
    task = tmp_path / "t.nps"
    nps_compress.pack(base, tuned, task)
    nps_compress.unpack(base, task, tmp_path / "out")
    weights = load_file(base / "model.safetensors")
    with nps_compress.open(task) as opened:
        yield weights, load_file(tmp_path / "out" / "model.safetensors"), opened


def test_a_stream_is_the_unpacked_checkpoint(packed):
    base, expected, task = packed
    found = dict(rebuilt_stream(base.items(), task, "base"))
    assert found.keys() == expected.keys()  # new, resized and deleted ones too
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)


def test_a_stream_rebuilds_one_tensor_at_a_time_in_the_order_of_the_base(packed):
    base, _, task = packed
    read = []

    def stream():
        for name in sorted(base, reverse=True):
            read.append(name)
            yield name, base[name]

    given = []
    for name, _ in rebuilt_stream(stream(), task, "base"):
        given.append(name)
        assert name in {read[-1], "empty", "head"}
    assert given == [*sorted(base.keys() - {"pooler"}, reverse=True), "empty", "head"]


def test_a_stream_under_another_prefix(tmp_path):
    base = {"a.weight": torch.randn(40, 40), "b.weight": torch.randn(40, 40)}
    tuned = {f"model.{name}": tensor + 0.01 for name, tensor in base.items()}
    folders = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "t", tuned)
    nps_compress.pack(*folders, tmp_path / "t.nps", lossless=True)
    with nps_compress.open(tmp_path / "t.nps") as task:
        found = dict(rebuilt_stream(base.items(), task, "base"))
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in tuned.items()
    }


def test_a_stream_of_another_base_is_refused(packed):
    base, _, task = packed
    for wrong, message in (
        ({**base, "layer.mlp": base["layer.mlp"] + 1}, "'layer.mlp' has other values"),
        ({**base, "positions": base["positions"] + 1}, "'positions' has other values"),
        ({**base, "layer.mlp": base["layer.mlp"].half()}, "'layer.mlp' is F16"),
        ({**base, "more": torch.zeros(1)}, "'more' is not in it"),
        ({name: base[name] for name in base if name != "scalar"}, "'scalar' is missing"),
    ):
        with pytest.raises(nps_compress.BaseMismatchError, match=message):
            list(rebuilt_stream(wrong.items(), task, "base"))


def test_what_a_rank_does_not_read_may_be_missing_and_others_pass(packed):
    base, expected, task = packed
    some = {"embed": base["embed"], "vision": torch.ones(2)}
    found = dict(rebuilt_stream(some.items(), task, "base", whole=False, others=True))
    assert found.keys() == {"embed", "vision", "empty", "head"}
    assert bits(found["embed"]) == bits(expected["embed"])
    assert found["vision"] is some["vision"]


def test_only_tasks_of_the_bases_shapes_can_be_switched(packed, tmp_path):
    base, _, task = packed
    with pytest.raises(nps_compress.InvalidArgumentError, match=r"'embed' differs.*t\.nps"):
        refuse_other_shape(task)
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    folders = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "t2", tuned)
    nps_compress.pack(*folders, tmp_path / "same.nps")
    with nps_compress.open(tmp_path / "same.nps") as same:
        refuse_other_shape(same)


def test_side_files_without_weights(tiny, tmp_path):
    base, tuned = tiny
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    names = unpack_side_files(base, tmp_path / "t.nps", tmp_path / "files")
    assert sorted(names) == sorted(path.name for path in (tmp_path / "files").iterdir())
    assert "config.json" in names
    for name in names:
        assert (tmp_path / "files" / name).read_bytes() == (tuned / name).read_bytes()
    with pytest.raises(nps_compress.OutputExistsError):
        unpack_side_files(base, tmp_path / "t.nps", tmp_path / "files")


def run(turns, jobs, step=0.1, switch=0.0):
    """Serve jobs, (task, arrival, steps of work), in turns. -> when each was done, the turns."""
    now, last, order = 0.0, None, []
    left = {job: job[2] for job in jobs}
    done = {}
    while left:
        working = [job[0] for job in sorted(left, key=lambda job: job[1]) if job[1] <= now]
        task, _ = turns.next(list(dict.fromkeys(working)), now, settled=True)
        if not working:
            now += step
            continue
        assert task in working
        if task != last:
            now += switch
            order.append(task)
        last = task
        now += step
        for job in [job for job in left if job[0] == task and job[1] <= now]:
            left[job] -= 1
            if not left[job]:
                done[job] = now
                del left[job]
    return done, order


def test_no_task_starves_under_the_load_of_another():
    jobs = [(1, i * 0.1, 3) for i in range(200)] + [(2, 1.05, 3)]
    done, _ = run(Turns(0.5), jobs)
    assert done[2, 1.05, 3] < 1.05 + 0.5 + 0.4


def test_a_task_alone_is_never_interrupted():
    _, order = run(Turns(0.1), [(0, i * 0.1, 5) for i in range(50)])
    assert order == [0]


def test_turns_go_round():
    jobs = [(task, 0.0, 20) for task in (3, 1, 2)]
    _, order = run(Turns(0.5), jobs)
    assert order[:6] == [3, 1, 2, 3, 1, 2]


def test_a_turn_lasts_as_long_as_its_switch_took():
    jobs = [(task, 0.0, 60) for task in (1, 2)]
    done, order = run(Turns(0.5), jobs, switch=3.0)
    assert len(order) <= 5  # 12 s of work, in turns of 3 s and not of half a second
    assert max(done.values()) < 2 * 12 + 4


def test_a_turn_ends_only_when_it_has_gained_something():
    turns = Turns(1.0)
    assert turns.next([1], 0.0, settled=True) == (1, True)
    assert turns.next([1, 2], 0.1, settled=False) == (1, True)
    assert turns.next([1, 2], 2.0, settled=False) == (1, False)
    assert turns.next([1, 2], 2.1, settled=True) == (2, True)
    assert turns.next([], 2.2, settled=True) == (2, True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.floats(0, 5), st.integers(1, 30)),
        min_size=1,
        max_size=12,
        unique=True,
    ),
    st.floats(0.05, 2),
    st.floats(0, 1),
)
def test_everything_is_served_and_nobody_waits_longer_than_a_round(jobs, cycle, switch):
    done, _ = run(Turns(cycle), jobs, switch=switch)
    assert done.keys() == set(jobs)
    tasks = {job[0] for job in jobs}
    turn = max(cycle, switch + 0.1) + switch + 0.3
    for job, end in done.items():
        rounds = job[2] + 1  # a turn does at least one step
        assert end - job[1] <= rounds * len(tasks) * turn + 0.3


def value(options, name):
    return options[options.index(name) + 1]


def test_options_of_one_task(tmp_path):
    options = arguments.one_task("base", "tasks/law.nps")
    assert value(options, "--model") == "base"
    assert value(options, "--load-format") == "nps"
    assert json.loads(value(options, "--model-loader-extra-config")) == {"task": "tasks/law.nps"}
    assert value(options, "--served-model-name") == "law"
    assert value(options, "--host") == "127.0.0.1"
    assert "--weight-transfer-config" not in options
    options = arguments.one_task("base", "law.nps", name="l", config="files", switch=True)
    assert value(options, "--tokenizer") == value(options, "--hf-config-path") == "files"
    assert json.loads(value(options, "--weight-transfer-config")) == {"backend": "nps"}
    assert value(options, "--served-model-name") == "l"


def test_options_of_a_switched_base(tmp_path):
    (tmp_path / "base").mkdir()
    options = arguments.switched(tmp_path / "base", port=9)
    assert value(options, "--served-model-name") == "base"
    assert value(options, "--port") == "9"
    assert json.loads(value(options, "--weight-transfer-config")) == {"backend": "nps"}


def test_options_of_many_tasks():
    tasks = {"law": "law.nps", "a=b": "x=y.nps"}
    options = arguments.many_tasks("org/base", tasks, cycle=0.5)
    at = options.index("--lora-modules")
    modules = [json.loads(each) for each in options[at + 1 : at + 3]]
    assert modules == [{"name": name, "path": path} for name, path in tasks.items()]
    assert value(options, "--max-loras") == "1"
    assert value(options, "--served-model-name") == "org/base"
    assert json.loads(value(options, "--additional-config")) == {"nps_cycle": 0.5}
    for name in ("--worker-cls", "--scheduler-cls"):
        assert value(options, name).startswith("nps_compress.vllm.routing.")
    assert "--lora-modules" not in arguments.many_tasks("base", {})
    command = arguments.command(options)
    assert command[:2] == [sys.executable, "-m"]
    assert command[3:] == options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"base": "x.nps"}}, "'base'"),
        ({"tasks": {"": "x.nps"}}, "task name"),
        ({"cycle": 0}, "cycle"),
        ({"cycle": float("nan")}, "cycle"),
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
    ],
)
def test_bad_options_are_refused(change, message):
    given = {"tasks": {"law": "law.nps"}, "name": "base", **change}
    with pytest.raises(nps_compress.InvalidArgumentError, match=message):
        arguments.many_tasks("somewhere", given.pop("tasks"), **given)


@pytest.fixture
def same_shape(tmp_path, monkeypatch):
    """Base and task that differ in values alone, with the base's tokenizer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = {"a.weight": torch.randn(40, 40), "b.weight": torch.randn(40, 40)}
    folders = [
        write_checkpoint(
            tmp_path / "same" / name, {key: value + add for key, value in base.items()}
        )
        for name, add in (("base", 0), ("tuned", 0.01))
    ]
    for folder in folders:
        (folder / "tokenizer.json").write_text('{"common": 1}')
    return folders


def start(base, tasks, **options):
    return prepare(str(base), tasks, **{"host": "127.0.0.1", "port": 9, **options})


def test_one_task_starts_alone(same_shape, tmp_path):
    base, tuned = same_shape
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    found = start(base, {"law": tmp_path / "t.nps"}, options=["--seed", "1"])
    assert found.command[1] == "-m"
    expected = arguments.one_task(base, tmp_path / "t.nps", name="law", port=9)
    assert found.command[3:] == [*expected, "--seed", "1"]
    assert found.environment == {}
    assert found.warnings == []
    assert "law alone" in found.what
    assert not (tmp_path / "cache").exists()


def test_a_task_has_its_own_tokenizer(same_shape, tmp_path):
    base, tuned = same_shape
    (tuned / "tokenizer.json").write_text('{"own": 1}')
    (tuned / "config.json").write_text('{"model_type": "llama"}')
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    for _ in range(2):  # the second finds what the first kept
        options = start(base, {"law": tmp_path / "t.nps"}).command
        folder = Path(value(options, "--tokenizer"))
        assert value(options, "--hf-config-path") == str(folder)
        assert (tmp_path / "cache") in folder.parents
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            "tokenizer.json": '{"own": 1}',
            "config.json": '{"model_type": "llama"}',
        }
    several = {"law": tmp_path / "t.nps", "med": tmp_path / "t.nps"}
    assert "the base's here" in start(base, several).warnings[0]


def test_without_a_tokenizer_a_task_has_the_bases(same_shape, tmp_path):
    base, tuned = same_shape
    (tuned / "tokenizer.json").unlink()
    (tuned / "config.json").write_text('{"model_type": "llama"}')
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    folder = Path(value(start(base, {"law": tmp_path / "t.nps"}).command, "--tokenizer"))
    assert (folder / "tokenizer.json").read_text() == '{"common": 1}'
    assert (folder / "config.json").read_text() == '{"model_type": "llama"}'


def test_several_tasks_are_chosen_by_request(same_shape, tmp_path):
    base, tuned = same_shape
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    tasks = {"law": tmp_path / "t.nps", "med": tmp_path / "t.nps"}
    found = start(base, tasks, name="b", cycle=0.25, api_key="k", host="0.0.0.0")
    expected = arguments.many_tasks(base, tasks, name="b", cycle=0.25, host="0.0.0.0", port=9)
    assert found.command[3:] == [*expected, "--enforce-eager"]
    assert found.environment == {"VLLM_API_KEY": "k"}
    assert "k" not in found.command
    assert found.warnings == []
    assert "experimental" in found.what
    assert "no API key" in start(base, tasks, host="0.0.0.0").warnings[0]


def test_without_a_task_the_base_is_switched(same_shape, monkeypatch):
    base, _ = same_shape
    found = start(base, {})
    assert found.command[3:] == [*arguments.switched(base, port=9), "--enforce-eager"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert start(base, {}).command[3:] == arguments.switched(base, port=9)
    assert found.environment == {"VLLM_SERVER_DEV_MODE": "1"}
    with pytest.raises(nps_compress.InvalidArgumentError, match="loopback"):
        start(base, {}, host="0.0.0.0")


def test_what_vllm_can_not_serve_is_refused_before_it_starts(same_shape, tiny, tmp_path):
    base, tuned = same_shape
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    nps_compress.pack(*tiny, tmp_path / "tiny.nps")
    with pytest.raises(nps_compress.BaseMismatchError):
        start(tiny[0], {"law": tmp_path / "t.nps"})
    with pytest.raises(nps_compress.InvalidArgumentError, match=r"tiny\.nps"):
        start(tiny[0], {"a": tmp_path / "tiny.nps", "b": tmp_path / "tiny.nps"})
    with pytest.raises(nps_compress.CheckpointError):
        start(tmp_path / "none", {})


def test_the_command_becomes_vllm(same_shape, tmp_path, monkeypatch):
    base, tuned = same_shape
    nps_compress.pack(base, tuned, tmp_path / "t.nps")
    arguments_ = ["serve", str(base), "--engine", "vllm", "--task", f"law={tmp_path / 't.nps'}"]
    found = CliRunner().invoke(main, arguments_)
    assert found.exit_code == 1
    assert found.output == ("Error: vllm is not installed in this environment: pip install vllm\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    became = []

    def execve(*given):
        became.append(given)
        raise SystemExit(0)  # it would not return

    monkeypatch.setattr(os, "execve", execve)
    extra = ["--port", "9", "--max-tokens", "64", "--", "--seed", "1"]
    found = CliRunner().invoke(main, [*arguments_, *extra], env={"NPS_COMPRESS_API_KEY": "k"})
    assert found.output == "starting vLLM: law alone, as `--load-format nps`, on port 9\n"
    ((program, command, environment),) = became
    assert program == sys.executable
    assert command[-3:] == ["--max-model-len=64", "--seed", "1"]
    assert environment["VLLM_API_KEY"] == "k"
    refused = CliRunner().invoke(main, [*arguments_, "--max-batch", "2"])
    assert refused.exit_code == 2
    assert "--max-batch is of --engine transformers" in refused.output
    refused = CliRunner().invoke(main, ["serve", str(base), "more"])
    assert refused.exit_code == 2
    assert "unexpected extra arguments (more)" in refused.output


def test_without_vllm_the_plugin_only_warns():
    code = (
        "import sys, logging; sys.modules['vllm'] = None; logging.basicConfig();"
        "from nps_compress.vllm import register; register(); register();"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("can't load .nps tasks") == 1
