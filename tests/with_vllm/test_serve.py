"""`nps-compress serve --engine vllm`: the command line, and what it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from processes import environment, free_port, running, small

SERVE = (str(Path(sys.executable).with_name("nps-compress")), "serve")


def command(models, port, *tasks, more=()):
    named = [f"--task={name}={models / name}.nps" for name in tasks]
    place = ["--engine", "vllm", "--port", str(port), *more]
    return [*SERVE, str(models / "base"), *named, *place, "--", *small()]


def test_one_task(models, answers, tmp_path):
    """Its checkpoint's tokens and log-probabilities, behind a key."""
    port = free_port()
    (tmp_path / "key").write_text("secret")
    arguments = command(models, port, "law", more=["--api-key-file", str(tmp_path / "key")])
    with running(tmp_path, arguments, port) as server:
        assert server.call("/v1/models")[0] == 401
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert [each.id for each in client.models.list()] == ["law"]
        extra = {"ignore_eos": True, "return_token_ids": True}
        for prompt, expected in answers["law"].items():
            done = client.completions.create(
                model="law",
                prompt=prompt,
                max_tokens=len(expected.tokens),
                temperature=0,
                logprobs=0,
                extra_body=extra,
            )
            assert done.choices[0].token_ids == expected.tokens
            assert done.choices[0].logprobs.token_logprobs == expected.logprobs
        client.close()
    assert "starting vLLM: law alone" in server.log.read_text()


def test_several_tasks(models, answers, clear, tmp_path):
    port = free_port()
    with running(tmp_path, command(models, port, "law", "med"), port) as server:
        for name in ("law", "base", "med"):
            for prompt in clear[name][:2]:
                assert server.complete(name, prompt)[0] == answers[name][prompt].tokens


def test_no_task(models, answers, clear, tmp_path):
    """The base, with vLLM's own routes to switch its weights."""
    port = free_port()
    with running(tmp_path, command(models, port), port) as server:
        prompt = clear["base"][0]
        assert server.complete("base", prompt)[0] == answers["base"][prompt].tokens
        for route, body in (
            ("/init_weight_transfer_engine", {"init_info": {}}),
            ("/pause?mode=wait", {}),
            ("/start_weight_update", {}),
            ("/update_weights", {"update_info": {"task": str(models / "law.nps")}}),
            ("/finish_weight_update", {}),
            ("/resume", {}),
        ):
            assert server.call(route, body)[0] == 200, route
        prompt = clear["law"][0]
        assert server.complete("base", prompt)[0] == answers["law"][prompt].tokens


def test_faults_are_one_line_before_an_engine_starts(models, tmp_path):
    other = [*SERVE, str(models / "law"), f"--task={models / 'med.nps'}", "--engine", "vllm"]
    (tmp_path / "model.nps").write_bytes(os.urandom(4096))
    torn = [*SERVE, str(models / "base"), f"--task={tmp_path / 'model.nps'}", "--engine", "vllm"]
    for arguments in (torn, [*other, "--host", "0.0.0.0", "--grace", "3"]):
        done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
        assert done.returncode != 0
        assert done.stdout == ""
        assert "Error: " in done.stderr
        assert "Traceback" not in done.stderr


def test_signals_reach_vllm(models, tmp_path):
    """The process that is started is vLLM's: ended by SIGTERM it has freed its port."""
    port = free_port()
    with running(tmp_path, command(models, port, "law"), port) as server:
        assert server.call("/health")[0] == 200
    with pytest.raises(OSError, match="refused"):
        server.call("/health")
