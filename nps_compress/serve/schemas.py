"""Requests and responses, as OpenAI's API and vLLM name them.

A field that would change the answer and is not known here is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_CHOICES = 16  # of one request: its prompts times n
MAX_INPUTS = 256
MAX_MESSAGES = 1024
MAX_LOGPROBS = 20
MAX_STOPS = 4
NAME = Field(min_length=1, max_length=256)
TOKEN = Annotated[int, Field(ge=0, lt=1 << 31)]
TOKENS = Annotated[list[TOKEN], Field(min_length=1)]
STOP = Annotated[str, Field(min_length=1, max_length=256)]
ZERO = Annotated[float, Field(ge=0, le=0, description="Only 0 is supported.")]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Said(_Request):
    """What may be said beside, and changes no answer."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


class StreamOptions(_Request):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class _Generation(_Said):
    model: str = NAME
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=1.0, description="0: the likeliest token, always."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stop: STOP | Annotated[list[STOP], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: ZERO | None = None
    presence_penalty: ZERO | None = None


class CompletionRequest(_Generation):
    """Go on from each prompt: a text, several, or tokens."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | TOKENS
        | Annotated[list[TOKENS], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        default=None, description="Give the log-probabilities of so many tokens at each place."
    )


class TextPart(_Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatRequest(_Generation):
    """Answer the last message, in the words of the task's chat template."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Default: as many as there is room for, and the server allows."
    )
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


INPUT = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    | TOKENS
    | Annotated[list[TOKENS], Field(min_length=1, max_length=MAX_INPUTS)]
)


class EmbeddingRequest(_Said):
    """A vector of unit length for each text."""

    model: str = NAME
    input: INPUT
    encoding_format: Literal["float", "base64"] | None = Field(
        default="float", description="base64: of float32, the least significant byte first."
    )


class ClassifyRequest(_Said):
    """Probabilities of the classes, or a score, for each text."""

    model: str = NAME
    input: INPUT


class LoadRequest(_Request):
    """A task to serve from now on, from a file in an allowed folder."""

    lora_name: str = NAME
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadRequest(_Request):
    """A task to serve no more, once what it has begun is finished."""

    lora_name: str = NAME


class Model(BaseModel):
    """The base (no ``parent``) or a task of it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nps-compress"
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    """All that can be named in ``model``."""

    object: Literal["list"] = "list"
    data: list[Model]


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length"]


class CompletionLogprobs(BaseModel):
    """Of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """The answers; in a stream, a piece of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that stands there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of a message."""

    content: list[TokenLogprob]


class Answer(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A line of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class InputUsage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """A text's vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """In the order of the input."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: InputUsage


class Classification(BaseModel):
    """A text's probabilities, one a class; of a regression model its score, and no label."""

    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassificationList(BaseModel):
    """In the order of the input."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: InputUsage


class TaskStatus(BaseModel):
    """The base or a task, for people and dashboards. Sizes in bytes.

    ``tier``: the fastest that holds it: ``rebuilt``, ``device``, ``host`` or ``disk``.
    """

    id: str
    kind: str
    active: bool
    tier: str
    file_bytes: int
    memory_bytes: int
    waiting: int
    running: int


class Status(BaseModel):
    """What the server holds and does now. ``switch_seconds``: of the last switches."""

    base: str
    tasks: list[TaskStatus]
    switches: int
    switch_seconds: list[float]
    undo_bytes: int
    memory_bytes: dict[str, int]


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"] = "ok"


class Done(BaseModel):
    """A task was loaded or unloaded."""

    message: str


class ErrorDetail(BaseModel):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """As OpenAI's API says it."""

    error: ErrorDetail


JSON = dict[str, Any]
