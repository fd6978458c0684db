"""Turn checked bodies into requests of the engine: prompts into tokens, defaults into settings, n into choices."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...hub.chat.template import ChatTemplate
from ...hub.model_folder import ModelSource
from ...meshes import ServeError, TrellaxError
from ...meshes.arguments import check_count
from ...meshes.errors import shown
from ..async_engine import AsyncEngine
from ..constraints.constraint import Constraint
from ..requests import Request
from .answers import Choice, Job
from .errors import HttpError
from .metrics import Metrics
from .protocol import AnswerSettings, ChatRequest, CompletionRequest

_COMPLETION_TOKENS = 16
"""Length of an answer of /v1/completions that names none, as in OpenAI's API."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one HTTP request.

    Args:
        body_bytes: the longest body.
        idle_s: most seconds from the connection, or the end of an answer, to the first byte of the next request.
            Closing while a client sends leaves that request without an answer, and a client may not send a POST again
            by itself; so it is longer than others keep connections that they do not use: httpx 5 s, aiohttp 15 s, load
            balancers 60 s, Go 90 s.
        head_s: most seconds from the first byte of a request to the end of its headers, and in which a client must take
            a part of the rest of its answer.
        body_s: most seconds in which the body must arrive.
        answer_s: most seconds from a request to the end of its answer.
        choices: most choices of a request, prompts x n.

    Raises:
        ServeError: a bound is not positive.
    """

    body_bytes: int = 4 << 20
    idle_s: float = 120.0
    head_s: float = 30.0
    body_s: float = 30.0
    answer_s: float = 600.0
    choices: int = 64

    def __post_init__(self) -> None:
        for name in ("body_bytes", "choices"):
            check_count(name, getattr(self, name), error=ServeError)
        for name in ("idle_s", "head_s", "body_s", "answer_s"):
            if not getattr(self, name) > 0:
                raise ServeError(f"{name}={getattr(self, name)} is no time to wait.", fix="give seconds above 0.")


@dataclass(kw_only=True)
class Service:
    """A model that answers HTTP requests.

    Args:
        name: the model's name in requests.
        source: its tokenizer and its special tokens.
        template: its chat template, None if it has none.
        api_key: what `Authorization: Bearer` must hold; None for no check.
        is_stopping: whether new requests are refused.
    """

    name: str
    engine: AsyncEngine
    source: ModelSource
    template: ChatTemplate | None = None
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    is_stopping: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    async def complete(self, body: CompletionRequest) -> Job:
        """Begin the answers to prompts.

        Raises:
            HttpError: the model is unknown, a prompt or a setting does not fit, or there is no room.
        """
        self._check(body, num_prompts=len(body.prompts))
        if not body.prompts:
            raise HttpError("there is no prompt.", fix="send a text, or a list with one.", param="prompt")
        constraint = await self._compile(body)
        prompts = await asyncio.to_thread(lambda: [self._encode_prompt(prompt) for prompt in body.prompts])
        max_tokens = body.max_tokens or _COMPLETION_TOKENS
        return self._begin("text", body, prompts, max_tokens=max_tokens, constraint=constraint)

    async def chat(self, body: ChatRequest) -> Job:
        """Begin the answers to a chat.

        Raises:
            HttpError: as `complete`; or the model has no chat template, or one that refuses the messages.
        """
        self._check(body)
        if self.template is None:
            raise HttpError(
                f"the model {self.name} has no chat template, so messages are no prompt for it.",
                fix="start the server with --chat-template FILE, or use /v1/completions.",
                code="no_chat_template",
            )
        constraint = await self._compile(body)
        prompt = await asyncio.to_thread(self._encode_chat, self.template, body)
        room = self.engine.engine.sizes.max_tokens - len(prompt)
        max_tokens = body.max_completion_tokens or body.max_tokens or max(room, 1)
        return self._begin("chat", body, [prompt], max_tokens=max_tokens, constraint=constraint)

    async def _compile(self, body: AnswerSettings) -> Constraint | None:
        """Return the form that the answer must have, compiled."""
        found = body.constraint()
        if found is None:
            return None
        constraint, param = found
        try:
            await self.engine.compile(constraint)
        except ServeError as error:
            raise HttpError(error.problem, fix=error.fix, param=param) from None
        return constraint

    def _check(self, body: AnswerSettings, *, num_prompts: int = 1) -> None:
        if body.model != self.name:
            raise HttpError(
                f"there is no model {shown(body.model)} here; this server has {shown(self.name)}.",
                fix=f"send model={shown(self.name)}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        if (num_choices := num_prompts * (body.n or 1)) > self.limits.choices:
            raise HttpError(
                f"prompts x n are {num_choices} answers, and a request has at most {self.limits.choices}.",
                fix="send several requests.",
                param="n",
            )

    def _encode_chat(self, template: ChatTemplate, body: ChatRequest) -> tuple[int, ...]:
        """Render and encode messages; like all that grows with a prompt on a thread, so that nobody waits for it."""
        try:
            text = template.render([message.for_template() for message in body.messages])
        except ServeError as error:
            raise HttpError(error.problem, fix=error.fix, param="messages") from None
        # The template writes the special tokens itself.
        return self._encode(text, special="without", param="messages")

    def _encode_prompt(self, prompt: str | list[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        return self._encode(prompt, special="with", param="prompt") or self.source.begin_ids

    def _encode(self, text: str, *, special: str, param: str) -> tuple[int, ...]:
        tokenizer = self.source.tokenizer
        try:
            return tuple(tokenizer.encode_prompt(text) if special == "with" else tokenizer.encode(text))
        except TrellaxError as error:
            raise HttpError(error.problem, fix=error.fix, param=param) from None

    def _begin(
        self,
        kind: str,
        body: AnswerSettings,
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        constraint: Constraint | None,
    ) -> Job:
        """Submit a request for each choice, or none of them."""
        own: dict[str, Any] = {"kind": kind, "max_tokens": max_tokens, "constraint": constraint}
        requests = [one for prompt in prompts for one in self._requests(body, prompt, **own)]
        self._check_room(len(requests))
        choices = [
            Choice(
                self.engine.submit(request),
                index=index,
                tokenizer=self.source.tokenizer,
                stops=body.stops,
                metrics=self.metrics,
            )
            for index, request in enumerate(requests)
        ]
        lengths = [len(prompt) for prompt in prompts]
        self.metrics.num_prompt_tokens += sum(lengths)
        return Job(
            kind="chat" if kind == "chat" else "text",
            model=self.name,
            choices=choices,
            prompt_lengths=lengths,
        )

    def _requests(
        self,
        body: AnswerSettings,
        prompt: tuple[int, ...],
        *,
        kind: str,
        max_tokens: int,
        constraint: Constraint | None,
    ) -> list[Request]:
        """Return the n requests for one prompt, which the engine has checked, with seeds one after another."""
        param = "messages" if kind == "chat" else "prompt"
        self._check_length(prompt, max_tokens, param=param)
        seed = secrets.randbelow(2**32) if body.seed is None else body.seed
        try:
            first = Request(
                prompt=prompt,
                max_new_tokens=max_tokens,
                **body.choosing,
                seed=seed % 2**32,
                stop=self.source.end_ids,
                constraint=constraint,
            )
            self.engine.engine.check(first)
        except ServeError as error:
            raise HttpError(error.problem, fix=error.fix, param=param) from None
        return [replace(first, seed=(seed + index) % 2**32) for index in range(body.n or 1)]

    def _check_length(self, prompt: tuple[int, ...], max_tokens: int, *, param: str) -> None:
        """Name the fields of the API where a request does not fit, and its code."""
        room = self.engine.engine.sizes.max_tokens
        if len(prompt) + max_tokens > room:
            left = room - len(prompt)
            raise HttpError(
                f"a prompt of {len(prompt)} tokens and max_tokens={max_tokens} are {len(prompt) + max_tokens} tokens, "
                f"but this server has room for {room}.",
                fix=f"set max_tokens={left} or less."
                if left > 0
                else f"shorten the prompt to less than {room} tokens.",
                param=param,
                code="context_length_exceeded",
            )

    def _check_room(self, num_requests: int) -> None:
        # Also a server that has begun to stop while a prompt was encoded.
        if self.is_stopping:
            raise HttpError("the server is stopping.", fix="send the request to another one.", status=503)
        if self.engine.error:
            raise HttpError(self.engine.error.problem, fix=self.engine.error.fix, status=503)
        if num_requests > self.engine.num_free:
            raise HttpError(
                f"the server is busy: {self.engine.num_open} answers are in progress or in the queue, and "
                f"{num_requests} more have no place.",
                fix="try again in some seconds.",
                status=429,
                code="queue_full",
            )
