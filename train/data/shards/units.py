"""Cut the files of a corpus into units of work, each of which becomes one shard; their order is that of the texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..records.damage import Damage
from ..records.json_lines import Span
from ..records.records import is_plain_lines, read_records, record_kind
from ..texts import read_texts

if TYPE_CHECKING:
    from ....hub.chat.template import ChatTemplate, RenderedChat


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Files, or a span of one file, whose texts become one shard; `num_bytes` of them are on the disk."""

    files: tuple[Path, ...]
    span: Span | None
    num_bytes: int

    def read(self, *, field: str, damage: Damage) -> Iterator[tuple[str, bytes]]:
        """Yield file and text of each document.

        Raises:
            DataError: a file cannot be read.
        """
        if self.span is None:
            yield from read_texts(self.files, field=field, damage=damage)
            return
        (file,) = self.files
        for text in read_records(file, field=field, damage=damage, span=self.span):
            yield str(file), text

    def read_chats(self, *, field: str, template: "ChatTemplate", damage: Damage) -> Iterator["RenderedChat"]:
        """Yield the chats of the records.

        Raises:
            DataError: a file cannot be read, or holds no records.
        """
        # Not at the top: jinja2 is of an extra.
        from ..records.chats import read_chats

        for file in self.files:
            yield from read_chats(file, field=field, template=template, damage=damage, span=self.span)


def cut_units(files: Sequence[Path], *, unit_bytes: int) -> list[Unit]:
    """Return the units of files: spans of plain lines, groups of text files, and all other files one by one.

    >>> [unit.span for unit in cut_units([Path("2000-bytes.jsonl")], unit_bytes=1500)]
    [Span(start=0, stop=1500), Span(start=1500, stop=2000)]

    Raises:
        OSError: a file cannot be read.
    """
    units: list[Unit] = []
    texts: list[tuple[Path, int]] = []
    for file in files:
        size = file.stat().st_size
        if record_kind(file) is None:
            texts.append((file, size))
            if sum(own for _, own in texts) < unit_bytes:
                continue
        units += _group(texts)
        texts = []
        if is_plain_lines(file):
            starts = range(0, size, unit_bytes)
            spans = [Span(start=start, stop=min(start + unit_bytes, size)) for start in starts]
            units += [Unit(files=(file,), span=own, num_bytes=own.stop - own.start) for own in spans]
        elif record_kind(file):
            units.append(Unit(files=(file,), span=None, num_bytes=size))
    return units + _group(texts)


def _group(texts: list[tuple[Path, int]]) -> list[Unit]:
    if not texts:
        return []
    return [Unit(files=tuple(file for file, _ in texts), span=None, num_bytes=sum(size for _, size in texts))]
