"""What fuzzing has found worth keeping, run through the same targets without the fuzzer."""

from __future__ import annotations

import struct
import zipfile

import pytest
from conftest import ROOT

import targets

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
ALL_THREE = struct.pack("<4BH4I", 1, 0, 3, 1, 4096, *[1 << 16] * 4)  # distances of no bits


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_corpus(name):
    with zipfile.ZipFile(CORPUS / f"{name}.zip") as stored:
        inputs = [stored.read(member) for member in stored.namelist()]
    assert len(inputs) > 5
    for data in inputs:
        targets.TARGETS[name](data)


@pytest.mark.parametrize(
    ("name", "broken", "value"),
    [
        ("masks", "codecs.decode_mask", lambda *_: targets.np.zeros(1, targets.np.uint32)),
        ("zstd", "codecs.decompress", lambda *_: b"x"),
        ("values", "codecs.apply_payload", lambda *_: None),
        ("magnitudes", "entropy_coding.decode_magnitudes", lambda *_: 0),
        ("magnitudes", "entropy_coding.encode_magnitudes", lambda *_: b"x"),
        ("learned", "mask_coding.decode_positions", lambda *_: 0),
        ("learned", "mask_coding.encode_positions", lambda *_: b"x"),
        ("distances", "ulp_coding.apply_distances", lambda *_: None),
        ("distances", "ulp_coding.encode_distances", lambda *_: (ALL_THREE, b"")),
        ("quantised", "grid_codec.add_changes", lambda *_: None),
        ("quantised", "sign_codec.add_changes", lambda *_: None),
        ("quantised", "sign_codec.level_changes", lambda levels, _: levels.astype("f4")),
        ("reader", "Task.rebuild_words", lambda *_: None),
        ("members", "NpsReader._dictionary", lambda *_: bytes(64)),
    ],
)
def test_a_wrong_codec_would_show(name, broken, value, monkeypatch):
    module, function = broken.split(".")
    monkeypatch.setattr(getattr(targets, module), function, value)
    with pytest.raises(AssertionError):
        test_corpus(name)


def test_readers_that_differ_would_show(monkeypatch):
    monkeypatch.setattr(targets, "minimal_outcome", lambda *_: ("refused", "X-OTHER"))
    with pytest.raises(AssertionError):
        test_corpus("reader")
