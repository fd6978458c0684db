"""Read a column of texts, or of chats, of a Parquet or Arrow file."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ....meshes import DataError
from ....meshes.errors import printable
from ....meshes.files.regular_file import open_regular
from .damage import no_field
from .extra import import_extra
from .json_lines import Place

Holds = Literal["text", "messages"]
"""What a column holds."""

_ROWS = 1024
_TYPES = {"text": ("string", "large_string", "string_view"), "messages": ("list<", "large_list<")}
_NAMES = {"text": "no text", "messages": "no list of messages"}


def read_rows(
    file: Path, *, field: str, kind: Literal["parquet", "arrow"], holds: Holds
) -> Iterator[tuple[Place, Any]]:
    """Yield place and value of a column of a Parquet or Arrow file, `_ROWS` in memory at a time.

    Raises:
        DataError: it is another file, it has no such column, or pyarrow is missing.
    """
    pyarrow = import_extra("pyarrow", file)
    number = 0
    try:
        batches = _open_parquet(file, field, holds) if kind == "parquet" else _open_arrow(file, field, holds)
        for column in batches:
            for value in column.to_pylist():
                number += 1
                yield partial("{}: row {}".format, file, number), value
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
    pyarrow = import_extra("pyarrow", file)
    with open_regular(file, error=DataError) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        # `datasets` writes streams, which have no footer.
        reader = pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)
        _check_column(file, field, reader.schema, holds)
        found = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
        for batch in found:
            yield batch.column(field)


def _check_column(file: Path, field: str, schema: Any, holds: Holds) -> None:
    if field not in schema.names:
        raise no_field(str(file), field, schema.names)
    kind = str(schema.field(field).type)
    if not kind.startswith(_TYPES[holds]):
        raise DataError(
            f"{file}: the column {field} is {kind}, {_NAMES[holds]}.", fix="set data.text_field to the right one."
        )
