"""Read JSON lines, plain or in .gz or .zst, one record a line; a large plain file may be read in spans of bytes."""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from ....meshes import DataError
from ....meshes.errors import printable, shown
from ....meshes.files.regular_file import open_regular
from .damage import Damage, no_field
from .extra import import_extra
from .unzst import Unzst

Place = Callable[[], str]
"""Returns the file and the line of a record."""

_MAX_LINE = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Span:
    """The lines of a file that start at the bytes from `start` to before `stop`; not of a compressed file."""

    start: int
    stop: int


def read_json_lines(
    file: Path,
    *,
    field: str | Sequence[str],
    damage: Damage,
    span: Span | None = None,
    optional: Sequence[str] = (),
) -> Iterator[tuple[Place, Any]]:
    """Yield place and value of the field of every line of JSON that is not blank; damaged ones are counted.

    Of several fields the value is a list of theirs, None for `optional` ones that a record lacks.

    Raises:
        DataError: the compressed file is cut off, a line is endless, or the first record has no such field.
    """
    start = span.start if span else 0
    # Counted only for a line that is named: the lines before a span are those of other spans.
    before = cache(partial(_count_lines, file, start))
    is_first, names = start == 0, [field] if isinstance(field, str) else field
    with _open_lines(file) as stream:
        for number, line in enumerate(_split_lines(stream, file, span), 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue

            def place(number: int = number) -> str:
                return f"{file}:{before() + number}"

            record = _parse(text)
            if isinstance(record, str):
                damage.add(place, record)
                continue
            missing = next((name for name in names if name not in record and name not in optional), None)
            if is_first and missing:
                raise no_field(place(), missing, list(record))
            is_first = False
            if missing:
                damage.add(place, f"no field {missing}")
                continue
            yield place, record[field] if isinstance(field, str) else [record.get(name) for name in names]


def _parse(text: bytes) -> dict[str, Any] | str:
    """Return the record of a line, or what is wrong with it."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return printable(f"no JSON: {error}", limit=80)
    return record if isinstance(record, dict) else f"{shown(record, limit=40)} is no record"


def _count_lines(file: Path, stop: int) -> int:
    """Return the number of lines that start before the byte `stop` of a file, at which one starts or goes on."""
    if not stop:
        return 0
    count, left = 0, stop - 1
    with open_regular(file, error=DataError) as stream:
        while left and (chunk := stream.read(min(left, 1 << 24))):
            count, left = count + chunk.count(b"\n"), left - len(chunk)
    return count + 1


@contextmanager
def _open_lines(file: Path) -> Iterator[IO[bytes]]:
    """Open a file of lines, unpacked if it is .gz or .zst.

    Raises:
        DataError: it cannot be opened, or a package is missing.
    """
    try:
        stream = open_regular(file, error=DataError)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.", fix="check its permissions.") from None
    with stream:
        if file.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif file.suffix.lower() == ".zst":
            yield BufferedReader(Unzst(stream, import_extra("zstandard", file)), 1 << 20)
        else:
            yield stream


def _split_lines(stream: IO[bytes], file: Path, span: Span | None) -> Iterator[bytes]:
    if span and span.start:
        # A line that starts at `start` follows a line end at the byte before; any other line is of the span before.
        stream.seek(span.start - 1)
        while (rest := stream.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
            pass
    while span is None or stream.tell() < span.stop:
        try:
            line = stream.readline(_MAX_LINE + 1)
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise DataError(
                f"{file}: it cannot be unpacked to its end: {printable(str(error), limit=200)}.", fix="copy it again."
            ) from None
        if not line:
            return
        if len(line) > _MAX_LINE:
            raise DataError(f"{file}: a line has more than {_MAX_LINE:,} bytes.", fix="write a record on each line.")
        yield line
