"""Load, limits and faults: the server goes on, and no answer is another task's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import servers
from click.testing import CliRunner
from conftest import ROOT

from nps_compress import TaskBank, resident
from nps_compress.cli import main
from nps_compress.errors import CheckpointError, InvalidArgumentError
from nps_compress.serve.api_key import read_api_key
from nps_compress.serve.server import Settings, build

PROMPT = "the red cat runs"
LONG = 120


@pytest.fixture(scope="module")
def world(causal_world):
    return causal_world


@pytest.fixture
def unsafe_copy(world, tmp_path):
    """The same, with .nps files that may be damaged."""
    tasks = {name: Path(shutil.copy(path, tmp_path)) for name, path in world.tasks.items()}
    return servers.World(tmp_path, world.base, tasks, world.unpacked, world.loaded)


def check_all(world, server):
    for name in ("base", *world.tasks):
        assert server.text(name, PROMPT) == world.greedy(name, PROMPT, 8)[0]


@pytest.mark.parametrize(
    "options",
    [{"max_batch": 2}, {"max_batch": 4, "max_running": 4}, {"max_batch": 4, "mixed": True}],
)
def test_a_task_is_served_while_another_never_rests(world, options):
    """With and without room for it among what runs."""
    with servers.running(world.settings(cycle_time=0.1, **options)) as server:
        stop = threading.Event()

        def load():
            while not stop.is_set():
                found = server.complete("law", PROMPT, LONG)
                assert found.json()["choices"][0]["text"] == world.greedy("law", PROMPT, LONG)[0]

        with ThreadPoolExecutor(6) as pool:
            busy = [pool.submit(load) for _ in range(6)]
            servers.wait_until(lambda: server.engine.work()[1].get("law", 0) >= 2)
            try:
                for _ in range(3):
                    start = time.monotonic()
                    assert server.text("med", PROMPT, 4) == world.greedy("med", PROMPT, 4)[0]
                    # its first token, its turn and that of law; far more on a busy machine
                    assert time.monotonic() - start < 10
                    assert server.engine.work()[1].get("law", 0) >= 1
            finally:
                stop.set()
            for each in busy:
                each.result()


def test_a_full_queue_is_429_and_others_are_served(world):
    with servers.running(world.settings(max_waiting=2, max_batch=1, max_running=2)) as server:
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda _: server.complete("law", PROMPT, LONG), range(12)))
            refused = [each for each in found if each.status_code == 429]
            assert refused
            assert {each.status_code for each in found} == {200, 429}
            wanted = world.greedy("law", PROMPT, LONG)[0]
            for each in found:
                if each.status_code == 200:
                    assert each.json()["choices"][0]["text"] == wanted
                else:
                    assert each.headers["retry-after"] == "1"
                    assert each.json()["error"]["code"] == "queue_full"
        together = server.http.post(
            "/v1/completions", json={"model": "law", "prompt": PROMPT, "n": 3}
        )
        assert together.status_code == 429  # all or none
        check_all(world, server)
        assert server.is_idle()


def test_too_many_requests_at_once_are_429(world):
    with servers.running(world.settings(max_requests=2, max_batch=1)) as server:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: server.complete("law", PROMPT, LONG), range(8)))
        assert {each.status_code for each in found} == {200, 429}
        codes = {each.json()["error"]["code"] for each in found if each.status_code == 429}
        assert codes == {"too_many_requests"}
        check_all(world, server)


def test_requests_that_are_too_large_or_slow_are_refused(world, monkeypatch):
    with servers.running(world.settings(max_body=0.01, timeout=0.5)) as server:
        large = {"model": "law", "prompt": "red " * 5000}
        answer = server.http.post("/v1/completions", json=large)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        answer = server.http.post("/v1/completions", content=(b"x" * 1000 for _ in range(20)))
        assert answer.status_code == 413
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
            slow.settimeout(30)
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        with ThreadPoolExecutor(8) as pool:  # more than can be done in half a second
            jobs = [
                pool.submit(server.complete, name, PROMPT, 150, n=16, temperature=1, seed=1)
                for name in ("law", "med") * 4
            ]
            found = [each.result() for each in jobs]
        late = [each for each in found if each.status_code == 504]
        assert late
        assert late[0].json()["error"]["type"] == "timeout_error"
        servers.wait_until(server.is_idle)
        answer = server.complete("law", PROMPT, 150, n=16, temperature=1, stream=True)
        if answer.status_code == 200 and "[DONE]" not in answer.text:
            assert servers.events(answer.text)[-1]["error"]["type"] == "timeout_error"


def test_the_key_is_asked_for(world, tmp_path):
    key = "k3y-of-" + "x" * 30
    path = tmp_path / "key"
    path.write_text(f"{key}\n")
    with servers.running(world.settings(api_key_file=path)) as server:
        for wrong in (None, "", key[:-1], key + "x", "é"):
            headers = {} if wrong is None else {"authorization": f"Bearer {wrong}".strip().encode()}
            for route in ("/v1/models", "/status", "/metrics", "/openapi.json", "/nothing"):
                answer = httpx.get(server.url + route, headers=headers, trust_env=False)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        basic = {"authorization": f"Basic {key}"}
        assert httpx.get(f"{server.url}/status", headers=basic, trust_env=False).status_code == 401
        for route in ("/", "/health"):
            answer = httpx.get(server.url + route, trust_env=False)
            assert answer.status_code == 200
            assert "law" not in answer.text
        check_all(world, server)
        assert len(server.openai.models.list().data) == 4


def test_keys_that_are_none(tmp_path):
    path = tmp_path / "key"
    assert read_api_key(None, {}) is None
    assert read_api_key(None, {"NPS_COMPRESS_API_KEY": " abc\n"}) == "abc"
    for content in ("", " \n", "é", "a\nb", "x" * 5000):
        path.write_text(content)
        with pytest.raises(InvalidArgumentError, match="the API key must be"):
            read_api_key(path, {})
    with pytest.raises(InvalidArgumentError, match="--api-key-file must be a readable file"):
        read_api_key(tmp_path, {})


def test_a_client_that_hangs_up_is_not_worked_for(world):
    with servers.running(world.settings(max_batch=2, cycle_time=0.05)) as server:
        body = {"model": "law", "prompt": PROMPT, "max_tokens": 150, "temperature": 1.5, "n": 8}
        before = server.engine.bank.metrics().switches
        with server.http.stream(
            "POST", "/v1/completions", json={**body, "stream": True}
        ) as streamed:
            next(streamed.iter_lines())
        servers.wait_until(server.is_idle)
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json=body, timeout=0.05)
        servers.wait_until(server.is_idle)
        assert server.engine.bank.metrics().switches >= before
        check_all(world, server)
        text = server.http.get("/metrics").text
        assert 'nps_requests_total{status="499",task="law"} 2.0' in text


@pytest.mark.parametrize("mixed", [False, True])
def test_files_that_change_while_they_are_served(unsafe_copy, mixed):
    """With room for one task in memory, so that each is read again and again."""
    world = unsafe_copy
    good = {name: path.read_bytes() for name, path in world.tasks.items()}
    sizes = [
        task.nbytes for task in TaskBank.from_pretrained(world.base, world.tasks).tasks().values()
    ]
    assert max(sizes) < 1.5 * min(sizes)
    with servers.running(world.settings(host_memory=1.5e-9 * min(sizes), mixed=mixed)) as server:
        tiers = [task["tier"] for task in server.http.get("/status").json()["tasks"]]
        assert sorted(tiers) == ["disk", "disk", "host", "host"]  # the base, and one task
        check_all(world, server)
        broken = bytearray(good["law"])
        broken[len(broken) // 2] ^= 1
        for content in (None, bytes(broken), good["law"][:100], good["med"], b""):
            server.text("code", PROMPT)
            path = world.tasks["law"]
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            for _ in range(2):
                answer = server.complete("law", PROMPT)
                assert answer.status_code == 503, answer.text
                assert answer.json()["error"]["code"] == "unavailable"
                assert str(world.folder) not in answer.text
            for name in ("med", "base", "code"):
                assert server.text(name, PROMPT) == world.greedy(name, PROMPT, 8)[0]
            path.write_bytes(good["law"])
            check_all(world, server)


def test_a_file_that_is_in_memory_is_not_missed(unsafe_copy):
    with servers.running(unsafe_copy.settings()) as server:
        for path in unsafe_copy.tasks.values():
            path.unlink()
        check_all(unsafe_copy, server)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_no_memory_for_a_switch(world, monkeypatch, error, mixed):
    with servers.running(world.settings(mixed=mixed)) as server:
        original = resident.exchange
        failing = True

        def exchange(*arguments, **options):
            original(*arguments, **options)
            if failing:
                raise error("no room")  # with the weights changed half-way

        monkeypatch.setattr(resident, "exchange", exchange)
        for _ in range(2):
            answer = server.complete("law", PROMPT)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert server.text("base", PROMPT) == world.greedy("base", PROMPT, 8)[0]
        failing = False
        check_all(world, server)
        failing = True  # now the base can't be restored by undoing, nor the task put back
        answer = server.complete("base", PROMPT)
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == world.greedy("base", PROMPT, 8)[0]
        failing = False
        check_all(world, server)


def test_what_the_model_raises_fails_that_batch_alone(world, monkeypatch):
    with servers.running(world.settings()) as server:
        model = server.engine.bank.model
        original = model.forward

        def forward(*arguments, **options):
            if options["input_ids"].shape[1] == 7:
                raise RuntimeError("out of memory")
            return original(*arguments, **options)

        forward.__signature__ = __import__("inspect").signature(original)
        monkeypatch.setattr(model, "forward", forward)
        answer = server.complete("law", "red " * 7)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        check_all(world, server)
        assert server.is_idle()


def test_tasks_come_and_go_over_http(world, tmp_path):
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    (allowed / "sub").mkdir(parents=True)
    other.mkdir()
    for folder in (allowed, allowed / "sub", other):
        shutil.copy(world.tasks["code"], folder / "late.nps")
    (allowed / "out.nps").symlink_to(other / "late.nps")
    (allowed / "text.txt").write_text("law")
    (allowed / "bad.nps").write_bytes(b"NPS" * 50)
    (allowed / "folder.nps").mkdir()
    settings = Settings(
        base=str(world.base), tasks={"law": world.tasks["law"]}, port=0, folders=[allowed]
    )
    with servers.running(settings) as server:

        def load(name, path):
            body = {"lora_name": name, "lora_path": str(path)}
            return server.http.post("/v1/load_lora_adapter", json=body)

        def unload(name):
            return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

        for path in (
            *("../other/late.nps", "out.nps", other / "late.nps", "none.nps", "text.txt"),
            *("folder.nps", ".", "sub/../../other/late.nps", "\0.nps", "a" * 4000),
        ):
            answer = load("late", path)
            assert answer.status_code == 400, path
            assert "no such .nps file in the allowed folders" in answer.json()["error"]["message"]
        assert "D-" in load("late", "bad.nps").text or "[" in load("late", "bad.nps").text
        for taken in ("law", "base"):
            assert "not taken" in load(taken, "late.nps").json()["error"]["message"]
        assert "printable" in load("a\nb", "late.nps").text
        assert server.complete("late", PROMPT).status_code == 404
        for path in ("late.nps", allowed / "late.nps", "sub/late.nps", "sub/../late.nps"):
            assert load("late", path).status_code == 200
            assert "late" in [model.id for model in server.openai.models.list()]
            assert server.text("late", PROMPT) == world.greedy("code", PROMPT, 8)[0]
            with ThreadPoolExecutor(4) as pool:
                asked = [pool.submit(server.complete, "late", PROMPT, LONG) for _ in range(3)]
                servers.wait_until(lambda: not server.is_idle())
                gone = unload("late")
                assert gone.status_code == 200, gone.text
                for each in asked:  # what had begun is finished
                    found = each.result()
                    if found.status_code == 200:
                        wanted = world.greedy("code", PROMPT, LONG)[0]
                        assert found.json()["choices"][0]["text"] == wanted
                    else:
                        assert found.status_code in (404, 503)
            assert server.complete("late", PROMPT).status_code == 404
            assert len(server.engine.bank) == 1
        assert unload("late").status_code == 404
        assert unload("base").status_code == 400
        assert server.text("law", PROMPT) == world.greedy("law", PROMPT, 8)[0]


def test_loading_is_off_unless_allowed(world):
    with servers.running(world.settings()) as server:
        body = {"lora_name": "late", "lora_path": str(world.tasks["law"])}
        assert server.http.post("/v1/load_lora_adapter", json=body).status_code == 404
        assert (
            server.http.post("/v1/unload_lora_adapter", json={"lora_name": "law"}).status_code
            == 404
        )
        check_all(world, server)


# Starts the real command once for each line, in a process of its own that need not import again.
STARTER = """
import json, os, sys
import transformers.models.llama.modeling_llama
import nps_compress.serve.server
from nps_compress.cli import main
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.stdin.close()
        main(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
STARTED_KEY = "k3y-of-the-environment"


@pytest.fixture
def starter():
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "NPS_COMPRESS_API_KEY": STARTED_KEY,
        },
    )
    try:
        yield process
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def start(starter, world, port):
    """-> the number of the process and the address that it told."""
    tasks = [f"--task={name}={path}" for name, path in world.tasks.items()]
    starter.stdin.write(json.dumps(["serve", str(world.base), *tasks, "--port", str(port)]) + "\n")
    starter.stdin.flush()
    lines = sorted(starter.stdout.readline() for _ in range(2))  # in whatever order
    assert lines[1].startswith(f"serving {world.base} and 3 tasks on http://127.0.0.1:"), lines
    return int(lines[0]), lines[1].split()[-1]


def test_killed_and_started_again_it_answers_as_before_and_ends_in_good_order(world, starter):
    files = {path: path.read_bytes() for path in world.folder.rglob("*") if path.is_file()}
    body = {"model": "law", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    options = {
        "trust_env": False,
        "timeout": 60,
        "headers": {"authorization": f"Bearer {STARTED_KEY}"},
    }
    pid, url = start(starter, world, 0)
    try:
        port = url.rsplit(":", 1)[1]
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
        answer = httpx.post(f"{url}/v1/completions", json=body, **options)
        assert answer.json()["choices"][0]["text"] == world.greedy("law", PROMPT, 8)[0]
        taken = CliRunner().invoke(main, ["serve", str(world.base), "--port", port])
        assert taken.exit_code == 1
        assert f"received '127.0.0.1:{port}'" in taken.output
    finally:
        os.kill(pid, signal.SIGKILL)
    assert starter.stdout.readline() == f"{-signal.SIGKILL}\n"
    assert files == {path: path.read_bytes() for path in world.folder.rglob("*") if path.is_file()}
    pid, url = start(starter, world, port)
    try:
        long = {**body, "max_tokens": 150, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, **options) as streamed:
            lines = streamed.iter_lines()
            text = next(lines) + "\n\n"
            os.kill(pid, signal.SIGTERM)
            text += "\n\n".join(line for line in lines if line)
        told = servers.events(text)
        assert told[-1] == "[DONE]"  # what ran was finished
        said = "".join(each["choices"][0]["text"] for each in told[:-1])
        assert said == world.greedy("law", PROMPT, 150)[0]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health", trust_env=False)
        assert starter.stdout.readline() == "0\n"
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "law="], "expected NAME=FILE, received 'law='"),
        (["--task", "=law.nps"], "expected NAME=FILE, received '=law.nps'"),
        (["--task", "a=x.nps", "--task", "a=y.nps"], "'a' is given twice"),
        (["--task", "none.nps"], "none.nps"),
        (["--task", "base=law.nps"], "--name must be none of the tasks' names, received 'base'"),
        (["--max-batch", "0"], "--max-batch must be at least 1, received 0"),
        (["--max-tokens", "1"], "--max-tokens must be at least 2, received 1"),
        (["--timeout", "nan"], "--timeout must be more than 0"),
        (["--cycle-time", "-1"], "--cycle-time must be 0 to 10^6 seconds, received -1.0"),
        (["--rebuilt-memory", "nan"], "--rebuilt-memory must be 0 to 10^9 GB, received nan"),
        (["--host-memory", "-1"], "--host-memory must be 0 to 10^9 GB, received -1.0"),
        (["--host", "no.such.host.invalid"], "an address to listen on"),
        (["--api-key-file", "none"], "--api-key-file must be a readable file"),
        (["--allow-load", "none"], "folder of tasks must be a folder, received 'none'"),
        (["--device", "gpu7"], "device must be"),
        (["--port", "70000"], "70000 is not in the range 0<=x<=65535"),
    ],
)
def test_bad_options_are_one_clear_line(world, options, message, monkeypatch):
    monkeypatch.chdir(world.folder)
    found = CliRunner().invoke(main, ["serve", "base", "--port", "0", *options])
    assert found.exit_code != 0
    (line,) = [line for line in found.output.splitlines() if line.startswith("Error: ")]
    assert message in line


def test_without_the_extra_it_says_what_to_install(world, monkeypatch):
    for module in [name for name in sys.modules if name.startswith("nps_compress.serve.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = CliRunner().invoke(main, ["serve", str(world.base)])
    assert found.exit_code == 1
    assert found.output == ("Error: uvicorn is not installed: pip install 'nps-compress[serve]'\n")


def test_models_that_are_not_served(world, tmp_path):
    import tiny_models

    image = tiny_models.build("image", tmp_path / "image")
    with pytest.raises(CheckpointError, match="kind 'image', which is not served"):
        build(Settings(base=str(image)), None)
    bare = tmp_path / "bare"
    shutil.copytree(world.base, bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer") as caught:
        build(Settings(base=str(bare)), None)
    assert str(bare) in str(caught.value)
