"""Find the files of a folder that `data.paths` may name: one that the library `datasets` saved."""

import json
from pathlib import Path
from typing import Any

from ..meshes import DataError
from ..meshes.errors import shown
from ..meshes.files.regular_file import read_bounded

_MAX_BYTES = 100 << 20


def find_folder_files(folder: Path) -> list[Path] | None:
    """Return the files of a folder by `Dataset.save_to_disk`, in their order; None if it is another folder.

    Raises:
        DataError: the folder has several splits, or its list of files cannot be read.
    """
    splits = read_object(folder / "dataset_dict.json")
    if splits is not None:
        names = splits.get("splits")
        names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        raise DataError(
            f"data.paths: {shown(str(folder))} has the splits {', '.join(map(shown, names))}.",
            fix=f"name one of them: {folder}/{names[0] if names else 'train'}.",
        )
    state = read_object(folder / "state.json")
    if state is None or "_data_files" not in state:
        return None
    if state.get("_indices_files"):
        raise DataError(
            f"data.paths: {shown(str(folder))} is a selection of rows, kept as indices.",
            fix="call flatten_indices() and save it again.",
        )
    try:
        return [folder / Path(part["filename"]).name for part in state["_data_files"]]
    except (TypeError, KeyError):
        raise DataError(f"{folder}/state.json does not list its files.", fix="save the dataset again.") from None


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
