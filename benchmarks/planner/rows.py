"""Read published measurements from TOML files: rows of inputs, outputs and provenance.

The schema is in the README beside the files. A table with `columns` and `data` becomes one row per line. Read
`training_case.py` next.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trellax.meshes.errors import DataError

_ZERO_BUBBLE = re.compile("zb|zero.bubble", re.IGNORECASE)
_TABLE_DEFAULTS = {"cp": 1, "mlp": "gelu", "recompute": "full", "vocab": 50304, "precision": "fp16 mixed"}


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One measurement: `inputs` and `outputs` by name, and the names of inputs that its source does not state.

    `has_sequence_parallel` is whether any row of the source uses sequence parallelism, which dates the measured code;
    `notes` are those of the source.
    """

    source: str
    id: str
    kind: str
    value_kind: str
    provenance: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    derived: Mapping[str, Any]
    unstated: tuple[str, ...]
    has_sequence_parallel: bool
    notes: str = ""


def read_published(folder: str | Path) -> dict[str, list[PublishedRow]]:
    """Read the rows of every TOML file of a folder, by the id of their source.

    A table of columns within a file is a source of its own, named `id/table`.

    Raises:
        DataError: the folder is missing, or a file is not TOML of schema 1.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{path} is no folder.", fix="name the folder that holds the TOML files of measurements.")
    found: dict[str, list[PublishedRow]] = {}
    for file in sorted(path.glob("*.toml")):
        for row in _read_file(file):
            found.setdefault(row.source, []).append(row)
    return found


def _read_file(file: Path) -> Iterator[PublishedRow]:
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}.", fix="mend it, or move it out of the folder.") from error
    if content.get("schema") != 1:
        raise DataError(f"{file} has schema {content.get('schema')!r}; 1 is read.", fix="set schema = 1.")
    source = content.get("source", {}).get("id", file.stem)
    rows = content.get("row", [])
    inputs = [row.get("in", {}) for row in rows]
    # Zero-bubble schedules came after sequence parallelism.
    is_dated = any(one.get("seq_parallel") or _ZERO_BUBBLE.search(str(one.get("schedule"))) for one in inputs)
    notes = content.get("source", {}).get("notes", {})
    about = " ".join(map(str, notes.values()))
    for place, row in enumerate(rows):
        made = _make_row(row, source=source, name=str(row.get("id", f"row {place}")))
        yield replace(made, has_sequence_parallel=is_dated, notes=about)
    for name, table in content.items():
        if isinstance(table, dict) and {"columns", "data"} <= table.keys():
            yield from _read_table(table, source=f"{source}/{name}")


def _make_row(row: Mapping[str, Any], *, source: str, name: str) -> PublishedRow:
    return PublishedRow(
        source=source,
        id=name,
        kind=row.get("kind", "train"),
        value_kind=row.get("value_kind", "measured"),
        provenance=row.get("provenance", ""),
        inputs=row.get("in", {}),
        outputs=row.get("out", {}),
        derived=row.get("derived", {}),
        unstated=tuple(row.get("unstated", ())),
        has_sequence_parallel=False,
    )


def _read_table(table: Mapping[str, Any], *, source: str) -> Iterator[PublishedRow]:
    """Yield the rows of a table of columns, with the inputs that it states once for all lines."""
    node = 8 if "node of 8" in str(table.get("gpu", "")) else None
    for number, line in enumerate(table["data"]):
        values = dict(zip(table["columns"], line, strict=True))
        outputs = {"step_time_s": values.pop("step_time_ms") / 1e3} if "step_time_ms" in values else {}
        inputs = {**_TABLE_DEFAULTS, "gpu": table.get("gpu", ""), **values}
        inputs |= {"gpus_per_node": node} if node else {}
        inputs |= {"ffn": 4 * values["hidden"], "kv_heads": values["heads"]} if "hidden" in values else {}
        inputs |= {"schedule": "1f1b" if values.get("pp", 1) > 1 else "none (pp=1)"}
        name = "-".join(f"{key}{values[key]}" for key in values if key not in ("seq", "heads"))
        row = {"in": inputs, "out": outputs} | {key: table[key] for key in ("value_kind", "provenance") if key in table}
        yield _make_row(row, source=source, name=f"{number}-{name}")
