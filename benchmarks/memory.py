"""Peak memory of pack, verify and unpack on a sharded checkpoint far larger than the bound.

The bound is 1 GiB plus four times the largest tensor, whatever the model's size. Each step runs
in a process of its own, which reads its peak resident set from Linux's /proc. The lossless road
must give back every tensor; otherwise nothing is reported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import nps_compress
import rows
from nps_compress.checkpoint import open_checkpoint
from nps_compress.dtypes import BY_NAME, round_float32

BF16 = BY_NAME["BF16"]
HIDDEN, FEED_FORWARD, VOCABULARY = 3072, 8192, 64_000
SHARD_BYTES = 2_000_000_000


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """A Llama-like model with grouped-query attention."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= {
            at + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            at + "self_attn.k_proj.weight": (HIDDEN // 4, HIDDEN),
            at + "self_attn.v_proj.weight": (HIDDEN // 4, HIDDEN),
            at + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            at + "mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
            at + "mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
            at + "mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
            at + "input_layernorm.weight": (HIDDEN,),
            at + "post_attention_layernorm.weight": (HIDDEN,),
        }
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def write(folder: Path, layers: int, changed: bool) -> int:
    """Write one checkpoint, shard by shard, from a block of weights that is rolled per tensor."""
    rng = np.random.default_rng(0)
    block = round_float32(rng.normal(0, 0.02, 1 << 24).astype(np.float32), BF16)
    move = rng.standard_t(3, block.size).astype(np.float32) * np.float32(2e-4)
    tuned = round_float32((block.astype(np.uint32) << 16).view(np.float32) + move, BF16)
    source = tuned if changed else block
    folder.mkdir(parents=True)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(layers).items():
        nbytes = 2 * int(np.prod(shape))
        if size + nbytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        header, offset = {}, 0
        for name, shape in group.items():
            end = offset + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, shape in group.items():
                count = int(np.prod(shape))
                start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "little")
                while count:
                    part = source[start % source.size :][:count]
                    stream.write(part.tobytes())
                    count, start = count - part.size, 0
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


# What wait4 or getrusage say of a program includes the peak of the process that started it.
LAUNCHER = """
import atexit, runpy, sys
from pathlib import Path

report, module = sys.argv[1], sys.argv[2]
del sys.argv[1:3]
atexit.register(lambda: Path(report).write_text(Path("/proc/self/status").read_text()))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def peak(*arguments: object, module: str = "nps_compress.cli") -> tuple[float, float]:
    """Run a module, the CLI; returns seconds and its own peak resident set in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "status"
        command = [sys.executable, "-c", LAUNCHER, str(report), module, *map(str, arguments)]
        start = time.perf_counter()
        if subprocess.run(command).returncode:
            raise SystemExit(f"{module} {' '.join(map(str, arguments))} failed")
        seconds = time.perf_counter() - start
        (line,) = (s for s in report.read_text().splitlines() if s.startswith("VmHWM:"))
    return seconds, int(line.split()[1]) / 2**20


def index_percent(file: Path) -> float:
    """What of a file is no tensor's data."""
    said = nps_compress.inspect(file)
    data = sum(tensor["stored_bytes"] for tensor in said["tensors"])
    return 100 * float(1 - data / said["file_bytes"])


def same(left: Path, right: Path) -> bool:
    first, second = open_checkpoint(left), open_checkpoint(right)
    return first.tensors.keys() == second.tensors.keys() and all(
        np.array_equal(first.read(name), second.read(name)) for name in first.tensors
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28, help="28 give 6.4 GB a checkpoint")
    parser.add_argument("--folder", type=Path, help="where to work (needs 20 GB)")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        print("writing base and fine-tune", flush=True)
        total = write(work / "base", arguments.layers, changed=False)
        write(work / "tuned", arguments.layers, changed=True)
        largest = max(2 * int(np.prod(shape)) for shape in shapes(arguments.layers).values())
        bound = 1 + 4 * largest / 2**30
        pair = work / "base", work / "tuned"
        steps: dict[str, tuple[object, ...]] = {
            "pack magnitude 0.05": (
                *("pack", *pair, "-o", work / "m.nps"),
                *("--prune", "magnitude", "--density", "0.05"),
            ),
            "pack sampled 0.01": (
                *("pack", *pair, "-o", work / "s.nps"),
                *("--prune", "sampled", "--density", "0.01"),
            ),
            "pack signs 0.01": (
                *("pack", *pair, "-o", work / "t.nps"),
                *("--prune", "signs", "--density", "0.01"),
            ),
            "pack lossless": ("pack", *pair, "-o", work / "l.nps", "--lossless"),
            "verify magnitude": ("verify", work / "base", work / "m.nps"),
            "unpack lossless": ("unpack", work / "base", work / "l.nps", "-o", work / "out"),
        }
        found: list[dict[str, object]] = []
        for name, step in steps.items():
            seconds, resident = peak(*step)
            output = Path(str(step[step.index("-o") + 1])) if "-o" in step else None
            size = output.stat().st_size if output and output.is_file() else None
            found.append(
                {
                    "step": name,
                    "checkpoint_gb": round(total / 1e9, 2),
                    "largest_tensor_gib": round(largest / 2**30, 3),
                    "peak_gib": round(resident, 3),
                    "bound_gib": round(bound, 3),
                    "within": resident <= bound,
                    "seconds": round(seconds, 1),
                    "dense_gb_s": round(total / seconds / 1e9, 3),
                    "bits_per_param": round(16 * size / total, 4) if size else "",
                    "index_percent": round(index_percent(output), 3) if output and size else "",
                }
            )
            print(rows.table(found[-1:]), flush=True)
        if not same(work / "tuned", work / "out"):
            raise SystemExit("the lossless road did not give the fine-tune back; nothing reported")
        print(f"\nlossless road exact\n\n{rows.table(found)}")
        print(f"\nsaved in {rows.save('memory_cpu', found)}")
        if not all(row["within"] for row in found):
            raise SystemExit("a step went over the bound")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
