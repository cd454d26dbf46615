"""Answers as the routes of OpenAI's API have them: whole, or as a stream of events."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from nps_compress.serve import schemas
from nps_compress.serve.answers import HungUpError
from nps_compress.serve.catalogue import Served
from nps_compress.serve.failures import RequestError
from nps_compress.serve.jobs import Piece, TokenScore

_LEAST_LOGPROB = -9999.0  # OpenAI's for "impossible"; JSON has no infinity


class Shape:
    """How pieces look in one of the two routes."""

    def __init__(self, served: Served, has_scores: bool, prefix: str) -> None:
        self._served, self._has_scores = served, has_scores
        self._head: dict[str, Any] = {"id": new_id(prefix), "created": now(), "model": served.name}

    def head(self, choices: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        raise NotImplementedError

    def piece(self, number: int, piece: Piece) -> dict[str, Any]:
        """A piece of a choice in a stream."""
        raise NotImplementedError

    def last(self, usage: schemas.Usage) -> dict[str, Any]:
        """The tokens of a whole stream."""
        raise NotImplementedError

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: schemas.Usage) -> Any:
        """All choices."""
        raise NotImplementedError

    def _text(self, token: int) -> str:
        return self._served.processor.token_text(token)


class CompletionShape(Shape):
    """Of /v1/completions."""

    def __init__(self, served: Served, has_scores: bool) -> None:
        super().__init__(served, has_scores, "cmpl")
        self._offsets: dict[int, int] = {}

    def head(self, choices: int) -> list[dict[str, Any]]:
        """As :meth:`Shape.head`."""
        return []

    def piece(self, number: int, piece: Piece) -> dict[str, Any]:
        """As :meth:`Shape.piece`."""
        choice = schemas.CompletionChoice(
            index=number,
            text=piece.text,
            logprobs=self._logprobs(number, [piece]),
            finish_reason=piece.reason,
        )
        return schemas.Completion(**self._head, choices=[choice]).model_dump()

    def last(self, usage: schemas.Usage) -> dict[str, Any]:
        """As :meth:`Shape.last`."""
        return schemas.Completion(**self._head, choices=[], usage=usage).model_dump()

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: schemas.Usage) -> schemas.Completion:
        """As :meth:`Shape.whole`."""
        choices = [
            schemas.CompletionChoice(
                index=number,
                text="".join(piece.text for piece in each),
                logprobs=self._logprobs(number, each),
                finish_reason=each[-1].reason,
            )
            for number, each in enumerate(pieces)
        ]
        return schemas.Completion(**self._head, choices=choices, usage=usage)

    def _logprobs(self, number: int, pieces: Sequence[Piece]) -> schemas.CompletionLogprobs | None:
        if not self._has_scores:
            return None
        scores = [score for piece in pieces for score in piece.scores]
        texts = [self._text(score.token) for score in scores]
        offsets = []
        at = self._offsets.get(number, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[number] = at
        return schemas.CompletionLogprobs(
            tokens=texts,
            token_logprobs=[_logprob(score.logprob) for score in scores],
            top_logprobs=[
                {self._text(token): _logprob(value) for token, value in score.likeliest}
                for score in scores
            ],
            text_offset=offsets,
        )


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    def __init__(self, served: Served, has_scores: bool) -> None:
        super().__init__(served, has_scores, "chatcmpl")

    def head(self, choices: int) -> list[dict[str, Any]]:
        """As :meth:`Shape.head`."""
        return [
            self._chunk(number, {"role": "assistant", "content": ""}) for number in range(choices)
        ]

    def piece(self, number: int, piece: Piece) -> dict[str, Any]:
        """As :meth:`Shape.piece`."""
        delta = {"content": piece.text} if piece.text else {}
        found = self._chunk(number, delta, piece.reason)
        logprobs = self._logprobs([piece])
        if logprobs is not None:
            found["choices"][0]["logprobs"] = logprobs.model_dump()
        return found

    def last(self, usage: schemas.Usage) -> dict[str, Any]:
        """As :meth:`Shape.last`."""
        return schemas.ChatChunk(**self._head, choices=[], usage=usage).model_dump()

    def whole(
        self, pieces: Sequence[Sequence[Piece]], usage: schemas.Usage
    ) -> schemas.ChatCompletion:
        """As :meth:`Shape.whole`."""
        choices = []
        for number, each in enumerate(pieces):
            reason = each[-1].reason
            assert reason is not None
            choices.append(
                schemas.ChatChoice(
                    index=number,
                    message=schemas.Answer(content="".join(piece.text for piece in each)),
                    logprobs=self._logprobs(each),
                    finish_reason=reason,
                )
            )
        return schemas.ChatCompletion(**self._head, choices=choices, usage=usage)

    def _chunk(
        self, number: int, delta: dict[str, Any], reason: schemas.FinishReason | None = None
    ) -> dict[str, Any]:
        choice = schemas.ChatChunkChoice(index=number, delta=schemas.Delta(), finish_reason=reason)
        found = schemas.ChatChunk(**self._head, choices=[choice]).model_dump()
        found["choices"][0]["delta"] = delta  # what is not new is not named
        return found

    def _logprobs(self, pieces: Sequence[Piece]) -> schemas.ChatLogprobs | None:
        if not self._has_scores:
            return None
        scores = [score for piece in pieces for score in piece.scores]
        return schemas.ChatLogprobs(content=[self._token(score) for score in scores])

    def _token(self, score: TokenScore) -> schemas.TokenLogprob:
        return schemas.TokenLogprob(
            **self._top(score.token, score.logprob).model_dump(),
            top_logprobs=[self._top(token, value) for token, value in score.likeliest],
        )

    def _top(self, token: int, value: float) -> schemas.TopLogprob:
        text = self._text(token)
        return schemas.TopLogprob(
            token=text, logprob=_logprob(value), bytes=list(text.encode("utf-8"))
        )


async def events(
    first: tuple[int, Piece],
    stream: AsyncGenerator[tuple[int, Piece]],
    shape: Shape,
    choices: int,
    read_tokens: int,
    with_usage: bool,
    observed: contextlib.ExitStack,
) -> AsyncIterator[str]:
    """Server-sent events. ``observed`` is closed at the end, however it ends."""
    written = [0] * choices
    try:
        async with contextlib.aclosing(stream):
            with observed:
                for each in shape.head(choices):
                    yield _event(each)
                number, piece = first
                while True:
                    written[number] = piece.tokens
                    if piece.text or piece.scores or piece.reason:
                        yield _event(shape.piece(number, piece))
                    try:
                        number, piece = await anext(stream)
                    except StopAsyncIteration:
                        break
        if with_usage:
            yield _event(shape.last(usage_of(read_tokens, sum(written))))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield _event(error.body())
    except HungUpError:
        return


def usage_of(read_tokens: int, written: int) -> schemas.Usage:
    """Of tokens read and written."""
    return schemas.Usage(
        prompt_tokens=read_tokens, completion_tokens=written, total_tokens=read_tokens + written
    )


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _logprob(value: float) -> float:
    return max(value, _LEAST_LOGPROB)


def now() -> int:
    """Unix seconds."""
    return int(time.time())


def new_id(prefix: str) -> str:
    """Of an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"
