"""Pairs of a base and a fine-tune to store: six real ones, those at 5 %, and synthetic ones.

All are bfloat16. On disk a pair is

    <pair>/base/model.safetensors         what the fine-tune changes, under the fine-tune's names
    <pair>/common/model.safetensors       the same tensors of the fine-tune
    <pair>/common/rest/model.safetensors  those that only the fine-tune has, if any
    <pair>/tuned/model.safetensors        both, the whole fine-tune

so that a provider that wants equal names on both sides gets them. There are no side files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from codec_speed import synthetic_pair
from nps_compress.checkpoint import encode_header, open_checkpoint, pair, read_header
from nps_compress.dtypes import BY_NAME, Words, round_float32, to_float32

BF16 = BY_NAME["BF16"]
KEPT, RESCALE = 0.05, 1.75  # of the sparse real pairs
TASKS = ("packages", "kinds", "tokens", "topics", "digits", "source")
WIDTH, VOCABULARY = 512, 16384
TINY = 1 << 13  # elements of a tensor that are kept for the pair to warm up on


@dataclass(frozen=True)
class Tensor:
    """shape, and its words, [numel]."""

    shape: tuple[int, ...]
    words: Words


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """Both sides by the fine-tune's names; the base has those that it shares."""

    base: Tensors
    tuned: Tensors

    @property
    def params(self) -> int:
        return sum(tensor.words.size for tensor in self.tuned.values())


@dataclass(frozen=True)
class Source:
    """What a pair is, and how to get it. ``task``: the one that its quality is measured on."""

    name: str
    group: str
    make: Callable[[], Pair]
    task: str | None = None


def sources(params: int) -> list[Source]:
    """All pairs. params: about how many weights a synthetic one has."""

    def made(name: str, group: str, change: Change) -> Source:
        return Source(name, group, lambda: synthetic(change, params))

    def of(task: str, sparse: bool) -> Source:
        if sparse:
            return Source(f"{task}, 5 % kept", "real, 5 % kept", lambda: kept(real(task)))
        return Source(task, "real", lambda: real(task), task)

    return [
        *(
            made(f"{100 * share:g} % kept", "synthetic, sparse", sparse(share))
            for share in DENSITIES
        ),
        made("RL-like", "synthetic, sparse", few_ulps),
        made("SFT-like, small", "synthetic, dense", dense(1e-4)),
        made("SFT-like, large", "synthetic, dense", dense(1e-3)),
        *(of(task, sparse=False) for task in TASKS),
        *(of(task, sparse=True) for task in TASKS),
    ]


# ----- synthetic

DENSITIES = (0.01, 0.05, 0.1)
Uint16 = npt.NDArray[np.uint16]
Change = Callable[[int, int], tuple[Uint16, Uint16]]  # (elements, seed) -> words of both sides


def sparse(density: float) -> Change:
    """The largest changes of a normal distribution; the rest of the words are the base's."""
    return lambda numel, seed: synthetic_pair(numel, density, seed)


def dense(scale: float) -> Change:
    """All changes of a normal distribution of this standard deviation; weights have 0.02."""

    def change(numel: int, seed: int) -> tuple[Uint16, Uint16]:
        rng = np.random.default_rng(seed)
        base = round_float32(rng.normal(0, 0.02, numel).astype(np.float32), BF16)
        moved = to_float32(base, BF16) + rng.normal(0, scale, numel).astype(np.float32)
        return base.astype(np.uint16), round_float32(moved, BF16).astype(np.uint16)

    return change


def few_ulps(numel: int, seed: int) -> tuple[Uint16, Uint16]:
    """One word in a hundred is moved, by one step of bfloat16 mostly, at most by three."""
    rng = np.random.default_rng(seed)
    base = round_float32(rng.normal(0, 0.02, numel).astype(np.float32), BF16).astype(np.uint16)
    steps = rng.choice(np.arange(1, 4), numel, p=(0.8, 0.15, 0.05)) * rng.choice((-1, 1), numel)
    moved = (rng.random(numel) < 0.01) & (base & 0x7FFF > 3)  # a step never changes the sign
    return base, np.where(moved, base.astype(np.int32) + steps, base).astype(np.uint16)


def synthetic(change: Change, params: int) -> Pair:
    """A transformer's shapes, each tensor with a seed of its own."""
    base, tuned = {}, {}
    for seed, (name, shape) in enumerate(shapes(params).items()):
        before, after = change(int(np.prod(shape)), seed)
        base[name], tuned[name] = Tensor(shape, before), Tensor(shape, after)
    return Pair(base, tuned)


def shapes(params: int) -> dict[str, tuple[int, ...]]:
    """An embedding and as many layers as come nearest to ``params``; at least one."""
    layers = max(1, round((params - VOCABULARY * WIDTH) / (12 * WIDTH**2)))
    found: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        at = f"layers.{layer}."
        found |= {f"{at}{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        found[f"{at}up_proj.weight"] = (4 * WIDTH, WIDTH)
        found[f"{at}down_proj.weight"] = (WIDTH, 4 * WIDTH)
        found[f"{at}norm.weight"] = (WIDTH,)
    return found


# ----- real


def real(task: str) -> Pair:
    """A fine-tune of tasks.py, made where the cache lacks it, with the tensors as they are."""
    import tasks

    built = tasks.build(task)
    base, tuned = open_checkpoint(built.base), open_checkpoint(built.finetuned)
    base_of = pair(base, tuned).base_of
    for checkpoint in (base, tuned):
        for tensor in checkpoint.tensors.values():
            if tensor.dtype != BF16:
                raise SystemExit(f"{checkpoint.path}: {tensor.name} is {tensor.dtype.name}")
    return Pair(
        {n: Tensor(tuned.tensors[n].shape, base.read(at)) for n, at in base_of.items()},
        {n: Tensor(tensor.shape, tensor.read()) for n, tensor in tuned.tensors.items()},
    )


def kept(whole: Pair) -> Pair:
    """The largest 5 % of the task vector times 1.75, and the base: to be stored exactly."""
    import torch

    import baselines

    def floats(tensors: Tensors) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(to_float32(tensor.words, BF16)).view(tensor.shape)
            for name, tensor in tensors.items()
        }

    found = baselines.magnitude(
        floats(whole.base), floats(whole.tuned), list(whole.base), KEPT, RESCALE
    )
    rounded = {
        name: round_float32(weights.reshape(-1).numpy(), BF16)
        for name, weights in found.weights.items()
    }
    return Pair(
        whole.base,
        {
            name: replace(tensor, words=rounded.get(name, tensor.words))
            for name, tensor in whole.tuned.items()
        },
    )


# ----- on disk


def write(found: Pair, folder: Path) -> None:
    """Write a pair as the module says."""
    common = {name: tensor for name, tensor in found.tuned.items() if name in found.base}
    rest = {name: tensor for name, tensor in found.tuned.items() if name not in found.base}
    # In one order, so that the files of equal tensors have equal headers.
    save(folder / "base" / "model.safetensors", {name: found.base[name] for name in common})
    save(folder / "common" / "model.safetensors", common)
    if rest:
        save(folder / "common" / "rest" / "model.safetensors", rest)
    save(folder / "tuned" / "model.safetensors", found.tuned)


def tiny(found: Pair) -> Pair:
    """The same names with a row or more of each, for code to be loaded and compiled on."""

    def cut(tensors: Tensors) -> dict[str, Tensor]:
        small = {}
        for name, tensor in tensors.items():
            row = int(np.prod(tensor.shape[1:]))
            rows = min(tensor.shape[0], max(1, TINY // row)) if tensor.shape else 1
            shape = (rows, *tensor.shape[1:]) if tensor.shape else ()
            small[name] = Tensor(shape, tensor.words[: rows * row])
        return small

    return Pair(cut(found.base), cut(found.tuned))


def save(file: Path, tensors: Tensors) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        header = ((name, BF16, tensor.shape) for name, tensor in tensors.items())
        stream.write(encode_header(header, {"format": "pt"}))
        for tensor in tensors.values():
            stream.write(np.ascontiguousarray(tensor.words).data)


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder and those within it, but for those of another dtype than a pair's."""
    return {
        name: Tensor(tensor.shape, tensor.read())
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in read_header(file)[0].items()
        if tensor.dtype == BF16
    }


def folder_bytes(folder: Path) -> int:
    """All that lies in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def differences(wanted: Tensors, found: Tensors) -> Iterator[str]:
    """Names of tensors that are not bit for bit as wanted."""
    for name in sorted({*wanted, *found}):
        one, other = wanted.get(name), found.get(name)
        if (
            one is None
            or other is None
            or one.shape != other.shape
            or not np.array_equal(one.words, other.words)
        ):
            yield name
