"""The routes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from nps_compress import __version__
from nps_compress.bank import DEVICE, HOST
from nps_compress.serve import page, schemas
from nps_compress.serve.access import Access, AccessLimits
from nps_compress.serve.answers import HungUpError, generated, read
from nps_compress.serve.catalogue import Catalogue, Served
from nps_compress.serve.engine import Engine
from nps_compress.serve.failures import RequestError
from nps_compress.serve.jobs import Generation, Piece, Reading
from nps_compress.serve.metrics import Metrics
from nps_compress.serve.processors import ProcessorError, Use
from nps_compress.serve.sampling import Sampling
from nps_compress.serve.shapes import (
    ChatShape,
    CompletionShape,
    Shape,
    events,
    new_id,
    now,
    usage_of,
)

_POLL_SECONDS = 0.02
_DEFAULT_TOKENS = 16  # of a completion, as in OpenAI's API
_HUNG_UP = 499  # as nginx has it; nobody reads it


@dataclass(frozen=True)
class RequestLimits:
    """``tokens``: of a prompt and its answer together; ``seconds``: for an answer."""

    tokens: int = 4096
    seconds: float = 300.0


class _Json(Response):
    """ASCII only, so that whatever a client sent can be told back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorBody, "description": what}
    for status, what in {
        400: "The request is malformed, or asks for what can't be done.",
        401: "The API key is missing or wrong.",
        404: "No such model.",
        408: "The request came too slowly.",
        413: "The request is too large.",
        429: "Too much is waiting; see Retry-After.",
        500: "The model failed.",
        503: "The model can't be served now.",
        504: "It took too long.",
    }.items()
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {  # of each event; its data is JSON, at last [DONE]
                "schema": {
                    "type": "object",
                    "properties": {"data": {"type": "string"}},
                    "required": ["data"],
                }
            }
        }
    }
}


def create_app(
    engine: Engine,
    catalogue: Catalogue,
    metrics: Metrics,
    *,
    limits: RequestLimits,
    access: AccessLimits,
    may_load: bool = False,
) -> FastAPI:
    """The routes over an engine, which is closed when the app shuts down.

    may_load: whether tasks can be loaded and unloaded over HTTP.
    """
    server = _Server(engine, catalogue, metrics, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(
        title="nps-compress",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from the network
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.add_middleware(
        Access,
        limits=access,
        refused=lambda status: metrics.refused.labels(str(status)).inc(),
    )
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(HungUpError, _on_hung_up)
    app.add_exception_handler(Exception, _on_fault)

    app.get("/", response_class=HTMLResponse, include_in_schema=False)(server.page)
    app.get("/health", responses={})(server.health)
    app.get("/metrics", response_class=Response, include_in_schema=False)(server.metrics_text)
    app.get("/status")(server.status)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{model:path}")(server.model)
    app.post("/v1/completions", response_model=schemas.Completion, responses=_STREAM)(
        server.completions
    )
    app.post("/v1/chat/completions", response_model=schemas.ChatCompletion, responses=_STREAM)(
        server.chat_completions
    )
    app.post("/v1/embeddings")(server.embeddings)
    app.post("/classify")(server.classify)
    if may_load:
        app.post("/v1/load_lora_adapter")(server.load)
        app.post("/v1/unload_lora_adapter")(server.unload)
    app.state.engine = engine
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class _Server:
    def __init__(
        self, engine: Engine, catalogue: Catalogue, metrics: Metrics, limits: RequestLimits
    ) -> None:
        self._engine, self._catalogue = engine, catalogue
        self._metrics, self._limits = metrics, limits
        model = engine.bank.model
        self._base_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        self._base_tier = DEVICE if model.device.type == "cuda" else HOST

    async def page(self) -> HTMLResponse:
        return HTMLResponse(page.HTML, headers=page.HEADERS)

    async def health(self) -> schemas.Health:
        """Whether the server can answer."""
        if not self._engine.alive:
            raise RequestError(503, "the engine has stopped; see the server's log")
        return schemas.Health()

    async def metrics_text(self) -> Response:
        text = await run_in_threadpool(self._metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> schemas.ModelList:
        """The base and all tasks."""
        return schemas.ModelList(data=[self._model(served) for served in self._catalogue])

    async def model(self, model: str) -> schemas.Model:
        """The base or one task."""
        return self._model(self._catalogue.get(model))

    async def status(self) -> schemas.Status:
        """Sizes, residency, queues and switch times."""
        bank = self._engine.bank
        infos, found = bank.tasks(), bank.metrics()
        waiting, running = self._engine.work()
        tasks = []
        for served in self._catalogue:
            info = infos.get(served.task) if served.task is not None else None
            if served.task is not None and info is None:
                continue  # it was unloaded meanwhile
            tasks.append(
                schemas.TaskStatus(
                    id=served.name,
                    kind=served.processor.kind,
                    active=bank.active == served.task,
                    tier=info.tier if info else self._base_tier,
                    file_bytes=info.file_bytes if info else self._base_bytes,
                    memory_bytes=info.nbytes if info else self._base_bytes,
                    waiting=waiting.get(served.task, 0),
                    running=running.get(served.task, 0),
                )
            )
        return schemas.Status(
            base=self._catalogue.base_name,
            tasks=tasks,
            switches=found.switches,
            switch_seconds=list(found.switch_seconds),
            undo_bytes=found.undo_bytes,
            memory_bytes=dict(found.nbytes),
        )

    async def completions(self, request: Request, body: schemas.CompletionRequest) -> Any:
        """Go on from a prompt."""
        served = self._for(body.model, "generate")
        prompts = await run_in_threadpool(self._rows, served, body.prompt, "prompt")
        tokens = [row["input_ids"] for row in prompts]
        asked = body.max_tokens if "max_tokens" in body.model_fields_set else None
        plan = self._plan(served, body, tokens, asked, _DEFAULT_TOKENS, body.logprobs)
        shape = CompletionShape(served, body.logprobs is not None)
        return await self._generate(request, served, body, plan, shape)

    async def chat_completions(self, request: Request, body: schemas.ChatRequest) -> Any:
        """Answer the last message of a conversation."""
        served = self._for(body.model, "generate")
        most, param = body.max_completion_tokens, "max_completion_tokens"
        if most is None:
            most, param = body.max_tokens, "max_tokens"
        elif body.max_tokens not in (None, most):
            raise RequestError(
                400, f"max_tokens is {body.max_tokens}, {param} {most}", param="max_tokens"
            )
        top = body.top_logprobs
        if top is not None and not body.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs", param="top_logprobs")
        messages = [
            {"role": each.role, "content": _text_of(each.content)}
            | ({"name": each.name} if each.name is not None else {})
            for each in body.messages
        ]
        try:
            tokens = await run_in_threadpool(served.processor.chat_tokens, messages)
        except ProcessorError as error:
            raise RequestError(400, str(error), param="messages") from None
        self._check_row(served, {"input_ids": tokens}, "messages")
        scores = (top or 0) if body.logprobs else None
        plan = self._plan(served, body, [tokens], most, self._limits.tokens, scores)
        return await self._generate(
            request, served, body, plan, ChatShape(served, bool(body.logprobs))
        )

    async def embeddings(
        self, request: Request, body: schemas.EmbeddingRequest
    ) -> schemas.EmbeddingList:
        """A vector of unit length for each text."""
        served, values, usage = await self._read(request, body.model, body.input, "embed")
        encode = _base64 if body.encoding_format == "base64" else list
        data = [
            schemas.Embedding(index=index, embedding=encode(each))
            for index, each in enumerate(values)
        ]
        return schemas.EmbeddingList(model=served.name, data=data, usage=usage)

    async def classify(
        self, request: Request, body: schemas.ClassifyRequest
    ) -> schemas.ClassificationList:
        """Probabilities of the classes of each text, as vLLM's route of this name has them."""
        served, values, usage = await self._read(request, body.model, body.input, "classify")
        processor = served.processor
        data = [
            schemas.Classification(
                index=index,
                label=None
                if processor.activation == "none"
                else processor.labels[max(range(len(each)), key=each.__getitem__)],
                probs=each,
                num_classes=len(each),
            )
            for index, each in enumerate(values)
        ]
        return schemas.ClassificationList(
            id=new_id("classify"), created=now(), model=served.name, data=data, usage=usage
        )

    async def load(self, body: schemas.LoadRequest) -> schemas.Done:
        """Serve one more task, from a file in an allowed folder."""
        await run_in_threadpool(self._catalogue.load, body.lora_name, body.lora_path)
        return schemas.Done(message=f"{body.lora_name!r} is served")

    async def unload(self, body: schemas.UnloadRequest) -> schemas.Done:
        """Serve a task no more, once what has begun is finished."""
        served = self._catalogue.withdraw(body.lora_name)
        assert served.task is not None
        while self._engine.work_of(served.task):
            await asyncio.sleep(_POLL_SECONDS)
        await asyncio.wrap_future(self._engine.call(partial(self._engine.bank.remove, served.task)))
        self._engine.forget(served.task)
        return schemas.Done(message=f"{body.lora_name!r} is served no more")

    def _model(self, served: Served) -> schemas.Model:
        return schemas.Model(
            id=served.name,
            created=served.created,
            root=served.root,
            parent=None if served.task is None else self._catalogue.base_name,
            max_model_len=self._most_tokens(served),
        )

    def _most_tokens(self, served: Served) -> int:
        return min(served.processor.max_tokens, self._limits.tokens)

    def _for(self, name: str, use: Use) -> Served:
        served = self._catalogue.get(name)
        if use not in served.processor.uses:
            can = ", ".join(sorted(served.processor.uses)) or "nothing by itself"
            raise RequestError(
                400, f"model {served.name!r} does not {use}; it can: {can}", param="model"
            )
        return served

    def _rows(
        self, served: Served, given: str | Sequence[Any], param: str
    ) -> list[dict[str, list[int]]]:
        """What a text, texts, tokens or lists of tokens are to the model. Raises RequestError."""
        is_one = isinstance(given, str) or isinstance(given[0], int)
        rows = [served.processor.inputs(each) for each in ([given] if is_one else given)]
        for row in rows:
            self._check_row(served, row, param)
        return rows

    def _check_row(self, served: Served, row: Mapping[str, list[int]], param: str) -> None:
        tokens, most = row["input_ids"], self._most_tokens(served)
        if not tokens:
            raise RequestError(400, f"{param} has no tokens", param=param)
        if len(tokens) > most:
            raise _too_long(f"{param} has {len(tokens)} tokens, the limit is {most}", param)
        highest = max(tokens)
        if highest >= served.processor.vocabulary:
            known = served.processor.vocabulary
            raise RequestError(
                400, f"{param} has token {highest}, the model knows {known}", param=param
            )

    def _plan(
        self,
        served: Served,
        body: schemas.CompletionRequest | schemas.ChatRequest,
        prompts: Sequence[list[int]],
        asked: int | None,
        default: int,
        logprobs: int | None,
    ) -> list[tuple[list[int], Sampling]]:
        """The generations that a request wants, in the order of its choices."""
        count = body.n or 1
        if len(prompts) * count > schemas.MAX_CHOICES:
            raise RequestError(
                400,
                f"{len(prompts)} prompts times n = {count} are more than {schemas.MAX_CHOICES}",
                param="n",
            )
        if body.stream_options is not None and not body.stream:
            raise RequestError(400, "stream_options needs stream", param="stream_options")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        plan: list[tuple[list[int], Sampling]] = []
        for prompt in prompts:
            room = self._most_tokens(served) - len(prompt)
            most = asked if asked is not None else min(default, room)
            if most > room or room < 1:
                raise _too_long(
                    f"{len(prompt)} tokens of the prompt and {max(most, 1)} of the answer are more "
                    f"than the limit of {self._most_tokens(served)}",
                    "max_tokens",
                )
            for _ in range(count):
                seed = body.seed
                if seed is not None:
                    seed = (seed + len(plan) + (1 << 63)) % (1 << 64) - (1 << 63)
                sampling = Sampling(
                    most,
                    1.0 if body.temperature is None else body.temperature,
                    1.0 if body.top_p is None else body.top_p,
                    seed,
                    stop,
                    logprobs,
                )
                plan.append((prompt, sampling))
        return plan

    async def _generate(
        self,
        request: Request,
        served: Served,
        body: schemas.CompletionRequest | schemas.ChatRequest,
        plan: Sequence[tuple[list[int], Sampling]],
        shape: Shape,
    ) -> Any:
        make = [
            partial(Generation, served.task, served.name, served.processor, prompt, sampling)
            for prompt, sampling in plan
        ]
        distinct = plan[:: body.n or 1]
        read_tokens = sum(len(prompt) for prompt, _ in distinct)
        observed = self._observed(served, read_tokens)
        stream = generated(request, self._engine, make, self._limits.seconds)
        if not body.stream:
            with observed:
                pieces: list[list[Piece]] = [[] for _ in plan]
                async for number, piece in stream:
                    pieces[number].append(piece)
            return shape.whole(pieces, usage_of(read_tokens, sum(p[-1].tokens for p in pieces)))
        usage = bool(body.stream_options and body.stream_options.include_usage)
        with contextlib.ExitStack() as stack:
            stack.enter_context(observed)
            first = await anext(stream)  # what fails before it is told by the status
            lines = events(first, stream, shape, len(plan), read_tokens, usage, stack.pop_all())
        return StreamingResponse(
            lines, media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    async def _read(
        self,
        request: Request,
        name: str,
        given: str | Sequence[Any],
        use: Literal["embed", "classify"],
    ) -> tuple[Served, list[list[float]], schemas.InputUsage]:
        served = self._for(name, use)
        rows = await run_in_threadpool(self._rows, served, given, "input")
        tokens = sum(len(row["input_ids"]) for row in rows)
        make = [
            partial(Reading, served.task, served.name, served.processor, use, row) for row in rows
        ]
        with self._observed(served, tokens):
            values = await read(request, self._engine, make, self._limits.seconds)
        return served, values, schemas.InputUsage(prompt_tokens=tokens, total_tokens=tokens)

    @contextlib.contextmanager
    def _observed(self, served: Served, tokens: int) -> Iterator[None]:
        """Count a request that names a model, however it ends."""
        start = time.perf_counter()
        status = 500
        self._metrics.prompt_tokens.labels(served.name).inc(tokens)
        try:
            yield
            status = 200
        except RequestError as error:
            status = error.status
            raise
        except (HungUpError, asyncio.CancelledError, GeneratorExit):
            status = _HUNG_UP
            raise
        finally:
            self._metrics.requests.labels(served.name, str(status)).inc()
            self._metrics.seconds.labels(served.name).observe(time.perf_counter() - start)


def _text_of(content: str | Sequence[schemas.TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _base64(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")


def _too_long(message: str, param: str) -> RequestError:
    return RequestError(400, message, code="context_length_exceeded", param=param)


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _Json(error.body(), error.status, error.headers())


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(each) for each in first["loc"] if each != "body"]
    where = ".".join(place)[:200]
    found = RequestError(
        400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None
    )
    return _Json(found.body(), 400)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = RequestError(error.status_code, str(error.detail))
    return _Json(found.body(), error.status_code, dict(error.headers or {}))


async def _on_hung_up(_: Request, error: Exception) -> Response:
    return Response(status_code=_HUNG_UP)


async def _on_fault(_: Request, error: Exception) -> Response:
    return _Json(RequestError(500, "the server failed; see its log").body(), 500)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """As FastAPI has it, but that a malformed request is told by 400 as in OpenAI's API."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = found
    return app.openapi_schema
