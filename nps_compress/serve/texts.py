"""Tokens become text piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "�"  # what a decoder gives for the first bytes of a character


class TextStream:
    """The text of tokens that come one by one.

    Text is given out once later tokens can't change it and it can't be the beginning of a stop
    string, so that the pieces put together are the text of the whole.

    decode: tokens to text. stop: what ends the text, and is no part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []
        # Tokens from _start on are decoded again, as the first of them decide what is between
        # words; the text of those before _end was given out.
        self._start = self._end = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token. -> the text that is certain now. Sets ``stopped`` at a stop string."""
        self._tokens.append(token)
        return self._give_out(self._new_text(), finished=False)

    def finish(self) -> str:
        """No token follows. -> what is left of the text."""
        return "" if self.stopped else self._give_out(self._new_text(last=True), finished=True)

    def _new_text(self, last: bool = False) -> str:
        before = self._decode(self._tokens[self._start : self._end])
        now = self._decode(self._tokens[self._start :])
        if not last and (len(now) <= len(before) or now.endswith(_UNFINISHED)):
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return now[len(before) :]

    def _give_out(self, text: str, *, finished: bool) -> str:
        text = self._held + text
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = 0 if finished else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
