"""Servers on loopback over tiny models made on the spot, and what the models say offline."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import tiny_models
import torch
import uvicorn
from conftest import WORDS

import nps_compress
from nps_compress.recipe import Recipe
from nps_compress.serve import server
from nps_compress.serve.api_key import read_api_key

POSITIONS = 160
TEMPLATE = "{% for m in messages %}{{ m.role }} word {{ m.content }} {% endfor %}the"
OTHER_TEMPLATE = "a {{ messages[-1].content }}"
NO_HEAD = "encoder"


@dataclass
class World:
    """A base and its tasks: .nps files, and the same unpacked, which transformers loads."""

    folder: Path
    base: Path
    tasks: dict[str, Path]
    unpacked: dict[str, Path]
    loaded: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def offline(self, name: str) -> tuple[Any, Any]:
        """The model and tokenizer of a task, or of the base, by plain transformers."""
        import transformers

        if name not in self.loaded:
            path = self.base if name == "base" else self.unpacked[name]
            config = transformers.AutoConfig.from_pretrained(path)
            found = getattr(transformers, config.architectures[0]).from_pretrained(path)
            self.loaded[name] = found.eval(), transformers.AutoTokenizer.from_pretrained(path)
        return self.loaded[name]

    def greedy(self, name: str, prompt: str | Sequence[int], most: int) -> tuple[str, int]:
        """-> the text that the model generates, and the number of its tokens."""
        model, tokenizer = self.offline(name)
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=most, do_sample=False
            )[0, len(ids) :]
        return tokenizer.decode(out, skip_special_tokens=True), len(out)

    def ends_by_itself(self, name: str, prompt: str, most: int) -> bool:
        """Whether the model ends its answer before there are more tokens than so many."""
        return self.greedy(name, prompt, most) == self.greedy(name, prompt, most + 1)

    def settings(self, **options: Any) -> server.Settings:
        return server.Settings(base=str(self.base), tasks=self.tasks, port=0, **options)


def causal_world(folder: Path) -> World:
    """A language model whose answers end by themselves now and then; ``code`` has a template of
    its own."""
    import transformers as hf

    torch.manual_seed(0)
    settings = {**tiny_models.BERT, "max_position_embeddings": POSITIONS}
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **settings, num_key_value_heads=1, eos_token_id=tiny_models.BERT["vocab_size"] - 1
        )
    )
    _enlarge(model)
    base = folder / "base"
    model.save_pretrained(base)
    tiny_models.write_tokenizer(base)
    tiny_models._end_answers(base, always=False)
    _set_template(base, TEMPLATE)
    return _with_tasks(folder, base, ("law", "med", "code"))


def classifier_world(folder: Path) -> World:
    """An encoder and classifiers made from it, of two numbers of classes."""
    import transformers as hf

    torch.manual_seed(0)
    base = folder / "base"
    body = hf.BertModel(hf.BertConfig(**tiny_models.BERT))
    _enlarge(body)
    body.save_pretrained(base)
    tiny_models.write_tokenizer(base)
    return _with_tasks(folder, base, ("topic", "mood"))


def _with_tasks(folder: Path, base: Path, names: Sequence[str]) -> World:
    world = World(folder, base, {}, {})
    for number, name in enumerate(names):
        tuned = folder / f"{name}-tuned"
        write_fine_tune(
            base, tuned, number + 1, template=OTHER_TEMPLATE if name == "code" else None
        )
        pack(world, tuned, name)
    return world


def write_fine_tune(base: Path, tuned: Path, seed: int, template: str | None = None) -> None:
    import transformers as hf

    config = hf.AutoConfig.from_pretrained(base)
    if config.model_type == "bert":
        torch.manual_seed(seed)
        labels = [f"{tuned.name}-{i}" for i in range(2 + seed)]
        config = hf.AutoConfig.from_pretrained(base, num_labels=len(labels))
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        model = hf.BertForSequenceClassification.from_pretrained(base, config=config)
        model.classifier.weight.data *= 20
    else:
        model = hf.AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.6 * noise * parameter.std()
    model.save_pretrained(tuned)
    hf.AutoTokenizer.from_pretrained(base).save_pretrained(tuned)
    if template:
        _set_template(tuned, template)


def pack(world: World, tuned: Path, name: str) -> Path:
    path, unpacked = world.folder / f"{name}.nps", world.folder / f"{name}-unpacked"
    nps_compress.pack(world.base, tuned, path, recipe=Recipe(prune="sampled", density=0.3))
    nps_compress.unpack(world.base, path, unpacked)
    world.tasks[name], world.unpacked[name] = path, unpacked
    return path


def _enlarge(model: torch.nn.Module) -> None:
    with torch.no_grad():  # fresh weights are so small that all inputs look the same
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 4


def _set_template(folder: Path, template: str) -> None:
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def prompts(count: int, longest: int = 40) -> list[str]:
    """Made of the words that the tokenizer knows; the same ones each time."""
    rng = np.random.default_rng(7)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


@dataclass
class Running:
    url: str
    app: Any
    engine: Any
    key: str | None = None

    @cached_property
    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, timeout=60, headers=headers, trust_env=False)

    @cached_property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.key or "none",
            max_retries=0,
            timeout=60,
            http_client=httpx.Client(trust_env=False),
        )

    def complete(self, model: str, prompt: str, most: int = 8, **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": most, "temperature": 0, **more}
        return self.http.post("/v1/completions", json=body)

    def text(self, model: str, prompt: str, most: int = 8) -> str:
        found = self.complete(model, prompt, most)
        assert found.status_code == 200, found.text
        return found.json()["choices"][0]["text"]

    def is_idle(self) -> bool:
        waiting, running = self.engine.work()
        return not waiting and not running


@contextlib.contextmanager
def running(settings: server.Settings) -> Iterator[Running]:
    """A real server in a thread."""
    key = read_api_key(settings.api_key_file, {})
    app = server.build(settings, key)
    with server.bound("127.0.0.1", 0) as listener:
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        serving = uvicorn.Server(config)
        thread = threading.Thread(target=serving.run, args=([listener],))
        thread.start()
        wait_until(lambda: serving.started or not thread.is_alive())
        found = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app, app.state.engine, key)
        try:
            yield found
        finally:
            found.http.close()
            found.openai.close()
            serving.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
            assert not found.engine.alive


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def events(text: str) -> list[Any]:
    """What a stream of server-sent events tells, [DONE] included."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
