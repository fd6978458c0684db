"""Check the output files of a command before its work, and write them after it."""

import os
import sys
from pathlib import Path

from ..meshes.errors import ConfigError, printable
from ..meshes.files.own_file import replace_file

_FIX = "name a file in a folder that is there."


def check_output_files(*paths: str | None) -> None:
    """Check that files can be written; None and "" are options that were not given.

    Raises:
        ConfigError: a path is a folder, or its folder does not exist.
    """
    for path in filter(None, paths):
        try:
            is_folder, has_folder = Path(path).is_dir(), Path(path).resolve().parent.is_dir()
        except (OSError, ValueError) as error:
            raise _refuse(path, error) from None
        if is_folder or not has_folder:
            why = "it is a folder" if is_folder else "there is no such folder"
            raise ConfigError(f"{path} cannot be written: {why}.", fix=_FIX)


def write_output_file(path: str, content: bytes) -> None:
    """Write a file, replacing an older one, and report it on stderr.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        target = Path(path).resolve()  # The target of a link is replaced, not the link.
        # Pipes and devices, such as /dev/stdout, cannot be replaced, nor can a file in a read-only folder.
        if target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK)):
            target.write_bytes(content)
        else:
            replace_file(target, content, writers="many")
    except (OSError, ValueError) as error:
        raise _refuse(path, error) from None
    print(f"wrote {printable(path, limit=400)}", file=sys.stderr)


def _refuse(path: str, error: Exception) -> ConfigError:
    why = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"{path} cannot be written: {why[:1].lower()}{why[1:]}.", fix=_FIX)
