"""The server over real HTTP: every answer is that of the unpacked model offline."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import servers
import torch

NAMES = ("base", "law", "med", "code")


@pytest.fixture(scope="module")
def world(causal_world):
    return causal_world


@pytest.fixture(scope="module")
def server(world):
    with servers.running(world.settings(cycle_time=0.05, max_batch=4)) as found:
        yield found


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    return servers.classifier_world(tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="module")
def reader(classifiers):
    with servers.running(classifiers.settings(name="minibert")) as found:
        yield found


def test_requests_of_all_tasks_at_once_get_the_answers_of_the_unpacked_models(world, server):
    jobs = [
        (NAMES[i % 4], prompt, 1 + 5 * i % 23, i % 3 == 0)
        for i, prompt in enumerate(servers.prompts(48))
    ]

    def ask(job):
        name, prompt, most, streamed = job
        options = {"model": name, "prompt": prompt, "max_tokens": most, "temperature": 0}
        if not streamed:
            found = server.openai.completions.create(**options)
            return found.choices[0].text, found.choices[0].finish_reason, found.usage
        pieces = list(
            server.openai.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
        )
        told = [piece.choices[0] for piece in pieces if piece.choices]
        assert [each.finish_reason for each in told[:-1]] == [None] * (len(told) - 1)
        return "".join(each.text for each in told), told[-1].finish_reason, pieces[-1].usage

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, jobs))
    endings = set()
    for (name, prompt, most, _), (text, reason, usage) in zip(jobs, answers, strict=True):
        wanted, count = world.greedy(name, prompt, most)
        assert text == wanted, (name, prompt)
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt.split()), count)
        assert (reason == "stop") == world.ends_by_itself(name, prompt, most)
        endings.add(reason)
    assert endings == {"length", "stop"}
    assert len({world.greedy(name, jobs[0][1], 20)[0] for name in NAMES}) == 4
    assert server.engine.bank.metrics().switches > 4


def test_chat_is_worded_by_each_tasks_own_template(world, server):
    messages = [
        {"role": "system", "content": "red"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "cat "}, {"type": "text", "text": "runs"}],
        },
    ]
    worded = {
        "law": "system word red user word cat runs the",
        "base": "system word red user word cat runs the",
        "code": "a cat runs",
    }
    for name, text in worded.items():
        found = server.openai.chat.completions.create(
            model=name, messages=messages, max_completion_tokens=9, temperature=0
        )
        assert found.choices[0].message.content == world.greedy(name, text, 9)[0]
        assert found.choices[0].message.role == "assistant"
        assert found.usage.prompt_tokens == len(text.split())
        pieces = list(
            server.openai.chat.completions.create(
                model=name, messages=messages, max_tokens=9, temperature=0, stream=True
            )
        )
        assert pieces[0].choices[0].delta.role == "assistant"
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == found.choices[0].message.content
        assert pieces[-1].choices[0].finish_reason == found.choices[0].finish_reason


def test_chat_goes_on_to_the_limit_unless_told(world, server):
    found = server.openai.chat.completions.create(
        model="code", messages=[{"role": "user", "content": "cat"}], temperature=0
    )
    wanted, count = world.greedy("code", "a cat", servers.POSITIONS - 2)
    assert found.choices[0].message.content == wanted
    assert found.usage.completion_tokens == count


def test_models_are_the_base_and_its_tasks(world, server):
    found = {model.id: model for model in server.openai.models.list().data}
    assert list(found) == list(NAMES)
    assert found["base"].parent is None
    assert {found[name].parent for name in world.tasks} == {"base"}
    assert {model.max_model_len for model in found.values()} == {servers.POSITIONS}
    assert server.openai.models.retrieve("law").id == "law"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("tax")


def test_an_unknown_model_is_404(server):
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.completions.create(model="tax", prompt="red")
    assert caught.value.body == {
        "message": "the model 'tax' does not exist",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }
    answer = server.http.get("/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    answer = server.http.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def curl(*arguments):
    done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(world, server):
    body = {"model": "law", "prompt": "the red cat", "max_tokens": 6, "temperature": 0}
    wanted = world.greedy("law", "the red cat", 6)[0]
    url = f"{server.url}/v1/completions"
    plain = curl(url, "--json", json.dumps(body))
    assert json.loads(plain)["choices"][0]["text"] == wanted
    streamed = servers.events(curl("-N", url, "--json", json.dumps({**body, "stream": True})))
    assert streamed[-1] == "[DONE]"
    assert "".join(each["choices"][0]["text"] for each in streamed[:-1]) == wanted
    assert json.loads(curl(f"{server.url}/health")) == {"status": "ok"}


def test_prompts_may_be_several_and_tokens(world, server):
    texts = ["red cat", "the day in a word"]
    found = server.openai.completions.create(
        model="med", prompt=texts, n=2, max_tokens=5, temperature=0
    )
    wanted = [world.greedy("med", text, 5) for text in texts for _ in range(2)]
    assert [choice.text for choice in found.choices] == [text for text, _ in wanted]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == 7
    assert found.usage.completion_tokens == sum(count for _, count in wanted)
    tokens = server.openai.completions.create(
        model="med", prompt=[[2, 5], [9]], max_tokens=5, temperature=0
    )
    wanted = [world.greedy("med", prompt, 5)[0] for prompt in ([2, 5], [9])]
    assert [choice.text for choice in tokens.choices] == wanted


def test_seeds_give_the_same_draws_in_whatever_batch(server):
    def drawn(seed, model="law", **more):
        return server.openai.completions.create(
            model=model, prompt="the red", max_tokens=20, seed=seed, temperature=1.5, **more
        )

    alone = drawn(5).choices[0].text
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: drawn(5 + i % 2, NAMES[1 + i // 4]), range(8)))
    texts = [found.choices[0].text for found in together]
    assert texts[0] == texts[2] == alone
    assert texts[1] == texts[3] != alone
    assert texts[4] != alone
    several = drawn(5, n=3).choices
    assert several[0].text == alone
    assert several[1].text == texts[1]  # of the next seed
    assert drawn(None).choices[0].text != drawn(None).choices[0].text


def test_next_to_no_top_p_is_greedy(world, server):
    found = server.openai.completions.create(
        model="law", prompt="the red", max_tokens=12, top_p=1e-9, temperature=2
    )
    assert found.choices[0].text == world.greedy("law", "the red", 12)[0]


def test_log_probabilities_are_the_models(world, server):
    model, tokenizer = world.offline("med")
    prompt = tokenizer("a dog sleeps")["input_ids"]
    found = server.openai.completions.create(
        model="med", prompt=prompt, max_tokens=4, temperature=0, logprobs=3
    ).choices[0]
    chat = server.openai.chat.completions.create(
        model="med",
        messages=[{"role": "user", "content": "dog"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    ).choices[0]
    tokens = list(prompt)
    for i, text in enumerate(found.logprobs.tokens):
        with torch.inference_mode():
            scores = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        likeliest = scores.topk(3)
        assert found.logprobs.token_logprobs[i] == pytest.approx(float(scores.max()), abs=1e-4)
        wanted = {
            tokenizer.decode([token]): pytest.approx(value, abs=1e-4)
            for token, value in zip(
                likeliest.indices.tolist(), likeliest.values.tolist(), strict=True
            )
        }
        assert found.logprobs.top_logprobs[i] == wanted
        tokens.append(int(scores.argmax()))
        assert text == tokenizer.decode([tokens[-1]])
    assert found.logprobs.text_offset[:2] == [0, len(found.logprobs.tokens[0])]
    scores = chat.logprobs.content
    assert [each.token for each in scores] == [each.top_logprobs[0].token for each in scores]
    assert all(len(each.top_logprobs) == 2 for each in scores)
    assert bytes(scores[0].bytes).decode() == scores[0].token


def test_a_stop_string_ends_the_text_before_it(world, server):
    whole = world.greedy("law", "the red cat", 40)[0]
    words = whole.split(" ")
    at = next(i for i in range(2, len(words)) if words[i] not in words[:i])  # a word that is new
    stop = f" {words[at]}"
    for stream in (False, True):
        body = {"stop": [stop, "never"], "stream": stream}
        answer = server.complete("law", "the red cat", 40, **body)
        if stream:
            told = [each["choices"][0] for each in servers.events(answer.text)[:-1]]
            text, reason = "".join(each["text"] for each in told), told[-1]["finish_reason"]
        else:
            choice = answer.json()["choices"][0]
            text, reason = choice["text"], choice["finish_reason"]
            assert answer.json()["usage"]["completion_tokens"] == at + 1
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_embeddings_are_the_mean_of_the_last_states(classifiers, reader):
    texts = ["the red cat", "a dog sleeps in the word", "bird"]
    for name in ("topic", "mood", "base"):
        model, tokenizer = classifiers.offline(name)
        wanted = []
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt")
            with torch.inference_mode():
                states = model.base_model(**tokens).last_hidden_state[0]
            wanted.append(torch.nn.functional.normalize(states.mean(0), dim=0))
        served = "minibert" if name == "base" else name
        for encoding in ("float", "base64"):  # which the client asks for, and decodes, by itself
            found = reader.openai.embeddings.create(
                model=served, input=texts, encoding_format=encoding
            )
            if encoding == "base64":
                found = reader.openai.embeddings.create(model=served, input=texts)
            got = torch.tensor([each.embedding for each in found.data])
            assert torch.allclose(got, torch.stack(wanted), atol=1e-5)
            assert found.usage.prompt_tokens == 10


def test_classes_are_each_tasks_own(classifiers, reader):
    texts = servers.prompts(20, 12)
    with ThreadPoolExecutor(8) as pool:
        jobs = [(name, text) for text in texts for name in ("topic", "mood")]
        answers = list(
            pool.map(
                lambda job: reader.http.post(
                    "/classify", json={"model": job[0], "input": job[1]}
                ).json(),
                jobs,
            )
        )
    labels = set()
    for (name, text), answer in zip(jobs, answers, strict=True):
        model, tokenizer = classifiers.offline(name)
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        (found,) = answer["data"]
        assert found["probs"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert found["label"] == model.config.id2label[int(logits.argmax())]
        assert found["num_classes"] == {"topic": 3, "mood": 4}[name]
        labels.add(found["label"])
    assert len(labels) > 2
    whole = reader.http.post("/classify", json={"model": "mood", "input": texts}).json()
    wanted = [answer["data"][0]["probs"] for answer in answers[1::2]]
    for found, probabilities in zip(whole["data"], wanted, strict=True):
        assert found["probs"] == pytest.approx(probabilities, abs=1e-5)


def test_a_model_is_asked_only_for_what_it_can(server, reader):
    answer = server.http.post("/v1/embeddings", json={"model": "law", "input": "red"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "model 'law' does not embed; it can: generate",
    )
    answer = reader.http.post("/classify", json={"model": "minibert", "input": "red"})
    assert "model 'minibert' does not classify; it can: embed" in answer.text
    answer = reader.complete("topic", "red")
    assert "model 'topic' does not generate; it can: classify, embed" in answer.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"max_tokens": 200},
            "1 tokens of the prompt and 200 of the answer are more than the limit of 160",
        ),
        ({"prompt": "red " * 161}, "prompt has 161 tokens, the limit is 160"),
        ({"prompt": ""}, "prompt has no tokens"),
        ({"prompt": [99]}, "prompt has token 99, the model knows 19"),
        ({"prompt": [[1]] * 9, "n": 2}, "9 prompts times n = 2 are more than 16"),
        ({"tools": []}, "tools: Extra inputs are not permitted"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature: Input should be a finite number"),
        ({"presence_penalty": 1}, "presence_penalty: Input should be less than or equal to 0"),
        ({"model": 3}, "model: Input should be a valid string"),
        (
            {"model": "\ud800"},
            "model: Input should be a valid string, unable to parse raw data as a unicode string",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"seed": 2**63}, "seed: Input should be less than 9223372036854775808"),
    ],
)
def test_bad_requests_are_one_clear_line(server, body, message):
    whole = {"model": "law", "prompt": "red", **body}
    answer = server.http.post(
        "/v1/completions", content=json.dumps(whole), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 50_000])
def test_what_is_no_json_is_refused(server, content):
    answer = server.http.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_chat_template_may_refuse(server):
    answer = server.http.post(
        "/v1/chat/completions", json={"model": "law", "messages": [{"role": "tool", "content": ""}]}
    )
    assert answer.status_code == 400
    answer = server.http.post("/v1/chat/completions", json={"model": "law", "messages": []})
    assert answer.status_code == 400


def test_metrics_and_status_say_what_was_done(world, server):
    server.text("law", "red", 3)
    server.http.post("/v1/completions", json={"model": "law", "prompt": ""})
    lines = server.http.get("/metrics").text.splitlines()
    found = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"
    }
    assert found['nps_requests_total{status="200",task="law"}'] >= 1
    assert found['nps_request_seconds_count{task="law"}'] >= 1
    assert found['nps_generated_tokens_total{task="law"}'] >= 3
    assert found["nps_bank_switches_total"] == server.engine.bank.metrics().switches
    assert found["nps_waiting"] == found["nps_running"] == 0
    status = server.http.get("/status").json()
    tasks = {task["id"]: task for task in status["tasks"]}
    assert set(tasks) == set(NAMES)
    assert tasks["law"]["active"]
    assert tasks["med"]["file_bytes"] == world.tasks["med"].stat().st_size
    assert tasks["med"]["tier"] == "host"
    assert len(status["switch_seconds"]) == min(status["switches"], 256)


def test_the_page_needs_nothing_else(server):
    answer = server.http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text.replace("http://www.w3.org/", "")
    assert "https://" not in answer.text


def test_another_host_name_than_its_own_is_no_matter(server):
    """Behind a proxy the name is the proxy's."""
    answer = httpx.get(f"{server.url}/health", headers={"host": "models.example"}, trust_env=False)
    assert answer.status_code == 200
