"""Read a column of texts, or of chats, of a Parquet or Arrow file."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from ....meshes import DataError
from ....meshes.errors import printable
from ....meshes.files.regular_file import open_regular
from .damage import NAME_FIELD, no_field
from .extra import import_extra
from .json_lines import Place

Holds = Literal["text", "messages", "either"]
"""What a column holds."""

_ROWS = 1024
_TEXT, _LISTS = ("string", "large_string", "string_view"), ("list<", "large_list<")
_TYPES = {"text": _TEXT, "messages": _LISTS, "either": _TEXT + _LISTS}
_NAMES = {"text": "no text", "messages": "no list of messages", "either": "no text and no list of messages"}


def read_rows(
    file: Path, *, field: str, kind: Literal["parquet", "arrow"], holds: Holds
) -> Iterator[tuple[Place, Any]]:
    """Yield place and value of a column of a Parquet or Arrow file, `_ROWS` in memory at a time.

    Raises:
        DataError: it is another file, it has no such column, or pyarrow is missing.
    """
    number = 0
    with _explain_damage(file, kind):
        batches = _open_parquet(file, field, holds) if kind == "parquet" else _open_arrow(file, field, holds)
        for column in batches:
            for value in column.to_pylist():
                number += 1
                yield partial("{}: row {}".format, file, number), value


def column_names(file: Path, kind: Literal["parquet", "arrow"]) -> list[str]:
    """Return the names of the columns of a Parquet or Arrow file.

    Raises:
        DataError: it is another file, or pyarrow is missing.
    """
    parquet = import_extra("pyarrow.parquet", file)
    with _explain_damage(file, kind), open_regular(file, error=DataError) as stream:
        return (parquet.read_schema(stream) if kind == "parquet" else _open_reader(stream, file).schema).names


@contextmanager
def _explain_damage(file: Path, kind: str) -> Iterator[None]:
    pyarrow = import_extra("pyarrow", file)
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        why = printable(str(error).partition("\n")[0].rstrip("."), limit=200)
        raise DataError(f"{file}: this is no {kind} file: {why}.", fix="write it again.") from None


def _open_parquet(file: Path, field: str, holds: Holds) -> Iterator[Any]:
    parquet = import_extra("pyarrow.parquet", file)
    with open_regular(file, error=DataError) as stream, parquet.ParquetFile(stream) as table:
        _check_column(file, field, table.schema_arrow, holds)
        for batch in table.iter_batches(columns=[field], batch_size=_ROWS):
            yield batch.column(0)


def _open_arrow(file: Path, field: str, holds: Holds) -> Iterator[Any]:
    with open_regular(file, error=DataError) as stream:
        reader = _open_reader(stream, file)
        _check_column(file, field, reader.schema, holds)
        is_file = hasattr(reader, "num_record_batches")
        found = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
        for batch in found:
            yield batch.column(field)


def _open_reader(stream: IO[bytes], file: Path) -> Any:
    pyarrow = import_extra("pyarrow", file)
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    # `datasets` writes streams, which have no footer.
    return pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)


def _check_column(file: Path, field: str, schema: Any, holds: Holds) -> None:
    if field not in schema.names:
        raise no_field(str(file), field, schema.names)
    kind = str(schema.field(field).type)
    if not kind.startswith(_TYPES[holds]):
        raise DataError(f"{file}: the column {field} is {kind}, {_NAMES[holds]}.", fix=NAME_FIELD)
