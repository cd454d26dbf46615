"""Mixed batches over real HTTP: every answer is that of the unpacked model offline."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import servers
import torch

from nps_compress import TaskBank

NAMES = ("base", "law", "med", "code")


@pytest.fixture(scope="module")
def world(causal_world):
    return causal_world


@pytest.fixture(scope="module")
def server(world):
    with servers.running(world.settings(cycle_time=0.05, mixed=True)) as found:
        yield found


def figures(server) -> dict[str, float]:
    lines = server.http.get("/metrics").text.splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"
    }


def margin(world, name: str, prompt: str, most: int) -> float:
    """By how much the likeliest token leads, where it leads by least."""
    model, tokenizer = world.offline(name)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    leads = [scores[0].topk(2).values for scores in said.scores]
    return min(float(first - second) for first, second in leads)


def test_requests_of_all_tasks_at_once_get_their_own_answers(world, server):
    most = 8
    jobs = [
        (name, prompt)
        for i, prompt in enumerate(servers.prompts(32))
        if margin(world, name := NAMES[i % 4], prompt, most) > 0.01
    ]
    assert len(jobs) > 20
    assert {name for name, _ in jobs} == set(NAMES)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda job: server.text(*job, most), jobs))
    seen = []
    for (name, prompt), text in zip(jobs, answers, strict=True):
        assert text == world.greedy(name, prompt, most)[0], (name, prompt)
        others = [world.greedy(other, prompt, most)[0] for other in NAMES if other != name]
        seen.append(text not in others)
    assert sum(seen) > 0.8 * len(seen)
    found = figures(server)
    passes = found["nps_batch_tasks_count"]
    assert passes == found["nps_batch_rows_count"]
    assert found['nps_batch_tasks_bucket{le="1.0"}'] < 0.5 * passes
    # each to try it once, and back; no more for requests
    assert found["nps_bank_switches_total"] == server.engine.bank.metrics().switches == 2 * 3
    assert server.engine.bank.active is None
    servers.wait_until(server.is_idle)
    status = server.http.get("/status").json()
    assert [task["running"] + task["waiting"] for task in status["tasks"]] == [0] * 4


def test_draws_are_the_same_in_a_mixed_batch(server):
    def drawn(name: str) -> str:
        body = {"model": name, "prompt": "the red", "max_tokens": 15, "seed": 5, "temperature": 1.5}
        return server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    alone = {name: drawn(name) for name in NAMES}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(drawn, NAMES * 4))
    assert together == [alone[name] for name in NAMES] * 4


def test_with_room_for_one_task_what_has_begun_goes_on(world):
    """Rows of the mix whose task had to leave memory go on at turns of their own."""
    most, prompt = 30, "the red cat runs"
    sizes = [
        task.nbytes for task in TaskBank.from_pretrained(world.base, world.tasks).tasks().values()
    ]
    options = {"host_memory": 1.5e-9 * min(sizes), "cycle_time": 0.02, "max_running": 4}
    with servers.running(world.settings(mixed=True, **options)) as server:
        moved, move_out = [], server.engine._move_out
        server.engine._move_out = lambda task: (
            moved.extend(row for group in server.engine._groups["mixed"] for row in group.rows),
            move_out(task),
        )
        names = NAMES * 4
        with ThreadPoolExecutor(12) as pool:
            texts = list(pool.map(lambda name: server.text(name, prompt, most), names))
        assert texts == [world.greedy(name, prompt, most)[0] for name in NAMES] * 4
        servers.wait_until(server.is_idle)
        assert moved
        assert not server.engine._groups


def test_what_can_not_be_mixed_takes_turns_in_the_same_server(tmp_path):
    """One task has a head of its own size."""
    world = servers.classifier_world(tmp_path)
    for seed, name in ((1, "more"), (1, "again")):  # of as many classes as the first
        servers.write_fine_tune(world.base, tmp_path / f"{name}-tuned", seed)
        servers.pack(world, tmp_path / f"{name}-tuned", name)
    texts = servers.prompts(24, 12)
    names = ("topic", "mood", "more", "again")
    with servers.running(world.settings(mixed=True, cycle_time=0.05)) as server:

        def classes(job):
            answer = server.http.post("/classify", json={"model": job[0], "input": job[1]})
            return answer.json()["data"][0]["probs"]

        def embedded(job):
            return server.openai.embeddings.create(model=job[0], input=[job[1]]).data[0].embedding

        jobs = [(name, text) for text in texts for name in names]
        with ThreadPoolExecutor(16) as pool:
            probabilities = list(pool.map(classes, jobs))
            vectors = list(pool.map(embedded, jobs))
        found = figures(server)
        assert found['nps_batch_tasks_bucket{le="1.0"}'] < found["nps_batch_tasks_count"]
        assert server.engine._unmixable == {"mood"}
    for (name, text), probs, vector in zip(jobs, probabilities, vectors, strict=True):
        model, tokenizer = world.offline(name)
        with torch.inference_mode():
            tokens = tokenizer(text, return_tensors="pt")
            wanted = model(**tokens).logits[0].softmax(-1)
            state = model.base_model(**tokens).last_hidden_state[0].mean(0)
        assert probs == pytest.approx(wanted.tolist(), abs=1e-4)
        assert vector == pytest.approx((state / state.norm()).tolist(), abs=1e-4)
