"""`--load-format nps`: one task from the start."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from processes import environment, free_port, offline, serving
from safetensors.torch import load_file, save_file

import nps_compress
from nps_compress.unpacking import unpack_side_files
from nps_compress.vllm import arguments


@pytest.mark.parametrize("name", ["law", "med", "code"])
def test_equals_the_full_checkpoint(name, models, answers, tmp_path):
    """Tokens and log-probabilities, through the server that the arguments start."""
    options = arguments.one_task(models / "base", models / f"{name}.nps", port=free_port())
    with serving(tmp_path, options) as server:
        assert [each["id"] for each in server.call("/v1/models")[1]["data"]] == [name]
        for prompt, expected in answers[name].items():
            tokens, logprobs = server.complete(name, prompt)
            assert tokens == expected.tokens
            assert logprobs == expected.logprobs


def test_a_task_with_a_vocabulary_of_its_own(models, tmp_path):
    """Resized embeddings, another configuration and tokenizer, all from the task's file."""
    folder = shutil.copytree(models / "law", tmp_path / "longer")
    weights = load_file(folder / "model.safetensors")
    for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[tensor] = weights[tensor].repeat(2, 1)[: weights[tensor].shape[0] + 6]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += 6
    (folder / "config.json").write_text(json.dumps(config))
    task, files = tmp_path / "longer.nps", tmp_path / "files"
    nps_compress.pack(models / "base", folder, task, lossless=True)
    unpack_side_files(models / "base", task, files)

    step = {"generate": ["the red cat", "a bird sleeps on the word"]}
    engine = {"load_format": "nps", "model_loader_extra_config": {"task": str(task)}}
    engine |= {"hf_config_path": str(files), "tokenizer": str(files)}
    ours = offline([step], tmp_path, environment(), model=str(models / "base"), **engine)
    assert ours == offline([step], tmp_path, environment(), model=str(folder))


@pytest.mark.parametrize("fault", ["another base", "no such task", "damaged"])
def test_refuses_before_it_serves(fault, models, tmp_path):
    base, task = models / "base", models / "law.nps"
    if fault == "another base":
        base = shutil.copytree(models / "base", tmp_path / "other")
        weights = load_file(base / "model.safetensors")
        weights["model.norm.weight"][3] += 1
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        expected = "tensor 'model.norm.weight' has other values"
    elif fault == "no such task":
        task = tmp_path / "none.nps"
        expected = "task must be a readable file"
    else:
        task = models / "damaged.nps"
        expected = "chunk 0 of 'model.layers.1.mlp.down_proj.weight' is damaged [P-DIGEST]"
    command = arguments.command(arguments.one_task(base, task, port=free_port()))
    done = subprocess.run(
        [*command, "--max-model-len=64", "--kv-cache-memory-bytes=64M", "--enforce-eager"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    assert expected in done.stdout + done.stderr
