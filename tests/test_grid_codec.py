"""Tensors stored as multiples of a step: what comes back, and what is refused."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import bits, changed_in_place, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import minimal_reader
import nps_compress
from nps_compress import FormatError, Recipe
from nps_compress.candidates import Pruner
from nps_compress.checkpoint import open_checkpoint, pair
from nps_compress.codecs import EncodedChunk, MaskCodec, ValueCodec
from nps_compress.dtypes import BY_NAME, round_float32, to_float32
from nps_compress.format import layout
from nps_compress.format.layout import Op
from nps_compress.format.reader import NpsReader
from nps_compress.format.records import BaseTensor, TensorEntry
from nps_compress.format.writer import NpsWriter
from nps_compress.grid_codec import (
    GridParameters,
    decode_grid,
    encode_grid,
    grid_parameter_bytes,
)
from nps_compress.rank_one import ZERO, RankOne
from nps_compress.sign_codec import parameter_chunk

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHAPE = (130, 77)
NUMEL = math.prod(SHAPE)


def parameters(rng, shape=SHAPE, step=1e-3):
    """Factors of every kind; a row and a column of size 0."""

    def factors(low, high):
        return RankOne(*(rng.integers(low, high, n).astype(np.int16) for n in shape))

    sizes = factors(-6, 7)
    sizes.rows[5 % shape[0]] = sizes.columns[6 % shape[1]] = ZERO
    return GridParameters.of(step, sizes, factors(-3, 4))


def levels_for(rng, known, numel=NUMEL, mean=0.7):
    """Integers of both signs, 0 where there is no code."""
    found = np.floor(rng.exponential(mean, numel) + rng.random(numel)) * rng.choice([-1, 1], numel)
    found[known.contexts(0, numel) < 0] = 0
    return found.astype(np.int16)


class TestParameters:
    def test_round_trip(self, rng):
        wanted = parameters(rng)
        data = wanted.to_bytes()
        assert len(data) == grid_parameter_bytes(sum(SHAPE))
        found = GridParameters.parse(data, *SHAPE)
        assert found.to_bytes() == data
        assert (found.step, found.first) == (wanted.step, wanted.first)
        assert np.array_equal(found.contexts(0, NUMEL), wanted.contexts(0, NUMEL))

    @pytest.mark.parametrize(
        ("at", "value"),
        [
            *((0, struct.pack("<d", step)) for step in (0.0, -0.0, -1.0, np.nan, np.inf, -np.inf)),
            *((at, b"\1") for at in range(10, 16)),
            (16, struct.pack("<b", 61)),
            (16 + sum(SHAPE) - 1, struct.pack("<b", -61)),
            (16 + sum(SHAPE), struct.pack("<b", -128)),
            (16 + 2 * sum(SHAPE) - 1, struct.pack("<b", 100)),
        ],
    )
    def test_what_breaks_a_rule(self, rng, at, value):
        data = bytearray(parameters(rng).to_bytes())
        GridParameters.parse(bytes(data), *SHAPE)
        data[at : at + len(value)] = value
        with pytest.raises(FormatError, match="P-PARAMETERS"):
            GridParameters.parse(bytes(data), *SHAPE)

    def test_contexts_by_hand(self, rng):
        known = replace(parameters(rng), first=-4)
        wanted = []
        for position in range(NUMEL):
            row, column = divmod(position, SHAPE[1])
            s = int(known.sizes.rows[row]) + int(known.sizes.columns[column])
            u = s + int(known.importance.rows[row]) + int(known.importance.columns[column])
            wanted.append(min(max(u + 4, 0), 63) if s > ZERO // 2 else -1)
        assert known.contexts(0, NUMEL).tolist() == wanted
        assert {-1, 0} < set(wanted)
        for start, stop in ((0, 0), (76, 78), (500, 1524), (NUMEL - 1, NUMEL)):
            assert known.contexts(start, stop).tolist() == wanted[start:stop]

    def test_the_highest_scores_are_told_apart(self, rng):
        known = parameters(rng)
        assert known.contexts(0, NUMEL).max() == 63
        nothing = RankOne(np.full(3, ZERO, np.int16), np.full(4, ZERO, np.int16))
        none = GridParameters.of(
            1.0, nothing, RankOne(np.zeros(3, np.int16), np.zeros(4, np.int16))
        )
        assert GridParameters.parse(none.to_bytes(), 3, 4).contexts(0, 12).tolist() == [-1] * 12

    @pytest.mark.parametrize("first", [-(1 << 15), (1 << 15) - 1])
    def test_any_first_context(self, rng, first):
        known = replace(parameters(rng), first=first)
        found = known.contexts(0, NUMEL)
        assert set(found.tolist()) == {-1, 63 if first < 0 else 0}


class TestChunks:
    def test_round_trip(self, rng):
        known = parameters(rng)
        levels = levels_for(rng, known)
        levels[1024:2048] = 0
        for start in range(0, NUMEL, 1024):
            part = levels[start : start + 1024]
            chunk = encode_grid(known, start, part)
            assert (chunk.mask_codec is MaskCodec.EMPTY) == (chunk.nnz == 0) == (start == 1024)
            if chunk.nnz:
                span = range(start, start + part.size)
                data = chunk.mask + chunk.planes[0]
                positions, found = decode_grid(data, len(chunk.mask), known, span, chunk.nnz)
                assert np.array_equal(positions, np.flatnonzero(part))
                assert np.array_equal(found, part[positions])

    @settings(deadline=None, max_examples=100)
    @given(
        rows=st.integers(1, 40),
        columns=st.integers(1, 40),
        mean=st.sampled_from([0.01, 0.5, 3.0, 9000.0]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_round_trip_of_any_shape(self, rows, columns, mean, seed):
        rng = np.random.default_rng(seed)
        known = parameters(rng, (rows, columns))
        numel = rows * columns
        levels = np.clip(levels_for(rng, known, numel, mean), -32767, 32767)
        chunk = encode_grid(known, 0, levels)
        assert chunk.nnz == np.count_nonzero(levels)
        if chunk.nnz:
            data = chunk.mask + chunk.planes[0]
            positions, found = decode_grid(data, len(chunk.mask), known, range(numel), chunk.nnz)
            assert np.array_equal(positions, np.flatnonzero(levels))
            assert np.array_equal(found, levels[positions])

    def test_another_number_or_stream(self, rng):
        known = parameters(rng)
        levels = levels_for(rng, known)
        levels[np.flatnonzero(levels)[: np.count_nonzero(levels) % 8 + 1]] = 0
        chunk = encode_grid(known, 0, levels)
        stream, plane = chunk.mask, chunk.planes[0]

        def refused(rule, stream, plane, nnz):
            with pytest.raises(FormatError, match=rule):
                decode_grid(stream + plane, len(stream), known, range(NUMEL), nnz)

        for nnz in (chunk.nnz - 1, chunk.nnz + 1):
            refused("P-POPCOUNT", stream, plane, nnz)
        refused("P-CODE", stream[:-4], plane, chunk.nnz)
        refused("P-CODE", stream + bytes(4), plane, chunk.nnz)
        refused("P-CODE", bytes(8), plane, chunk.nnz)
        assert chunk.nnz % 8
        refused("P-TAIL", stream, plane[:-1] + bytes([plane[-1] | 0x80]), chunk.nnz)
        refused("P-CODE", stream + bytes(4), plane[:-1] + b"\xff", chunk.nnz)

    @pytest.mark.parametrize("name", DTYPES)
    @pytest.mark.parametrize("step", [1e-3, 0.3, 1e-41, 1e38, 1e300, 5e-324])
    def test_words_by_hand(self, rng, name, step):
        """Each formula of the specification in numpy, element by element."""
        dtype, known = BY_NAME[name], parameters(rng, step=step)
        levels = levels_for(rng, known)
        base = round_float32(rng.normal(0, 0.05, NUMEL).astype(np.float32), dtype)
        base[:6] = round_float32(
            np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 6e4], np.float32), dtype
        )
        levels[:6] = 1
        positions = np.flatnonzero(levels).astype(np.uint32)
        out = np.empty_like(base)
        known.apply(0, positions, levels[positions], base, out, dtype)
        in_place = base.copy()
        known.apply(0, positions, levels[positions], in_place, in_place, dtype)
        assert np.array_equal(in_place, out)
        rows, columns = known.importance.rows, known.importance.columns
        wanted = base.copy()
        root = np.array(0x3FB504F3, np.uint32).view(np.float32)
        with np.errstate(all="ignore"):
            for position in positions.tolist():
                v = int(rows[position // SHAPE[1]]) + int(columns[position % SHAPE[1]])
                power = np.ldexp(root if v % 2 else np.float32(1), (v - v % 2) // 2)
                change = np.float32(levels[position]) * np.float32(step / np.float64(power))
                x = to_float32(base[position : position + 1], dtype)
                word = round_float32(x + change, dtype)
                y = to_float32(word, dtype)
                if np.isfinite(x) and np.isfinite(y) and x != y:
                    wanted[position] = word[0]
        assert np.array_equal(out, wanted)
        if step in (1e-3, 0.3):
            assert np.count_nonzero(wanted != base) > 1000
        elif step in (1e300, 5e-324):  # infinite, or 0
            assert np.array_equal(wanted, base)


def file_of(known, chunks, shape, log2, digest=bytes(32), base=None):
    """A file of one BF16 tensor in a grid."""
    stream = io.BytesIO()
    writer = NpsWriter(stream)
    writer.add_chunks([parameter_chunk(known), *chunks])
    dtype = BY_NAME["BF16"]
    writer.add_tensor(TensorEntry("w", dtype, shape, Op.DELTA, ValueCodec.GRID, log2, 0, digest))
    writer.finish([BaseTensor("w", dtype, shape, bytes(32) if base is None else base)], {})
    return stream.getvalue()


def test_a_damaged_file_is_refused_or_rebuilds_something(tmp_path, rng):
    """Every bit of the streams, with the digests that would notice made right."""
    known, dtype, shape = parameters(rng, (11, 13)), BY_NAME["BF16"], (11, 13)
    levels = levels_for(rng, known, 143)
    chunk = encode_grid(known, 0, levels)
    path = tmp_path / "x.nps"
    base = np.zeros(143, np.uint16)
    rules = set()
    streams = [known.to_bytes(), chunk.mask, chunk.planes[0]]
    for number, stream in enumerate(streams):
        for bit in range(8 * len(stream)):
            damaged = [*streams]
            changed = bytearray(stream)
            changed[bit // 8] ^= 1 << bit % 8
            damaged[number] = bytes(changed)
            again = EncodedChunk(
                chunk.nnz,
                MaskCodec.CODED,
                len(damaged[1]),
                False,
                damaged[1],
                0,
                (damaged[2],),
                143,
            )
            data = file_of(damaged[0], [again], shape, 10)
            path.write_bytes(data)
            minimal = minimal_reader.Nps(data)
            with NpsReader(path) as reader:
                (entry,) = reader.tensors
                try:
                    found = reader.read_chunk(entry, 0)
                except FormatError as error:
                    rules.add(error.rule)
                    with pytest.raises(minimal_reader.Refused, match=error.rule):
                        minimal.verify()
                    continue
                minimal.verify()
            given = GridParameters.parse(damaged[0], *shape)
            out = np.empty_like(base)
            integers = found.planes[0].view(np.int16)
            given.apply(0, found.positions, integers, base, out, dtype)
    assert rules >= {"P-CODE", "P-PARAMETERS", "P-POPCOUNT", "P-TAIL"}


def test_work_that_is_just_allowed(tmp_path):
    """One integer more is too much for the index: see the vector C-EXPANSION-grid-kept."""
    shape = (32973, 8141)
    raw, stored = 16 + 2 * sum(shape), 64
    path = tmp_path / "x.nps"

    def file(kept):
        counts = np.ones(16, int)
        counts[: (kept - 16) // 7] = 8
        counts[-1] += kept - counts.sum()
        stream = io.BytesIO()
        writer = NpsWriter(stream)
        known = EncodedChunk(0, MaskCodec.PARAMETERS, raw, True, bytes(stored), 0, ())
        writer.add_chunks([known])
        for nnz in counts.tolist():
            one = EncodedChunk(nnz, MaskCodec.CODED, 8, False, bytes(8), 0, (b"\0",), 1 << 24)
            writer.add_chunks([one])
        dtype = BY_NAME["BF16"]
        writer.add_tensor(
            TensorEntry("w", dtype, shape, Op.DELTA, ValueCodec.GRID, 24, 0, bytes(32))
        )
        writer.finish([BaseTensor("w", dtype, shape, bytes(32))], {})
        return stream.getvalue()

    elements = sum(min(1 << 24, math.prod(shape) - i * (1 << 24)) // 4 for i in range(16))
    spare = layout.max_raw_bytes(stored + 16 * 16) - (raw + elements + 16 * (8 + 1))
    kept = spare // 4
    path.write_bytes(file(kept))
    NpsReader(path).close()
    minimal_reader.Nps(path.read_bytes())
    path.write_bytes(file(kept + 1))
    with pytest.raises(FormatError, match="C-EXPANSION"):
        NpsReader(path)
    with pytest.raises(minimal_reader.Refused, match="C-EXPANSION"):
        minimal_reader.Nps(path.read_bytes())


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
    recipe = Recipe.with_subspaces(3, "tail", prune="sampled", density=0.3, scope=scope, seed=9)
    recipe = replace(recipe, coefficients=tuple(np.exp(rng.normal(0, 0.5, 3)).tolist()))
    out = tmp_path / "t.nps"
    nps_compress.pack(*folders, out, recipe=recipe)
    pruner = Pruner(pair(*map(open_checkpoint, folders)), recipe)
    pruner.count(1 << 30)
    shared = pruner.selection()
    nps_compress.unpack(folders[0], out, tmp_path / "u")
    unpacked = load_file(tmp_path / "u" / "model.safetensors")
    minimal = minimal_reader.Nps(out.read_bytes())
    rebuilt_by_hand = minimal.rebuild(
        minimal_reader.read_safetensors(folders[0] / "model.safetensors")
    )
    with nps_compress.open(out) as task:
        codecs = {entry.name: entry.value_codec for entry in task.reader.tensors}
        assert codecs["mlp.weight"] is ValueCodec.GRID
        for tensor in base:
            wanted = pruner.prune(tensor, pruner.load(tensor), shared)
            rebuilt = task.rebuild(tensor, base[tensor])
            assert bits(rebuilt) == bits(unpacked[tensor]) == wanted.tobytes()
            assert rebuilt_by_hand[tensor] == wanted.tobytes()
            changed = np.flatnonzero(wanted != pruner.load(tensor)[0])
            assert changed.size
            assert set(changed) <= set(task.kept_positions(tensor))
            assert changed_in_place(task, tensor, base[tensor]) == wanted.tobytes()
