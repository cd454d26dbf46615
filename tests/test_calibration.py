"""Calibration data: every form of it, and one test for each way to get it wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from nps_compress import CalibrationError
from nps_compress.calibration import Example, data_digest, read_examples
from nps_compress.images import open_image, plain_pixels


def read(folder, *lines):
    path = folder / "c.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return read_examples(path)


def save_image(path, value=0, size=(4, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def test_every_kind_of_line(tmp_path):
    image = save_image(tmp_path / "i" / "0.png")
    found = read(
        tmp_path,
        {"text": "a", "label": 3},
        {"text": "a", "pair": "b", "label": 0.5},
        {"text": "a", "text_pair": "b", "label": "same"},
        {"words": ["a", "b"], "labels": [1, "name"]},
        {"words": ["a"]},
        "",
        {"text": "a", "target": "b", "label": None},
        {"image": "i/0.png", "label": "cat", "text": None},
        {"text": "a", "unknown": 1},
    )
    assert found == [
        Example(text="a", label=3),
        Example(text="a", pair="b", label=0.5),
        Example(text="a", pair="b", label="same"),
        Example(words=("a", "b"), labels=(1, "name")),
        Example(words=("a",)),
        Example(text="a", target="b"),
        Example(image=image, label="cat"),
        Example(text="a"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "needs an object"),
        ({}, 'needs an object with one of "text", "words" and "image"'),
        ({"text": "a", "words": ["a"]}, "one of"),
        ({"text": 5}, 'a string under "text", received 5'),
        ('{"text": "\\ud800"}', "text holds unpaired surrogates"),
        ({"text": "a", "pair": 1}, 'a string under "pair"'),
        ({"text": "a", "target": ["b"]}, 'a string under "target"'),
        ({"words": ["a"], "target": "b"}, '"target" needs a "text"'),
        ({"text": "a", "label": True}, "label must be a number or a string: True"),
        ('{"text": "a", "label": NaN}', "label must be a number or a string: nan"),
        ({"words": "a b"}, 'a list under "words"'),
        ({"words": []}, '"words" must not be empty'),
        ({"words": ["a", 1]}, 'a string under "words"'),
        ({"words": ["a"], "labels": [1, 2]}, "has 1 words and 2 labels"),
        ({"words": ["a"], "labels": [1.5]}, "a word's label must be an int or a string"),
        ({"text": "a", "labels": [1]}, '"labels" needs "words"'),
        ({"image": 1}, 'a string under "image"'),
        ({"image": "none.png"}, "there is no image"),
    ],
)
def test_bad_lines(tmp_path, line, reason):
    with pytest.raises(CalibrationError) as error:
        read(tmp_path, {"text": "fine"}, line)
    assert "c.jsonl, line 2: " in str(error.value)
    assert reason in str(error.value)


def test_a_folder_of_images(tmp_path):
    for name in ("dog/b.png", "dog/a.JPG", "cat/c.png"):
        save_image(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "labels.txt").write_text("no class")
    found = read_examples(tmp_path)
    assert [(e.image.name, e.label) for e in found if e.image] == [
        ("c.png", "cat"),
        ("a.JPG", "dog"),
        ("b.png", "dog"),
    ]
    with pytest.raises(CalibrationError, match="holds no examples"):
        read_examples(tmp_path / "cat")


def test_digest_covers_all_of_it(tmp_path):
    image = save_image(tmp_path / "a.png", 1)
    examples = [
        Example(text="a"),
        Example(text="a", label=1),
        Example(text="a", label="1"),
        Example(text="a", pair="b"),
        Example(text="a", target="b"),
        Example(words=("a",)),
        Example(words=("a",), labels=(1,)),
        Example(image=image),
    ]
    assert len({data_digest([example]) for example in examples}) == len(examples)
    assert data_digest(examples) != data_digest(examples[::-1])
    before = data_digest([Example(image=image)])
    moved = image.rename(tmp_path / "b.png")
    assert data_digest([Example(image=moved)]) == before
    save_image(moved, 2)
    assert data_digest([Example(image=moved)]) != before
    moved.unlink()
    with pytest.raises(CalibrationError, match="No such file"):
        data_digest([Example(image=moved)])


def test_pixels_of_a_model_without_a_preprocessor(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 255], [51, 102]], np.uint8)).save(path)
    grey = plain_pixels(open_image(path, 1), 2, 2)
    assert grey.shape == (1, 2, 2)
    assert grey.tolist()[0] == [pytest.approx([-1, 1]), pytest.approx([-0.6, -0.2])]
    colour = plain_pixels(open_image(path, 3), 4, 6)
    assert colour.shape == (3, 4, 6)
    assert (colour[0] == colour[2]).all()
    path.write_bytes(b"no image")
    with pytest.raises(CalibrationError, match="can't be read as an image"):
        open_image(path, 3)
