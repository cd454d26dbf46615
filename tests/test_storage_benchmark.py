"""The storage benchmark's pairs are what they say, and its gate sees what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

SMALL = 8_400_000  # weights: one layer


@pytest.fixture(scope="module")
def pairs(benchmark):
    return benchmark("storage_pairs")


@pytest.fixture(scope="module")
def storage(benchmark):
    return benchmark("storage")


@pytest.fixture(scope="module")
def recipes(benchmark):
    return benchmark("recipes")


@pytest.fixture(scope="module")
def sparse(pairs):
    """A pair of which 5 % are changed, small; and a tensor that only the fine-tune has."""
    shapes = {"up.weight": (96, 160), "norm.weight": (160,), "down.weight": (160, 96)}
    return make(pairs, pairs.sparse(0.05), shapes, {"head.weight": (7, 96)})


@pytest.fixture(scope="module")
def dense(pairs):
    return make(pairs, pairs.dense(1e-3), {"up.weight": (96, 160), "norm.weight": (160,)}, {})


def make(pairs, change, shapes, new):
    base, tuned = {}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        before, after = change(math.prod(shape), seed)
        base[name], tuned[name] = pairs.Tensor(shape, before), pairs.Tensor(shape, after)
    for name, shape in new.items():
        words = change(math.prod(shape), 9)[0]
        tuned[name] = pairs.Tensor(shape, words)
    return pairs.Pair(base, tuned)


def changed_share(before, after):
    return np.count_nonzero(before != after) / before.size


# ----- pairs


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1])
def test_sparse_changes_are_as_many_as_they_say_and_the_largest(pairs, density):
    before, after = pairs.sparse(density)(1 << 18, 3)
    assert changed_share(before, after) == pytest.approx(density, rel=0.02)
    change = np.abs(floats(after) - floats(before))[before != after]
    # The normal quantile of the density, less what rounding to bfloat16 takes.
    at_least = 1e-3 * torch.special.ndtri(torch.tensor(1 - density / 2)).item()
    assert np.quantile(change, 0.01) > 0.9 * at_least


@pytest.mark.parametrize(("scale", "share"), [(1e-4, 0.68), (1e-3, 0.96)])
def test_dense_changes_have_their_scale(pairs, scale, share):
    before, after = pairs.dense(scale)(1 << 18, 3)
    change = floats(after) - floats(before)
    assert change.std() == pytest.approx(scale, rel=0.05)
    assert changed_share(before, after) == pytest.approx(share, abs=0.02)


def test_rl_like_changes_are_few_steps_of_one_word_in_a_hundred(pairs):
    before, after = pairs.few_ulps(1 << 20, 3)
    assert changed_share(before, after) == pytest.approx(0.01, rel=0.05)
    steps = after.astype(np.int32) - before.astype(np.int32)
    assert np.abs(steps).max() == 3
    assert np.count_nonzero(np.abs(steps) == 1) > 0.75 * np.count_nonzero(steps)
    assert np.array_equal(before >> 15, after >> 15)


def test_a_synthetic_pair_follows_from_the_seed_and_has_the_size_asked_for(pairs):
    found = pairs.synthetic(pairs.few_ulps, SMALL)
    again = pairs.synthetic(pairs.few_ulps, SMALL)
    assert not list(pairs.differences(found.tuned, again.tuned))
    assert math.prod(pairs.shapes(24_000_000)["embed_tokens.weight"]) == 16384 * 512
    sizes = [math.prod(shape) for shape in pairs.shapes(24_000_000).values()]
    assert sum(sizes) == pytest.approx(24_000_000, rel=0.1)


def test_kept_is_the_largest_changes_times_the_factor(pairs, dense):
    found = pairs.kept(dense)
    numel = sum(t.words.size for t in dense.base.values())
    total = 0
    for name, before in dense.base.items():
        moved = found.tuned[name].words != before.words
        total += np.count_nonzero(moved)
        change = floats(dense.tuned[name].words) - floats(before.words)
        wanted = torch.from_numpy(floats(before.words) + np.float32(pairs.RESCALE) * change)
        wanted = wanted.bfloat16().float().numpy()
        assert np.array_equal(floats(found.tuned[name].words)[moved], wanted[moved])
    assert total == pytest.approx(0.05 * numel, abs=2)


def test_a_pair_is_on_disk_as_it_is(pairs, sparse, tmp_path):
    pairs.write(sparse, tmp_path)
    assert not list(pairs.differences(sparse.tuned, pairs.load(tmp_path / "tuned")))
    assert not list(pairs.differences(sparse.tuned, pairs.load(tmp_path / "common")))
    assert not list(pairs.differences(sparse.base, pairs.load(tmp_path / "base")))
    base, common = (tmp_path / name / "model.safetensors" for name in ("base", "common"))
    assert base.stat().st_size == common.stat().st_size
    # For what reads all files of a folder: nothing that the base lacks is beside.
    assert list((tmp_path / "common").glob("*.safetensors")) == [common]


def test_bytes_are_those_of_all_files(pairs, tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "model").write_bytes(b"x" * 1000)
    (tmp_path / "part" / "side").write_bytes(b"x" * 23)
    assert pairs.folder_bytes(tmp_path) == 1023


# ----- gate


def test_the_gate_lets_pass_what_is_equal(storage, sparse):
    assert storage.Gate.of(sparse, sparse.tuned) == storage.Gate(True, 0.0)


def test_the_base_itself_is_off_by_the_whole_task_vector(storage, sparse):
    found = {**sparse.tuned, **sparse.base}
    assert storage.Gate.of(sparse, found) == storage.Gate(False, pytest.approx(1.0))


@pytest.mark.parametrize("at", [0, 77, -1])
def test_the_gate_sees_one_bit(storage, sparse, at):
    words = sparse.tuned["up.weight"].words.copy()
    words[at] ^= 1
    found = {**sparse.tuned, "up.weight": replace(sparse.tuned["up.weight"], words=words)}
    gate = storage.Gate.of(sparse, found)
    assert not gate.exact
    assert 0 < gate.relative_error < 1


def test_the_gate_sees_a_sign_of_zero(storage, pairs):
    zero = pairs.Tensor((2,), np.array([0, 0x3F80], np.uint16))
    minus = pairs.Tensor((2,), np.array([0x8000, 0x3F80], np.uint16))
    pair = pairs.Pair({"w": zero}, {"w": minus})
    assert not storage.Gate.of(pair, {"w": zero}).exact


def test_the_gate_wants_every_tensor_in_its_shape(storage, pairs, sparse):
    without = {name: t for name, t in sparse.tuned.items() if name != "norm.weight"}
    headless = {name: t for name, t in sparse.tuned.items() if name != "head.weight"}
    turned = {**sparse.tuned, "up.weight": replace(sparse.tuned["up.weight"], shape=(160, 96))}
    more = {**sparse.tuned, "other": sparse.tuned["norm.weight"]}
    for found in (without, headless, turned, more):
        assert storage.Gate.of(sparse, found) == storage.Gate(False, math.inf)


def test_a_broken_promise_is_wrong_and_a_kept_one_exact(storage):
    good, off = storage.Gate(True, 0.0), storage.Gate(False, 0.1)

    def result(gates, promises_exact, sizes=(5, 5)):
        return storage.Measured(sizes=list(sizes), gates=gates).result(promises_exact)

    assert result([good, good], True) == "exact"
    assert result([good, off], True) == "WRONG"
    assert result([off, off], False) == "lossy"
    assert result([off, storage.Gate(False, 0.2)], False) == "WRONG"
    assert result([off, off], False, (5, 6)) == "WRONG"
    assert result([storage.Gate(False, math.inf)] * 2, False) == "WRONG"


# ----- providers, without peers


WORKER = """
import shutil, sys
sys.path.insert(0, {peers!r})
import worker

def encode(base, tuned, out):
    print("a library's chatter")
    shutil.copyfile(tuned, out / worker.MODEL)

def decode(base, packed, out):
    data = bytearray((packed / worker.MODEL).read_bytes())
    if worker.settings().get("corrupt"):
        data[-1] ^= 1
    if worker.settings().get("fail"):
        raise ValueError("no luck")
    if worker.settings().get("die"):
        sys.exit("out of words")
    (out / worker.MODEL).write_bytes(data)

worker.serve(encode, decode, ["numpy"])
"""


@pytest.fixture
def provider(storage, tmp_path, monkeypatch):
    (tmp_path / "peers").mkdir()
    text = WORKER.format(peers=str(ROOT / "benchmarks" / "peers"))
    (tmp_path / "peers" / "fake.py").write_text(text)
    monkeypatch.setattr(storage, "PEERS", tmp_path / "peers")
    return lambda name, **settings: storage.Provider(name, "fake.py", settings, True)


def test_providers_are_measured_marked_and_reported(storage, sparse, provider, tmp_path):
    chosen = [
        *(provider(name, **{name: True}) for name in ("good", "corrupt", "fail", "die")),
        replace(provider("absent"), environment="nowhere"),
    ]
    said = {}
    found = storage.measure(sparse, chosen, 2, tmp_path, said.__setitem__)
    assert {name: done.result(True) for name, done in found.items()} == {
        "good": "exact",
        "corrupt": "WRONG",
    }
    assert said["fail"] == "decode: ValueError: no luck"
    assert said["die"].endswith("out of words")
    assert "make storage-peers" in said["absent"]
    good = found["good"]
    assert (
        good.sizes
        == [
            (tmp_path / "pair" / "good" / "model.safetensors").stat().st_size
            + (tmp_path / "pair" / "common" / "rest" / "model.safetensors").stat().st_size
        ]
        * 2
    )
    assert {step: len(seconds) for step, seconds in good.seconds.items()} == {
        "encode": 2,
        "decode": 2,
    }
    assert all(8 < peak < 4096 for peak in good.peak.values())


def test_rows_are_kept_and_not_measured_again(storage, pairs, sparse, provider, tmp_path, capsys):
    copy, bad = provider("copy"), provider("ours: lossless", corrupt=True)
    source = storage.Source("small", "synthetic, sparse", lambda: sparse)
    result = tmp_path / "results" / "storage.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "providers", lambda: [copy, bad])
        assert not storage.run(source, [copy, bad], 1, False, result, tmp_path)
        patch.setattr(storage, "measure", None)
        assert not storage.run(source, [copy, bad], 1, False, result, tmp_path)
    kept = storage.rows.read(result)
    assert [row["result"] for row in kept] == ["exact", "WRONG"]
    copied = kept[0]
    pairs.write(sparse, tmp_path / "same")
    assert int(copied["bytes"]) == pairs.folder_bytes(tmp_path / "same" / "common")
    assert float(copied["bits_per_param"]) == pytest.approx(
        8 * int(copied["bytes"]) / sparse.params, abs=1e-4
    )
    assert "WRONG" in storage.table(kept)


def test_where_a_peer_is_ahead_is_said(storage):
    def row(provider, bits, encode, decode, result="exact", retained=""):
        return {
            "pair": "p",
            "provider": provider,
            "result": result,
            "bits_per_param": bits,
            "encode_mb_s": encode,
            "decode_mb_s": decode,
            "retained": retained,
        }

    found = [
        row("copy", "16", "999", "999"),
        row("ours: lossless", "0.7", "100", "200"),
        row("small", "0.6", "10", "20"),
        row("quick", "2.0", "110", "20"),
        row("broken", "0.1", "900", "900", "WRONG"),
        row("ours: default", "0.2", "50", "60", "lossy", "0.95"),
        row("ours: signs", "0.3", "50", "60", "lossy", "0.97"),
        row("better", "0.2", "10", "90", "lossy", "0.96"),
    ]
    assert storage.behind(found) == [
        "p: small 0.6, ours: lossless 0.7 bits",
        "p: quick 110, ours: lossless 100 MB/s in",
        "p: better 90, ours: default 60 MB/s out",
        "p: better keeps 0.96 in 0.2 bits, ours: default 0.95 in 0.2",
    ]


# ----- methods without a package


def packed(pairs, pair, tmp_path, encode, decode, **options):
    pairs.write(pair, tmp_path)
    base, tuned = (tmp_path / name / "model.safetensors" for name in ("base", "common"))
    at, out = tmp_path / "packed", tmp_path / "out"
    at.mkdir()
    out.mkdir()
    encode(base, tuned, at, **options)
    decode(base, at, out)
    return pairs.load(out), pairs.folder_bytes(at)


def test_planes_take_every_word_apart_and_together(recipes):
    words = np.arange(1 << 16, dtype=np.uint16)
    exponent, rest = recipes.split(words)
    assert np.array_equal(recipes.join(exponent, rest), words)
    assert np.array_equal(exponent, (words >> 7) & 0xFF)


def test_xor_and_zstd_give_all_bits_back_in_fewer_bytes(pairs, recipes, sparse, tmp_path):
    wanted = {name: sparse.tuned[name] for name in sparse.base}
    wanted["down.weight"] = sparse.base["down.weight"]  # one that is not changed
    pair = pairs.Pair(sparse.base, wanted)
    found, nbytes = packed(pairs, pair, tmp_path, recipes.xor_encode, recipes.xor_decode)
    assert not list(pairs.differences(wanted, found))
    assert nbytes < 0.2 * 2 * pair.params


def test_signs_are_the_baseline_of_the_quality_benchmark(pairs, recipes, dense, tmp_path):
    import baselines

    found, nbytes = packed(pairs, dense, tmp_path, recipes.signs_encode, recipes.signs_decode)
    base, tuned = tensors(dense.base), tensors(dense.tuned)
    wanted = baselines.bitdelta(base, tuned, list(base))
    for name, tensor in tensors(found).items():
        assert torch.equal(tensor, wanted.weights[name])
    assert wanted.bits / 8 < nbytes < wanted.bits / 8 + 400  # names and shapes


def test_a_low_rank_keeps_a_change_of_that_rank_within_its_bytes(pairs, recipes, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(256, 128, generator=generator) * 0.02
    change = torch.randn(256, 3, generator=generator) @ torch.randn(3, 128, generator=generator)

    def tensor(values):
        words = values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(-1)
        return pairs.Tensor(tuple(values.shape), words)

    # A rank of 3 takes 16 * 3 * (256 + 128) / (256 * 128) bits a weight.
    for shape in ((256, 128), (128, 256)):
        turned = (base, base + change) if shape == (256, 128) else (base.T, (base + change).T)
        pair = pairs.Pair(*({"w": tensor(side.contiguous())} for side in turned))
        at = tmp_path / str(shape[0])
        steps = recipes.rank_encode, recipes.rank_decode
        found, nbytes = packed(pairs, pair, at, *steps, bits=0.5626)
        assert nbytes < 0.5626 / 8 * pair.params + 250
        moved = floats(found["w"].words) - floats(pair.tuned["w"].words)
        assert np.linalg.norm(moved) < 0.01 * np.linalg.norm(change.numpy())


def floats(words):
    return (words.astype(np.uint32) << 16).view(np.float32)


def tensors(found):
    return {name: torch.from_numpy(floats(t.words)).view(t.shape) for name, t in found.items()}
