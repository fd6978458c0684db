"""Answers as text: one `Choice` reads the tokens of one stream; a `Job` has all choices of one HTTP request."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...hub.text_stream import TextStream, Tokenizer
from ...meshes import ServeError
from ..async_engine import TokenStream
from ..requests import TokenLogprobs
from ..stop_strings import StopStrings
from .errors import HttpError
from .logprobs import chat_logprobs, text_logprobs
from .metrics import Metrics

_MAX_PIECES = 256
"""Most pieces of text that wait for a client that reads slowly; tokens wait as numbers beyond."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of the text of an answer, and the log probabilities of its tokens, if the request wants them."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


class Choice:
    """One answer: an async iterator of pieces of its text, which ends at a stop string.

    Args:
        index: its number among the choices of the request.
        stops: strings that end the answer and are not part of it.
    """

    def __init__(
        self, stream: TokenStream, *, index: int, tokenizer: Tokenizer, stops: Sequence[str], metrics: Metrics
    ) -> None:
        self.stream, self.index, self.metrics = stream, index, metrics
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._text, self._stops = TextStream(tokenizer, prompt=stream.request.prompt), StopStrings(stops)
        self._tokenizer = tokenizer
        self._start_s = time.monotonic()
        self._untold: list[TokenLogprobs] = []
        self._num_letters = 0

    @property
    def has_logprobs(self) -> bool:
        """Whether the request wants log probabilities."""
        return self.stream.request.logprobs is not None

    def shape_logprobs(self, kind: Literal["text", "chat"], found: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """Return log probabilities of the next tokens as the API has them; None if the request wants none."""
        if not self.has_logprobs:
            return None
        if kind == "chat":
            return chat_logprobs(found, self._tokenizer)
        shaped = text_logprobs(found, self._tokenizer, offset=self._num_letters)
        self._num_letters += sum(map(len, shaped["tokens"]))
        return shaped

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces of text; where log probabilities are wanted the last one may be empty.

        Raises:
            ServeError: logits are not finite, or the server or its engine has stopped.
        """
        while tokens := await self.stream.take():
            if not self.num_tokens:
                self.metrics.first_token.observe(time.monotonic() - self._start_s)
            for token in tokens:
                self.num_tokens += 1
                self.metrics.num_answer_tokens += 1
                if self.has_logprobs:
                    self._untold.append(self.stream.logprobs[self.num_tokens - 1])
                if text := self._stops.add(self._text.add(token)):
                    yield self._piece(text)
                if self._stops.has_stopped:
                    self.stream.cancel()
                    self._end("stop")
                    return
        if self.stream.finish_reason == "cancelled":
            raise HttpError("the answer was cancelled: the server has stopped.", fix="ask again.", status=503)
        rest = self._stops.add(self._text.finish())
        rest += self._stops.finish()
        if rest or self._untold:
            yield self._piece(rest)
        self._end("stop" if self._stops.has_stopped else self.stream.finish_reason or "length")

    def cancel(self) -> None:
        """End the answer, if it has not ended, and free its slot."""
        self.stream.cancel()
        self._end(self.stream.finish_reason or "cancelled")

    def _piece(self, text: str) -> Piece:
        untold, self._untold = tuple(self._untold), []
        return Piece(text=text, logprobs=untold)

    def _end(self, reason: str) -> None:
        if self.finish_reason is not None:
            return
        self.finish_reason = reason
        self.metrics.answers[reason] += 1
        self.metrics.answer.observe(time.monotonic() - self._start_s)


@dataclass(kw_only=True)
class Job:
    """The choices of one HTTP request, and what all parts of its response have in common.

    Args:
        kind: "text" for /v1/completions, "chat" for /v1/chat/completions.
        choices: those of the first prompt, then those of the next.
        prompt_lengths: tokens of each prompt.
    """

    kind: Literal["text", "chat"]
    model: str
    choices: list[Choice]
    prompt_lengths: list[int]
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def cancel(self) -> None:
        """Cancel the choices that have not ended."""
        for choice in self.choices:
            choice.cancel()

    async def collect(self) -> dict[str, Any]:
        """Wait for all choices, and return the JSON of the response.

        Raises:
            ServeError: as `Choice.pieces`.
        """
        wholes = await asyncio.gather(*map(_collect, self.choices))
        choices = [self._choice(choice, whole) for choice, whole in zip(self.choices, wholes, strict=True)]
        name = "text_completion" if self.kind == "text" else "chat.completion"
        return self._envelope(name) | {"choices": choices, "usage": self.usage()}

    async def chunks(self, *, with_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        """Yield the JSON of the parts of a streaming response, those of several choices as they come.

        Raises:
            ServeError: as `Choice.pieces`.
        """
        envelope = self._envelope("text_completion" if self.kind == "text" else "chat.completion.chunk")
        if with_usage:
            envelope["usage"] = None
        if self.kind == "chat":
            for choice in self.choices:
                yield envelope | {"choices": [_chunk(choice.index, delta={"role": "assistant", "content": ""})]}
        async with contextlib.aclosing(_merge(self.choices)) as merged:
            async for choice, piece in merged:
                if self.kind == "text":
                    part = _chunk(choice.index, text=piece.text if piece else "")
                else:
                    part = _chunk(choice.index, delta={"content": piece.text} if piece else {})
                if piece:
                    part["logprobs"] = choice.shape_logprobs(self.kind, piece.logprobs)
                reason = choice.finish_reason if piece is None else None
                yield envelope | {"choices": [part | {"finish_reason": reason}]}
        if with_usage:
            yield envelope | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens so far; each prompt counts once, whatever n is."""
        prompt = sum(self.prompt_lengths)
        answer = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": self._count_cached()},
            **self._count_guessed(),
        }

    def _count_guessed(self) -> dict[str, Any]:
        """Return the tokens that speculation has guessed, by the names of OpenAI's predicted outputs; none if none."""
        guessed = sum(choice.stream.num_guessed for choice in self.choices)
        right = sum(choice.stream.num_accepted for choice in self.choices)
        details = {"accepted_prediction_tokens": right, "rejected_prediction_tokens": guessed - right}
        return {"completion_tokens_details": details} if guessed else {}

    def _count_cached(self) -> int:
        """Count tokens of prompts that were in the cache; one choice of a prompt may share what another has read."""
        n = len(self.choices) // len(self.prompt_lengths)
        firsts = range(0, len(self.choices), n)
        return sum(min(choice.stream.num_shared for choice in self.choices[first : first + n]) for first in firsts)

    def _envelope(self, name: str) -> dict[str, Any]:
        prefix = "cmpl" if self.kind == "text" else "chatcmpl"
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}

    def _choice(self, choice: Choice, whole: Piece) -> dict[str, Any]:
        if self.kind == "text":
            part = _chunk(choice.index, text=whole.text)
        else:
            part = _chunk(choice.index, message={"role": "assistant", "content": whole.text, "refusal": None})
        logprobs = choice.shape_logprobs(self.kind, whole.logprobs)
        return part | {"logprobs": logprobs, "finish_reason": choice.finish_reason}


def _chunk(index: int, **content: Any) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": None}


async def _collect(choice: Choice) -> Piece:
    pieces = [piece async for piece in choice.pieces()]
    logprobs = tuple(one for piece in pieces for one in piece.logprobs)
    return Piece(text="".join(piece.text for piece in pieces), logprobs=logprobs)


async def _merge(choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece | None]]:
    """Yield pieces of all choices as they come, and None at the end of each."""
    ready: asyncio.Queue[tuple[Choice, Piece | ServeError | None]] = asyncio.Queue(_MAX_PIECES)

    async def read(choice: Choice) -> None:
        try:
            async for piece in choice.pieces():
                await ready.put((choice, piece))
            await ready.put((choice, None))
        except ServeError as error:
            await ready.put((choice, error))

    tasks = [asyncio.create_task(read(choice)) for choice in choices]
    num_left = len(choices)
    try:
        while num_left:
            choice, piece = await ready.get()
            if isinstance(piece, ServeError):
                raise piece
            num_left -= piece is None
            yield choice, piece
    finally:
        for task in tasks:
            task.cancel()
