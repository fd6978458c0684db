"""Create a folder with all its files, or nothing: it gets its name when everything in it is written."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import WeightsError
from .own_file import name_part


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a folder to write to, which is renamed to `folder` when the context ends, and removed if that raises.

    Raises:
        WeightsError: `folder` exists and is not empty, or it cannot be written.
    """
    folder = Path(folder)
    refuse_existing(folder)
    try:
        part = name_part(folder.absolute())
        part.mkdir(parents=True)
        try:
            yield part
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WeightsError(f"{folder} cannot be written: {reason}.", fix="make room, or name another.") from None


def refuse_existing(folder: str | Path) -> None:
    """Check that a path is free: nothing is there, or an empty folder.

    Raises:
        WeightsError: it is not.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WeightsError(f"{folder} is already there, and nothing is written over it.", fix="name another.")
