"""Find what the assistant wrote in the text of a chat, so that answers alone are trained on.

A template says it itself by `{% generation %}`. Of any other, an answer is what its message adds to its prompt:

    messages[:1], with a prompt    <user>2 + 2?</user><assistant>
    messages[:2]                   <user>2 + 2?</user><assistant>4</assistant>
                                                                 ^-----------^   trained on

That holds for templates that only add to the text. One that writes an earlier message in another way once a later one
is there, as those of reasoning models do, is refused. Read `tokens.py` next.
"""

from collections.abc import Sequence
from typing import Any

from ...meshes import DataError, ServeError
from ...meshes.errors import shown
from .template import ChatTemplate, RenderedChat

_BEFORE = {
    "system": {None},
    "developer": {None},
    "user": {None, "system", "developer", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
"""The roles that a message may follow, None at the start."""


class DamagedChatError(DataError):
    """A conversation that cannot be trained on: no messages, roles out of order, or refused by its template."""


def render_answers(template: ChatTemplate, messages: Any) -> RenderedChat:
    """Return the text of a conversation, and the spans that the assistant wrote.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    ...     "{% if add_generation_prompt %}<assistant>{% endif %}")
    >>> render_answers(template, [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
    RenderedChat(text='<user>2 + 2?<assistant>4', spans=((23, 24),))

    Raises:
        DamagedChatError: these messages cannot be trained on.
        DataError: nor can any others: the template does not say what the assistant wrote.
    """
    chat = check_messages(messages)
    try:
        rendered = template.render_marked(chat) if template.marks_answers else _compare_prefixes(template, chat)
    except ServeError as error:
        raise DamagedChatError(error.problem, fix=error.fix) from None
    check_unicode(rendered.text)
    if not rendered.spans:
        raise DamagedChatError("the chat template marks nothing that the assistant wrote.", fix="leave the chat out.")
    return rendered


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation whose roles are in order, without the nulls of a table.

    Raises:
        DamagedChatError: they are no such messages, or none is the assistant's.
    """
    if not isinstance(messages, list) or not messages:
        raise DamagedChatError(f"{shown(messages, limit=40)} is no list of messages.", fix=_FIX)
    before, chat = None, []
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _BEFORE:
            raise DamagedChatError(
                f"message {number} has the role {shown(role, limit=40)}, not one of {', '.join(_BEFORE)}.", fix=_FIX
            )
        if before not in _BEFORE[role]:
            where = f"follows {before}" if before else "comes first"
            raise DamagedChatError(f"message {number}, of the role {role}, {where}: roles out of order.", fix=_FIX)
        # A call of a tool may come without a text.
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DamagedChatError(
                f"message {number} has the content {shown(message.get('content'), limit=40)}, no text.", fix=_FIX
            )
        # A table has a null for each field that another message has.
        chat.append({name: value for name, value in message.items() if value is not None or name == "content"})
        before = role
    if not any(message["role"] == "assistant" for message in chat):
        raise DamagedChatError("there is no message of the assistant.", fix="leave the chat out.")
    return chat


def check_unicode(text: str) -> None:
    """Raise unless a text can be written in UTF-8.

    Raises:
        DamagedChatError: it has half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DamagedChatError("it has half of a surrogate pair.", fix="write its letters in UTF-8.") from None


_FIX = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'


def _compare_prefixes(template: ChatTemplate, chat: Sequence[dict[str, Any]]) -> RenderedChat:
    text, spans = template.render(chat, ends="message"), []
    for index, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        prompt = template.render(chat[:index])
        whole = text if index + 1 == len(chat) else template.render(chat[: index + 1], ends="message")
        if not (whole.startswith(prompt) and text.startswith(whole)):
            raise DataError(
                f"the chat template writes message {index + 1} in another way once more of the conversation is there, "
                "so what the assistant wrote cannot be told from its text.",
                fix="mark the answers in the template by {% generation %} and {% endgeneration %}.",
            )
        spans.append((len(prompt), len(whole)))
    return RenderedChat(text=text, spans=tuple(span for span in spans if span[0] < span[1]))
