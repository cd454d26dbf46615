"""What is refused before a request is read: too long, too slow, too many, or without the key."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nps_compress.serve.failures import RequestError

OPEN_PATHS = ("/", "/health")  # which tell nothing of what is served


@dataclass(frozen=True)
class AccessLimits:
    """``body_bytes``: of a request; ``body_seconds``: for all of it to come; ``requests``: at once;
    ``api_key``: None for none."""

    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    requests: int = 1024
    api_key: str | None = None


class Access:
    """An ASGI middleware: the app sees requests that are whole, within limits and allowed.

    refused: told the status of those that it never sees.
    """

    def __init__(self, app: ASGIApp, limits: AccessLimits, refused: Callable[[int], None]) -> None:
        self._app, self._limits, self._refused = app, limits, refused
        self._key = _digest(limits.api_key.encode()) if limits.api_key is not None else None
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._open += 1
        try:
            self._check(scope)
            whole = await self._body(Headers(scope=scope), receive)
        except RequestError as error:
            self._refused(error.status)
            await _send_error(send, error)
        except _HungUpError:
            pass
        else:
            await self._app(scope, _replay(whole, receive), send)
        finally:
            self._open -= 1

    def _check(self, scope: Scope) -> None:
        if self._open > self._limits.requests:
            raise RequestError(
                429,
                f"{self._limits.requests} requests are open at most; try later",
                code="too_many_requests",
                retry_after=1,
            )
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Digests are of one length, so that not even the key's shows in the time this takes.
        right = hmac.compare_digest(_digest(given.strip().encode()), self._key)
        if not right or scheme.lower() != "bearer":
            raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._limits.body_bytes
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise _too_long(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _HungUpError
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise _too_long(limit)
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise RequestError(408, f"the request did not come within {seconds:g} s") from None
        return bytes(body)


class _HungUpError(Exception):
    """The client is gone before the request was whole."""


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _too_long(limit: int) -> RequestError:
    return RequestError(413, f"a request has {limit:,} bytes at most", code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what really comes: only that the client hangs up."""
    is_told = False

    async def replayed() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _send_error(send: Send, error: RequestError) -> None:
    body = json.dumps(error.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",  # what is left of the request is not read
        **error.headers(),
    }
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
