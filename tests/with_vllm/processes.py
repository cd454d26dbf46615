"""vLLM in processes of its own: an engine with a list of steps, or a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

from nps_compress.vllm import arguments

HERE = Path(__file__).parent
TOKENS = 8
SMALL = {"max_model_len": 192, "max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20}
START = 600  # seconds that an engine may take; a busy machine needs minutes
# Two ranks on one machine: a core each.
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def environment(**more: str) -> dict[str, str]:
    """What vLLM's processes see: no kernels of ours in an interpreter, nothing compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return {**kept, **quiet, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", **more}


def offline(steps: Sequence[Any], folder: Path, env: dict[str, str], **engine: Any) -> list[Any]:
    """Run steps in an engine of its own (engine.py) and return what each gave."""
    request, answer = folder / "steps.json", folder / "answer.json"
    engine = {**SMALL, "enforce_eager": True, "disable_log_stats": True, **engine}
    request.write_text(json.dumps({"engine": engine, "steps": list(steps)}))
    with (folder / "engine.log").open("w") as log:
        command = [sys.executable, str(HERE / "engine.py"), str(request), str(answer)]
        done = subprocess.run(command, env=env, stdout=log, stderr=log, timeout=START)
    assert done.returncode == 0, (folder / "engine.log").read_text()[-20000:]
    return json.loads(answer.read_text())


@dataclass
class Server:
    """A running vLLM server on loopback."""

    url: str
    log: Path

    def call(self, route: str, body: Any = None, *, seconds: float = 300) -> tuple[int, Any]:
        """POST where there is a body, else GET. -> status and decoded answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + route, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                text, status = answer.read(), answer.status
        except urllib.error.HTTPError as error:
            text, status = error.read(), error.code
        try:
            return status, json.loads(text or "null")
        except ValueError:
            return status, text.decode(errors="replace")

    def complete(self, model: str, prompt: str, **more: Any) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        body |= {"logprobs": 0, "ignore_eos": True, "return_token_ids": True, **more}
        status, answer = self.call("/v1/completions", body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]


@contextmanager
def serving(folder: Path, options: Sequence[str], **env: str) -> Iterator[Server]:
    """vLLM's own server with these options of nps_compress.vllm.arguments, until the end."""
    port = int(options[options.index("--port") + 1])
    with running(folder, arguments.command([*options, *small()]), port, **env) as server:
        yield server


def small() -> list[str]:
    """Options of a server as small as the engines are."""
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return [*sizes, "--enforce-eager", "--disable-uvicorn-access-log"]


@contextmanager
def running(folder: Path, command: Sequence[str], port: int, **env: str) -> Iterator[Server]:
    """The server that a command line starts, until the end."""
    server = Server(f"http://127.0.0.1:{port}", folder / "server.log")
    with server.log.open("w") as log:
        process = subprocess.Popen(command, env=environment(**env), stdout=log, stderr=log)
        try:
            end = time.monotonic() + START
            while True:
                assert process.poll() is None, server.log.read_text()[-20000:]
                assert time.monotonic() < end, server.log.read_text()[-20000:]
                try:
                    if server.call("/health", seconds=5)[0] == 200:
                        break
                except OSError:
                    time.sleep(1)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)


def free_port() -> int:
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
