"""The command line as a person and a script meet it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import write_checkpoint

import nps_compress
from nps_compress.cli import main

COMMANDS = [
    *("bench", "bundle", "card", "export", "import", "inspect", "merge", "pack", "search", "serve"),
    *("transfer", "unpack", "verify"),
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object, code: int = 1) -> str:
    """The one line on standard error; nothing on standard output."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit), result.exception
    *_, line = result.stderr.strip().splitlines()
    if code == 1:
        assert line == result.stderr.strip()
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    text = ok(command, "--help")
    assert "Example:" in text
    assert f"nps-compress {command}" in text


@pytest.mark.parametrize("command", sorted(main.commands["bundle"].commands))
def test_help_of_bundles_shows_an_example(command):
    assert f"Example:\n    nps-compress bundle {command} tasks/" in ok("bundle", command, "--help")


def test_help_lists_every_command():
    assert set(main.commands) == set(COMMANDS)
    for command in COMMANDS:
        assert command in ok("--help")
    assert nps_compress.__version__ in ok("--version")


def test_help_is_instant():
    code = "import sys, nps_compress.cli; sys.exit(bool({'torch', 'numba'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_whole_road(tiny, tmp_path):
    base, tuned = tiny
    task, out = tmp_path / "t.nps", tmp_path / "out"
    text = ok("pack", base, tuned, "-o", task)
    assert "bits per parameter" in text
    assert "nothing was searched" in text
    assert "ok: 7 base tensors match, 8 rebuilt tensors" in ok("verify", base, task)
    assert "needs the base" in ok("verify", task)
    assert json.loads(ok("verify", task, "--json"))["with_base"] is False
    assert "every digest matched" in ok("unpack", base, task, "-o", out)
    assert (out / "model.safetensors").exists()
    text = ok("inspect", task)
    assert "layer.mlp" in text
    assert "base base: 7 tensors, root " in text
    assert "file config.json" in text


def test_a_bundle_from_the_first_task_to_the_last(tiny, tmp_path):
    base, tuned = tiny
    law, med, folder = tmp_path / "law.nps", tmp_path / "med.nps", tmp_path / "tasks"
    ok("pack", base, tuned, "-o", law)
    ok("pack", base, tuned, "-o", med, "--lossless")
    said = ok("bundle", "add", folder, law)
    less = law.stat().st_size - (folder / "law.nps").stat().st_size
    assert f"law.nps: {(folder / 'law.nps').stat().st_size:,} bytes, {less:,} less" in said
    assert "exists; pass --force" in fails("bundle", "add", folder, law)
    added = json.loads(ok("bundle", "add", folder, med, "--name", "med-2", "--json"))
    assert [task["name"] for task in added["tasks"]] == ["med-2"]
    ok("bundle", "add", folder, med, "--name", "med-2", "--force")
    assert "ok" in ok("verify", base, folder / "law.nps")
    assert "every digest" in ok("unpack", base, folder / "med-2.nps", "-o", tmp_path / "out")
    found = json.loads(ok("bundle", "list", folder, "--json"))
    assert [task["name"] for task in found["tasks"]] == ["law", "med-2"]
    assert found["file_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert found["standalone_bytes"] == law.stat().st_size + med.stat().st_size
    text = ok("bundle", "list", folder)
    assert f"one more task costs {found['mean_task_bytes']:,.0f} bytes on average" in text
    assert found["base_root"] in text
    ok("bundle", "extract", folder, "med-2", "-o", tmp_path / "again.nps")
    assert (tmp_path / "again.nps").read_bytes() == med.read_bytes()
    assert "removed" in ok("bundle", "remove", folder, "med-2")
    assert "one of" in fails("bundle", "remove", folder, "med-2")
    assert "received 2" in fails("bundle", "add", folder, law, med, "--name", "x")
    assert "'../x'" in fails("bundle", "add", folder, law, "--name", "../x")
    (folder / "base.nps").unlink()
    assert "[T-DICTIONARY]" in fails("inspect", folder / "law.nps")
    assert "a folder with base.nps" in fails("bundle", "list", folder)
    ok("bundle", "add", folder, med)
    assert "base base: root" in ok("bundle", "list", folder)


def test_json_is_the_whole_output(tiny, tmp_path):
    base, tuned = tiny
    task = tmp_path / "t.nps"
    packed = json.loads(ok("pack", base, tuned, "-o", task, "--json", "--density", 0.2))
    assert packed["file_bytes"] == task.stat().st_size
    assert packed["recipe"]["density"] == 0.2
    found = json.loads(ok("inspect", task, "--json"))
    for key in ("tensors", "total_params", "nnz", "density", "file_bytes", "bits_per_param"):
        assert key in found
    assert packed["base_root"] == found["base_root"]
    verified = json.loads(ok("verify", base, task, "--json"))
    assert verified["ok"] is True
    assert len(verified["verified"]) == verified["tensors"] == 8
    unpacked = json.loads(ok("unpack", base, task, "-o", tmp_path / "out", "--json"))
    assert unpacked["tensors"] == 8


def test_options_reach_the_file(tiny, tmp_path):
    task = tmp_path / "t.nps"
    ok("pack", *tiny, "-o", task, "--prune", "sampled", "--scope", "tensor", "--seed", 5)
    recipe = json.loads(nps_compress.inspect(task)["metadata"]["recipe"])
    assert (recipe["prune"], recipe["scope"], recipe["seed"]) == ("sampled", "tensor", 5)


def test_signs_of_a_sparse_fine_tune_are_worth_a_note(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(100, 100, generator=generator)
    changes = torch.randn(100, 100, generator=generator)
    few = torch.rand(100, 100, generator=generator) < 0.3
    rows = torch.arange(100)[:, None] < 30
    for name, changed, share in (("few", few, "71%"), ("rows", rows, None), ("all", ~rows, None)):
        folders = [
            write_checkpoint(tmp_path / name / part, {"w": weights})
            for part, weights in (("base", base), ("tuned", base + changes * changed))
        ]
        said = run("pack", *folders, "-o", tmp_path / f"{name}.nps").stderr
        assert ("note: the fine-tune leaves" in said) == (share is not None)
        assert share is None or share in said
    few = [tmp_path / "few" / part for part in ("base", "tuned")]
    said = run("pack", *few, "-o", tmp_path / "s.nps", "--prune", "sampled")
    assert (said.exit_code, said.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--prune", "random", "--density", 0.1), "random"),
        (("--prune", "magnitude"), "magnitude"),
        (("--prune", "magnitude", "--values", "int3", "--scope", "tensor"), "magnitude"),
        (("--prune", "signs", "--density", 0.2), "signs"),
        (("--prune", "signs", "--density", 0.2, "--scope", "tensor"), "signs"),
        (("--prune", "sampled", "--density", 0.5), "sampled"),
        (("--prune", "sampled", "--density", 1), "sampled"),
        (("--prune", "sampled", "--scope", "tensor"), "sampled"),
    ],
)
def test_rules_end_to_end(tiny, tmp_path, options, expected):
    task = tmp_path / "t.nps"
    ok("pack", *tiny, "-o", task, *options)
    assert "ok" in ok("verify", tiny[0], task)
    recipe = json.loads(nps_compress.inspect(task)["metadata"]["recipe"])
    assert recipe["prune"] == expected
    default = "auto" if expected in ("magnitude", "random") else "exact"
    asked = options[options.index("--values") + 1] if "--values" in options else default
    assert recipe["values"] == asked
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    ok("pack", *tiny, "-o", tmp_path / "u.nps", "--recipe", tmp_path / "r.json")
    assert (tmp_path / "u.nps").read_bytes() == task.read_bytes()
    assert "recipe:" in ok("inspect", task)


def test_a_search_of_groups_and_draws(classifier_pair, tmp_path, monkeypatch):
    from nps_compress import groups

    monkeypatch.setattr(groups, "SMALL", 64)
    base, tuned, calibration = classifier_pair
    task, found = tmp_path / "t.nps", tmp_path / "r.json"
    options = (
        *("--calibration", calibration, "--genes", "groups,group-density", "--draws", 3),
        *("--generations", 1, "--population", 2, "--workers", 2),
        *("--prune", "signs", "--density", 0.1),
    )
    text = ok("pack", base, tuned, "-o", task, *options)
    assert "in 5 evaluations" in text
    assert "ok" in ok("verify", base, task)
    recipe = json.loads(nps_compress.inspect(task)["metadata"]["recipe"])
    names = {"embedding", "attention", "mlp", "small"}
    assert names <= set(recipe["group_coefficients"])
    assert recipe["group_coefficients"].keys() == recipe["group_densities"].keys()
    assert recipe["seed"] in (0, 1, 2)
    assert recipe["prune"] == "signs"
    genes = recipe["search"]["genes"]
    assert {"attention", "density of attention"} <= set(genes)
    text = ok("search", base, tuned, "-o", found, *options)
    assert "density of attention" in text
    assert {**json.loads(found.read_text()), "nps_recipe": 1} == recipe
    again = ("--recipe", found, "--calibration", calibration)  # for the importance
    ok("pack", base, tuned, "-o", tmp_path / "u.nps", *again)
    same = [nps_compress.inspect(path)["content_digest"] for path in (task, tmp_path / "u.nps")]
    assert same[0] == same[1]


def test_recipe_feeds_pack(tiny, tmp_path):
    recipe = nps_compress.Recipe(prune="sampled", density=0.3)
    recipe.write(tmp_path / "r.json")
    ok("pack", *tiny, "-o", tmp_path / "t.nps", "--recipe", tmp_path / "r.json")
    stored = json.loads(nps_compress.inspect(tmp_path / "t.nps")["metadata"]["recipe"])
    assert stored["density"] == 0.3


class TestBadInput:
    def test_wrong_base(self, tiny, tmp_path):
        base, tuned = tiny
        ok("pack", base, tuned, "-o", tmp_path / "t.nps")
        line = fails("verify", tuned, tmp_path / "t.nps")
        assert "is not the base this task was made from (base): tensor 'embed'" in line

    def test_density(self, tiny, tmp_path):
        for density in ("0", "1.5", "-1", "nan"):
            line = fails("pack", *tiny, "-o", tmp_path / "t.nps", "--density", density)
            assert "density must be in (0, 1], received" in line
        line = fails("pack", *tiny, "-o", tmp_path / "t", "--density", "five", code=2)
        assert "'five' is not a valid float" in line

    def test_output_exists(self, tiny, tmp_path):
        (tmp_path / "t.nps").write_text("precious")
        assert "pass --force" in fails("pack", *tiny, "-o", tmp_path / "t.nps")
        assert (tmp_path / "t.nps").read_text() == "precious"
        ok("pack", *tiny, "-o", tmp_path / "t.nps", "--force")

    def test_damaged_and_missing_task(self, tiny, tmp_path):
        (tmp_path / "t.nps").write_bytes(b"x" * 500)
        assert "H-MAGIC" in fails("inspect", tmp_path / "t.nps")
        assert "No such file" in fails("verify", tiny[0], tmp_path / "none.nps")
        assert "Is a directory" in fails("inspect", tmp_path)

    def test_verify_takes_one_or_two_paths(self, tiny, tmp_path):
        line = fails("verify", *tiny, tmp_path / "t.nps", code=2)
        assert "expected [BASE] TASK, received 3 arguments" in line
        assert "Missing argument '[BASE] TASK'" in fails("verify", code=2)

    def test_output_too_large(self, tiny, tmp_path):
        ok("pack", *tiny, "-o", tmp_path / "t.nps")
        call = ("unpack", tiny[0], tmp_path / "t.nps", "-o", tmp_path / "o", "--max-size")
        line = fails(*call, 1e-6)
        assert "at most 1,000 were allowed" in line
        assert "-1.0 GB" in fails(*call, -1, code=2)
        assert not (tmp_path / "o").exists()
        ok(*call, 1)

    def test_export_and_import(self, tiny, tmp_path):
        base, tuned = tiny
        ok("pack", base, tuned, "-o", tmp_path / "t.nps")
        call = ("export", tmp_path / "t.nps", "--base", base, "-o", tmp_path / "p.safetensors")
        assert "'zip' is not 'sparse-safetensors'" in fails(*call, "--to", "zip", code=2)
        (tmp_path / "p.safetensors").write_text("precious")
        assert "pass --force" in fails(*call)
        ok(*call, "--force")
        line = fails("import", tmp_path / "t.nps", "--base", base, "-o", tmp_path / "u.nps")
        assert "is not a readable safetensors file" in line
        line = fails(
            "import", tmp_path / "p.safetensors", "--base", tuned, "-o", tmp_path / "u.nps"
        )
        assert "changes 'pooler', which" in line or "is not the base" in line
        assert not (tmp_path / "u.nps").exists()
        line = fails(
            "export", tmp_path / "t.nps", "--base", base, "-o", tmp_path / "t.nps", "--force"
        )
        assert "would replace the input" in line

    def test_calibration(self, tiny, tmp_path):
        data = tmp_path / "c.jsonl"
        call = ("pack", *tiny, "-o", tmp_path / "t.nps", "--calibration", data)
        assert "No such file" in fails(*call)
        data.write_text("\n")
        assert "holds no examples" in fails(*call)
        data.write_text('{"text": "a"}\n\n{"text": }\n')
        assert "c.jsonl, line 3: is not JSON" in fails(*call)
        data.write_text('{"label": 1}\n')
        assert 'line 1: needs an object with one of "text", "words" and "image"' in fails(*call)
        data.write_text('{"text": "a", "label": [1]}\n')
        assert "label must be a number or a string: [1]" in fails(*call)
        data.write_text('{"text": "\\ud800"}\n')
        assert "surrogates" in fails(*call)
        data.write_text("[" * 100_000)
        assert "line 1: is not JSON" in fails(*call)
        data.write_bytes(b'{"text": "\xff"}\n')
        assert "c.jsonl" in fails(*call)
        assert not list(tmp_path.glob("t.nps*"))

    def test_options_that_contradict(self, tiny, tmp_path):
        call = ("pack", *tiny, "-o", tmp_path / "t.nps")
        line = fails(*call, "--lossless", "--density", 0.1, code=2)
        assert "--density can't be used with --lossless" in line
        line = fails(*call, "--recipe", tmp_path / "r.json", "--seed", 1, code=2)
        assert "--seed can't be used with --recipe" in line
        assert "can't be loaded" in fails(*call, "--calibration", _calibration(tmp_path))
        for option in (("--subspaces", 4), ("--generations", 3), ("--fitness", "loss")):
            assert f"{option[0]} needs --calibration" in fails(*call, *option, code=2)
        fails("unpack", tiny[0], "t.nps", "-o", tmp_path / "o", "--max-shard-size", "nan", code=2)
        for option in (("--population", 0), ("--generations", -1), ("--seed", -1)):
            line = fails(*call, "--calibration", _calibration(tmp_path), *option)
            assert f"received {option[1]}" in line

    def test_options_of_a_search(self, tiny, tmp_path):
        call = ("pack", *tiny, "-o", tmp_path / "t.nps")
        for option in (("--genes", "groups"), ("--draws", 2), ("--workers", 2), ("--retain", 0.9)):
            assert f"{option[0]} needs --calibration" in fails(*call, *option, code=2)
        searched = (*call, "--calibration", _calibration(tmp_path))
        for option, said in (
            (("--genes", "layers"), "genes must be some of subspaces, subspace-density, groups"),
            (("--genes", "groups,,heads"), "received 'heads'"),
            (("--genes", ","), "genes must be some of"),
            (("--draws", 0), "draws must be from 1 to 1000, received 0"),
            (("--workers", 0), "workers must be from 1 to 64, received 0"),
            (("--fitness", "bleu"), "fitness must be one of kl"),
        ):
            for command in (searched, ("search", *searched[1:])):
                assert said in fails(*command, *option)
        assert "is not a valid integer" in fails(*searched, "--draws", "two", code=2)
        line = fails(*searched, "--retain", 0.9, "--density", 0.1, code=2)
        assert "--density can't be used with --retain" in line
        assert not list(tmp_path.glob("t.nps*"))

    def test_options_of_a_rule(self, tiny, tmp_path):
        call = ("pack", *tiny, "-o", tmp_path / "t.nps")
        examples = tmp_path / "e.jsonl"
        examples.write_text('{"text": "a"}\n')
        searched = ("--calibration", examples, "--genes", "subspaces,subspace-density")
        line = fails(*call, *searched, "--prune", "sampled")
        assert "genes must be without 'subspace-density' where the rule is sampled" in line
        assert "subspace-density" in fails(*call, *searched, "--retain", 0.9)
        assert "is not one of" in fails(*call, "--prune", "dare", code=2)
        for rule in (("--prune", "signs"), ("--prune", "sampled"), ()):
            line = fails(*call, *rule, "--values", "int4", code=2)
            received = rule[1] if rule else "signs"
            assert f"--values int4 needs --prune magnitude or random, received {received}" in line
        assert "--values can't be used with --lossless" in fails(
            *call, "--lossless", "--values", "int4", code=2
        )
        assert "is not one of" in fails(*call, "--prune", "magnitude", "--values", "int5", code=2)
        assert not (tmp_path / "t.nps").exists()

    def test_terminal_escapes_stay_out_of_messages(self, tiny, tmp_path):
        base, tuned = tiny
        evil = base.rename(tmp_path / "ba\x1b[31mse")
        ok("pack", evil, tuned, "-o", tmp_path / "t.nps")
        assert "\x1b" not in ok("inspect", tmp_path / "t.nps")
        assert "\x1b" not in ok("inspect", tmp_path / "t.nps", "--json")
        assert "\x1b" not in fails("verify", tuned, tmp_path / "t.nps")


def _calibration(folder: Path) -> Path:
    path = folder / "calibration.jsonl"
    path.write_text("".join(f'{{"text": "word {i} of the day"}}\n' for i in range(8)))
    return path


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_keeps_the_search_and_the_same_command_resumes(classifier_pair, tmp_path):
    base, tuned, calibration = classifier_pair
    out = tmp_path / "r.json"
    arguments = [
        *("search", base, tuned, "-o", out, "--calibration", calibration),
        *("--generations", "40", "--subspaces", "3", "--prune", "sampled"),
    ]
    command = [sys.executable, "-m", "nps_compress.cli", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A shell's background jobs hand down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    state = out.with_name("r.json.search.json")
    deadline = time.monotonic() + 120
    while not state.exists() or len(json.loads(state.read_text())["fitness"]) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command to resume" in error
    assert "Traceback" not in error
    assert not out.exists()
    kept = json.loads(state.read_text())["fitness"]
    ok(*arguments)
    assert not state.exists()
    resumed = json.loads(out.read_text())
    ok(*arguments[:4], tmp_path / "whole.json", *arguments[5:])
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert resumed == whole
    assert len(kept) < whole["search"]["evaluations"]


def test_ctrl_c_while_packing_leaves_nothing(tiny, tmp_path, monkeypatch):
    from nps_compress.format.writer import NpsWriter

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NpsWriter, "add_tensor", interrupt)
    line = fails("pack", *tiny, "-o", tmp_path / "t.nps", code=130)
    assert line == "Error: interrupted; nothing was written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_hub_id_in_the_local_cache(tiny, tmp_path):
    revision = "0123456789abcdef0123456789abcdef01234567"
    for folder, name in zip(tiny, ("base", "law"), strict=True):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(revision)
        (repository / "snapshots").mkdir()
        blobs = folder.rename(repository / "blobs")
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir()
        for blob in blobs.iterdir():
            (snapshot / blob.name).symlink_to(blob)
    task = tmp_path / "t.nps"
    command = [sys.executable, "-m", "nps_compress.cli", "pack", "someone/base", "someone/law"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [*command, "-o", str(task)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert nps_compress.inspect(task)["base_name"] == "someone/base"


def test_progress_is_for_terminals_only(tiny, tmp_path):
    command = [sys.executable, "-m", "nps_compress.cli", "pack", *map(str, tiny), "-o"]
    done = subprocess.run([*command, str(tmp_path / "t.nps")], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
