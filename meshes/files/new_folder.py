"""A folder that appears under its name when all of it is written, and never over another."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import WeightsError
from .own_file import free_name


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a folder to write to, which is given its name at the end; nothing is left of it if that is not reached.

    Raises:
        WeightsError: the folder is there and holds anything, or it cannot be written.
    """
    folder = Path(folder)
    refuse_existing(folder)
    try:
        part = _make_part(folder.absolute())
        try:
            yield part
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WeightsError(f"{folder} cannot be written: {reason}.", fix="make room, or name another.") from None


def _make_part(folder: Path) -> Path:
    """Make a folder that no other process writes to: in containers many have one id, and some are killed."""
    part = free_name(folder.with_name(f"{folder.name}.part-{socket.gethostname()}-{os.getpid()}"))
    part.mkdir(parents=True)
    return part


def refuse_existing(folder: str | Path) -> None:
    """Raise if a folder is there and holds anything.

    Raises:
        WeightsError: it does.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WeightsError(f"{folder} is already there, and nothing is written over it.", fix="name another.")
