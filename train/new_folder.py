"""A folder that appears under its name when all of it is written, and never over another."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..meshes import WeightsError


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a folder to write to, which is given its name at the end; nothing is left of it if that is not reached.

    Raises:
        WeightsError: the folder is there and holds anything, or it cannot be written.
    """
    folder = Path(folder)
    refuse_existing(folder)
    part = folder.absolute().with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WeightsError(f"{folder} cannot be written: {reason}.", fix="make room, or name another.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_existing(folder: str | Path) -> None:
    """Raise if a folder is there and holds anything.

    Raises:
        WeightsError: it does.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WeightsError(f"{folder} is already there, and nothing is written over it.", fix="name another.")
