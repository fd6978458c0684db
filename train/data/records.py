"""Read the texts of records: JSON lines, plain or in .gz or .zst, and Parquet and Arrow files; a record is a document.

A damaged line is left out, counted, and named by file and line; more than a small share of them is an error. Read
`texts.py` next.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Literal

from ...meshes import DataError
from ...meshes.errors import printable, shown, suggest
from ...meshes.files.regular_file import open_regular
from .unzst import Unzst

Kind = Literal["lines", "parquet", "arrow"]

MOST_DAMAGED = 1e-3
"""Share of damaged records from which a corpus is refused."""

_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".jl": "lines",
    ".ndjson": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSED = (".gz", ".zst")
_MAX_LINE = 1 << 28
_SHOWN = 5
_ROWS = 1024


class Damage:
    """Count the records that were read, and those that could not be, with the places of the first of them."""

    def __init__(self) -> None:
        self.num_records, self.num_damaged = 0, 0
        self.places: list[str] = []

    def add(self, place: str, why: str) -> None:
        """Count a record that cannot be read."""
        self.num_records += 1
        self.num_damaged += 1
        if len(self.places) < _SHOWN:
            self.places.append(f"{place}: {why}")

    def check(self, *, most: float = MOST_DAMAGED) -> None:
        """Raise if more than a share `most` of the records is damaged.

        Raises:
            DataError: it is; the first places are named.
        """
        if self.num_damaged <= most * self.num_records:
            return
        more = self.num_damaged - len(self.places)
        lines = "".join(f"\n  {place}" for place in self.places) + (f"\n  and {more:,} more" if more else "")
        raise DataError(
            f"{self.num_damaged:,} of {self.num_records:,} records are damaged, more than {most:.1%}:{lines}",
            fix="repair these lines, or leave them out.",
        )

    def __str__(self) -> str:
        """Return a note on the damaged records, "" if there are none."""
        if not self.num_damaged:
            return ""
        return f"{self.num_damaged:,} of {self.num_records:,} records damaged and left out ({'; '.join(self.places)})"


def record_kind(file: Path) -> Kind | None:
    """Return which kind of records a file holds, by its name; None if it is a text."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    kind = _KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None and len(suffixes) > 1 and suffixes[-1] in _COMPRESSED and _KINDS.get(suffixes[-2]) == "lines":
        return "lines"
    return kind


def read_records(file: Path, *, field: str, damage: Damage) -> Iterator[tuple[str, bytes]]:
    """Yield the place and the text, in UTF-8, of each record of a file.

    Args:
        field: name of the field, or column, that holds the text.
        damage: counts the records.

    Raises:
        DataError: the file cannot be read, a package is missing, or the first record has no such field.
    """
    kind = record_kind(file)
    values = _read_rows(file, field) if kind in ("parquet", "arrow") else _read_lines(file, field, damage)
    for place, value in values:
        if not isinstance(value, str):
            damage.add(place, f"{field} is {shown(value, limit=40)}, no text")
            continue
        try:
            text = value.encode()
        except UnicodeEncodeError:
            damage.add(place, f"{field} has half of a surrogate pair")
            continue
        damage.num_records += 1
        yield place, text


def _read_lines(file: Path, field: str, damage: Damage) -> Iterator[tuple[str, Any]]:
    with open_lines(file) as stream:
        yield from read_json_lines(stream, file=file, field=field, damage=damage)


def read_json_lines(stream: IO[bytes], *, file: Path, field: str, damage: Damage) -> Iterator[tuple[str, Any]]:
    """Yield place and value of the field of every line of JSON that is not blank; damaged ones are counted.

    Raises:
        DataError: the compressed file is cut off, a line is endless, or the first record has no such field.
    """
    is_first = True
    for number, line in enumerate(_split_lines(stream, file), 1):
        place, text = f"{file}:{number}", line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            damage.add(place, printable(f"no JSON: {error}", limit=80))
            continue
        if not isinstance(record, dict):
            damage.add(place, f"{shown(record, limit=40)} is no record")
            continue
        if is_first and field not in record:
            raise _no_field(place, field, list(record))
        is_first = False
        if field not in record:
            damage.add(place, f"no field {field}")
            continue
        yield place, record[field]


@contextmanager
def open_lines(file: Path) -> Iterator[IO[bytes]]:
    """Open a file of lines, unpacked if it is .gz or .zst.

    Raises:
        DataError: it cannot be opened, or a package is missing.
    """
    try:
        stream = open_regular(file, error=DataError)
    except OSError as error:
        raise _unreadable(file, error) from None
    with stream:
        if file.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif file.suffix.lower() == ".zst":
            yield BufferedReader(Unzst(stream, _import_extra("zstandard", file)), 1 << 20)
        else:
            yield stream


def _split_lines(stream: IO[bytes], file: Path) -> Iterator[bytes]:
    while True:
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


def _read_rows(file: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Yield place and value of a column of a Parquet or Arrow file, `_ROWS` in memory at a time."""
    pyarrow = _import_extra("pyarrow", file)
    number = 0
    try:
        batches = _open_parquet(file, field) if record_kind(file) == "parquet" else _open_arrow(file, field)
        for column in batches:
            for value in column.to_pylist():
                number += 1
                yield f"{file}: row {number}", value
    except (pyarrow.ArrowException, OSError) as error:
        why = printable(str(error).partition("\n")[0].rstrip("."), limit=200)
        raise DataError(f"{file}: this is no {record_kind(file)} file: {why}.", fix="write it again.") from None


def _open_parquet(file: Path, field: str) -> Iterator[Any]:
    parquet = _import_extra("pyarrow.parquet", file)
    with open_regular(file, error=DataError) as stream, parquet.ParquetFile(stream) as table:
        _check_column(file, field, table.schema_arrow)
        for batch in table.iter_batches(columns=[field], batch_size=_ROWS):
            yield batch.column(0)


def _open_arrow(file: Path, field: str) -> Iterator[Any]:
    pyarrow = _import_extra("pyarrow", file)
    with open_regular(file, error=DataError) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        # `datasets` writes streams, which have no footer.
        reader = pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)
        _check_column(file, field, reader.schema)
        found = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
        for batch in found:
            yield batch.column(field)


def _check_column(file: Path, field: str, schema: Any) -> None:
    if field not in schema.names:
        raise _no_field(str(file), field, schema.names)
    kind = str(schema.field(field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(f"{file}: the column {field} is {kind}, no text.", fix="set data.text_field to the text's.")


def _no_field(place: str, field: str, known: list[str]) -> DataError:
    names = ", ".join(shown(name, limit=40) for name in known[:20]) or "none"
    near = suggest(field, known)
    return DataError(
        f"{place}: there is no field {field!r}; the fields are {names}.{near}", fix="set data.text_field to the text's."
    )


def _import_extra(name: str, file: Path) -> Any:
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(
            f"{file}: reading it needs the package {package}.", fix="pip install 'trellax[data]'."
        ) from None


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(f"{file}: cannot be read: {error.strerror}.", fix="check its permissions.")
