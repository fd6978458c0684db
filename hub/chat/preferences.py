"""Tokenize two answers to the messages of a chat, one of which is preferred, as TRL does.

    prompt           <user>2 + 2?</user><assistant>
    with an answer   <user>2 + 2?</user><assistant>4</assistant>
                                                   ^-----------^   the answer

Both texts are tokenized whole. The answer begins where their tokens part, which is before the end of the prompt where a
template begins an answer in another way, or a token lies across its start; at the same token for both answers.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from ...meshes import DataError, ServeError
from ..tokenizer import ModelTokenizer
from .answers import DamagedChatError, check_messages, check_unicode
from .template import ChatTemplate, RenderedChat
from .tokens import encode_chats

Message = dict[str, Any]


def encode_answers(
    template: ChatTemplate, tokenizer: ModelTokenizer, *, prompt: Sequence[Message], answers: Sequence[Message]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of the prompt and of the answer, for each answer; those of the prompt are the same.

    Raises:
        DamagedChatError: these messages cannot be trained on.
        DataError: nor can any others: the template writes the prompt in another way before an answer.
    """
    try:
        texts = list(_render(template, prompt, answers))
    except ServeError as error:
        raise DamagedChatError(error.problem, fix=error.fix) from None
    chats = encode_chats([RenderedChat(text=text, spans=()) for text in texts], tokenizer)
    before, *whole = (chat.ids.tolist() for chat in chats)
    start = min(_common_length(before, own) for own in whole)
    for own in whole:
        yield own[:start], own[start:]


def _render(template: ChatTemplate, prompt: Sequence[Message], answers: Sequence[Message]) -> Iterator[str]:
    """Yield the text of the prompt, and those of the prompt with each answer."""
    chats = [check_messages([*prompt, answer]) for answer in answers]
    before = chats[0][:-1]
    yield template.render(before)
    start = template.render(before, ends="message")
    for chat in chats:
        check_unicode(text := template.render(chat, ends="message"))
        if not text.startswith(start):
            raise DataError(
                "the chat template writes the messages before an answer in another way once the answer is there, so "
                "its tokens cannot be told from those of the prompt.",
                fix="take a chat template that only adds to the text.",
            )
        yield text


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
