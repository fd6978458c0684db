"""A file that a command was asked to write: refused before the work starts, and written once it is done."""

import sys
from pathlib import Path

from ..meshes.errors import ConfigError, printable

_FIX = "name a file in a folder that is there."


def check_files(*paths: str | None) -> None:
    """Raise if one of these files could not be written; None and "" are files that nobody asked for.

    Raises:
        ConfigError: it is a folder, or there is no folder to put it in.
    """
    for path in filter(None, paths):
        try:
            is_folder, has_folder = Path(path).is_dir(), Path(path).resolve().parent.is_dir()
        except (OSError, ValueError) as error:
            raise _refuse(path, error) from None
        if is_folder or not has_folder:
            why = "it is a folder" if is_folder else "there is no such folder"
            raise ConfigError(f"{path} cannot be written: {why}.", fix=_FIX)


def write_file(path: str, content: bytes) -> None:
    """Write the file, over an older one, and say so on stderr.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        Path(path).write_bytes(content)
    except (OSError, ValueError) as error:
        raise _refuse(path, error) from None
    print(f"wrote {printable(path, limit=400)}", file=sys.stderr)


def _refuse(path: str, error: Exception) -> ConfigError:
    why = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"{path} cannot be written: {why[:1].lower()}{why[1:]}.", fix=_FIX)
