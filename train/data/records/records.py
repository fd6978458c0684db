"""Read the texts of records: JSON lines, plain or in .gz or .zst, and Parquet and Arrow files; a record is a document.

A damaged record is left out, counted, and named by file and line; more than a small share of them is an error. Read
`../texts.py` next.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ....meshes.errors import shown
from .damage import Damage
from .json_lines import Place, Span, read_json_lines
from .tables import Holds, read_rows

Kind = Literal["lines", "parquet", "arrow"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".jl": "lines",
    ".ndjson": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSED = (".gz", ".zst")


def record_kind(file: Path) -> Kind | None:
    """Return which kind of records a file holds, by its name; None if it is a text."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] in _COMPRESSED and _KINDS.get(suffixes[0]) == "lines":
        return "lines"
    return _KINDS.get(suffixes[-1]) if suffixes else None


def is_plain_lines(file: Path) -> bool:
    """Return whether a file holds lines of records and is not compressed, so that it may be read in spans."""
    return record_kind(file) == "lines" and file.suffix.lower() not in _COMPRESSED


def read_records(file: Path, *, field: str, damage: Damage, span: Span | None = None) -> Iterator[bytes]:
    """Yield the text, in UTF-8, of each record of a file.

    Args:
        field: name of the field, or column, that holds the text.
        damage: counts the records.
        span: a part of a file of plain lines; None is the whole file.

    Raises:
        DataError: the file cannot be read, a package is missing, or the first record has no such field.
    """
    for place, value in read_values(file, field=field, damage=damage, span=span, holds="text"):
        if not isinstance(value, str):
            damage.add(place, f"{field} is {shown(value, limit=40)}, no text")
            continue
        try:
            text = value.encode()
        except UnicodeEncodeError:
            damage.add(place, f"{field} has half of a surrogate pair")
            continue
        damage.num_records += 1
        yield text


def read_values(
    file: Path, *, field: str, damage: Damage, span: Span | None, holds: Holds
) -> Iterator[tuple[Place, Any]]:
    """Yield place and value of a field of each record; lines that are no records are counted.

    Args:
        holds: what the field should hold; a column of another type is refused.

    Raises:
        DataError: as `read_records`.
    """
    kind = record_kind(file)
    if kind == "lines" or kind is None:
        return read_json_lines(file, field=field, damage=damage, span=span)
    return read_rows(file, field=field, kind=kind, holds=holds)
