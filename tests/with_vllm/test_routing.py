"""Requests served by the task that their `model` names (experimental)."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from processes import TOKENS, TWO, free_port, serving

from nps_compress.vllm import arguments

CYCLE = 1.0
MODELS = ("base", "law", "med", "code")


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    tasks = {name: models / f"{name}.nps" for name in MODELS if name != "base"}
    options = arguments.many_tasks(models / "base", tasks, cycle=CYCLE, port=free_port())
    folder = tmp_path_factory.mktemp("routing")
    with serving(folder, options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as running:
        yield running


def check(server, answers, name, prompt):
    """The full checkpoint's tokens, and its log-probabilities but for a batch's rounding."""
    tokens, logprobs = server.complete(name, prompt)
    assert tokens == answers[name][prompt].tokens, (name, prompt)
    assert logprobs == pytest.approx(answers[name][prompt].logprobs, abs=0.2)


def test_models_are_the_base_and_its_tasks(server):
    listed = {each["id"]: each["parent"] for each in server.call("/v1/models")[1]["data"]}
    assert listed == {"base": None, "law": "base", "med": "base", "code": "base"}


def test_each_model_answers_as_its_full_checkpoint(server, answers, clear):
    for name in MODELS:
        for prompt in clear[name]:
            check(server, answers, name, prompt)


def test_mixed_concurrent_requests(server, answers, clear):
    every = [(name, clear[name][i % 4]) for i in range(12) for name in MODELS]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda each: check(server, answers, *each), every))


def test_preempted_requests_go_on_where_they_were(server, clear):
    """Answers that take many turns are those that the same requests have alone."""
    wanted = [(name, clear[name][0]) for name in MODELS]
    alone = [server.complete(*each, max_tokens=100) for each in wanted]
    before = preemptions(server)
    with ThreadPoolExecutor(len(wanted)) as pool:
        together = list(pool.map(lambda each: server.complete(*each, max_tokens=100), wanted * 4))
    assert preemptions(server) > before
    for (tokens, _), (expected, _) in zip(together, alone * 4, strict=True):
        # Far on, rounding in another batch may make a close call another one.
        assert tokens[:TOKENS] == expected[:TOKENS]
        assert len(tokens) == 100


def preemptions(server):
    lines = server.call("/metrics")[1].splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:num_preemptions_total"))


def test_no_task_starves_under_the_load_of_another(server, answers, clear):
    stop = threading.Event()

    def load():
        while not stop.is_set():
            server.complete("law", clear["law"][1], max_tokens=150)

    with ThreadPoolExecutor(6) as pool:
        busy = [pool.submit(load) for _ in range(6)]
        try:
            time.sleep(3 * CYCLE)
            waited = []
            for name in ("med", "base", "code"):
                start = time.monotonic()
                check(server, answers, name, clear[name][0])
                waited.append(time.monotonic() - start)
        finally:
            stop.set()
        for each in busy:
            each.result()
    # A turn of the other, two switches and its own eight tokens; a busy machine is slow.
    assert max(waited) < 15 * CYCLE, waited


def test_unknown_names_are_404(server):
    status, answer = server.call("/v1/completions", {"model": "tax", "prompt": "a"})
    assert status == 404
    assert "tax" in json.dumps(answer)


def test_tasks_come_and_go(server, models, answers, clear):
    def load(name, path):
        return server.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    for bad, fault in (("damaged.nps", "P-DIGEST"), ("none.nps", "a readable file")):
        status, answer = load("bad", models / bad)
        assert status >= 400
        assert fault in json.dumps(answer)
    assert load("law2", models / "law.nps")[0] == 200
    prompt = clear["law"][0]
    assert server.complete("law2", prompt)[0] == answers["law"][prompt].tokens
    assert server.call("/v1/unload_lora_adapter", {"lora_name": "law2"})[0] == 200
    assert server.call("/v1/completions", {"model": "law2", "prompt": "a"})[0] == 404
    check(server, answers, "med", clear["med"][0])


def test_a_name_keeps_its_content(server, models, clear, tmp_path):
    """Cached keys and values are found by name and path: another content there is refused."""
    path = tmp_path / "changing.nps"
    path.write_bytes((models / "law.nps").read_bytes())
    body = {"lora_name": "changing", "lora_path": str(path)}
    assert server.call("/v1/load_lora_adapter", body)[0] == 200
    server.complete("changing", clear["law"][0])
    assert server.call("/v1/unload_lora_adapter", {"lora_name": "changing"})[0] == 200
    path.unlink()
    path.write_bytes((models / "med.nps").read_bytes())
    status, answer = server.call("/v1/load_lora_adapter", body)
    assert status >= 400
    assert "use another name" in json.dumps(answer)


def test_openai_client_and_curl(server, answers, clear):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for name in MODELS:
        options = {"max_tokens": TOKENS, "temperature": 0}
        extra = {"ignore_eos": True, "return_token_ids": True}
        done = client.completions.create(
            model=name, prompt=clear[name][2], extra_body=extra, **options
        )
        assert done.model == name
        assert done.choices[0].token_ids == answers[name][clear[name][2]].tokens
    streamed = client.completions.create(
        model="law", prompt=clear["law"][2], stream=True, extra_body=extra, **options
    )
    assert "".join(part.choices[0].text for part in streamed).split()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tax", prompt="a")
    prompt = clear["med"][2]
    body = {"model": "med", "prompt": prompt, **options, **extra}
    command = ["curl", "-sS", "--fail", f"{server.url}/v1/completions", "-d", json.dumps(body)]
    command += ["-H", "Content-Type: application/json"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert json.loads(out)["choices"][0]["token_ids"] == answers["med"][prompt].tokens


def test_two_ranks(models, answers, clear, tmp_path):
    tasks = {"law": models / "law.nps", "med": models / "med.nps"}
    options = arguments.many_tasks(models / "base", tasks, port=free_port())
    options += ["--tensor-parallel-size", "2"]
    with serving(tmp_path, options, **TWO) as server, ThreadPoolExecutor(6) as pool:
        every = [(name, prompt) for name in ("base", "law", "med") for prompt in clear[name][:4]]
        list(pool.map(lambda each: check(server, answers, *each), every))


def test_refuses_what_it_can_not_serve_with(models, tmp_path):
    options = arguments.many_tasks(
        models / "base", {"law": models / "damaged.nps"}, port=free_port()
    )
    with pytest.raises(AssertionError, match="P-DIGEST"), serving(tmp_path, options):
        pass
