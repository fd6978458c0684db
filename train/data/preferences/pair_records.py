"""Read records of prompt, chosen and rejected: texts, or messages of a chat.

    {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
    {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}
    {"prompt": [user], "chosen": [user, assistant], "rejected": [user, assistant]}
    {"chosen": [user, assistant], "rejected": [user, assistant]}

Each answer of a chat is one message, the last one; before it both have the same messages, or the prompt has them.
Beside messages the prompt may also be a text, of the user. Read `pairs.py` next.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ....hub.chat.answers import DamagedChatError
from ....meshes import DataError
from ..records.damage import Damage
from ..records.json_lines import Place, read_json_lines
from ..records.records import record_kind
from ..records.tables import column_names, read_rows

FIELDS = ("prompt", "chosen", "rejected")
"""Fields of a record, all text or all messages; of messages the prompt may be left out."""


class TextPair(NamedTuple):
    """A prompt and two answers, all of them text."""

    prompt: str
    chosen: str
    rejected: str


class ChatPair(NamedTuple):
    """The messages of a prompt, and two answers of one message each."""

    prompt: list[Any]
    chosen: Any
    rejected: Any


def read_pairs(file: Path, damage: Damage) -> Iterator[tuple[Place, TextPair | ChatPair]]:
    """Yield place and content of every record that is no damaged one; those are counted.

    Raises:
        DataError: this is no file of records, it cannot be read, or its first record lacks a field.
    """
    for place, values in _read_values(file, damage):
        pair = _make_pair(*values)
        if isinstance(pair, str):
            damage.add(place, pair)
        else:
            yield place, pair


def _make_pair(prompt: Any, chosen: Any, rejected: Any) -> TextPair | ChatPair | str:
    """Return the pair of a record, or what is wrong with it."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        try:
            return _split_chats(prompt, chosen, rejected)
        except DamagedChatError as error:
            return error.problem
    values = prompt, chosen, rejected
    if prompt is None:
        return "no prompt, which answers that are text need"
    if wrong := [name for name, value in zip(FIELDS, values, strict=True) if not isinstance(value, str)]:
        return f"{' and '.join(wrong)}: no text"
    return TextPair(*values) if chosen and rejected else "an answer is empty"


def _split_chats(prompt: Any, chosen: list[Any], rejected: list[Any]) -> ChatPair:
    if not chosen or not rejected:
        raise DamagedChatError("an answer is empty", fix=_FIX)
    before = [own[:-1] for own in (chosen, rejected)]
    if before[0] != before[1]:
        raise DamagedChatError("chosen and rejected differ in more than their last message", fix=_FIX)
    shared, ends = before[0], (chosen[-1], rejected[-1])
    if isinstance(prompt, str) and not shared:
        shared = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list):
        if shared and shared != prompt:
            raise DamagedChatError("the messages before the answers are not those of prompt", fix=_FIX)
        shared = prompt
    elif isinstance(prompt, str) and not any(_content_of(message) == prompt for message in shared):
        raise DamagedChatError("prompt is none of the messages before the answers", fix=_FIX)
    elif prompt is not None and not isinstance(prompt, str):
        raise DamagedChatError("prompt: no text and no list of messages", fix=_FIX)
    if any(not isinstance(end, dict) or end.get("role") != "assistant" for end in ends):
        raise DamagedChatError("the last message of chosen or rejected is not the assistant's", fix=_FIX)
    return ChatPair(shared, *ends)


def _content_of(message: Any) -> Any:
    return message.get("content") if isinstance(message, dict) else None


_FIX = 'write {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}.'


def _read_values(file: Path, damage: Damage) -> Iterator[tuple[Place, Sequence[Any]]]:
    kind = record_kind(file)
    if kind is None:
        raise DataError(
            f"{file}: data.source='pairs' reads records, and this is no file of them by its name.",
            fix="name .jsonl, .parquet or .arrow files with the fields prompt, chosen and rejected.",
        )
    if kind == "lines":
        yield from read_json_lines(file, field=FIELDS, optional=FIELDS[:1], damage=damage)
        return
    given = column_names(file, kind)
    fields = [name for name in FIELDS if name in given or name != FIELDS[0]]
    for columns in zip(*(read_rows(file, field=name, kind=kind, holds="either") for name in fields), strict=True):
        values = dict(zip(fields, (value for _, value in columns), strict=True))
        yield columns[0][0], [values.get(name) for name in FIELDS]
