"""Load test of `nps-compress serve`: one process and many tasks, beside what it replaces.

    python benchmarks/serving.py                 # writes results/serving.csv and serving.png
    python benchmarks/serving.py --requests 64 --tasks 2 8 --clients 4 16
    python benchmarks/serving.py --density 0.01 --systems ours mixed "base alone" --no-save

Made weights: a Llama of 16 million parameters that generates, and a BERT in the shape of MiniLM-L6
that classifies; a task is a fine-tune of it, packed as signs, 0.2 being the default's density.
Clients are on loopback; each asks for a task drawn at random, waits for the answer, and asks again.

``ours``            one process: the base and its tasks, which take turns
``ours, rebuilt``   the same with --rebuilt-memory for all tasks
``mixed``           as ours with --mixed: batches with rows of several tasks
``base alone``      the same server without tasks; all clients ask the base
``a process each``  one server for each unpacked fine-tune, one thread each
``reloading``       the same server, but that a switch is a from_pretrained of the unpacked
                    checkpoint, whose files are in the page cache
``copying``         likewise, but that a switch copies the mapped file into the model's weights

They take turns, and figures are medians over the turns. ``memory_mib`` is the proportional set
size of all processes of a system after the load. Every answer is compared with that of the
unpacked model offline, tokens or probabilities; a system one of whose answers is wrong has no row.
Prompts for which a second token comes close to the likeliest are left out, as sums of another order
may then decide otherwise, and those that make the model say a token that has no text.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

import nps_compress
import rows

WORKLOADS = ("generate", "classify")
SYSTEMS = (
    *("ours", "ours, rebuilt", "mixed", "base alone"),
    *("a process each", "reloading", "copying"),
)
SLOW = ("reloading", "copying")  # asked less
VOCABULARY = 4096
PROMPT_TOKENS, NEW_TOKENS = 64, 16
PROMPTS = 12  # of each task, all of whose answers are known
START_SECONDS = 300.0
TOLERANCE = 3e-3  # of probabilities: weights as large as these amplify float32's rounding
CLEAR_LEAD = 1e-3  # of the likeliest token's logit


@dataclass(frozen=True)
class Question:
    """What a task is asked, and what it must answer: tokens or probabilities."""

    prompt: list[int]
    answer: list[float]


@dataclass(frozen=True)
class World:
    """base and unpacked: folders; files: .nps; questions: by task, "base" being the base."""

    workload: str
    density: float
    base: Path
    files: dict[str, Path]
    unpacked: dict[str, Path]
    questions: dict[str, list[Question]]


def make_world(workload: str, density: float, folder: Path, tasks: int) -> World:
    """Weights, packed tasks, and what each says offline."""
    import transformers as hf

    torch.manual_seed(0)
    base = folder / "base"
    if workload == "generate":
        model: Any = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=6,
                intermediate_size=1024,
                max_position_embeddings=512,
                eos_token_id=None,
            )
        )
    else:
        model = hf.BertForSequenceClassification(
            hf.BertConfig(
                vocab_size=30522,
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
                id2label={i: f"class{i}" for i in range(4)},
                label2id={f"class{i}": i for i in range(4)},
            )
        )
    with torch.no_grad():  # fresh weights are so small that all inputs look the same
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3
    model.save_pretrained(base)
    _write_tokenizer(base)
    recipe = nps_compress.Recipe(prune="signs", density=density)
    world = World(workload, density, base, {}, {}, {})
    world.questions["base"] = _questions(world, base, 0)
    for number in range(1, tasks + 1):
        name, tuned = f"task{number}", folder / f"task{number}-tuned"
        generator = torch.Generator().manual_seed(number)
        state = {}
        for key, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            state[key] = tensor + 0.3 * noise * tensor.std() if tensor.ndim > 1 else tensor
        model_class = type(model)
        model_class.from_pretrained(None, config=model.config, state_dict=state).save_pretrained(
            tuned
        )
        _write_tokenizer(tuned)
        world.files[name], world.unpacked[name] = folder / f"{name}.nps", folder / name
        nps_compress.pack(base, tuned, world.files[name], recipe=recipe)
        nps_compress.unpack(base, world.files[name], world.unpacked[name])
        world.questions[name] = _questions(world, world.unpacked[name], number)
    return world


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def _questions(world: World, folder: Path, seed: int) -> list[Question]:
    import transformers as hf

    draw = random.Random(seed)
    model_class = (
        hf.AutoModelForCausalLM
        if world.workload == "generate"
        else hf.AutoModelForSequenceClassification
    )
    model = model_class.from_pretrained(folder).eval()
    found: list[Question] = []
    while len(found) < PROMPTS:
        length = draw.randrange(PROMPT_TOKENS // 2, PROMPT_TOKENS * 3 // 2)
        prompt = [draw.randrange(2, VOCABULARY) for _ in range(length)]
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        with torch.inference_mode():
            if world.workload == "generate":
                out = model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                answer = out.sequences[0, length:].tolist()
                leads = [logits[0].topk(2).values.diff().abs() for logits in out.logits]
                if min(leads) < CLEAR_LEAD or min(answer) < 2:
                    continue
            else:
                answer = model(input_ids=tokens, attention_mask=mask).logits[0].softmax(-1).tolist()
        found.append(Question(prompt, answer))
    return found


@dataclass
class Fleet:
    """Processes of a system, and the address where each name is answered."""

    processes: list[subprocess.Popen[str]]
    addresses: dict[str, tuple[str, str]]  # name asked for -> address, name there

    def memory_mib(self) -> float:
        """Proportional set size: what is shared is counted once."""
        total = 0
        for process in self.processes:
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        return total / 1024


@contextlib.contextmanager
def running(system: str, world: World) -> Iterator[Fleet]:
    """Start a system and wait until it answers."""
    script, cli = str(Path(__file__).resolve()), ["-m", "nps_compress.cli", "serve"]
    limits = ["--port", "0", "--max-waiting", "4096"]
    tasks = [f"--task={name}={path}" for name, path in world.files.items()]
    base = str(world.base)
    named = ["--name", "base"]
    if system == "ours":
        commands = [[*cli, base, *tasks, *limits, *named]]
    elif system == "ours, rebuilt":
        commands = [[*cli, base, *tasks, *limits, *named, "--rebuilt-memory", "64"]]
    elif system == "mixed":
        commands = [[*cli, base, *tasks, *limits, *named, "--mixed"]]
    elif system == "base alone":
        commands = [[*cli, base, *limits, *named]]
    elif system in SLOW:
        folders = [f"--task={name}={path}" for name, path in world.unpacked.items()]
        commands = [[script, f"--{system}", base, *tasks, "--", *folders]]
    else:
        commands = [
            [*cli, str(path), *limits, "--name", name] for name, path in world.unpacked.items()
        ]
    environment = dict(os.environ)
    if system == "a process each":
        environment["OMP_NUM_THREADS"] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment
        )
        for command in commands
    ]
    try:
        urls = []
        for process in processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " on http://" not in line:
                raise SystemExit(f"{system} did not start: {line}")
            urls.append(line.split()[-1])
        if system == "a process each":
            addresses = dict(
                zip(world.unpacked, zip(urls, world.unpacked, strict=True), strict=True)
            )
        else:
            addresses = {name: (urls[0], name) for name in world.questions}
        yield Fleet(processes, addresses)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
            if process.stdout:
                process.stdout.close()


@dataclass(frozen=True)
class Load:
    """Seconds of the whole, and of each answer."""

    seconds: float
    latencies: list[float]


async def ask(fleet: Fleet, world: World, names: Sequence[str], clients: int, total: int) -> Load:
    """So many clients at once, until there are so many answers; every one is checked."""
    draw = random.Random(1)
    wanted = [(name, draw.choice(world.questions[name])) for name in draw.choices(names, k=total)]
    latencies: list[float] = []

    async def client(http: httpx.AsyncClient) -> None:
        while wanted:
            name, question = wanted.pop()
            url, there = fleet.addresses[name]
            start = time.perf_counter()
            if world.workload == "generate":
                body = {
                    "model": there,
                    "prompt": question.prompt,
                    "temperature": 0,
                    "max_tokens": NEW_TOKENS,
                }
                answer = await http.post(f"{url}/v1/completions", json=body)
                text = answer.json()["choices"][0]["text"]
                right = text == " ".join(f"w{int(token)}" for token in question.answer)
            else:
                body = {"model": there, "input": question.prompt}
                answer = await http.post(f"{url}/classify", json=body)
                probabilities = answer.json()["data"][0]["probs"]
                right = all(
                    abs(a - b) < TOLERANCE
                    for a, b in zip(probabilities, question.answer, strict=True)
                )
            latencies.append(time.perf_counter() - start)
            if not right:
                raise SystemExit(f"wrong answer of {name}: {answer.text}")

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=600, trust_env=False, limits=limits) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return Load(time.perf_counter() - start, latencies)


def measure(
    world: World,
    systems: Sequence[str],
    tasks: int,
    clients: Sequence[int],
    total: int,
    turns: int,
) -> list[dict[str, Any]]:
    """A row for each number of clients and system."""
    some = World(
        world.workload,
        world.density,
        world.base,
        dict(list(world.files.items())[:tasks]),
        dict(list(world.unpacked.items())[:tasks]),
        world.questions,
    )
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        fleets = {system: stack.enter_context(running(system, some)) for system in systems}
        names = {s: ["base"] if s == "base alone" else list(some.files) for s in systems}
        for system in systems:  # compiled, loaded, warm
            asyncio.run(ask(fleets[system], some, names[system], 8, 32))
        for count in clients:
            loads: dict[str, list[Load]] = {system: [] for system in systems}
            memory: dict[str, float] = {}
            for _ in range(turns):
                for system in systems:
                    few = total if system not in SLOW else max(total // 4, count)
                    load = ask(fleets[system], some, names[system], count, few)
                    loads[system].append(asyncio.run(load))
                    memory[system] = fleets[system].memory_mib()
            shared = {"workload": world.workload, "density": world.density}
            shared |= {"tasks": tasks, "clients": count}
            found += [{**shared, **row} for row in _rows(loads, memory)]
    return found


def _rows(loads: dict[str, list[Load]], memory: dict[str, float]) -> list[dict[str, Any]]:
    rate = {
        system: statistics.median(len(each.latencies) / each.seconds for each in found)
        for system, found in loads.items()
    }
    found = []
    for system, mine in loads.items():
        latencies = sorted(value for load in mine for value in load.latencies)
        p99 = latencies[min(int(len(latencies) * 0.99), len(latencies) - 1)]
        found.append(
            {
                "system": system,
                "requests_per_second": round(rate[system], 2),
                "over_base_alone": round(rate[system] / rate["base alone"], 3),
                "ours_over_it": round(rate["ours"] / rate[system], 2),
                "p50_ms": round(1000 * latencies[len(latencies) // 2], 1),
                "p99_ms": round(1000 * p99, 1),
                "memory_mib": round(memory[system]),
                "answers": len(latencies),
                "turns": len(mine),
                "cores": os.cpu_count(),
            }
        )
    return found


def serve_loading(how: str, arguments: Sequence[str]) -> None:
    """The same server over a bank whose switches load a whole checkpoint, reloading or copying."""
    from safetensors.torch import load_file

    from nps_compress.commands.serving import _named
    from nps_compress.serve import server

    split = list(arguments).index("--")
    base, *tasks = arguments[:split]
    folders = _named(tuple(each.removeprefix("--task=") for each in arguments[split + 1 :]))

    class ReloadingBank(nps_compress.TaskBank):
        _loaded: str | None = None

        @contextlib.contextmanager
        def use(self, name: str | None, *, keep: bool = False) -> Iterator[Any]:
            if name != self._loaded:
                folder = Path(base) if name is None else folders[name]
                if how == "reloading":
                    model_class: Any = type(self.model)
                    state = model_class.from_pretrained(folder).state_dict()
                    self.model.load_state_dict(state, assign=True)
                else:
                    state = load_file(folder / "model.safetensors")
                    self.model.load_state_dict(state, strict=False)
                self._loaded = name
            yield self.model

    server.TaskBank = ReloadingBank  # type: ignore[misc]
    named = _named(tuple(each.removeprefix("--task=") for each in tasks))
    settings = server.Settings(base=base, tasks=named, port=0, name="base", max_waiting=4096)
    server.run(settings, tell=lambda line: print(line, flush=True))


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Throughput and memory of each system, where there are most tasks and clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    worlds = list(dict.fromkeys((row["workload"], row["density"]) for row in found))
    size = (1 + 4 * len(worlds), 6)
    figure, panels = pyplot.subplots(
        2, len(worlds), figsize=size, layout="constrained", squeeze=False
    )
    for column, (workload, density) in enumerate(worlds):
        rows_ = [row for row in found if (row["workload"], row["density"]) == (workload, density)]
        most = max((row["tasks"], row["clients"]) for row in rows_)
        shown = [row for row in rows_ if (row["tasks"], row["clients"]) == most]
        for line, (key, label) in enumerate(
            (("requests_per_second", "answers / s"), ("memory_mib", "memory, MiB"))
        ):
            panel = panels[line][column]
            bars = panel.barh([row["system"] for row in shown], [row[key] for row in shown])
            panel.bar_label(bars, padding=3)
            panel.margins(x=0.25)
            panel.invert_yaxis()
            panel.set_xlabel(label)
        panels[0][column].set_title(
            f"{workload}, density {density}\n{most[0]} tasks, {most[1]} clients"
        )
    figure.savefig(path, dpi=120)


def main() -> None:
    if sys.argv[1:] and sys.argv[1] in {f"--{system}" for system in SLOW}:
        serve_loading(sys.argv[1].removeprefix("--"), sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--density", nargs="+", type=float, default=[0.01, 0.2], help="of tasks")
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--clients", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--requests", type=int, default=96, help="answers a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    if not {"ours", "base alone"} <= set(options.systems):
        parser.error(
            "--systems must have 'ours' and 'base alone', which the others are compared to"
        )
    found = []
    for workload, density in itertools.product(options.workload, options.density):
        with tempfile.TemporaryDirectory() as folder:
            world = make_world(workload, density, Path(folder), max(options.tasks))
            for tasks in options.tasks:
                asked = (options.clients, options.requests, options.turns)
                new = measure(world, options.systems, tasks, *asked)
                print(rows.table(new), flush=True)
                found += new
                if not options.no_save:  # at once: the whole takes an hour
                    plot(found, rows.save("serving", found).with_suffix(".png"))


if __name__ == "__main__":
    main()
