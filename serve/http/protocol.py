"""Parse and check the bodies of requests: the fields of OpenAI's API that the server has.

A field of that API which would change the answer, and which the server does not have, is refused unless it has its
default; a field that changes no answer is ignored; any other field is a mistake. `top_k`, `min_p` and
`repetition_penalty` are additions, by vLLM's names. `formats.py` has the fields of constraints.
"""

from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ...meshes.errors import shown
from ..requests import MOST_LOGPROBS
from .errors import HttpError
from .formats import FormFields

MAX_STOPS = 16
"""Most stop strings of a request; OpenAI takes 4."""

_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_IGNORED |= {"prompt_cache_retention", "parallel_tool_calls"}
"""Fields that change no answer."""

_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that the server does not have, and their values that change nothing, besides null."""


_MAX_PROMPTS, _MAX_FIELDS = 4096, 64

# Else a body of a million wrong items makes a million errors, each with its text.
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(max_length=_MAX_PROMPTS, fail_fast=True)]


class _Strict(BaseModel):
    """A model that takes no value of another type and no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """Options of a streaming answer."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = False


class AnswerSettings(FormFields):
    """Fields of both kinds of requests; null stands for a default."""

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Texts | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="after")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MAX_STOPS:
            raise ValueError(f"{len(texts)} stop strings, at most {MAX_STOPS} are taken")
        if not all(texts):
            raise ValueError("a stop string is empty")
        return stop

    @field_validator("stream_options", mode="after")
    @classmethod
    def _check_stream_options(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options and not info.data.get("stream"):
            raise ValueError("stream_options needs stream to be true")
        return options

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _check_biases(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for token in biases or {}:
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ValueError(f"{shown(token)} is no token id")
        return biases

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens whose log probabilities are wanted; None for none at all."""

    @property
    def choosing(self) -> dict[str, Any]:
        """The settings of an engine's request by which tokens are chosen, those that are not given left out."""
        given = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_k": max(self.top_k or 0, 0),
            # 0 means the likeliest token alone, which an engine writes as the smallest positive share.
            "top_p": 1.0 if self.top_p is None else max(self.top_p, 1e-9),
            "logit_bias": [(int(token), bias) for token, bias in (self.logit_bias or {}).items()],
            "logprobs": self.num_logprobs,
        }
        names = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        return given | {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def has_usage_chunk(self) -> bool:
        """Whether the last chunk of a stream tells the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(AnswerSettings):
    """The body of /v1/completions: one prompt or several, as text or as token ids."""

    prompt: str | Texts | Tokens | Annotated[list[Tokens], Field(max_length=_MAX_PROMPTS, fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens whose log probabilities are wanted; None for none at all."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextPart(_Strict):
    """A part of a message; the server reads text alone."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat; a content of several parts is joined."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None
    tool_call_id: str | None = None
    # Clients send an answer back as they got it.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[None], Field(max_length=0)] | None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        names = {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        # Templates know "system"; "developer" is OpenAI's newer name for it.
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **names}


class ChatRequest(AnswerSettings):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @field_validator("top_logprobs", mode="after")
    @classmethod
    def _check_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs to be true")
        return count

    @property
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens whose log probabilities are wanted; None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


Body = TypeVar("Body", bound=AnswerSettings)


def parse_body(kind: type[Body], content: bytes) -> Body:
    """Parse the JSON of a request.

    Raises:
        HttpError: it is no JSON object, or a field is missing, wrong, unknown or not supported.
    """
    try:
        # Of bounded depth, and no NaN, which is not JSON.
        values = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise HttpError(f"the body is not JSON: {error}.", fix="send one JSON object in UTF-8.") from None
    if not isinstance(values, dict):
        raise HttpError(f"the body is {_kind(values)}, not a JSON object.", fix='send {"model": ..., ...}.')
    if len(values) > _MAX_FIELDS:
        raise HttpError(f"the body has {len(values)} fields, and there are fewer.", fix="send fewer fields.")
    try:
        return kind.model_validate(_drop_defaults(values))
    except pydantic.ValidationError as error:
        raise _explain(error) from None


def _drop_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out fields that change nothing, and refuse those that would need what the server has not."""
    for name in values.keys() & _DEFAULTS.keys():
        value = values[name]
        if value is not None and value not in _DEFAULTS[name]:
            raise HttpError(
                f"{name}={shown(value)} is not supported by this server.",
                fix=f"leave {name} out.",
                param=name,
                code="unsupported_parameter",
            )
    return {name: value for name, value in values.items() if name not in _DEFAULTS and name not in _IGNORED}


def _explain(error: pydantic.ValidationError) -> HttpError:
    """Return the first problem as one sentence; of a union the last alternative may be the nearest, so all are told."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        path = ".".join(map(str, first["loc"]))
        return HttpError(
            f"{shown(path)} is an unknown field.",
            fix="leave it out, or check its spelling.",
            param=path,
            code="unknown_parameter",
        )
    if first["type"] == "missing":
        path = ".".join(map(str, first["loc"]))
        return HttpError(
            f"the field {shown(path)} is missing.", fix=f"send {path}.", param=path, code="missing_required_parameter"
        )
    whys = dict.fromkeys(
        problem["msg"].removeprefix("Value error, ")
        for problem in problems
        if str(problem["loc"][0] if problem["loc"] else "") == name
    )
    return HttpError(f"{name}={shown(first['input'])}: {'; or '.join(whys)}.", fix=f"correct {name}.", param=name)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
