"""Tensors stored as signs or levels: what comes back, and what is refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import bits, changed_in_place, write_checkpoint
from safetensors.torch import load_file

import nps_compress
from nps_compress import FormatError, Recipe
from nps_compress.candidates import Pruner
from nps_compress.checkpoint import open_checkpoint, pair
from nps_compress.dtypes import BY_NAME, round_float32, to_float32
from nps_compress.prune import COEFFICIENTS
from nps_compress.rank_one import RankOne
from nps_compress.sign_codec import (
    SignParameters,
    add_changes,
    decode_signs,
    encode_signs,
    levels_parameters,
    parse_levels_parameters,
    sign_parameter_bytes,
)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHAPE = (130, 77)


def parameters(rng, subspaces=3, **more):
    def factors(low, high):
        return RankOne(*(rng.integers(low, high, n).astype(np.int16) for n in SHAPE))

    known = {
        "seed": int(rng.integers(0, 2**63)),
        "gain": float(np.float32(1e-3)),
        "first": (-(1 << 15), *range(-3, -3 + 3 * (subspaces - 1), 3)),
        "rate": tuple(float(r) for r in rng.uniform(20, 200, subspaces)),
        "scale": tuple(float(np.float32(s)) for s in rng.uniform(0.5, 2, subspaces)),
        "sizes": factors(-6, 7),
        "importance": factors(-3, 4),
    }
    return SignParameters(**{**known, **more})


@pytest.fixture
def signed(rng):
    return rng.normal(0, 1, SHAPE[0] * SHAPE[1]).astype(np.float32)


class TestParameters:
    @pytest.mark.parametrize("subspaces", [1, 8, 64])
    def test_round_trip(self, rng, subspaces):
        wanted = parameters(rng, subspaces)
        wanted.sizes.rows[5] = wanted.sizes.columns[6] = -(1 << 14)
        data = wanted.to_bytes()
        assert len(data) == sign_parameter_bytes(subspaces, *SHAPE)
        found = SignParameters.parse(data, *SHAPE)
        assert found.to_bytes() == data
        assert (found.seed, found.gain) == (wanted.seed, wanted.gain)
        assert np.array_equal(found.drawn(0, 1000), wanted.drawn(0, 1000))

    @pytest.mark.parametrize(
        ("at", "value"),
        [
            (8, struct.pack("<f", -1)),
            (8, struct.pack("<f", -0.0)),
            (8, struct.pack("<f", np.nan)),
            (8, struct.pack("<f", np.inf)),
            (12, struct.pack("<H", 0)),
            (12, struct.pack("<H", 2)),
            (12, struct.pack("<H", 65)),
            (14, b"\1"),
            (16, struct.pack("<h", -5)),
            (18, b"\1"),
            (20, struct.pack("<f", 0)),
            (20, struct.pack("<f", np.inf)),
            (24, struct.pack("<d", -1)),
            (24, struct.pack("<d", np.nan)),
            (32, struct.pack("<h", -(1 << 15))),
            (64, struct.pack("<b", 61)),
            (64, struct.pack("<b", -61)),
            (64 + sum(SHAPE), struct.pack("<b", -128)),
            (64 + sum(SHAPE), struct.pack("<b", 100)),
        ],
    )
    def test_what_breaks_a_rule(self, rng, at, value):
        data = bytearray(parameters(rng).to_bytes())
        SignParameters.parse(bytes(data), *SHAPE)
        data[at : at + len(value)] = value
        with pytest.raises(FormatError, match="P-PARAMETERS"):
            SignParameters.parse(bytes(data), *SHAPE)

    def test_levels(self):
        for exponent in (-120, 0, 120):
            assert parse_levels_parameters(levels_parameters(exponent)) == exponent
        for exponent in (-121, 121, 30000):
            with pytest.raises(FormatError, match="P-PARAMETERS"):
                parse_levels_parameters(levels_parameters(exponent))


class TestChunks:
    def test_round_trip_of_signs(self, rng, signed):
        known = parameters(rng)
        found = []
        for start in range(0, signed.size, 1024):
            part = signed[start : start + 1024]
            chunk = encode_signs(known, start, part)
            span = range(start, start + part.size)
            positions, minus = decode_signs(chunk.planes[0], known, span, chunk.nnz)
            assert np.array_equal(minus == 1, part[positions] < 0)
            found.append(positions + start)
        every = np.concatenate(found)
        assert np.array_equal(every, known.drawn(0, signed.size))
        assert 0.05 * signed.size < every.size < 0.95 * signed.size

    def test_another_number_of_signs(self, rng, signed):
        known = parameters(rng)
        chunk = encode_signs(known, 0, signed)
        for nnz in (chunk.nnz - 1, chunk.nnz + 1):
            with pytest.raises(FormatError, match="P-POPCOUNT"):
                decode_signs(chunk.planes[0], known, range(signed.size), nnz)
        spare = -chunk.nnz % 8
        assert spare
        tail = bytearray(chunk.planes[0])
        tail[-1] |= 0x80
        with pytest.raises(FormatError, match="P-TAIL"):
            decode_signs(bytes(tail), known, range(signed.size), chunk.nnz)

    @pytest.mark.parametrize("name", DTYPES)
    def test_words_by_hand(self, rng, signed, name):
        """Each formula of the specification in numpy, element by element."""
        dtype, known = BY_NAME[name], parameters(rng)
        base = round_float32(rng.normal(0, 0.05, signed.size).astype(np.float32), dtype)
        positions = known.drawn(0, signed.size)
        minus = (signed[positions] < 0).astype(np.uint8)
        out = np.empty_like(base)
        known.apply(0, positions, minus, base, out, dtype)
        power = lambda k: np.float32(2.0 ** (k / 2))  # noqa: E731
        gain = np.float32(known.gain)
        wanted, drawn = to_float32(base, dtype).copy(), []
        for position in range(signed.size):
            row, column = divmod(position, SHAPE[1])
            s = int(known.sizes.rows[row]) + int(known.sizes.columns[column])
            u = s + int(known.importance.rows[row]) + int(known.importance.columns[column])
            m = max(n for n, first in enumerate(known.first) if first <= u)
            score = np.float64(gain * power(u))
            level = min(65536, int(np.rint(65536.0 * (score * known.rate[m]))))
            z = (known.seed + (position // 4 + 1) * 0x9E3779B97F4A7C15) % 2**64
            z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
            z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
            z ^= z >> 31
            if (z >> 16 * (position % 4)) % 65536 < level:
                factor = np.float32(np.float64(np.float32(known.scale[m])) * 65536 / level)
                change = np.float32(gain * power(s)) * factor
                sign = -1 if signed[position] < 0 else 1
                wanted[position] += np.float32(sign) * change
                drawn.append(position)
        assert drawn == positions.tolist()
        assert np.array_equal(out, round_float32(wanted, dtype))

    @pytest.mark.parametrize("name", DTYPES)
    def test_words_that_stay(self, name):
        dtype = BY_NAME[name]
        largest = {"F32": 0x7F7FFFFF, "BF16": 0x7F7F, "F16": 0x7BFF}[name]
        infinite = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}[name]
        top = 1 << 8 * dtype.itemsize - 1
        base = np.array([largest, largest | top, infinite, infinite | 1, top, 5], dtype.word)
        huge = float(to_float32(base[:1], dtype)[0]) / 2
        changes = np.array([huge, -huge, 1, 1, 0, 0], np.float32)
        out = np.zeros_like(base)
        add_changes(np.arange(6, dtype=np.uint32), changes, base, out, dtype)
        assert np.array_equal(out, base)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("shape", [(129, 65), (70, 3, 5, 9), (2, 4097)])
def test_a_file_rebuilds_what_pruning_made(tmp_path, rng, name, scope, shape):
    """Searched factors, subspaces and importance included; in pieces, in place, on threads."""
    generator = torch.Generator().manual_seed(4)

    def normal(size, scale):
        return scale * torch.randn(size, generator=generator)

    dtype = DTYPES[name]
    base = {"mlp.weight": normal(shape, 0.05).to(dtype), "mlp.bias": normal(300, 0.1).to(dtype)}
    tuned = {n: (t.float() + normal(t.shape, 0.01)).to(dtype) for n, t in base.items()}
    folders = [write_checkpoint(tmp_path / n, t) for n, t in (("base", base), ("tuned", tuned))]
    recipe = Recipe.with_subspaces(3, "tail", prune="signs", density=0.3, scope=scope, seed=9)
    scale, share = (tuple(np.exp(rng.normal(0, 0.5, 3)).tolist()) for _ in range(2))
    recipe = replace(recipe, coefficients=scale, subspace_densities=share)
    out = tmp_path / "t.nps"
    nps_compress.pack(*folders, out, recipe=recipe)
    pruner = Pruner(pair(*map(open_checkpoint, folders)), recipe)
    pruner.count(1 << 30)
    shared = pruner.selection()
    nps_compress.unpack(folders[0], out, tmp_path / "u")
    unpacked = load_file(tmp_path / "u" / "model.safetensors")
    with nps_compress.open(out) as task:
        for tensor in base:
            wanted = pruner.prune(tensor, pruner.load(tensor), shared)
            rebuilt = task.rebuild(tensor, base[tensor])
            assert bits(rebuilt) == bits(unpacked[tensor]) == wanted.tobytes()
            changed = np.flatnonzero(wanted != pruner.load(tensor)[0])
            assert changed.size
            assert set(changed) <= set(task.kept_positions(tensor))
            assert changed_in_place(task, tensor, base[tensor]) == wanted.tobytes()


def test_extreme_factors_of_a_search(tmp_path):
    generator = torch.Generator().manual_seed(4)
    base = {"mlp.weight": torch.randn(200, 90, generator=generator)}
    tuned = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    folders = [write_checkpoint(tmp_path / n, t) for n, t in (("base", base), ("tuned", tuned))]
    for number, scale in enumerate([*COEFFICIENTS, 1.0]):
        for density in (1.0, 1e-4):
            recipe = Recipe(prune="signs", density=density, coefficients=(scale,))
            out = tmp_path / f"{number}-{density}.nps"
            nps_compress.pack(*folders, out, recipe=recipe)
            nps_compress.verify(folders[0], out)


def test_where_next_to_nothing_is_kept_positions_are_stored(tmp_path):
    """A reader's draws are bounded by the size of the file."""
    generator = torch.Generator().manual_seed(4)
    base = {"mlp.weight": torch.randn(1000, 900, generator=generator).bfloat16()}
    tuned = {
        n: t + 0.01 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in base.items()
    }
    folders = [write_checkpoint(tmp_path / n, t) for n, t in (("base", base), ("tuned", tuned))]
    for density, as_signs in ((2e-3, True), (5e-4, False)):
        out = tmp_path / f"{density}.nps"
        nps_compress.pack(*folders, out, recipe=Recipe(prune="signs", density=density))
        (tensor,) = nps_compress.inspect(out)["tensors"]
        assert ("signs" in tensor["codecs"]) == as_signs
        nps_compress.verify(folders[0], out)
