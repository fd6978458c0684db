"""Find the files of a folder that `data.paths` may name: one of prepared tokens, or one that `datasets` saved."""

from pathlib import Path

from ...meshes import DataError
from ...meshes.errors import shown
from .prepared import read_object, read_prepared


def find_folder_files(folder: Path) -> list[Path] | None:
    """Return the files of a folder by `trellax data prepare` or `Dataset.save_to_disk`, in their order.

    None if it is another folder.

    Raises:
        DataError: the folder has several splits, is not finished, or its list of files cannot be read.
    """
    prepared = read_prepared(folder)
    if prepared is not None:
        return [shard.tokens for shard in prepared.shards]
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
