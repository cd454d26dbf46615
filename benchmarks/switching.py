"""Seconds to switch a model in memory from one task to another, on the CPU.

Beside it, in turns in the same run: the same with both tasks kept rebuilt; copying every tensor
that either task changes, whole, from memory; writing only the elements that differ, from a list of
places and values; and loading its unpacked checkpoint again, into the model that is there. Made
weights in the shapes of a small Llama. Each is the least of several turns, as time that went by and
as CPU time of all threads, which other programs on the machine lengthen less. Rows are printed only
where the model was exactly the task after every switch, and the base at the end.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import nps_compress
import rows
from nps_compress import Recipe, TaskBank
from nps_compress._threads import workers
from nps_compress.adapters import quiet_transformers
from nps_compress.bench.synthetic import CHANGE_SCALE

KINDS: dict[str, dict[str, Any]] = {
    "signs 0.2": {"recipe": Recipe(prune="signs", density=0.2)},
    "signs 0.01": {"recipe": Recipe(prune="signs", density=0.01)},
    "magnitude 0.05": {"recipe": Recipe(prune="magnitude", density=0.05)},
    "lossless": {"lossless": True},
}


def write_models(folder: Path, hidden: int, layers: int) -> list[Path]:
    """A base and two fine-tunes of it, in bf16."""
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        intermediate_size=4 * hidden,
        vocab_size=32_000,
        tie_word_embeddings=True,
    )
    paths = []
    for number in range(3):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16()
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters() if number else ():
                change = torch.randn(parameter.shape)
                parameter.add_(CHANGE_SCALE * change * change.abs())
        paths.append(folder / f"model-{number}")
        model.save_pretrained(paths[-1])
    return paths


def words(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.view(torch.int16) for name, tensor in model.named_parameters()}


def measure(folder: Path, models: list[Path], kind: str, repeats: int) -> dict[str, object]:
    base, out = models[0], folder / kind.replace(" ", "-")
    out.mkdir()
    for number in (1, 2):
        nps_compress.pack(base, models[number], out / f"{number}.nps", **KINDS[kind])
        nps_compress.unpack(base, out / f"{number}.nps", out / f"{number}")
    tasks = {name: out / f"{name}.nps" for name in "12"}
    bank = TaskBank.from_pretrained(base, tasks)
    kept = TaskBank.from_pretrained(base, tasks, rebuilt_bytes=None)
    before = {n: t.clone() for n, t in words(bank.model).items()}
    whole = {
        n: {
            name: t.view(torch.int16)
            for name, t in load_file(out / n / "model.safetensors").items()
        }
        for n in "12"
    }
    # On the way from one task to the other all that either changes is written.
    changed = sorted(
        name
        for name, tensor in before.items()
        if any(not torch.equal(whole[n][name], tensor) for n in "12")
    )
    elements: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {"1": {}, "2": {}}
    for n, other in (("1", "2"), ("2", "1")):
        for name in changed:
            now, then = whole[n][name].view(-1), whole[other][name].view(-1)
            places = (now != then).nonzero().view(-1)
            elements[n][name] = (places, now[places])
    scratch = {name: tensor.clone() for name, tensor in before.items()}

    def switch(n: str) -> None:
        bank.activate(n)

    def rebuilt(n: str) -> None:
        kept.activate(n)

    def copy(n: str) -> None:
        for name in changed:
            scratch[name].copy_(whole[n][name])

    def scatter(n: str) -> None:
        for name, (places, values) in elements[n].items():
            scratch[name].view(-1)[places] = values

    def reload(n: str) -> None:
        for name, tensor in load_file(out / n / "model.safetensors").items():
            scratch[name].copy_(tensor.view(torch.int16))

    def right(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())

    ways: dict[str, Callable[[str], None]] = {
        "switch": switch,
        "rebuilt": rebuilt,
        "copy": copy,
        "scatter": scatter,
        "reload": reload,
    }
    wall, cpu = dict.fromkeys(ways, float("inf")), dict.fromkeys(ways, float("inf"))
    copy("2")
    for name in "212":
        kept.activate(name)
    found = {switch: bank, rebuilt: kept}
    for turn in range(repeats + 1):
        n = "12"[turn % 2]
        for name, way in ways.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            way(n)
            if turn:  # the first one warms up
                wall[name] = min(wall[name], time.perf_counter() - start)
                cpu[name] = min(cpu[name], time.process_time() - start_cpu)
            if not right(words(found[way].model) if way in found else scratch, whole[n]):
                raise SystemExit(f"{kind}: {name} is wrong; nothing is reported")
    for one in found.values():
        one.deactivate()
        if right(words(one.model), before):
            continue
        raise SystemExit(f"{kind}: the base is not restored; nothing is reported")
    info = bank.tasks()["1"]
    changed_bytes = sum(whole["1"][name].nbytes for name in changed)
    return {
        "kind": kind,
        "parameters": sum(tensor.numel() for tensor in before.values()),
        "changed_mb": round(changed_bytes / 1e6, 1),
        "resident_mb": round(info.nbytes / 1e6, 1),
        "file_mb": round(info.file_bytes / 1e6, 1),
        "threads": workers(),
        **{f"{name}_ms": round(1e3 * wall[name], 1) for name in ways},
        **{f"{name}_cpu_ms": round(1e3 * cpu[name], 1) for name in ways},
        "switch_over_copy": round(wall["switch"] / wall["copy"], 2),
        "rebuilt_over_copy": round(wall["rebuilt"] / wall["copy"], 2),
        "switch_over_copy_cpu": round(cpu["switch"] / cpu["copy"], 2),
        "switch_over_scatter_cpu": round(cpu["switch"] / cpu["scatter"], 2),
        "reload_over_switch_cpu": round(cpu["reload"] / cpu["switch"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/switching.csv"
    )
    options = parser.parse_args()
    torch.set_num_threads(workers())
    with tempfile.TemporaryDirectory() as name, quiet_transformers():
        models = write_models(Path(name), options.hidden, options.layers)
        found = [measure(Path(name), models, kind, options.repeats) for kind in options.kinds]
    print(rows.table(found))
    if options.save:
        print(rows.save("switching", found))


if __name__ == "__main__":
    main()
