"""Kernel, reference and CPU path agree bit for bit; the kernel runs in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from conftest import bits

import nps_compress
from nps_compress import codecs, torch_words
from nps_compress.codecs import ValueCodec
from nps_compress.dtypes import BY_NAME
from nps_compress.kernels import form, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled"))
DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES = [0, 1, 31, 32, 33, 1023, 1024, 1025, 5000]


def _case(name: str, codec: ValueCodec, numel: int, density: float, seed: int, device: str):
    """Base words, expected words, and the form of the difference, all of random bits."""
    rng = np.random.default_rng(seed)
    dtype = BY_NAME[name]
    base = np.frombuffer(rng.bytes(numel * dtype.itemsize), dtype.word).copy()
    new = np.frombuffer(rng.bytes(numel * dtype.itemsize), dtype.word).copy()
    special = torch.tensor([float("nan"), -0.0, 0.0, float("inf")]).to(
        torch_words._TORCH_DTYPES[name]
    )
    words = torch_words.to_numpy(torch_words.words_of(special))
    base[: min(4, numel)] = words[: min(4, numel)]
    new[: min(4, numel)] = words[::-1][: min(4, numel)]
    new = np.where(rng.random(numel) < density, new, base)
    positions = np.flatnonzero(base != new)
    payload = codecs.payload_of(codec, base[positions], new[positions], dtype)
    if codec is ValueCodec.ULP:
        one = dtype.word.type(1)
        zigzag = payload + one
        payload = (zigzag >> one) ^ (dtype.word.type(0) - (zigzag & one))
    signed = np.dtype(f"<i{dtype.itemsize}")
    built = form.sparse_form(numel, positions, payload.view(signed), int(codec), device)
    return torch.from_numpy(base.view(signed)).to(device), torch.from_numpy(new.view(signed)), built


@pytest.mark.parametrize("device", [CUDA, CPU])
@pytest.mark.parametrize("name", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("codec", [ValueCodec.REPLACE, ValueCodec.XOR, ValueCodec.ULP])
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_kernel_reference_and_cpu_agree(device, name, codec, density):
    from nps_compress.kernels.rebuild import rebuild

    dtype = BY_NAME[name]
    for seed, numel in enumerate(SIZES):
        base, expected, built = _case(name, codec, numel, density, seed, device)
        before = base.clone()
        out = torch.full_like(base, 0x5A)  # poison: every element must be written
        assert torch.equal(rebuild(base, built, out).cpu(), expected)
        assert torch.equal(reference.rebuild(base, built).cpu(), expected)
        assert torch.equal(base, before)

        words = base.cpu().numpy().view(dtype.word).copy()
        chunk = codecs.encode_chunk(words, expected.numpy().view(dtype.word), dtype, codec)
        planes = codecs.decode_planes(chunk.planes, chunk.planes_compressed, chunk.nnz)
        mask = chunk.mask
        if chunk.mask_compressed:
            mask = codecs.decompress(mask, chunk.mask_raw_bytes)
        positions = codecs.decode_mask(chunk.mask_codec, mask, numel, chunk.nnz)
        codecs.apply_payload(codec, planes, positions, words, words, dtype)
        assert np.array_equal(words, expected.numpy().view(dtype.word))


def test_kernel_may_write_in_place():
    from nps_compress.kernels.rebuild import rebuild

    base, expected, built = _case("BF16", ValueCodec.ULP, 3000, 0.1, 0, DEVICE)
    assert rebuild(base, built, base) is base
    assert torch.equal(base.cpu(), expected)


def test_kernel_refuses_what_does_not_fit():
    from nps_compress.kernels.rebuild import rebuild

    base, _, built = _case("BF16", ValueCodec.ULP, 100, 0.1, 0, DEVICE)
    with pytest.raises(ValueError, match="shape"):
        rebuild(base[:-1], built)
    with pytest.raises(ValueError, match="int16"):
        rebuild(base.to(torch.int32), built)


def test_form_size_is_what_the_docs_say():
    numel, density = 1 << 20, 0.05
    _, _, built = _case("BF16", ValueCodec.XOR, numel, density, 0, "cpu")
    per_element = 8 * built.nbytes / numel
    assert per_element == pytest.approx(1 + 32 / 1024 + 16 * density, rel=0.02)


@pytest.mark.gpu
def test_task_rebuilds_on_the_device_of_its_base(tiny, tmp_path):
    from safetensors.torch import load_file

    nps_compress.pack(*tiny, tmp_path / "t.nps", lossless=True)
    base = load_file(tiny[0] / "model.safetensors")
    tuned = load_file(tiny[1] / "model.safetensors")
    with nps_compress.open(tmp_path / "t.nps") as task:
        for name in task.names:
            source = task.base_tensor_name(name)
            if source is not None:
                found = task.rebuild(name, base[source].cuda())
                assert found.is_cuda
                assert bits(found.cpu()) == bits(tuned[name])
