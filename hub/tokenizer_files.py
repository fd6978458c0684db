"""Copy the files of a tokenizer from one model folder to another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..meshes import DataError
from .folder import copy_file, read_json
from .special_ids import ORIGIN
from .tokenizer import TOKENIZER, load_tokenizer

TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Names of the tokenizer files in a model folder, which are copied along with weights."""


def keep_tokenizer(path: str, folder: Path) -> None:
    """Copy the tokenizer of a run into the run folder, for serving and export.

    Args:
        path: the value of `data.tokenizer`; "bytes" copies nothing.
        folder: the run folder.

    Raises:
        DataError: there is no tokenizer, or it is broken.
    """
    if path != "bytes":
        file = load_tokenizer(path).file
        copy_tokenizer(file.parent, folder, besides=(TOKENIZER,))
        real = file.resolve()
        copy_file(real.parent, real.name, folder / TOKENIZER, error=DataError)


def copy_tokenizer(source: Path, target: Path, *, besides: Sequence[str] = ()) -> None:
    """Copy the files of a tokenizer from one folder to another, replacing those that are there.

    Args:
        besides: names of files that are not copied.

    Raises:
        DataError: a file is not a regular file, or a link out of its folder.
    """
    for name in TOKENIZER_FILES:
        if name not in besides:
            copy_file(source, name, target / name, error=DataError)
    if not (target / ORIGIN).exists():
        copy_file(source, ORIGIN, target / ORIGIN, error=DataError)


def read_origin(folder: Path) -> dict[str, Any]:
    """Return the keys of the config.json that the model of a run was imported with; empty if it was not imported.

    Raises:
        DataError: the file is broken.
    """
    values = read_json(folder, ORIGIN, error=DataError)
    return values if isinstance(values, dict) else {}
