"""Jobs as a request awaits them: in time, and only for as long as the client is there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from nps_compress.serve.engine import Engine
from nps_compress.serve.failures import RequestError
from nps_compress.serve.jobs import Generation, Piece, Reading

T = TypeVar("T")


class HungUpError(Exception):
    """The client is gone."""


async def generated(
    request: Request,
    engine: Engine,
    make: Sequence[Callable[[Callable[[Piece | RequestError], None]], Generation]],
    seconds: float,
) -> AsyncGenerator[tuple[int, Piece]]:
    """Pieces of several generations as they come, each with the number of its generation.

    Raises:
        RequestError: one can't be done, or it takes too long. HungUpError.
    """
    results: asyncio.Queue[tuple[int, Piece | RequestError]] = asyncio.Queue()
    jobs = [function(_emitter(results, number)) for number, function in enumerate(make)]
    with _watched(request) as gone:
        engine.submit(jobs)
        try:
            deadline = asyncio.get_running_loop().time() + seconds
            left = len(jobs)
            while left:
                number, piece = await _next(results, gone, deadline, seconds)
                left -= piece.reason is not None
                yield number, piece
        finally:
            engine.cancel(jobs)


async def read(
    request: Request,
    engine: Engine,
    make: Sequence[Callable[[Callable[[list[float] | RequestError], None]], Reading]],
    seconds: float,
) -> list[list[float]]:
    """What each reading gives. Raises: as :func:`generated`."""
    results: asyncio.Queue[tuple[int, list[float] | RequestError]] = asyncio.Queue()
    jobs = [function(_emitter(results, number)) for number, function in enumerate(make)]
    with _watched(request) as gone:
        engine.submit(jobs)
        try:
            deadline = asyncio.get_running_loop().time() + seconds
            found = [await _next(results, gone, deadline, seconds) for _ in jobs]
        finally:
            engine.cancel(jobs)
    return [values for _, values in sorted(found)]


def _emitter(results: asyncio.Queue[tuple[int, T]], number: int) -> Callable[[T], None]:
    """For another thread."""
    loop = asyncio.get_running_loop()

    def emit(what: T) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(results.put_nowait, (number, what))

    return emit


@contextlib.contextmanager
def _watched(request: Request) -> Iterator[asyncio.Future[None]]:
    """A future that is done when the client hangs up."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(wait())
    try:
        yield gone
    finally:
        gone.cancel()


async def _next(
    results: asyncio.Queue[tuple[int, T | RequestError]],
    gone: asyncio.Future[None],
    deadline: float,
    seconds: float,
) -> tuple[int, T]:
    if results.empty():
        coming = asyncio.ensure_future(results.get())
        try:
            left = deadline - asyncio.get_running_loop().time()
            both: set[asyncio.Future[Any]] = {coming, gone}
            await asyncio.wait(both, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                if gone.done():
                    raise HungUpError
                raise RequestError(504, f"not answered within {seconds:g} s", code="timeout")
            number, found = coming.result()
        finally:
            coming.cancel()
    else:
        number, found = results.get_nowait()
    if isinstance(found, RequestError):
        raise found
    return number, found
