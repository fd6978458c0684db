"""Read the documents of text files and of files with records, one after another.

Read `corpus.py` for a corpus in memory.
"""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...meshes import DataError
from ...meshes.files.regular_file import read_bounded
from .corpus_files import check_text_file
from .records.damage import Damage
from .records.records import read_records, record_kind

MOST_TEXT_BYTES = 1 << 31
"""Largest text that is read whole."""


def read_texts(files: Sequence[Path], *, field: str, damage: Damage) -> Iterator[tuple[str, bytes]]:
    """Yield file and text of each document: a text file is one, and so is each record of the others.

    Args:
        field: name of the field of a record that holds its text.
        damage: counts the records.

    Raises:
        DataError: a file cannot be read, or is of another kind.
    """
    for file in files:
        if record_kind(file):
            for text in read_records(file, field=field, damage=damage):
                yield str(file), text
        else:
            yield str(file), _read_text(file)


def check_total(total: int, files: Sequence[Path], *, largest: Path) -> None:
    """Raise if files have more than `MOST_TEXT_BYTES` bytes of text, which are read into memory.

    Raises:
        DataError: they have.
    """
    if total > MOST_TEXT_BYTES:
        raise DataError(
            f"data.paths: {len(files)} file{'s' * (len(files) > 1)} of {total:,} bytes, the largest {largest}; "
            f"text is read whole, at most {MOST_TEXT_BYTES:,} bytes.",
            fix="tokenize them once by `trellax data prepare`: its shards stay on disk.",
        )


def _read_text(file: Path) -> bytes:
    try:
        check_text_file(file)
        content = read_bounded(file, max_bytes=MOST_TEXT_BYTES, error=DataError)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.", fix="check its permissions.") from None
    # Editors on Windows put a byte order mark before the text; it is not part of it.
    return content.removeprefix(codecs.BOM_UTF8)
