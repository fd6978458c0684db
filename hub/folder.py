"""Read files of a model folder that other people made: only regular files, of a bounded size, inside the folder.

Through a link that leads out of the folder, its author could have trellax read any file of this machine, and copy it
into an output. Read `tensor_files.py` and `tokenizer.py` next.
"""

import json
from pathlib import Path
from typing import Any

from ..meshes import CheckpointError, TrellaxError, WeightsError
from ..meshes.files.own_file import replace_file
from ..meshes.files.regular_file import open_regular, read_bounded
from .cached_folder import find_model_folder

MAX_JSON_BYTES = 10 << 20
"""The largest config.json or similar file that is read; real ones have some thousand bytes."""

MAX_TOKENIZER_BYTES = 100 << 20
"""The largest tokenizer.json or similar file that is read; real ones have up to 30 MiB."""

_LFS = b"version https://git-lfs.github.com/spec/"


def find_file(folder: str | Path, name: str, *, error: type[TrellaxError] = WeightsError) -> Path | None:
    """Return the path of a regular file of a folder, None if there is no such file.

    A link may lead to a file of the folder, or from a snapshot of a Hugging Face cache to the cache's own blobs.

    Raises:
        TrellaxError: of the class `error`: it is not a regular file, a link to elsewhere, or a pointer of git lfs.
    """
    path = Path(folder) / name
    try:
        real, home = path.resolve(strict=True), Path(folder).resolve()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise error(f"{path} is a link to a file that is not there.", fix="copy the file itself.") from None
        return None
    except ValueError:  # no file has such a name
        return None
    except (OSError, RuntimeError):
        # Python 3.12 and older raise RuntimeError for links in a circle.
        raise error(
            f"{path} cannot be reached: its links lead in a circle, or nowhere.", fix="copy it again."
        ) from None
    if not (real.is_relative_to(home) or _is_blob_of(real, home)):
        raise error(
            f"{path} is a link to {real}, which is no file of this folder.",
            fix="put a copy of the file in its place, if it is yours.",
        )
    try:
        with open_regular(path, error=error) as file:
            start = file.read(len(_LFS))
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.", fix="check its permissions.") from None
    if start == _LFS:
        raise error(
            f"{path} is a pointer of git lfs, not the file itself.", fix="run `git lfs pull` in its folder, or copy it."
        )
    return path


def read_file(
    folder: str | Path, name: str, *, max_bytes: int, error: type[TrellaxError] = WeightsError
) -> bytes | None:
    """Return the bytes of a regular file of a folder, None if there is no such file.

    Raises:
        TrellaxError: of the class `error`: `find_file` refuses it, or it has more than `max_bytes`.
    """
    path = find_file(folder, name, error=error)
    return None if path is None else read_bounded(path, max_bytes=max_bytes, error=error)


def read_json(folder: str | Path, name: str, *, error: type[TrellaxError] = WeightsError) -> Any:
    """Return the contents of a JSON file of a folder, None if there is no such file.

    Raises:
        TrellaxError: of the class `error`: `find_file` refuses it, it is too large, or not JSON that Python reads.
    """
    path = Path(folder) / name
    content = read_file(folder, name, max_bytes=MAX_JSON_BYTES, error=error)
    if content is None:
        return None
    try:
        return json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as problem:
        raise error(f"{path}:{problem.lineno}: this is no JSON: {problem.msg}.", fix="copy it again.") from None
    except UnicodeDecodeError:
        raise error(f"{path} cannot be read: it is no UTF-8 text.", fix="copy it again.") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read: {problem}.", fix="copy it again.") from None


def copy_file(folder: str | Path, name: str, target: Path, *, error: type[TrellaxError] = WeightsError) -> None:
    """Copy a file of a folder to `target`, in place of a file or link there; do nothing if the folder has no such file.

    Raises:
        TrellaxError: of the class `error`: `read_file` refuses it.
        OSError: the target cannot be written.
    """
    content = read_file(folder, name, max_bytes=MAX_TOKENIZER_BYTES, error=error)
    if content is None or (target.exists() and target.samefile(Path(folder) / name)):
        return
    replace_file(target, content)


def check_model_folder(path: str | Path) -> None:
    """Raise unless a path is a folder, or the name of a downloaded model; imports no jax.

    Raises:
        CheckpointError: it is neither.
    """
    if not find_model_folder(path).is_dir():
        raise CheckpointError(
            f"{path} is no folder, so there is no model in it.",
            fix="name the folder of a run, runs/quickstart say, or of a Hugging Face model, or org/name of its cache.",
        )


def _is_blob_of(file: Path, folder: Path) -> bool:
    """Return whether a folder is models--org--name/snapshots/revision, and a file is in models--org--name/blobs."""
    cache = folder.parent.parent
    is_snapshot = folder.parent.name == "snapshots" and cache.name.startswith("models--")
    return is_snapshot and file.parent == cache / "blobs"
