"""Calibration data: examples from JSONL, or from a folder of images.

One object a line; every line of a file may hold what its model needs:

    {"text": "...", "label": 3}                       sequence classification; a name works too
    {"text": "...", "pair": "...", "label": 0.8}      two texts: a class, or a score of how alike
    {"words": ["..."], "labels": [0]}                 token classification; -100 counts for nothing
    {"text": "..."}                                   causal LM
    {"text": "a prompt", "target": "the answer"}      causal or encoder-decoder
    {"image": "a/path.png", "label": "cat"}           images; the path is relative to the file

Labels are only needed by the fitness functions that read them. In a folder of images each class is
a subfolder, whose name is the label.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nps_compress.errors import CalibrationError

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
IGNORED = -100  # a word with this label is not predicted, as in transformers

Label = int | float | str


@dataclass(frozen=True)
class Example:
    """One example; None for what it lacks.

    It has a ``text`` (with ``pair``: two; with ``target``: a prompt), ``words`` or an ``image``.
    """

    text: str | None = None
    pair: str | None = None
    target: str | None = None
    words: tuple[str, ...] | None = None
    labels: tuple[int | str, ...] | None = None  # of the words
    image: Path | None = None
    label: Label | None = None


def read_examples(path: Path) -> list[Example]:
    """Calibration data of a JSONL file or a folder of images, in the file's or names' order.

    Raises:
        CalibrationError: nothing there, or a bad line, with its number.
    """
    examples = list(_images_of(path) if path.is_dir() else _lines_of(path))
    if not examples:
        raise CalibrationError(path, "holds no examples")
    return examples


def data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of calibration data, to tell whether a saved search used the same.

    Of an image it is the bytes that count, not the name.

    Raises:
        CalibrationError: an image can't be read.
    """
    digest = hashlib.sha256()
    for example in examples:
        value = asdict(example)
        if example.image:
            try:
                value["image"] = hashlib.sha256(example.image.read_bytes()).hexdigest()
            except OSError as error:
                raise CalibrationError(example.image, str(error)) from error
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


def _images_of(folder: Path) -> Iterator[Example]:
    try:
        for place in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
            for file in sorted(place.iterdir()):
                if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
                    yield Example(image=file, label=place.name)
    except OSError as error:
        raise CalibrationError(folder, str(error)) from error


def _lines_of(path: Path) -> Iterator[Example]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(path, str(error)) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(path, f"is not JSON ({error})", number) from None
        try:
            yield _example(value, path.parent)
        except ValueError as error:
            raise CalibrationError(path, str(error), number) from None


def _example(value: Any, folder: Path) -> Example:
    """The example of one line. Raises ValueError that says what is wrong."""
    if not isinstance(value, dict):
        raise ValueError("needs an object")
    given = [key for key in ("text", "words", "image") if value.get(key) is not None]
    if len(given) != 1:
        raise ValueError('needs an object with one of "text", "words" and "image"')
    pair = value.get("pair", value.get("text_pair"))
    for key, text in (("pair", pair), ("target", value.get("target"))):
        if text is not None and given != ["text"]:
            raise ValueError(f'"{key}" needs a "text"')
    words, labels, image = value.get("words"), value.get("labels"), value.get("image")
    if words is not None:
        words = tuple(_text(word, "words") for word in _list(words, "words"))
        if not words:
            raise ValueError('"words" must not be empty')
    if labels is not None:
        if words is None:
            raise ValueError('"labels" needs "words"; a text or an image has a "label"')
        labels = tuple(_class(label) for label in _list(labels, "labels"))
        if len(labels) != len(words):
            raise ValueError(f"has {len(words)} words and {len(labels)} labels")
    if image is not None:
        image = folder / _text(image, "image")
        if not image.is_file():
            raise ValueError(f"there is no image {str(image)!r}")
    return Example(
        text=_optional_text(value.get("text"), "text"),
        pair=_optional_text(pair, "pair"),
        target=_optional_text(value.get("target"), "target"),
        words=words,
        labels=labels,
        image=image,
        label=_label(value.get("label")),
    )


def _optional_text(value: Any, key: str) -> str | None:
    return None if value is None else _text(value, key)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'needs a string under "{key}", received {_brief(value)}')
    if any(0xD800 <= ord(char) < 0xE000 for char in value):
        raise ValueError(f"{key} holds unpaired surrogates")
    return value


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f'needs a list under "{key}", received {_brief(value)}')
    return value


def _class(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"a word's label must be an int or a string: {_brief(value)}")
    return value


def _label(value: Any) -> Label | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"label must be a number or a string: {_brief(value)}")
    return value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
