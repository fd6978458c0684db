"""Find the files that an option of a command names, by the rules of `data.paths`."""

from collections.abc import Sequence
from pathlib import Path

from ...configs.corpora.paths import find_files
from ...meshes import DataError


def find_named(paths: Sequence[str], *, option: str) -> list[Path]:
    """Return the files of paths and globs.

    Raises:
        DataError: there is none; it names the option.
    """
    try:
        return find_files(paths)
    except DataError as error:
        fix = error.fix and error.fix.replace("data.paths", option)
        raise DataError(error.problem.replace("data.paths", option), fix=fix) from None
