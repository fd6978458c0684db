"""Read the chats of files with records: the conversation in a field of each, as `{"role": ..., "content": ...}`.

A conversation that is damaged, or has roles out of order, is left out and counted as other damaged records are. Read
`../chats.py` next.
"""

from collections.abc import Iterator
from pathlib import Path

from ....hub.chat.answers import DamagedChatError, render_answers
from ....hub.chat.template import ChatTemplate, RenderedChat
from ....meshes import DataError
from .damage import Damage
from .json_lines import Span
from .records import read_values, record_kind


def read_chats(
    file: Path, *, field: str, template: ChatTemplate, damage: Damage, span: Span | None = None
) -> Iterator[RenderedChat]:
    """Yield the chat of each record of a file, rendered.

    Args:
        field: name of the field, or column, that holds the messages.
        damage: counts the records.
        span: a part of a file of plain lines; None is the whole file.

    Raises:
        DataError: the file cannot be read, has no records, or the template does not say what the assistant wrote.
    """
    if record_kind(file) is None:
        raise DataError(
            f"{file}: chats are records, and this is no file of them.", fix="write a chat on each line of a .jsonl."
        )
    for place, messages in read_values(file, field=field, damage=damage, span=span, holds="messages"):
        try:
            chat = render_answers(template, messages)
        except DamagedChatError as error:
            damage.add(place, error.problem)
            continue
        except DataError as error:
            raise DataError(f"{place()}: {error.problem}", fix=error.fix) from None
        damage.num_records += 1
        yield chat
