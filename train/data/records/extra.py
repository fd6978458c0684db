"""Import the packages of the extra `data` where a file needs one."""

from importlib import import_module
from pathlib import Path
from typing import Any

from ....meshes import DataError


def import_extra(name: str, file: Path) -> Any:
    """Return a module that reads a file.

    Raises:
        DataError: its package is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(
            f"{file}: reading it needs the package {package}.", fix="pip install 'trellax[data]'."
        ) from None
