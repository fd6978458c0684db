"""Read the index of a folder of tokens that `trellax data prepare` wrote.

    index.json            format, tokenizer, counts, and for each shard its files, tokens, documents and SHA-256
    tokens-00000.npy      token ids, uint8, uint16 or uint32
    tokens-00000.mask.npy uint8: 1 where a token counts as a target; of chats alone
    documents-00000.npy   int64: place in the shard of the last token of each document
    tokenizer.json        unless tokens are bytes

`../../train/data/shards/` writes it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...meshes import DataError
from ...meshes.errors import shown
from ...meshes.files.regular_file import read_bounded

INDEX, JOB = "index.json", "job.json"
"""Names of the index, and of the file that says what an unfinished folder will hold."""

FORMAT = "trellax tokens 1"

_MAX_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of tokens, the one that says where its documents end, and that of its mask, None if all tokens count."""

    tokens: Path
    documents: Path
    num_tokens: int
    sha256: str
    mask: Path | None = None
    mask_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class PreparedTokens:
    """The shards of a folder in their order; `end_id` ends every document, None if no token does."""

    folder: Path
    shards: tuple[Shard, ...]
    end_id: int | None
    tokenizer: str


def is_prepared(path: str | Path) -> bool:
    """Return whether a path is a folder that `trellax data prepare` wrote or began to write."""
    return any((Path(path) / name).is_file() for name in (INDEX, JOB))


def read_prepared(folder: Path) -> PreparedTokens | None:
    """Return the index of a folder, None if it is another folder.

    Raises:
        DataError: the folder is not finished, or its index is broken.
    """
    values = read_object(folder / INDEX)
    if values is None:
        if not is_prepared(folder):
            return None
        raise DataError(
            f"data.paths: {shown(str(folder))} is not finished.",
            fix="give its `trellax data prepare` again: it goes on where it stopped.",
        )
    if values.get("format") != FORMAT:
        return None
    try:
        shards = tuple(_read_shard(folder, shard) for shard in values["shards"])
        end_id, tokenizer = values["end_id"], str(values["tokenizer"])
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{folder / INDEX} is broken.", fix="prepare the folder again.") from None
    if not isinstance(end_id, int | None):
        raise DataError(f"{folder / INDEX}: end_id is {shown(end_id)}.", fix="prepare the folder again.")
    return PreparedTokens(folder=folder, shards=shards, end_id=end_id, tokenizer=tokenizer)


def _read_shard(folder: Path, values: dict[str, Any]) -> Shard:
    # Names alone: an index may come from another person, and its files are of this folder.
    return Shard(
        tokens=folder / Path(values["tokens"]).name,
        documents=folder / Path(values["documents"]).name,
        num_tokens=int(values["num_tokens"]),
        sha256=str(values["sha256"]),
        mask=folder / Path(values["mask"]).name if "mask" in values else None,
        mask_sha256=str(values.get("mask_sha256", "")),
    )


def read_object(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None if there is no such file.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    if not file.is_file():
        return None
    try:
        found = json.loads(read_bounded(file, max_bytes=_MAX_BYTES, error=DataError))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is no JSON.", fix="write the folder again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{file} holds no JSON object.", fix="write the folder again.")
    return found
