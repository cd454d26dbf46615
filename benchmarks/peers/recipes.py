"""A plain copy, and methods that have no package, from their publications: as files."""

from __future__ import annotations

import functools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from safetensors.torch import load_file, save_file

import worker

FILE = "delta.safetensors"
Tensors = dict[str, torch.Tensor]
Bytes = npt.NDArray[np.uint8]


def copy_encode(base: Path, tuned: Path, out: Path) -> None:
    shutil.copyfile(tuned, out / worker.MODEL)


def copy_decode(base: Path, packed: Path, out: Path) -> None:
    shutil.copyfile(packed / worker.MODEL, out / worker.MODEL)


def xor_encode(base: Path, tuned: Path, out: Path) -> None:
    """BitX of ZipLLM (NSDI 2026): base XOR fine-tune, exponents apart from the rest, zstd."""
    before = load_file(base)

    def encode(item: tuple[str, torch.Tensor]) -> Tensors:
        name, tensor = item
        xor = _words(before[name]) ^ _words(tensor)
        if not xor.any():
            return {}
        packed = (zstandard.ZstdCompressor(3).compress(plane.data) for plane in split(xor))
        return {
            f"{name}.{kind}": torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for kind, data in zip(("exponent", "rest"), packed, strict=True)
        }

    with ThreadPoolExecutor(worker.cores()) as pool:
        parts = pool.map(encode, load_file(tuned).items())
        save_file({name: tensor for part in parts for name, tensor in part.items()}, out / FILE)


def xor_decode(base: Path, packed: Path, out: Path) -> None:
    stored = load_file(packed / FILE)

    def decode(item: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        name, tensor = item
        if f"{name}.rest" not in stored:
            return name, tensor
        planes = (
            np.frombuffer(
                zstandard.ZstdDecompressor().decompress(stored[f"{name}.{kind}"].numpy().data),
                np.uint8,
            )
            for kind in ("exponent", "rest")
        )
        words = _words(tensor) ^ join(*planes)
        return name, torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).view(tensor.shape)

    with ThreadPoolExecutor(worker.cores()) as pool:
        weights = dict(pool.map(decode, load_file(base).items()))
    save_file(weights, out / worker.MODEL, {"format": "pt"})


def split(words: npt.NDArray[np.uint16]) -> tuple[Bytes, Bytes]:
    """The exponents, and sign and mantissa, of bfloat16 words. [n] -> [n] and [n]."""
    exponent = (words >> 7).astype(np.uint8)
    return exponent, ((words >> 8) & 0x80 | words & 0x7F).astype(np.uint8)


def join(exponent: Bytes, rest: Bytes) -> npt.NDArray[np.uint16]:
    """What :func:`split` took apart."""
    wide = rest.astype(np.uint16)
    words = (wide & 0x80) << 8 | exponent.astype(np.uint16) << 7 | wide & 0x7F
    return words.astype(np.uint16, copy=False)


def signs_encode(base: Path, tuned: Path, out: Path) -> None:
    """BitDelta (arXiv 2402.10193, section 3.1): see :func:`baselines.bitdelta`."""
    before, stored = load_file(base), {}
    for name, tensor in load_file(tuned).items():
        if tensor.dim() < 2:
            stored[name] = tensor
            continue
        change = tensor.float() - before[name].float()
        stored[f"{name}.scale"] = change.abs().mean().bfloat16()
        stored[f"{name}.signs"] = torch.from_numpy(np.packbits((change < 0).numpy()))
    save_file(stored, out / FILE)


def signs_decode(base: Path, packed: Path, out: Path) -> None:
    stored, weights = load_file(packed / FILE), {}
    for name, tensor in load_file(base).items():
        if name in stored:
            weights[name] = stored[name]
            continue
        bits = np.unpackbits(stored[f"{name}.signs"].numpy(), count=tensor.numel())
        negative = torch.from_numpy(bits.view(np.bool_)).view(tensor.shape)
        scale = stored[f"{name}.scale"].float()
        weights[name] = (tensor.float() + torch.where(negative, -scale, scale)).bfloat16()
    save_file(weights, out / worker.MODEL, {"format": "pt"})


def rank_encode(base: Path, tuned: Path, out: Path, bits: float) -> None:
    """Truncated SVD of each matrix's change, factors in bfloat16, to ``bits`` a parameter in all.

    Each matrix gets the same bits an element; vectors are stored whole.
    """
    before, after, stored = load_file(base), load_file(tuned), {}
    matrices = {name: tensor for name, tensor in after.items() if tensor.dim() > 1}
    numel = sum(tensor.numel() for tensor in matrices.values())
    total = sum(tensor.numel() for tensor in after.values())
    share = (bits * total / 16 - (total - numel)) / numel  # words of factors an element
    for name, tensor in after.items():
        if name not in matrices:
            stored[name] = tensor
            continue
        change = (tensor.float() - before[name].float()).reshape(tensor.shape[0], -1)
        rank = min(int(share * change.numel() / sum(change.shape)), *change.shape)
        if rank < 1:
            continue
        tall = change if change.shape[0] >= change.shape[1] else change.T
        right = torch.linalg.eigh(tall.double().T @ tall.double())[1].flip(1)[:, :rank].float()
        factors = (tall @ right, right) if tall is change else (right, tall @ right)
        for kind, factor in zip(("left", "right"), factors, strict=True):
            stored[f"{name}.{kind}"] = factor.bfloat16().contiguous()
    save_file(stored, out / FILE)


def rank_decode(base: Path, packed: Path, out: Path) -> None:
    stored, weights = load_file(packed / FILE), {}
    for name, tensor in load_file(base).items():
        if f"{name}.left" in stored:
            left, right = (stored[f"{name}.{kind}"].float() for kind in ("left", "right"))
            tensor = (tensor.float() + (left @ right.T).view(tensor.shape)).bfloat16()
        weights[name] = stored.get(name, tensor)
    save_file(weights, out / worker.MODEL, {"format": "pt"})


def _words(tensor: torch.Tensor) -> npt.NDArray[np.uint16]:
    words: npt.NDArray[np.uint16] = tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16)
    return words


def main() -> None:
    settings = worker.settings()
    methods: dict[str, tuple[worker.Step, worker.Step]] = {
        "copy": (copy_encode, copy_decode),
        "xor": (xor_encode, xor_decode),
        "signs": (signs_encode, signs_decode),
        "rank": (functools.partial(rank_encode, bits=settings.get("bits", 1.0)), rank_decode),
    }
    worker.serve(*methods[settings["method"]], ["torch", "numpy", "zstandard"])


if __name__ == "__main__":
    main()
