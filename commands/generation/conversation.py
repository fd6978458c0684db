"""Keep the messages of a conversation, and answer the last one through the chat template of the model.

Every answer is a request of the whole conversation; the engine has read its beginning before, and reads the new part
alone where the pages of its cache are still there.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...hub.chat.template import ChatTemplate
from ...hub.model_folder import ModelSource
from ...meshes import ServeError
from ...meshes.errors import shown
from ...serve import Engine, Request, ServedSequence, check_request
from ...serve.state import MAX_STOPS
from .answer_text import AnswerText, is_text, read_stops
from .constraint import check_constraint, read_constraint
from .requests import make_request, stops_of

Message = dict[str, str]


@dataclass(kw_only=True)
class Answer:
    """An answer that is being decoded.

    Args:
        is_stopping: set it to end the answer after the next step.
    """

    engine: Engine
    sequence: ServedSequence
    message: str
    text: AnswerText
    is_stopping: bool = False

    def pieces(self) -> Iterator[str]:
        """Yield the text as it is decoded.

        Raises:
            ServeError: logits are not finite.
        """
        num_seen = 0
        while not self.engine.scheduler.is_idle:
            self.engine.step()
            for token in self.sequence.tokens[num_seen:]:
                num_seen += 1
                if not self.text.has_stopped:
                    yield self.text.add(token)
            if self.is_stopping or self.text.has_stopped:
                self.engine.cancel(self.sequence)
        yield self.text.finish()

    def numbers(self) -> dict[str, Any]:
        """Return what `--json` prints of the answer."""
        wanted = self.sequence.request.logprobs is not None
        return {
            "message": self.message,
            "completion": self.text.text,
            "token_ids": self.text.kept(self.sequence.tokens),
            "finish_reason": self.text.finish_reason(self.sequence),
            **({"logprobs": [asdict(one) for one in self.text.kept(self.sequence.logprobs)]} if wanted else {}),
        }


class Conversation:
    """The messages so far, and how the next one is answered.

    Args:
        args: settings of `trellax generate`.
        max_tokens: most tokens of a conversation, with its answers.
    """

    def __init__(self, args: argparse.Namespace, source: ModelSource, template: ChatTemplate, max_tokens: int) -> None:
        self._args, self._source, self._template, self._max_tokens = args, source, template, max_tokens
        self._stops, self._constraint = read_stops(args.stop), read_constraint(args)
        self._messages: list[Message] = []
        self._num_answers = 0
        self.begin_anew()

    @property
    def num_stops(self) -> int:
        """Stop tokens that the engine compares with."""
        return max(MAX_STOPS, len(stops_of(self._stops, self._source)))

    def begin_anew(self) -> None:
        """Forget all messages but that of the system."""
        self._messages = [{"role": "system", "content": self._args.system}] if self._args.system else []

    def check(self, messages: Sequence[str]) -> None:
        """Raise unless answers can have the form that is asked for, and the first of messages may be the next one.

        Raises:
            ServeError: the template refuses it, or the conversation would be too long.
        """
        config, sizes = self._source.config, {"max_tokens": self._max_tokens, "max_stops": self.num_stops}
        check_constraint(self._constraint, config, self._source.tokenizer)
        # Before a message is typed, one token stands for it: settings are checked all the same.
        check_request(self._make_request(messages[0]) if messages else self._request_of((0,)), config, **sizes)

    def begin(self, engine: Engine, message: str) -> Answer:
        """Submit a message, and return its answer.

        Raises:
            ServeError: as `check`.
        """
        request = self._make_request(message)
        text = AnswerText(self._source.tokenizer, request, self._stops)
        return Answer(engine=engine, sequence=engine.submit(request), message=message, text=text)

    def keep(self, answer: Answer) -> None:
        """Add a message and its answer to the conversation."""
        self._num_answers += 1
        self._messages += [*_turn(answer.message), {"role": "assistant", "content": answer.text.text}]

    def _make_request(self, message: str) -> Request:
        if not is_text(message):
            raise ServeError(f"{shown(message)} is not UTF-8 text.", fix="convert it, or check the locale.")
        text = self._template.render([*self._messages, *_turn(message)])
        # The template writes the special tokens itself.
        return self._request_of(self._source.tokenizer.encode(text))

    def _request_of(self, prompt: Sequence[int]) -> Request:
        room = self._max_tokens - len(prompt)
        if room < 1:
            raise ServeError(
                f"the conversation has {len(prompt)} tokens, which leaves no room for an answer in {self._max_tokens}.",
                fix="begin anew with /new, or give a larger --max-tokens, up to what the model reads.",
            )
        most = room if self._args.max_new_tokens is None else min(self._args.max_new_tokens, room)
        given: dict[str, Any] = {"source": self._source, "stops": self._stops, "index": self._num_answers}
        given["constraint"] = self._constraint
        return make_request(prompt, self._args, max_new_tokens=most, **given)


def _turn(message: str) -> list[Message]:
    return [{"role": "user", "content": message}]
